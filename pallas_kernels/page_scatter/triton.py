"""The op as one Pallas-Triton launch over all page pools of a layer, in place."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Int32

from pallas_kernels.common.blocks import whole
from pallas_kernels.common.implementation import interpreted


@functools.partial(jax.jit, static_argnames=("block", "warps", "interpret"))
def scatter_add_triton(
    pools: Any,
    ids: Int32[Array, "G MP"],
    deltas: Any,
    *,
    block: int = 1024,
    warps: int = 4,
    interpret: bool | None = None,
) -> Any:
    """`scatter_add_pages` in one launch, bit-identical to XLA except for page 0, which is skipped.

    Args:
        pools, ids, deltas: As for `scatter_add_pages`.
        block: Elements of a page handled by one program.
        warps: Triton's num_warps.
        interpret: Run as plain XLA operations; by default only on CPU.

    Returns:
        The tree of pools.
    """
    interpret = interpreted(interpret)
    leaves, tree = jax.tree.flatten(pools)
    slots, count = ids.size, len(leaves)
    flat = [a.reshape(a.shape[0], -1) for a in leaves]
    added = [a.astype(jnp.float32).reshape(slots, -1) for a in jax.tree.leaves(deltas)]
    blocks = [pl.cdiv(a.shape[1], block) for a in flat]

    def kernel(ids_ref: Any, *refs: Any) -> None:
        slot, index = pl.program_id(0), pl.program_id(1)
        page = ids_ref[slot]
        earlier = lax.fori_loop(0, slot, lambda n, found: found | (ids_ref[n] == page), page == 0)
        # The first slot of a page adds up all slots of that page; no other program touches it.
        for n, (size, programs) in enumerate(zip([a.shape[1] for a in flat], blocks, strict=True)):
            add = functools.partial(_add, slots, ids_ref, slot, page, index * block, block, size)
            pl.when(~earlier & (index >= 0) & (index < programs))(
                functools.partial(add, refs[n], refs[count + n], refs[2 * count + n])
            )
            index -= programs

    found = pl.pallas_call(
        kernel,
        grid=(slots, sum(blocks)),
        in_specs=[whole(a) for a in (ids.reshape(slots), *added, *flat)],
        out_specs=[whole(a) for a in flat],
        out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in flat],
        input_output_aliases={1 + count + n: n for n in range(count)},
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="scatter_add_pages",
    )(ids.reshape(slots), *added, *flat)
    return jax.tree.unflatten(tree, [a.reshape(b.shape) for a, b in zip(found, leaves, strict=True)])


def _add(
    slots: int,
    ids_ref: Any,
    slot: Array,
    page: Array,
    start: Array,
    block: int,
    size: int,
    delta_ref: Any,
    pool_ref: Any,
    out_ref: Any,
) -> None:
    """out[page, block] = pool + the deltas of all slots of the page, from `slot` on, in order."""
    at = start + jnp.arange(block, dtype=jnp.int32)
    inside = None if size % block == 0 else at < size

    def add(number: Array, total: Array) -> Array:
        same = jnp.broadcast_to(ids_ref[number] == page, (block,))
        mask = same if inside is None else same & inside
        return jnp.where(same, total + plt.load(delta_ref.at[number, at], mask=mask, other=0.0), total)

    first = plt.load(delta_ref.at[slot, at], mask=inside, other=None if inside is None else 0.0)
    total = plt.load(pool_ref.at[page, at], mask=inside, other=None if inside is None else 0.0) + first
    plt.store(out_ref.at[page, at], lax.fori_loop(slot + 1, slots, add, total), mask=inside)
