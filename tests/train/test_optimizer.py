"""optimizer_step against torch and plain optax; clipping, non-finite gradients, other pages, one compile."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loquetier_jax.adapters.lora import LoraShape
from loquetier_jax.adapters.pages import AdapterPages, pages_of
from loquetier_jax.errors import ConfigError
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.train.checkpoint import CheckpointStore, read_arrays, read_state
from loquetier_jax.train.config import OPTIMIZERS, TrainConfig
from loquetier_jax.train.optimizer import build_optimizer_step, hyperparams, init_state, make_optimizer, served_norm

SPEC = DecoderSpec.from_hf(
    {
        "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 24, "vocab_size": 32, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": False,
    }
)  # fmt: skip
SHAPE = LoraShape(((0, "q_proj", 4, 2.0), (0, "v_proj", 20, 0.5), (1, "down_proj", 8, 1.0)))
NUMBERS = {
    "adamw": {"weight_decay": 0.01, "learning_rate": 1e-3},
    "sgd": {"weight_decay": 0.1, "momentum": 0.9, "learning_rate": 1e-2},
    "lion": {"weight_decay": 0.1, "adam_beta2": 0.99, "learning_rate": 1e-3},
    "adafactor": {"weight_decay": 0.1, "learning_rate": 1e-3},
}
QUICK = [pytest.param(kind, marks=pytest.mark.slow) if kind in ("lion", "sgd") else kind for kind in OPTIMIZERS]
ZEROS = jax.tree.map(np.array, AdapterPages.empty(SPEC, 4, jnp.float32))
SEVENS = jax.tree.map(lambda x: np.full((6, *x.shape[1:]), 7, jnp.bfloat16), ZEROS)
TRAIN_IDS, PAGE_IDS = np.array([2, 1], np.int32), np.array([3, 5], np.int32)


class Run:
    """One job's device state, its pages among those of others."""

    def __init__(self, kind, max_grad_norm=0.0, seed=0, **config):
        self.random = np.random.default_rng(seed)
        self.weights = jax.tree.map(
            self._array, SHAPE.array_shapes(SPEC), is_leaf=lambda x: isinstance(x, tuple)
        )
        self.step = build_optimizer_step(SPEC, SHAPE, kind)
        self.cfg = TrainConfig(optim=kind, lr_scheduler_type="constant", **(NUMBERS[kind] | config))
        self.max_grad_norm = max_grad_norm
        self.master, self.opt_state = init_state(self.weights, kind)
        self.pages = jax.tree.map(jnp.array, SEVENS)
        self.grads = jax.tree.map(jnp.array, ZEROS)
        self.count = 0

    def _array(self, shape):
        return self.random.standard_normal(shape, np.float32)

    def page_gradients(self, scale=1.0):
        return jax.tree.map(lambda x: scale * self._array((2, *x.shape[1:])), self.grads)

    def update(self, page_gradients, denom=10.0, train_ids=TRAIN_IDS, page_ids=PAGE_IDS):
        pool = jax.tree.map(np.array, self.grads)
        for rows, new in zip(jax.tree.leaves(pool), jax.tree.leaves(page_gradients), strict=True):
            rows[train_ids] = new
        self.grads = jax.tree.map(jnp.array, pool)
        hyper = hyperparams(self.cfg, self.count, 100)
        limits = np.float32(denom), np.float32(self.max_grad_norm)
        self.master, self.opt_state, self.grads, self.pages, metrics = self.step(
            self.master, self.opt_state, self.grads, self.pages, train_ids, page_ids, *limits, hyper
        )
        self.count += 1
        return metrics


@jax.jit
def exact(page_gradients, denom=10.0):
    """The gradient of the exact-rank weights: the transpose of the (linear) map to pages."""
    sizes = SHAPE.array_shapes(SPEC)
    shapes = {k: {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in ab.items()} for k, ab in sizes.items()}
    (gradient,) = jax.linear_transpose(lambda w: pages_of(w, SHAPE, SPEC, jnp.float32), shapes)(
        page_gradients
    )
    return jax.tree.map(lambda g: g / denom, gradient)


