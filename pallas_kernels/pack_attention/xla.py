"""Attention of packs in plain XLA: float32, pack by pack; a row keeps its bits (see common/attend_rows.py)."""

import functools

import jax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.common.attend_rows import attend_rows

PACK_ALIGN = 64  # pack lengths are multiples of this: keeps gradient bits free of position on the XLA CPU path
SCORE_BYTES = 8 << 20  # one float32 score matrix; a few such live at the same time


def pack_attention_xla(
    q: Float[Array, "G L N H"],
    k: Float[Array, "G L K H"],
    v: Float[Array, "G L K H"],
    positions: Int[Array, "G L"],
    segments: Int[Array, "G L"],
    *,
    scale: float,
    window: int | None,
) -> Float[Array, "G L N H"]:
    """Same contract as `pack_attention`."""
    attend = functools.partial(_attend_pack, scale=scale, window=window)
    return lax.map(lambda pack: attend(*pack), (q, k, v, positions, segments)).astype(q.dtype)


def pack_mask(
    positions: Int[Array, "*G Q"],
    segments: Int[Array, "*G Q"],
    key_positions: Int[Array, "*G L"],
    key_segments: Int[Array, "*G L"],
    window: int | None,
) -> Bool[Array, "*G Q L"]:
    """[..., i, j]: whether query row i sees key row j."""
    distance = positions[..., :, None] - key_positions[..., None, :]
    seen = (segments[..., :, None] == key_segments[..., None, :]) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def _attend_pack(
    q: Float[Array, "L N H"],
    k: Float[Array, "L K H"],
    v: Float[Array, "L K H"],
    positions: Int[Array, " L"],
    segments: Int[Array, " L"],
    *,
    scale: float,
    window: int | None,
) -> Float[Array, "L N H"]:
    """One pack, float32. Nothing but its inputs is kept for the transpose."""
    length, heads, _ = q.shape
    rows = rows_at_once(length, heads)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend(k: Array, v: Array, part: tuple[Array, Array, Array]) -> Array:
        queries, position, segment = part
        mask = pack_mask(position, segment, positions, segments, window)
        return attend_rows(queries[None], k[None], v[None], mask[None], scale=scale)[0]

    def split(x: Array) -> Array:
        return x.reshape(length // rows, rows, *x.shape[1:])

    parts = (split(q), split(positions), split(segments))
    return lax.map(functools.partial(attend, k, v), parts).reshape(q.shape)


def rows_at_once(length: int, heads: int) -> int:
    """The most queries, a multiple of PACK_ALIGN that divides the pack, whose scores fit SCORE_BYTES; at least one."""
    blocks = length // PACK_ALIGN
    fits = max(1, SCORE_BYTES // (4 * heads * length * PACK_ALIGN))
    return PACK_ALIGN * max(n for n in range(1, blocks + 1) if blocks % n == 0 and n <= fits)
