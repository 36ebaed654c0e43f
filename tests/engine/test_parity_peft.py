"""Adapters of real PEFT in one batch, and adapters trained on either side carried to the other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loquetier_jax import Engine, LoraConfig, TrainConfig
from tests.engine.engines import random_data, random_prompt
from tests.engine.parity import LIMIT, Recording, run, tokens_of, torch_logits, worst
from tests.models.checkpoints import hf_model

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.also_gpu

RSLORA = {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]}
PATTERNS = {
    "r": 4,
    "lora_alpha": 12,
    "target_modules": "all-linear",
    "rank_pattern": {"layers.1.mlp.up_proj": 20, "q_proj": 2},
    "alpha_pattern": {"o_proj": 3, "layers.0.mlp.gate_proj": 10},
}


@pytest.fixture
def engine(family_engine: Callable[[str], Engine]) -> Engine:
    return family_engine("llama")


def peft_model(engine: Engine, config: dict[str, Any], seed: int) -> Any:
    """The engine's base in torch with a PEFT adapter whose B is not zero."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(
        hf_model(engine.name, dtype=torch.float32), peft.LoraConfig(task_type="CAUSAL_LM", **config)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def assert_rows_shared_steps(recorded: Recording, names: list[str]) -> None:
    """Some step prefilled at least two of the requests, and some step decoded all of them."""
    prefilled, decoded = (
        [{i for k, i in step if k == kind} for step in recorded.together] for kind in ("prefill", "decode")
    )
    assert any(len(ids) >= 2 for ids in prefilled) and set(names) in decoded


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma", marks=pytest.mark.slow)])
def test_two_peft_adapters_and_the_base_share_a_batch(
    family_engine: Callable[[str], Engine], family: str, tmp_path: Path
) -> None:
    engine = family_engine(family)
    models: dict[str | None, Any] = {None: hf_model(engine.name, dtype=torch.float32)}
    for seed, (name, config) in enumerate({"rslora": RSLORA, "patterns": PATTERNS}.items()):
        models[name] = peft_model(engine, config, seed)
        models[name].save_pretrained(tmp_path / name)
        engine.load_adapter(name, tmp_path / name)
    assert engine.adapters.get("rslora").shape.num_pages == 1
    assert engine.adapters.get("patterns").shape.num_pages == 2
    rng = np.random.default_rng(2)
    adapters = ["rslora", None, "patterns", "rslora"]
    prompts = [random_prompt(rng, n) for n in (9, 14, 50, 40)]
    outputs, recorded = run(engine, prompts, adapters)
    assert_rows_shared_steps(recorded, [o.request_id for o in outputs])
    for name, output in zip(adapters, outputs, strict=True):
        expected = torch_logits(models[name], tokens_of(output))
        errors = worst(output, recorded, expected)
        assert max(errors.values()) <= LIMIT, (name, errors)
        if name is not None:
            assert np.abs(expected - torch_logits(models[None], tokens_of(output))).max() > 0.1


def assert_same_logits(engine: Engine, adapter: str, model: Any) -> None:
    rng = np.random.default_rng(3)
    outputs, recorded = run(engine, [random_prompt(rng, n) for n in (40, 10)], [adapter, adapter])
    for output in outputs:
        errors = worst(output, recorded, torch_logits(model, tokens_of(output)))
        assert max(errors.values()) <= LIMIT, errors


@pytest.mark.slow  # compiles training; what is exported is compared with PEFT in tests/adapters
@pytest.mark.parametrize("config", [RSLORA, PATTERNS], ids=["rslora", "patterns"])
def test_trained_here_serves_in_peft(engine: Engine, tmp_path: Path, config: dict[str, Any]) -> None:
    train = TrainConfig(max_steps=4, learning_rate=2e-2, lr_scheduler_type="constant", pack_tokens=64)
    job = engine.finetune("job", random_data(4), lora=LoraConfig(**config), train=train).wait()
    job.save(tmp_path / "by-job")
    engine.save_adapter("job", tmp_path / "by-engine")
    base = hf_model(engine.name, dtype=torch.float32)
    tokens = random_prompt(np.random.default_rng(5), 30)
    before = torch_logits(base, tokens)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "by-job").eval()
    assert np.abs(torch_logits(model, tokens) - before).max() > 0.1, "training has changed something"
    assert_same_logits(engine, "job", model)
    again = peft.PeftModel.from_pretrained(hf_model(engine.name, dtype=torch.float32), tmp_path / "by-engine")
    assert np.array_equal(torch_logits(again.eval(), tokens), torch_logits(model, tokens))
    engine.export_merged("job", tmp_path / "merged")
    assert_same_logits(engine, "job", hf_model(tmp_path / "merged", dtype=torch.float32))


def test_trained_in_peft_serves_here(engine: Engine, tmp_path: Path) -> None:
    model = peft.get_peft_model(
        hf_model(engine.name, dtype=torch.float32), peft.LoraConfig(task_type="CAUSAL_LM", **PATTERNS)
    ).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    rng = np.random.default_rng(6)
    for _ in range(4):
        ids = torch.tensor([random_prompt(rng, 30)])
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path / "adapter")
    engine.load_adapter("peft", tmp_path / "adapter")
    assert_same_logits(engine, "peft", model)
