"""The public op: validation and choice of implementation."""

import functools
from typing import Any

import jax
from jaxtyping import Array, Int32

from pallas_kernels.common.checks import check_shapes
from pallas_kernels.common.implementation import choose
from pallas_kernels.page_scatter.triton import scatter_add_triton
from pallas_kernels.page_scatter.xla import scatter_add_xla


def scatter_add_pages(pools: Any, ids: Int32[Array, "G MP"], deltas: Any, *, implementation: str | None = None) -> Any:
    """pool[ids[g, m]] += delta[g, m], in group order, so that the packs of one job are always added in the same order.

    Args:
        pools: Tree of page pools [P, r, c], float32; updated in place if XLA may reuse the buffers (donate them).
        ids: Pages of each group, 0 for none; other pages must not repeat within a group.
        deltas: The same tree of gradients [G, MP, r, c], float32.
        implementation: "xla", "triton", or None for triton on a GPU and xla elsewhere.

    Returns:
        The tree of pools. Page 0 is a trash page that must not be read: the kernel skips it, XLA adds to it.

    Raises:
        ValueError: shapes disagree, or the implementation is unknown; the message gives both values.
    """
    for number, (pool, delta) in enumerate(zip(jax.tree.leaves(pools), jax.tree.leaves(deltas), strict=True)):
        check_shapes(**{f"deltas[{number}]": (delta, (*ids.shape, *pool.shape[1:]))})
    if choose(implementation) == "triton":
        return scatter_add_triton(pools, ids, deltas)
    return jax.tree.map(functools.partial(scatter_add_xla, ids), pools, deltas)
