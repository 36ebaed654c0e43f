"""Arguments of PEFT, TRL, transformers and vLLM: what they mean here, checked against the libraries' own classes."""

import dataclasses
import inspect

import numpy as np
import pytest

from loquetier_jax.adapters.lora import LoraConfig
from loquetier_jax.borrowed import absent, borrowing, only, spelled
from loquetier_jax.config_file import from_dict
from loquetier_jax.errors import ConfigError, RequestError
from loquetier_jax.sampling_params import SamplingParams
from loquetier_jax.train.config import TrainConfig


def defaults_of(cls):
    """The arguments of a dataclass and what it takes them for when nobody says anything."""
    found = {}
    for field in dataclasses.fields(cls):
        if field.init:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            found[field.name] = None if default is dataclasses.MISSING else default
    return found


def test_every_argument_of_peft_at_its_default_asks_for_nothing():
    peft = pytest.importorskip("peft")
    every = defaults_of(peft.LoraConfig)
    assert LoraConfig(**every) == LoraConfig()
    assert LoraConfig(r=16, task_type=peft.TaskType.CAUSAL_LM, peft_type=peft.PeftType.LORA) == LoraConfig(r=16)


def test_every_argument_of_transformers_at_its_default_is_taken_or_refused_in_a_sentence():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    differ = {  # our fields, with another idea of "not at all" or of where to write
        "save_steps": "save_steps: got 500, expected 0 without output_dir",
        "save_total_limit": "save_total_limit: got None, expected an integer",
        "save_strategy": "save_strategy: got 'steps', expected 'no' with save_steps=0",
    }
    plain = {"learning_rate", "logging_steps"}  # our own fields, with other defaults
    for name, value in defaults_of(transformers.TrainingArguments).items():
        if name == "load_best_model_at_end":
            continue  # a field of its own, which depends on others
        try:
            made = TrainConfig(**{name: value})
        except ConfigError as error:
            assert str(error).startswith(differ.pop(name)), name
        else:
            assert made == TrainConfig() or name in plain, name
    assert not differ


