"""TrainConfig refuses what it cannot honour, and its learning rates are those of transformers."""

import math

import numpy as np
import pytest

from loquetier_jax.errors import ConfigError
from loquetier_jax.train.config import SCHEDULES, TrainConfig, learning_rate


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", -1.0),
        ("learning_rate", math.nan),
        ("learning_rate", "1e-4"),
        ("learning_rate", 1e39),
        ("warmup_steps", 1e39),
        ("weight_decay", math.inf),
        ("optim", "adam"),
        ("lr_scheduler_type", "polynomial"),
        ("max_steps", 0),
        ("max_steps", 1.5),
        ("max_steps", 2**32),
        ("num_train_epochs", 0),
        ("num_train_epochs", 1e308),
        ("per_device_train_batch_size", 0),
        ("gradient_accumulation_steps", True),
        ("gradient_accumulation_steps", 2**32),
        ("pack_tokens", 100),
        ("max_length", 1),
        ("adam_beta2", 1.0),
        ("adam_epsilon", -1e-8),
        ("momentum", 1.0),
        ("seed", 2**32),
        ("loss", "dpo"),
        ("loss", np.zeros(3)),
        ("optim", np.zeros(3)),
        ("load_best_model_at_end", 1),
        ("output_dir", ""),
        ("save_steps", 5),
        ("shuffle", 1),
        ("early_stopping_patience", 2),
    ],
)
def test_bad_values_are_named(name, value):
    with pytest.raises(ConfigError, match=f"^{name}: got"):
        TrainConfig(**{name: value})


def test_values_that_do_not_go_together_are_named():
    """A job that never evaluates before its end could never stop early: it trained to its end instead."""
    with pytest.raises(ConfigError, match=r"^early_stopping_patience: got 2, expected 0 with eval_steps 0"):
        TrainConfig(early_stopping_patience=2)
    assert TrainConfig(early_stopping_patience=2, eval_steps=1).eval_steps == 1
    with pytest.raises(ConfigError, match=r"max_length: got 66, expected null or an integer in \[2, .* = 65\]"):
        TrainConfig(pack_tokens=64, max_length=66)


def test_unknown_keys_raise():
    with pytest.raises(TypeError, match="learning_rte"):
        TrainConfig(learning_rte=1e-3)
    with pytest.raises(ConfigError, match="learning_rte"):
        TrainConfig.from_dict({"learning_rte": 1e-3})


def test_dict_roundtrip():
    cfg = TrainConfig(
        learning_rate=3e-4, max_steps=7, output_dir="runs/a", save_steps=2, max_grad_norm=math.inf
    )
    assert TrainConfig.from_dict(cfg.to_dict()) == cfg

    def loss(logp, weights):
        return -(logp * weights).sum()

    cfg = TrainConfig(loss=loss)
    with pytest.raises(ConfigError, match="loss"):
        TrainConfig.from_dict(cfg.to_dict())
    assert TrainConfig.from_dict(cfg.to_dict(), loss=loss) == cfg


def test_steps():
    cfg = TrainConfig(per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=2.5)
    assert cfg.steps_per_epoch(17) == 3
    assert cfg.total_steps(17) == 8
    assert TrainConfig(max_steps=5).total_steps(17) == 5
    assert TrainConfig(num_train_epochs=2**32 - 1, per_device_train_batch_size=1).total_steps(17) == 17 * (2**32 - 1)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (10, 10), (0.25, 12), (5, 1), (100, 1000)])
def test_learning_rate_equals_transformers(kind, warmup, total):
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    base = 3e-4
    steps = int(warmup) if warmup >= 1 else math.ceil(total * warmup)
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=base)
    needs = {"num_warmup_steps": steps} if kind != "constant" else {}
    scheduler = get_scheduler(kind, sgd, **needs, num_training_steps=total)
    cfg = TrainConfig(learning_rate=base, lr_scheduler_type=kind, warmup_steps=warmup, max_steps=total)
    for step in range(total):
        assert learning_rate(cfg, step, total) == np.float32(scheduler.get_last_lr()[0])
        sgd.step()
        scheduler.step()
