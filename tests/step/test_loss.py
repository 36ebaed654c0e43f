"""What a loss of one's own sees of a pack, and what comes back, against torch's autograd and plain sums."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from loquetier_jax.batch.packs import pass_extras
from loquetier_jax.errors import ConfigError
from loquetier_jax.step.loss import loss_cotangent, loss_value
from loquetier_jax.step.loss_batch import LossBatch, loss_batch
from loquetier_jax.step.loss_function import takes_batch
from loquetier_jax.train.config import TrainConfig
from loquetier_jax.train.data import Sample
from loquetier_jax.train.packing import build_pack

ROWS, BETA = 256, 0.1
LENGTHS = (40, 32, 7, 33)
EXTRAS = (("margin", False), ("ref_logp", True))


def make_pack(rng, lengths=LENGTHS):
    """Samples that learn their second half, with reference log-probs per row and a margin each."""
    samples = []
    for n in lengths:
        tokens, targets = rng.integers(3, 99, (2, n)).astype(np.int32)
        weights = (np.arange(n) >= n // 2).astype(np.float32)
        extras = {"ref_logp": -rng.random(n).astype(np.float32), "margin": np.float32(rng.random())}
        samples.append(Sample(tokens, targets, weights, extras))
    return samples, build_pack(samples, range(len(samples)), ROWS)


def dpo(logp, weights, batch):
    gain = batch.sum_by_sample(weights * (logp - batch.extras["ref_logp"]))
    losses = -jax.nn.log_sigmoid(BETA * (gain[0::2] - gain[1::2]) - batch.extras["margin"][0::2])
    return jnp.where(batch.sample_mask[0::2], losses, 0.0).sum()


def torch_dpo(samples, logps):
    """The same over lists of samples, and its gradient with respect to each row."""
    rows = [torch.tensor(np.asarray(lp, np.float64), requires_grad=True) for lp in logps]
    gains = [
        (torch.tensor(s.weights) * (row - torch.tensor(s.extras["ref_logp"]))).sum()
        for s, row in zip(samples, rows, strict=True)
    ]
    total = sum(
        -torch.nn.functional.logsigmoid(BETA * (chosen - rejected) - float(sample.extras["margin"]))
        for chosen, rejected, sample in zip(gains[0::2], gains[1::2], samples[0::2], strict=True)
    )
    total.backward()
    return total.item(), [row.grad.numpy() for row in rows]


def stacked(packs):
    batches = [loss_batch(pack) for pack in packs]
    extras = pass_extras(EXTRAS, packs, len(packs), ROWS)
    rows = {name: np.stack([getattr(b, name) for b in batches]) for name in ("targets", "positions", "segment_ids")}
    return jax.tree.map(jnp.asarray, (np.stack([pack.weights for pack in packs]), LossBatch(**rows, extras=extras)))


def test_a_loss_over_pairs_equals_torch():
    """Two packs of a pass: each its own pairs. Log-probs of padding are rubbish, and get no gradient."""
    rng = np.random.default_rng(0)
    made = [make_pack(rng), make_pack(rng, (64, 20))]
    logp = np.where([p.segments >= 0 for _, p in made], -rng.random((2, ROWS)), np.nan).astype(np.float32)
    batches = stacked([pack for _, pack in made])
    losses, cotangent = jax.jit(partial(loss_cotangent, dpo))(logp, *batches)
    for g, (samples, pack) in enumerate(made):
        own = [pack.segments == i for i in range(len(samples))]
        want, gradients = torch_dpo(samples, [logp[g][rows] for rows in own])
        assert float(losses[g]) == pytest.approx(want, rel=1e-6)
        for rows, gradient in zip(own, gradients, strict=True):
            np.testing.assert_allclose(cotangent[g][rows], gradient, atol=1e-7)
        assert not np.asarray(cotangent[g])[pack.segments < 0].any()
        alone = jax.jit(partial(loss_value, dpo))(logp[g], pack.weights, loss_batch(pack))
        assert float(alone) == pytest.approx(want, rel=1e-6), "what an evaluation reports"


def test_sums_and_numbers_of_samples():
    rng = np.random.default_rng(1)
    samples, pack = make_pack(rng)
    batch, x = jax.tree.map(jnp.asarray, (loss_batch(pack), rng.random(ROWS).astype(np.float32)))
    places = ROWS // 32
    want = [x[pack.segments == i].sum() for i in range(places)]
    np.testing.assert_allclose(batch.sum_by_sample(x), want, rtol=1e-6)
    assert batch.sample_mask.tolist() == [True] * len(samples) + [False] * (places - len(samples))
    numbers = jnp.asarray(rng.random(places).astype(np.float32))
    np.testing.assert_array_equal(batch.to_rows(numbers), np.where(pack.segments >= 0, numbers[pack.segments], 0))
    np.testing.assert_array_equal(batch.extras["margin"][:4], [s.extras["margin"] for s in samples])
    one = pack.segments == 3
    np.testing.assert_array_equal(np.asarray(batch.extras["ref_logp"])[one], samples[3].extras["ref_logp"])
    np.testing.assert_array_equal(np.asarray(batch.positions)[one], np.arange(33))


def test_no_sum_scatters():
    """On a GPU a scatter adds in any order: neither a sum nor its gradient has one."""
    _, pack = make_pack(np.random.default_rng(2))
    text = str(jax.make_jaxpr(jax.grad(lambda lp: dpo(lp, pack.weights, loss_batch(pack))))(jnp.zeros(ROWS)))
    assert "scatter" not in text.replace("scatter_dimension", "")


def test_ordinary_jax_is_enough():
    """`at`, `cond` and numpy-free code: arguments are traced arrays, whatever they are called for."""

    def loss(logp, weights):
        first = weights.at[0].set(0.0)
        return jax.lax.cond(first.sum() > 0, lambda: -(first * logp).sum(), lambda: jnp.float32(0))

    _, pack = make_pack(np.random.default_rng(3))
    losses, cotangent = loss_cotangent(loss, jnp.full((1, ROWS), -1.0), *stacked([pack]))
    assert float(losses[0]) == pack.weights[1:].sum()
    np.testing.assert_array_equal(cotangent[0], -pack.weights)


@pytest.mark.parametrize("loss", [lambda logp, weights: logp, lambda logp, weights: 1], ids=["rows", "integer"])
def test_what_is_no_loss_is_named(loss):
    _, pack = make_pack(np.random.default_rng(4))
    with pytest.raises(ConfigError, match=r"loss: the function returned .*, expected a float scalar"):
        loss_value(loss, jnp.zeros(ROWS), jnp.asarray(pack.weights), loss_batch(pack))


def test_what_a_loss_raises_is_told_with_its_type():
    """It was "compiling failed: 'adv'"."""
    _, pack = make_pack(np.random.default_rng(4))

    def reads(logp, weights, batch):
        return batch.extras["adv"].sum()

    def fails(logp, weights):
        raise ValueError("first line\nsecond line")

    missing = "loss: KeyError: 'adv'; the samples have extras: margin, ref_logp"
    said = {reads: missing, fails: "loss: ValueError: first line"}
    for loss, message in said.items():
        with pytest.raises(ConfigError) as raised:
            jax.eval_shape(partial(loss_value, loss), jnp.zeros(ROWS), pack.weights, loss_batch(pack))
        assert str(raised.value) == message


@pytest.mark.parametrize(
    ("loss", "takes"),
    [
        (lambda logp, weights: 0, False),
        (lambda logp, weights, batch: 0, True),
        (lambda logp, weights, beta=0.1: 0, False),
        (lambda logp, weights, batch=None: 0, True),
        (lambda logp, weights, batch=None, beta=0.1: 0, True),
        (partial(dpo), True),
        (lambda *arrays: 0, False),
    ],
)
def test_a_loss_takes_two_arguments_or_three(loss, takes):
    assert takes_batch(loss) == takes
    for wrong in (lambda logp: 0, lambda a, b, c, d: 0, lambda logp, *, weights: 0):
        with pytest.raises(ConfigError, match=r"loss: got .*, expected a function of \(logp, weights\) or"):
            TrainConfig(loss=wrong)
