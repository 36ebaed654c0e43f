"""The optimizer step of one job: reads its gradient pages, updates its f32 masters and its adapter pages."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from loquetier_jax.adapters.lora import LoraShape, LoraWeights
from loquetier_jax.adapters.pages import AdapterPages, gradients_of, pages_of, put_pages, take_pages
from loquetier_jax.config import require
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.train.config import OPTIMIZERS, TrainConfig, learning_rate

OptState = Any
Hyper = dict[str, Any]
OptimizerStep = Callable[..., tuple[LoraWeights, OptState, AdapterPages, AdapterPages, dict[str, Array]]]


def hyperparams(cfg: TrainConfig, step: int, total_steps: int) -> dict[str, float]:
    """The hyperparameters of one optimizer step, by the names that `make_optimizer(cfg.optim)` uses.

    Args:
        cfg: The job's config.
        step: Optimizer step, from 0.
        total_steps: Optimizer steps of the whole job (`PackStream.total_steps`).

    Returns:
        {"learning_rate", "weight_decay"} and the optimizer's own, in float32 precision except for the last bit.
    """
    numbers = {"learning_rate": learning_rate(cfg, step, total_steps), "weight_decay": cfg.weight_decay}
    if cfg.optim in ("adamw", "lion"):
        numbers |= {"b1": cfg.adam_beta1, "b2": cfg.adam_beta2}
    if cfg.optim == "adamw":
        numbers |= {"eps": cfg.adam_epsilon}
    if cfg.optim == "sgd":
        numbers |= {"momentum": cfg.momentum}
    return numbers


def make_optimizer(kind: str) -> optax.GradientTransformationExtraArgs:
    """An optax transformation with all hyperparameters in its state, so that one compile serves all jobs of a kind.

    adamw and sgd are torch's, lion is its paper's with decoupled decay, adafactor has neither relative step nor
    parameter scale. The elementwise ones operate on one flat vector, because a job has hundreds of small arrays.

    Args:
        kind: One of OPTIMIZERS.

    Raises:
        ConfigError: an unknown kind.
    """
    require(kind in OPTIMIZERS, "optim", kind, f"one of {OPTIMIZERS}")
    factory, names = _FACTORIES[kind]
    zeros = {name: np.zeros((), np.float32) for name in names}
    inject = optax.inject_hyperparams(factory, hyperparam_dtype=jnp.float32)
    return inject(**zeros)


def init_state(weights: LoraWeights, kind: str) -> tuple[LoraWeights, OptState]:
    """Master weights (f32 copies on the device) and the optimizer's initial state.

    Args:
        weights: Exact-rank adapter, numpy or jax; copied.
        kind: One of OPTIMIZERS.
    """
    master = jax.tree.map(lambda w: jnp.array(w, jnp.float32, copy=True), weights)
    with _loose_promotion():
        return master, _init(kind)(master)


@cache
def _init(kind: str) -> Callable[[LoraWeights], OptState]:
    """The jitted initial state; jobs of the same shape and kind share its compile."""
    return jax.jit(make_optimizer(kind).init)


@cache
def build_optimizer_step(spec: DecoderSpec, shape: LoraShape, kind: str) -> OptimizerStep:
    """The jitted optimizer step for all jobs with this base, adapter shape and kind.

    The returned function takes, in order:
        master: f32 LoraWeights; donated.
        opt_state: From `init_state` or the previous call; donated.
        grads: Gradient pool, f32 pages [TP, ...]; donated.
        pages: Adapter pages [P, ...], compute dtype; donated.
        train_page_ids: [k] the job's pages in the gradient pool, k = shape.num_pages.
        page_ids: [k] the job's adapter pages.
        denom: f32, what the summed gradients are divided by (see TrainConfig.loss_per).
        max_grad_norm: f32; 0 or inf never clips.
        hyper: `hyperparams(cfg, step, total_steps)`.

    It returns (master, opt_state, grads, pages, metrics): the job's gradient pages are zeroed, and its adapter pages
    contain the cast of the new master. metrics is {"grad_norm": f32 before clipping, "weight_norm": f32 of the new
    weights as they would be served, "finite": whether both are}; if not finite, weights and optimizer state are
    returned unchanged. Page ids are traced, so that all pages share one compile.
    """
    return jax.jit(partial(_optimizer_step, spec, shape, make_optimizer(kind)), donate_argnums=(0, 1, 2, 3))


def _optimizer_step(
    spec: DecoderSpec,
    shape: LoraShape,
    optimizer: optax.GradientTransformationExtraArgs,
    master: LoraWeights,
    opt_state: OptState,
    grads: AdapterPages,
    pages: AdapterPages,
    train_page_ids: Int[Array, " k"],
    page_ids: Int[Array, " k"],
    denom: Float[Array, ""],
    max_grad_norm: Float[Array, ""],
    hyper: Hyper,
) -> tuple[LoraWeights, OptState, AdapterPages, AdapterPages, dict[str, Array]]:
    own = take_pages(grads, train_page_ids)
    denom = jnp.asarray(denom, jnp.float32)
    gradient = jax.tree.map(lambda g: g / denom, gradients_of(own, shape, spec))
    norm = optax.tree.norm(gradient)
    gradient = clip(gradient, norm, jnp.asarray(max_grad_norm, jnp.float32))
    hyper = {name: jnp.asarray(value, jnp.float32) for name, value in hyper.items()}
    with _loose_promotion():
        given = opt_state._replace(hyperparams=hyper)
        updates, new_state = optimizer.update(gradient, given, master)
        new_master = optax.apply_updates(master, updates)
    dtype = jax.tree.leaves(pages)[0].dtype
    weight_norm = served_norm(pages_of(new_master, shape, spec, jnp.float32), dtype)
    finite = jnp.isfinite(norm) & jnp.isfinite(weight_norm)
    new_master, new_state = jax.tree.map(
        partial(jnp.where, finite), (new_master, new_state), (master, opt_state)
    )
    pages = put_pages(pages, page_ids, pages_of(new_master, shape, spec, dtype))
    grads = put_pages(grads, train_page_ids, jax.tree.map(jnp.zeros_like, own))
    metrics = {"grad_norm": norm, "weight_norm": weight_norm, "finite": finite}
    return new_master, new_state, grads, pages, metrics


def served_norm(pages: AdapterPages, dtype: Any) -> Float[Array, ""]:
    """f32 norm of f32 pages rounded to `dtype`; infinite if the cast or a square overflows, as in a forward."""
    kind = jnp.finfo(dtype)
    # A cast there and back would be removed by XLA.
    return optax.tree.norm(jax.tree.map(lambda a: jax.lax.reduce_precision(a, kind.nexp, kind.nmant), pages))


def clip(gradient: LoraWeights, norm: Float[Array, ""], max_norm: Float[Array, ""]) -> LoraWeights:
    """torch's clip_grad_norm_: multiplies by min(1, max_norm / (norm + 1e-6)); a max_norm of 0 or inf never clips."""
    factor = jnp.minimum(jnp.float32(1), max_norm / (norm + jnp.float32(1e-6)))
    factor = jnp.where((max_norm > 0) & jnp.isfinite(max_norm), factor, jnp.float32(1))
    return jax.tree.map(lambda g: g * factor, gradient)