def norm_of(tree):
    return np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in jax.tree.leaves(tree)))


def assert_trees_close(actual, expected, rtol):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.abs(np.asarray(a, np.float64) - np.asarray(b)).max() <= rtol * np.abs(np.asarray(b)).max()


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_equals_torch(kind):
    torch = pytest.importorskip("torch")
    run = Run(kind, max_grad_norm=1.5)
    theirs = [torch.tensor(w.astype(np.float64), requires_grad=True) for w in jax.tree.leaves(run.weights)]
    if kind == "adamw":
        optimizer = torch.optim.AdamW(theirs, lr=1e-3, weight_decay=0.01)
    else:
        optimizer = torch.optim.SGD(theirs, lr=1e-2, weight_decay=0.1, momentum=0.9)
    for i in range(100):
        page_gradients = run.page_gradients(scale=0.1 if i % 2 else 10.0)  # clipped every other step
        for parameter, g in zip(theirs, jax.tree.leaves(exact(page_gradients)), strict=True):
            parameter.grad = torch.tensor(np.asarray(g, np.float64))
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.5)
        optimizer.step()
        metrics = run.update(page_gradients)
        assert metrics["finite"]
        assert float(metrics["grad_norm"]) == pytest.approx(norm.item(), rel=1e-5)
    # against double precision; torch's own float32 is off by 3e-6 after 100 steps
    assert_trees_close(run.master, [t.detach().numpy() for t in theirs], 2e-6)


@pytest.mark.parametrize("kind", QUICK)
def test_equals_plain_optax(kind):
    run = Run(kind)
    rate, decay = NUMBERS[kind]["learning_rate"], NUMBERS[kind]["weight_decay"]
    plain = {
        "adamw": lambda: optax.adamw(rate, weight_decay=decay),
        "sgd": lambda: optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum=0.9)),
        "lion": lambda: optax.lion(rate, b1=0.9, b2=0.99, weight_decay=decay),
        "adafactor": lambda: optax.adafactor(
            rate, min_dim_size_to_factor=1, multiply_by_parameter_scale=False, weight_decay_rate=rate * decay
        ),
    }[kind]()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params = jax.tree.map(jnp.asarray, run.weights)
        state = jax.jit(plain.init)(params)
        for _ in range(5):
            page_gradients = run.page_gradients()
            run.update(page_gradients)
            updates, state = jax.jit(plain.update)(exact(page_gradients), state, params)
            params = jax.jit(optax.apply_updates)(params, updates)
    assert_trees_close(run.master, params, 1e-6)


def test_pages_and_pool_after_a_step():
    run = Run("adamw")
    others = np.array([0, 3])
    run.grads = jax.tree.map(lambda x: np.full_like(x, 5.0), run.grads)
    run.update(run.page_gradients())
    expected = pages_of(jax.tree.map(np.asarray, run.master), SHAPE, SPEC, jnp.bfloat16)
    host = jax.tree.map(np.asarray, (run.grads, run.pages))
    for pool, page, want in zip(*(jax.tree.leaves(t) for t in (*host, expected)), strict=True):
        assert not np.any(pool[TRAIN_IDS]) and np.all(pool[others] == 5.0)
        assert np.array_equal(page[PAGE_IDS], want)
        assert np.all(page[np.array([0, 1, 2, 4])] == 7)


