"""A job's loss curve against PEFT and torch's AdamW: same base, same initial adapter, same data, 100 steps."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loquetier_jax import Engine, TrainConfig
from loquetier_jax.adapters.peft import read_peft
from loquetier_jax.batch.packs import Pack
from loquetier_jax.train.data import Dataset
from loquetier_jax.train.packing import Cursor, PackStream
from tests.engine.engines import random_data
from tests.models.checkpoints import hf_model
from tests.tolerances import assert_close

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.also_gpu

STEPS = 100
TRAIN = TrainConfig(
    max_steps=STEPS,
    learning_rate=5e-3,
    lr_scheduler_type="cosine",
    warmup_steps=10,
    per_device_train_batch_size=3,
    gradient_accumulation_steps=2,
    max_grad_norm=1.25,
    weight_decay=0.01,
    pack_tokens=64,
    seed=7,
)
LORA = {
    "r": 8,
    "lora_alpha": 16,
    "target_modules": "all-linear",
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"down_proj": 4},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Torch's threads would only wait for one another over such small matrices."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sequences(packs: list[Pack]) -> tuple[Any, Any, Any]:
    """The samples of some packs as one right-padded batch: tokens, targets, weights [n, T]."""
    samples = [(p, p.segments == s) for p in packs for s in range(p.segments.max() + 1)]
    batch = np.zeros((3, len(samples), max(rows.sum() for _, rows in samples)))
    for i, (pack, rows) in enumerate(samples):
        batch[:, i, : rows.sum()] = pack.tokens[rows], pack.targets[rows], pack.weights[rows]
    tokens, targets, weights = torch.tensor(batch)
    return tokens.long(), targets.long(), weights.float()


def loss_sum(model: Any, packs: list[Pack]) -> Any:
    """-sum(weights * log p(target)); causal attention never looks at the padding on the right."""
    tokens, targets, weights = sequences(packs)
    logp = torch.log_softmax(model(tokens).logits, -1).gather(-1, targets[..., None])[..., 0]
    return -(weights * logp).sum()


def torch_curve(model: Any, data: Dataset) -> tuple[list[float], list[float], list[float]]:
    """Loss, gradient norm before clipping and learning rate of each step."""
    from transformers import get_scheduler

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=TRAIN.learning_rate, weight_decay=TRAIN.weight_decay)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=10, num_training_steps=STEPS)
    stream, losses, norms, rates = PackStream(data, TRAIN), [], [], []
    for step in range(STEPS):
        packs = [stream.pack(Cursor(step, i)) for i in range(stream.packs_in_step(step))]
        assert len(packs) > 1, "accumulation over several packs is meant to be shown"
        loss = loss_sum(model, packs) / sum(p.num_targets for p in packs)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, TRAIN.max_grad_norm).item())
        losses.append(loss.item())
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses, norms, rates


@pytest.mark.slow  # compiles training; gradients and optimizers have references of their own in tests/step, tests/train
def test_a_hundred_steps_equal_peft_and_torch(family_engine: Callable[[str], Engine], tmp_path: Path) -> None:
    engine = family_engine("llama")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        hf_model(engine.name, dtype=torch.float32), peft.LoraConfig(task_type="CAUSAL_LM", **LORA)
    )
    model.save_pretrained(tmp_path / "start")
    engine.load_adapter("start", tmp_path / "start")
    data = random_data(8, count=21, low=8, high=30)
    job = engine.finetune("curve", data, train=TRAIN, init_from="start").wait()
    losses, norms, rates = torch_curve(model, data)
    ours = {key: np.array([line[key] for line in job.metrics]) for key in ("loss", "grad_norm", "learning_rate")}
    assert [line["step"] for line in job.metrics] == list(range(1, STEPS + 1))
    assert losses[-1] < 0.6 * losses[0], "training is meant to learn"
    assert 10 < sum(n > TRAIN.max_grad_norm for n in norms) < 90, "clipping is meant to act on some steps"
    assert_close(ours["loss"], losses, "loss_curve_f32")
    np.testing.assert_allclose(ours["learning_rate"], rates, rtol=1e-6)
    np.testing.assert_allclose(ours["grad_norm"], norms, rtol=1e-3)
    engine.save_adapter("curve", tmp_path / "end")
    model.save_pretrained(tmp_path / "torch")
    end, theirs = (read_peft(tmp_path / name, engine.spec).weights for name in ("end", "torch"))
    for key, pair in theirs.items():
        for name, value in pair.items():
            assert np.abs(end[key][name] - value).max() <= 1e-3 * np.abs(value).max(), (key, name)