@contextmanager
def _loose_promotion() -> Iterator[None]:
    """optax mixes weak and strong types; the rest of the package obeys the strict promotion rules set by its tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def _adamw(
    learning_rate: Any, weight_decay: Any, b1: Any, b2: Any, eps: Any
) -> optax.GradientTransformationExtraArgs:
    return optax.flatten(optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay))


def _sgd(learning_rate: Any, weight_decay: Any, momentum: Any) -> optax.GradientTransformationExtraArgs:
    # As in torch, the decay is added to the gradient before the momentum.
    chain = optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum=momentum))
    return optax.flatten(chain)


def _lion(learning_rate: Any, weight_decay: Any, b1: Any, b2: Any) -> optax.GradientTransformationExtraArgs:
    return optax.flatten(optax.lion(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay))


def _adafactor(learning_rate: Any, weight_decay: Any) -> optax.GradientTransformationExtraArgs:
    # optax applies this decay after the learning rate; multiplied by it, it equals the others' decoupled decay.
    return optax.adafactor(
        learning_rate,
        min_dim_size_to_factor=1,  # optax's 128 would never factor a LoRA matrix
        multiply_by_parameter_scale=False,
        weight_decay_rate=learning_rate * weight_decay,
    )


_FACTORIES: dict[str, tuple[Callable[..., optax.GradientTransformationExtraArgs], tuple[str, ...]]] = {
    "adamw": (_adamw, ("learning_rate", "weight_decay", "b1", "b2", "eps")),
    "sgd": (_sgd, ("learning_rate", "weight_decay", "momentum")),
    "lion": (_lion, ("learning_rate", "weight_decay", "b1", "b2")),
    "adafactor": (_adafactor, ("learning_rate", "weight_decay")),
}