TAKEN = [
    (LoraConfig, {"task_type": "CAUSAL_LM", "bias": "none", "inference_mode": False, "modules_to_save": None}, {}),
    (LoraConfig, {"layers_pattern": "layers", "rank_pattern": None, "r": np.int64(4)}, {"r": 4}),
    (TrainConfig, {"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
    (TrainConfig, {"warmup_ratio": 0.0, "warmup_steps": 5}, {"warmup_steps": 5}),
    (TrainConfig, {"warmup_ratio": 0.1, "warmup_steps": 0}, {"warmup_steps": 0.1}),
    (SamplingParams, {"do_sample": False, "temperature": 0}, {"temperature": 0}),
    (SamplingParams, {"max_new_tokens": 5, "max_completion_tokens": 5}, {"max_tokens": 5}),
    (TrainConfig, {"optim": "adamw_torch"}, {}),
    (TrainConfig, {"optim": "paged_adamw_32bit", "bf16": False, "fp16": False}, {}),
    (TrainConfig, {"optim": "lion_32bit"}, {"optim": "lion"}),
    (TrainConfig, {"max_seq_length": 100, "completion_only_loss": None}, {"max_length": 100}),
    (TrainConfig, {"truncation_mode": "keep_end"}, {"truncation": "left"}),
    (TrainConfig, {"train_sampling_strategy": "sequential"}, {"shuffle": False}),
    (TrainConfig, {"eval_strategy": "steps", "eval_steps": 10, "per_device_eval_batch_size": 4}, {"eval_steps": 10}),
    (TrainConfig, {"eval_strategy": "no", "eval_steps": None, "save_strategy": "no", "report_to": "none"}, {}),
    (TrainConfig, {"report_to": [], "gradient_checkpointing": True, "dataloader_num_workers": 4, "packing": False}, {}),
    (TrainConfig, {"data_seed": 7, "seed": 7, "assistant_only_loss": True}, {"seed": 7}),
    (TrainConfig, {"learning_rate": np.float32(0.5), "max_steps": np.int64(3)}, {"learning_rate": 0.5, "max_steps": 3}),
    (SamplingParams, {"max_new_tokens": 5, "num_return_sequences": 2}, {"max_tokens": 5, "n": 2}),
    (SamplingParams, {"max_completion_tokens": 5, "detokenize": True, "best_of": 1}, {"max_tokens": 5}),
    (SamplingParams, {"bad_words": [], "structured_outputs": None, "stop_strings": ["a"]}, {"stop": ["a"]}),
    (SamplingParams, {"stop_token_ids": np.array([1, 2]), "seed": np.uint32(3)}, {"stop_token_ids": (1, 2), "seed": 3}),
    (SamplingParams, {"logit_bias": {np.int64(3): np.float32(0.5)}}, {"logit_bias": {3: 0.5}}),
]


@pytest.mark.parametrize(("cls", "theirs", "ours"), TAKEN, ids=lambda value: getattr(value, "__name__", None))
def test_what_means_the_same_is_taken(cls, theirs, ours):
    assert cls(**theirs) == cls(**ours)


REFUSED = [
    (LoraConfig, {"bias": "all"}, "bias: got 'all', expected 'none': only LoRA's A and B are trained"),
    (LoraConfig, {"task_type": "SEQ_CLS"}, "task_type: got 'SEQ_CLS', expected None or 'CAUSAL_LM'"),
    (LoraConfig, {"use_dora": True}, "use_dora: got True, expected none: only plain LoRA is trained"),
    (LoraConfig, {"modules_to_save": ["lm_head"]}, r"modules_to_save: got \['lm_head'\], expected none"),
    (LoraConfig, {"inference_mode": True}, "inference_mode: got True, expected False: .*Engine.load_adapter"),
    (LoraConfig, {"init_lora_weights": "pissa"}, "init_lora_weights: got 'pissa', expected"),
    (TrainConfig, {"warmup_ratio": 3}, "warmup_ratio: got 3, expected a share"),
    (TrainConfig, {"warmup_ratio": 0.1, "warmup_steps": 5}, "warmup_ratio: got 0.1 beside warmup_steps=5, expected"),
    (TrainConfig, {"optim": "adamw_bnb_8bit"}, "optim: got 'adamw_bnb_8bit', expected one of"),
    (TrainConfig, {"bf16": True, "fp16": True}, "bf16: got True, expected false beside fp16"),
    (TrainConfig, {"eval_strategy": "epoch"}, "eval_strategy: got 'epoch', expected 'no' with eval_steps=0"),
    (TrainConfig, {"eval_strategy": "no", "eval_steps": 3}, "eval_strategy: got 'no', expected 'steps' with"),
    (TrainConfig, {"packing": True}, "packing: got True, expected False: samples always share packs"),
    (TrainConfig, {"report_to": "wandb"}, "report_to: got 'wandb', expected .* metrics.jsonl"),
    (TrainConfig, {"label_smoothing_factor": 0.1}, "label_smoothing_factor: got 0.1, expected 0 or 0.0: loss takes"),
    (TrainConfig, {"assistant_only_loss": False}, "assistant_only_loss: got False, expected True: completion"),
    (TrainConfig, {"resume_from_checkpoint": "a"}, "resume_from_checkpoint: got 'a', expected .* Engine.resume_job"),
    (TrainConfig, {"deepspeed": {"stage": 2}}, "deepspeed: got .* expected none: a job trains on the one device"),
    (SamplingParams, {"structured_outputs": {"json": {}}}, "structured_outputs: got .* expected none: constrained"),
    (SamplingParams, {"do_sample": False}, "do_sample: got False, expected True: use temperature=0"),
    (SamplingParams, {"max_tokens": 5, "max_new_tokens": 6}, "max_new_tokens: got 6 beside max_tokens=5, expected"),
    (
        SamplingParams,
        {"max_new_tokens": 5, "max_completion_tokens": 7},
        "max_completion_tokens: got 7 beside max_new_tokens=5, expected one of the two",
    ),
    (TrainConfig, {"warmup_ratio": 0.1, "warmup_steps": False}, "warmup_ratio: got 0.1 beside warmup_steps=False"),
    (SamplingParams, {"do_sample": False, "temperature": 0.5}, "do_sample: got False, expected True: use temp"),
    (SamplingParams, {"best_of": 4}, "best_of: got 4, expected None or 1: use n"),
]


@pytest.mark.parametrize(("cls", "theirs", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", None))
def test_what_does_not_is_refused_in_a_sentence(cls, theirs, message):
    error = RequestError if cls is SamplingParams else ConfigError
    with pytest.raises(error, match=f"^{message}") as caught:
        cls(**theirs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cls", [LoraConfig, TrainConfig, SamplingParams])
def test_a_class_stays_what_it_is(cls):
    """Its fields, its signature, its copies; and what nobody has ever heard of."""
    made = cls()
    assert dataclasses.replace(made) == made and cls(**dataclasses.asdict(made)) == made
    assert set(inspect.signature(cls).parameters) == {f.name for f in dataclasses.fields(cls)}
    assert not cls.borrowed & {f.name for f in dataclasses.fields(cls)}
    with pytest.raises(TypeError, match="unheard_of"):
        cls(unheard_of=1)


def test_config_files_take_them_too():
    assert from_dict(LoraConfig, {"bias": "none", "r": 4}) == LoraConfig(r=4)
    assert TrainConfig.from_dict({"warmup_ratio": 0.5}) == TrainConfig(warmup_steps=0.5)
    with pytest.raises(ConfigError, match="use_dora: got True"):
        from_dict(LoraConfig, {"use_dora": True})


def test_rules():
    @borrowing({"b": spelled("a", {"one": 1}, rest="one"), "c": only(2, why="so it is"), "d": absent("use a")})
    @dataclasses.dataclass(kw_only=True)
    class Owner:
        a: int = 0

    assert Owner(b="one", c=2, d=[]) == Owner(a=1) == Owner(a=1, b="one")
    assert Owner.in_own_words({"b": "one", "e": 3}) == {"a": 1, "e": 3}
    for given, message in (
        ({"b": "two"}, "b: got 'two', expected one"),
        ({"b": ["one"]}, r"b: got \['one'\], expected one"),
        ({"c": 2.0}, "c: got 2.0, expected 2: so it is"),
        ({"c": np.arange(2)}, "c: got array"),
        ({"d": 0}, "d: got 0, expected none: use a"),
        ({"a": 2, "b": "one"}, "b: got 'one' beside a=2, expected one of the two"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}"):
            Owner(**given)
