"""The backward of packs as two Pallas-Triton launches.

The first reads dY and computes partial sums of dS = dY B^T, which XLA adds up in a fixed order, and dB = S^T dY. The
second reads x and computes dA = dS^T x and dX = dS A. Both kinds of programs of a launch run concurrently, so that the
large operand is read from memory once. A gradient sum over a pack's rows is never split between programs.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.common.blocks import whole
from pallas_kernels.common.implementation import interpreted
from pallas_kernels.smlm.pack_kernels import dS_share, dX_tile, gradient
from pallas_kernels.smlm.pack_sides import Cut, Side
from pallas_kernels.smlm.pack_tuning import DyConfig, XConfig, default_dy_config, default_x_config
from pallas_kernels.smlm.plan import RANK_PAGE

F32 = jnp.float32
MAX_ELEMENTS = 2**31  # the kernels use 32-bit indices


# Jitted so that the layers of a model trace and lower the kernels once per shape.
@functools.partial(jax.jit, static_argnames=("out_features", "config", "interpret"))
def pack_dy_triton(
    B: Float[Array, "G MP R out"],
    S: Float[Array, "G L n MP R"],
    dy: Float[Array, "G L out"],
    out_features: tuple[int, ...],
    *,
    config: DyConfig | None = None,
    interpret: bool | None = None,
) -> tuple[Float[Array, "G L MP nR"], Float[Array, "G MP R out"]]:
    """`pack_dy_xla` as one kernel launch, followed by the sum of its partial sums of dS.

    Every sum has a fixed order, which depends only on the pack's shape; packs are independent.

    Args:
        B, S, dy, out_features: As for `pack_dy_xla`.
        config: Block sizes; by default chosen from the shapes.
        interpret: Run as plain XLA operations; by default only on CPU.

    Returns:
        dS in S's dtype, and dB in B's, which for float32 pages is never rounded.

    Raises:
        ValueError: an operand has 2^31 elements or more.
    """
    packs, rows, targets, pages, _ = S.shape
    check_elements(dy=dy)
    interpret = interpreted(interpret)
    config = config or default_dy_config(packs, rows, out_features, pages, S.dtype)
    flat = rows_of(S.dtype, B=B, dY=dy, S=S.reshape(packs, rows, -1))
    side = Side(packs, rows, out_features, pages * RANK_PAGE)
    outs = {
        "dB": jax.ShapeDtypeStruct(flat["B"].shape, F32),
        "shares": jax.ShapeDtypeStruct((side.blocks(config.dS.span), packs * rows, side.ranks), F32),
    }
    works = []
    for ranks in side.windows:
        dB, dS = Cut(side, config.dB, ranks), Cut(side, config.dS, ranks)
        works.append(Work(gradient, dB, dB.strips, ("dY", "S", "dB")))
        works.append(Work(dS_share, dS, dS.tiles, ("dY", "B", "shares")))
    params = plt.CompilerParams(num_warps=config.warps, num_stages=config.stages)
    found = launch("pack_backward_dy", works, flat, outs, params, interpret, turns=config.turns)
    dS = add_shares(found["shares"], side, config.dS.span).astype(S.dtype)
    return dS.reshape(packs, rows, pages, targets * RANK_PAGE), found["dB"].reshape(B.shape).astype(B.dtype)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def pack_x_triton(
    x: Float[Array, "G L in"],
    A: Float[Array, "G MP nR in"],
    dS: Float[Array, "G L MP nR"],
    dx: Float[Array, "G L in"] | None = None,
    *,
    config: XConfig | None = None,
    interpret: bool | None = None,
) -> tuple[Float[Array, "G L in"], Float[Array, "G MP nR in"]]:
    """`pack_x_xla` as one kernel launch; dX is written in place of dx and rounded once.

    Args:
        x, A, dS, dx: As for `pack_x_xla`.
        config, interpret: As for `pack_dy_triton`.

    Returns:
        dX in x's dtype, dA in A's.

    Raises:
        ValueError: an operand has 2^31 elements or more.
    """
    packs, rows, size = x.shape
    check_elements(x=x)
    interpret = interpreted(interpret)
    side = Side(packs, rows, (size,), A.shape[1] * A.shape[2])
    config = config or default_x_config(side.ranks, x.dtype)
    given = {} if dx is None else {"dx": dx}
    flat = rows_of(x.dtype, x=x, A=A, dS=dS.reshape(packs, rows, -1), **given)
    outs = {"dA": jax.ShapeDtypeStruct(flat["A"].shape, F32), "dX": jax.ShapeDtypeStruct(flat["x"].shape, x.dtype)}
    works = []
    for ranks in side.windows:
        dA = Cut(side, config.dA, ranks)
        works.append(Work(gradient, dA, dA.strips, ("x", "dS", "dA")))
    dX = Cut(side, config.dX, side.chunks)
    works.append(Work(dX_tile, dX, dX.tiles, ("dS", "A", *given, "dX")))
    params = plt.CompilerParams(num_warps=config.warps, num_stages=config.stages)
    found = launch("pack_backward_x", works, flat, outs, params, interpret, {"dX": "dx"} if given else None)
    return found["dX"].reshape(x.shape), found["dA"].reshape(A.shape).astype(A.dtype)


def check_elements(**arrays: Array) -> None:
    """Checks that the kernels can index the arrays with 32 bits.

    Raises:
        ValueError: they cannot.
    """
    for name, a in arrays.items():
        if a.size >= MAX_ELEMENTS:
            raise ValueError(f"{name}: got shape {a.shape}, expected fewer than {MAX_ELEMENTS} elements")


def rows_of(dtype: jnp.dtype, **arrays: Array) -> dict[str, Array]:
    """Operands in the kernels' layout: one dtype, with the rows of all packs concatenated."""
    return {name: a.astype(dtype).reshape(-1, a.shape[-1]) for name, a in arrays.items()}


