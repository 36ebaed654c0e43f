"""Patterns against `re` itself, and the ones that would keep `re` busy for ever."""

import random
import re

import pytest

from loquetier_jax.adapters.lora import LoraConfig, resolve_shape
from loquetier_jax.adapters.pattern import Steps, fullmatch, parse
from loquetier_jax.adapters.targets import TARGETS, module_name, pattern_matches
from loquetier_jax.errors import AdapterError, ConfigError
from tests.adapters.cases import SPEC

NAMES = [module_name(i, target) for i in (0, 1, 10, 23) for target in TARGETS] + ["lm_head", "model.embed_tokens"]

# As PEFT's documentation, ms-swift, LLaMA-Factory and Unsloth write them.
REAL = [
    r".*\.(q_proj|v_proj)",
    r"model\.layers\.(0|1|2)\..*",
    r".*\.(attn|mlp|self_attn)\.(q|v)_proj$",
    r"^(language_model|model)(?=\.).*\.(o_proj|gate_proj)$",
    r"^(?!.*visual)(?!.*\.1\.).*(?:q_proj|down_proj).*",
    r"model\.layers\.(?:1[0-9]|2[0-3])\.self_attn\.[qk]_proj",
    r"(?:.*?(?:language|text|model).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:up_proj|v_proj)))",
    r".*(?<!k)_proj",
    r"[^.]+\.layers\.\w+\.mlp\..{4,7}_proj",
]
ATOMS = ["a", "b", ".", r"\.", "[ab]", "[^a-c]", r"\w", r"\W", r"[\d_]", r"\S", "^", "$", r"\b", r"\A", r"\Z", "(?=a)"]
ATOMS += ["(?!b)", "(?<=a)", "(?<!b)", "(?=.*b)", "(?!)", "x"]
QUANTIFIERS = ["*", "+", "?", "{2}", "{1,2}", "*?", "+?", "{2,}", "{,2}"]
EVIL = ["(.*)*!", "(.+)+!", "(a|.|..|...)*!", ".*.*.*.*.*.*.*.*.*.*.*.*!", "(?:(?:(?:.{1,99}){1,99}){1,99}){1,99}!"]


def random_pattern(rng: random.Random, depth: int) -> str:
    kind = rng.random() if depth else 0
    if kind < 0.4:
        return rng.choice(ATOMS)
    if kind < 0.6:
        return random_pattern(rng, depth - 1) + random_pattern(rng, depth - 1)
    if kind < 0.75:
        return f"(?:{random_pattern(rng, depth - 1)}|{random_pattern(rng, depth - 1)})"
    return f"({random_pattern(rng, depth - 1)}){rng.choice(QUANTIFIERS)}"


@pytest.mark.parametrize("pattern", REAL)
def test_real_patterns_match_as_re_does(pattern: str) -> None:
    expected = [re.fullmatch(pattern, name) is not None for name in NAMES]
    assert [fullmatch(pattern, name, Steps(2000)) for name in NAMES] == expected
    assert any(expected) and not all(expected)


def test_random_patterns_match_as_re_does() -> None:
    rng = random.Random(0)
    outcomes = []
    for _ in range(1500):
        pattern = random_pattern(rng, 3)
        text = "".join(rng.choice("ab.x0_") for _ in range(rng.randrange(1, 7)))
        outcomes.append(re.fullmatch(pattern, text) is not None)
        assert fullmatch(pattern, text, Steps(10**5)) == outcomes[-1], (pattern, text)
    assert 100 < sum(outcomes) < 1400


@pytest.mark.parametrize(
    "key",
    ["q_proj", "self_attn.q_proj", "self.attn.q.proj", "proj", "model", r"layers\.1\..*", ".*", "q_proj|v_proj", "x"],
)
def test_keys_of_patterns_match_as_peft_matches_them(key: str) -> None:
    for name in NAMES:
        expected = re.match(rf"(.*\.)?({key})$", name) is not None  # peft.utils.other.get_pattern_key
        assert pattern_matches(key, name, Steps(2000)) == expected, name


@pytest.mark.parametrize("pattern", EVIL)
def test_what_re_never_ends_with_ends_here(pattern: str) -> None:
    assert not any(fullmatch(pattern, name, Steps(20_000)) for name in NAMES)


def test_work_is_limited_for_all_names_together() -> None:
    deep = "(?=(?:(?=(?:(?=(?:(?=(?:(?=.*).)*).)*).)*).)*)x" * 9
    steps = Steps(50_000)
    with pytest.raises(TimeoutError, match="more than 50,000 steps"):
        for name in NAMES * 100:
            fullmatch(deep, name, steps)
    with pytest.raises(AdapterError, match="use fewer or simpler ones"):
        resolve_shape(LoraConfig(target_modules=[f"x{i}" for i in range(200_000)]), SPEC, strict=False)


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(", "missing"), ("a**", "multiple repeat"), ("a{99999999999999999999}", "too large"), ("(" * 5000, "nested"),
        (r"(a)\1", "reference"), ("(?>a)", "atomic"), ("a*+", "possessive"), ("(?i)a", "flags"), ("(?i:a)", "flag"),
        ("x" * 20_000, "20000 characters"),
    ],
)  # fmt: skip
def test_what_cannot_be_matched_is_refused_by_name(pattern: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse(pattern)
    with pytest.raises(ConfigError, match=rf"rank_pattern: .*{why}"):
        LoraConfig(rank_pattern={pattern: 4})


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
def test_numbers_that_no_float_holds_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        LoraConfig(**{field: 10**400, "use_rslora": True})
