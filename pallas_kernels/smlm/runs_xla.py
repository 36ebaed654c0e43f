"""The backward of runs in plain XLA, batched over the plan's tiles of TILE rows.

The products are batched GEMMs over tiles, one page at a time; a run's gradients are the sum over its tiles in order. On
the XLA CPU path their float32 bits depend only on the run.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.smlm.plan import TILE, SmlmPlan
from pallas_kernels.smlm.run_list import Runs

F32 = jnp.float32


@partial(jax.jit, static_argnames="out_features")
def runs_dy_xla(
    B: Float[Array, "P R out"],
    S: Float[Array, "T n MP R"],
    dy: Float[Array, "T out"],
    plan: SmlmPlan,
    runs: Runs,
    out_features: tuple[int, ...],
) -> tuple[list[Float[Array, "NT M nR"]], Float32[Array, "G MP R out"]]:
    """dS = dY B^T by page and tile, rounded to S's dtype, and dB = S^T dY by runs."""
    dy_tiles, S_tiles = (_tiles(plan, a) for a in (dy.astype(S.dtype), S))
    dS, dB = [], []
    for m in range(S.shape[2]):
        used, B_m = _page(plan, B, m)
        shares, sums, start = [], [], 0
        for i, size in enumerate(out_features):
            dy_i, B_i = (a[:, :, start : start + size] for a in (dy_tiles, B_m))
            shares.append(jnp.einsum("tlo,tro->tlr", dy_i, B_i, preferred_element_type=F32))
            sums.append(jnp.einsum("tlr,tlo->tro", S_tiles[:, :, i, m], dy_i, preferred_element_type=F32))
            start += size
        dS.append(_where(used, jnp.concatenate(shares, axis=-1).astype(S.dtype)))
        dB.append(_where(used, jnp.concatenate(sums, axis=-1)))
    return dS, _sum_tiles(plan, runs, dB)


@jax.jit
def runs_x_xla(
    x: Float[Array, "T in"],
    A: Float[Array, "P nR in"],
    dS: list[Float[Array, "NT M nR"]],
    dx: Float[Array, "T in"] | None,
    plan: SmlmPlan,
    runs: Runs,
) -> tuple[Float[Array, "T in"], Float32[Array, "G MP nR in"]]:
    """dX = dx + dS A, rounded once, and dA = dS^T x by runs."""
    x_tiles, dX, dA = _tiles(plan, x), None, []
    for m, dS_m in enumerate(dS):
        used, A_m = _page(plan, A, m)
        part = jnp.einsum("tlr,tri->tli", dS_m, A_m, preferred_element_type=F32)
        # Skip absent pages rather than adding zeros, so that the bits do not depend on MP.
        dX = part if dX is None else jnp.where(used[:, None, None], dX + part, dX)
        dA.append(_where(used, jnp.einsum("tlr,tli->tri", dS_m, x_tiles, preferred_element_type=F32)))
    slot = jnp.asarray(plan.row_slot)
    flat, has = dX.reshape(-1, dX.shape[-1])[jnp.maximum(slot, 0)], (slot >= 0)[:, None]
    if dx is None:
        dX = jnp.where(has, flat, 0.0).astype(x.dtype)
    else:
        dX = jnp.where(has, (dx.astype(F32) + flat).astype(dx.dtype), dx)
    return dX, _sum_tiles(plan, runs, dA)


def _tiles(plan: SmlmPlan, a: Float[Array, "T ..."]) -> Float[Array, "NT M ..."]:
    """Rows gathered by tile, 0 beyond a tile's end."""
    row, length = jnp.asarray(plan.tile_row), jnp.asarray(plan.tile_len)
    offset = jnp.arange(TILE, dtype=jnp.int32)[None, :]
    rows = jnp.minimum(row[:, None] + offset, a.shape[0] - 1)
    inside = (offset < length[:, None]).reshape(*rows.shape, *(1,) * (a.ndim - 1))
    return jnp.where(inside, a[rows], jnp.zeros((), a.dtype))


def _page(plan: SmlmPlan, pool: Float[Array, "P r c"], m: int) -> tuple[Bool[Array, " NT"], Float[Array, "NT r c"]]:
    """The mask of tiles with an m-th page, and that page."""
    pages = jnp.asarray(plan.tile_pages)[:, m]
    return pages > 0, pool[pages]


def _where(used: Bool[Array, " NT"], a: Float[Array, "NT r c"]) -> Float[Array, "NT r c"]:
    return jnp.where(used[:, None, None], a, jnp.zeros((), a.dtype))


def _sum_tiles(plan: SmlmPlan, runs: Runs, parts: list[Float32[Array, "NT r c"]]) -> Float32[Array, "G MP r c"]:
    """Sums over each run's tiles, page by page, in tile order."""
    number: Int32[Array, " NT"] = runs.of_tile

    def step(tile: Array, totals: list[Any]) -> list[Any]:
        return [total.at[number[tile]].add(part[tile]) for total, part in zip(totals, parts, strict=True)]

    totals = [jnp.zeros((runs.pages.shape[0], *part.shape[1:]), F32) for part in parts]
    return jnp.stack(lax.fori_loop(0, jnp.asarray(plan.used)[0], step, totals), axis=1)