@dataclass(frozen=True)
class Work:
    """One kind of work of a launch: kernel body, split, programs per pack, and operand names."""

    body: Callable[..., None]
    cut: Cut
    programs: int
    operands: tuple[str, ...]

    def run(self, pack: Array, index: Array, refs: dict[str, Any]) -> None:
        """One program's part of a pack, if the pack has work for it."""
        place = self.cut.side.place(pack, refs)
        operands = (refs[name] for name in self.operands)
        place.when(self.cut.ranks, functools.partial(self.body, self.cut, place, index, *operands))


def launch(
    name: str,
    works: list[Work],
    arrays: dict[str, Array],
    outs: dict[str, jax.ShapeDtypeStruct],
    params: plt.CompilerParams,
    interpret: bool,
    in_place: dict[str, str] | None = None,
    turns: int = 1,
) -> dict[str, Array]:
    """Runs all works in one grid: pack by pack (or run by run), and within it the kinds of work in turn.

    Args:
        name: Kernel name, shown in profiles.
        works: The kinds of work.
        arrays: Operands by name; unused ones are ignored.
        outs: Results by name.
        params: Triton's compiler parameters.
        interpret: Run as plain XLA operations.
        in_place: {result: operand whose buffer it reuses}.
        turns: Number of pieces that each kind of work is split into per pack; the kinds alternate between pieces, so
            that they read the same part of an operand while it is in the cache.
    """
    used = {operand for work in works for operand in (*work.operands, *work.cut.side.lists())}
    arrays = {key: a for key, a in arrays.items() if key in used}
    packs, shares = max(work.cut.side.packs for work in works), [pl.cdiv(work.programs, turns) for work in works]
    alias = {list(arrays).index(given): list(outs).index(out) for out, given in (in_place or {}).items()}

    def kernel(*refs: Any) -> None:
        named = dict(zip([*arrays, *outs], refs, strict=True))
        turn, first = (f(pl.program_id(0), jnp.int32(sum(shares))) for f in (lax.div, lax.rem))
        pack, turn = (f(turn, jnp.int32(turns)) for f in (lax.div, lax.rem))
        for work, share in zip(works, shares, strict=True):
            index = turn * share + first
            wanted = (first >= 0) & (first < share) & (index < work.programs)
            if work.cut.side.packs < packs:
                wanted &= pack < work.cut.side.packs
            pl.when(wanted)(functools.partial(work.run, pack, index, named))
            first -= share

    kernel.__name__ = name
    found = pl.pallas_call(
        kernel,
        grid=(packs * turns * sum(shares),),
        in_specs=[whole(a) for a in arrays.values()],
        out_specs=tuple(whole(out) for out in outs.values()),
        out_shape=tuple(outs.values()),
        input_output_aliases=alias,
        compiler_params=params,
        interpret=interpret,
        name=name,
    )(*arrays.values())
    return dict(zip(outs, found, strict=True))


def add_shares(h: Float[Array, "parts T RT"], side: Side, span: int) -> Float[Array, "T nRT"]:
    """dS from the partial sums of its column blocks: a tree sum per target, then ranks reordered page by page."""
    totals, at = [], 0
    for size in side.sizes:
        parts = list(h[at : at + pl.cdiv(size, span)])
        at += len(parts)
        while len(parts) > 1:
            odd = parts[len(parts) & ~1 :]
            parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + odd
        totals.append(parts[0].reshape(h.shape[1], -1, RANK_PAGE))
    return jnp.stack(totals, axis=2).reshape(h.shape[1], -1)