def test_other_pages_and_numbers_share_the_compile_and_the_bits():
    one, two = Run("adamw"), Run("adamw")
    two.cfg = replace(two.cfg, max_steps=7)
    for _ in range(3):
        gradients = one.page_gradients()
        one.update(gradients)
        compiled = one.step._cache_size()
        two.update(gradients, train_ids=np.array([3, 0], np.int32), page_ids=np.array([1, 2], np.int32))
    assert one.step is two.step and one.step._cache_size() == compiled
    two.cfg = replace(two.cfg, learning_rate=0.5, adam_beta1=0.5, weight_decay=0.0)
    assert all(map(np.array_equal, *(jax.tree.leaves((r.master, r.opt_state)) for r in (one, two))))
    two.update(one.page_gradients())
    assert two.step._cache_size() == compiled


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", QUICK)
def test_a_gradient_that_is_not_finite_changes_nothing(kind, bad):
    run = Run(kind, max_grad_norm=1.0)
    run.update(run.page_gradients())
    before = jax.tree.map(np.array, (run.master, run.opt_state.inner_state))
    gradients = run.page_gradients()
    gradients.layers[0]["qkv_proj"].A[0, 1, 2] = bad
    assert not run.update(gradients)["finite"]
    after = (run.master, run.opt_state.inner_state)
    assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(after)))
    assert not any(np.any(np.asarray(pool)[TRAIN_IDS]) for pool in jax.tree.leaves(run.grads))
    assert run.update(run.page_gradients())["finite"]


@pytest.mark.parametrize("kind", QUICK)
def test_weights_that_are_not_finite_are_not_taken(kind):
    run = Run(kind)
    run.update(run.page_gradients())
    before = jax.tree.map(np.array, (run.master, run.opt_state.inner_state))
    run.cfg = replace(run.cfg, learning_rate=1e38)
    metrics = run.update(run.page_gradients(scale=100.0))
    assert not metrics["finite"] and np.isfinite(metrics["grad_norm"]) and not np.isfinite(metrics["weight_norm"])
    after = (run.master, run.opt_state.inner_state)
    assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(after)))


@pytest.mark.parametrize(
    ("value", "served"),
    [(3e4, (True, True, True)), (1e5, (True, True, False)), (1e25, (False,) * 3), (np.nan, (False,) * 3)],
)
def test_the_norm_of_weights_is_that_of_their_cast(value, served):
    pages = [{"qkv_proj": (np.full(3, value, np.float32), np.ones(3, np.float32))}]
    norms = [jax.jit(served_norm, static_argnums=1)(pages, d) for d in (jnp.float32, jnp.bfloat16, jnp.float16)]
    assert tuple(bool(np.isfinite(norm)) for norm in norms) == served
    assert not served[0] or norms[0] == pytest.approx(np.sqrt(3 * value**2 + 3))


@pytest.mark.parametrize(("limit", "clips"), [(0.0, False), (np.inf, False), (1e9, False), (0.25, True)])
def test_clipping(limit, clips):
    run = Run("sgd", max_grad_norm=limit, weight_decay=0.0, momentum=0.0, learning_rate=1.0)
    gradients = run.page_gradients()
    norm = norm_of(exact(gradients))
    run.update(gradients)
    moved = norm_of(jax.tree.map(lambda old, new: old - np.asarray(new), run.weights, run.master))
    assert moved == pytest.approx(0.25 if clips else norm, rel=1e-5)


def test_unknown_kind():
    with pytest.raises(ConfigError, match="optim"):
        make_optimizer("adam")


def test_a_checkpoint_goes_on_with_the_same_bits(tmp_path):
    run = Run("adamw", max_grad_norm=1.0)
    gradients = [run.page_gradients() for _ in range(3)]
    for g in gradients[:2]:
        run.update(g)
    path = CheckpointStore(tmp_path).save(
        {"master": run.master, "opt_state": run.opt_state}, {"count": run.count}
    )
    compiled = run.step._cache_size()
    again = Run("adamw", max_grad_norm=1.0, seed=1)
    saved = jax.device_put(read_arrays(path, {"master": again.master, "opt_state": again.opt_state}))
    again.master, again.opt_state = saved["master"], saved["opt_state"]
    again.count = read_state(path)["count"]
    for one in (run, again):
        one.update(gradients[2])
    assert all(map(np.array_equal, *(jax.tree.leaves((r.master, r.opt_state)) for r in (run, again))))
    assert run.step._cache_size() == compiled
