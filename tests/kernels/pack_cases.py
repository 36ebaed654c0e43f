"""Cases of the backward of packs, and its plain formula."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.smlm import RANK_PAGE
from tests.kernels.quick import quick_jit

F32 = jnp.float32
Gradients = tuple[jax.Array, jax.Array, jax.Array]


@dataclass(frozen=True)
class Case:
    packs: int
    rows: int
    size: int
    outs: tuple[int, ...]
    pages: int

    def arrays(self, dtype: jnp.dtype = F32) -> list[jax.Array]:
        """x, A, B, dy; A and B by pack and page."""
        rng, n = np.random.default_rng(0), len(self.outs)
        shapes = [
            (self.packs, self.rows, self.size),
            (self.packs, self.pages, n * RANK_PAGE, self.size),
            (self.packs, self.pages, RANK_PAGE, sum(self.outs)),
            (self.packs, self.rows, sum(self.outs)),
        ]
        x, A, B, dy = (rng.standard_normal(shape, np.float32) for shape in shapes)
        return [jnp.asarray(a, dtype) for a in (x, A * self.size**-0.5, B * 0.25, dy)]


def pool_of(pages: jax.Array) -> jax.Array:
    """A pool that holds pages [G, MP, ...] in reverse order; page 0 means none: it is NaN, never to be read."""
    flat = pages.reshape(-1, *pages.shape[2:])[::-1]
    return jnp.concatenate([jnp.full_like(flat[:1], jnp.nan), flat])


def ids_of(packs: int, pages: int) -> jax.Array:
    """Where that pool has them."""
    return 1 + jnp.arange(packs * pages, dtype=jnp.int32)[::-1].reshape(packs, pages)


CASES = {
    "one pack": Case(1, 64, 128, (64,), 1),
    "pages": Case(2, 96, 64, (64,), 3),
    "targets": Case(2, 64, 96, (48, 16, 16), 1),
    "all odd": Case(3, 40, 80, (112, 80), 3),
    "rank 128": Case(1, 32, 64, (32, 32), 8),
    "one row packs": Case(3, 1, 48, (16, 32), 2),
}


def shrink(x: jax.Array, A: jax.Array) -> jax.Array:
    """S = x A^T as `smlm` keeps it, [G, L, n, MP, R]: summed in float32, rounded to x's dtype."""
    S = jnp.einsum("gli,gmri->glmr", x, A.astype(x.dtype), preferred_element_type=F32).astype(x.dtype)
    return S.reshape(*S.shape[:3], -1, RANK_PAGE).swapaxes(2, 3)


def plain(x: jax.Array, A: jax.Array, B: jax.Array, outs: tuple[int, ...]) -> jax.Array:
    """The delta per target, in full: no stacking, no fused columns."""
    deltas, start = [], 0
    for i, size in enumerate(outs):
        A_i, B_i = A[:, :, i * RANK_PAGE : (i + 1) * RANK_PAGE], B[..., start : start + size]
        W = jnp.einsum("gmri,gmro->gio", A_i, B_i, precision="highest")
        deltas.append(jnp.einsum("gli,gio->glo", x, W, precision="highest"))
        start += size
    return jnp.concatenate(deltas, axis=-1)


@functools.partial(quick_jit, static_argnums=0)
def reference(case: Case, x: jax.Array, A: jax.Array, B: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
    """dX, dA, dB of the plain formula, in float32."""
    x, A, B, dy = (a.astype(F32) for a in (x, A, B, dy))
    return jax.vjp(lambda *a: plain(*a, case.outs), x, A, B)[1](dy)


def flat(packs: jax.Array) -> jax.Array:
    return packs.reshape(-1, *packs.shape[2:])
