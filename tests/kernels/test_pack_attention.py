"""Attention inside packs: against plain jnp, against paged attention bit for bit, and nothing crosses packs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import AttentionPlan, pack_attention, paged_attention
from pallas_kernels.pack_attention import xla as module
from tests.tolerances import assert_close

attend = jax.jit(pack_attention, static_argnames=("scale", "window", "implementation"))
paged = jax.jit(
    partial(paged_attention, implementation="xla"), static_argnames=("block_rows", "scale", "window")
)
Pack = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def make_packs(layouts: list[list[int]], length: int, heads: int, kv_heads: int, dim: int, seed: int = 0) -> Pack:
    """(q, k, v, positions, segments) of packs with samples of these lengths, the rest padding."""
    rng = np.random.default_rng(seed)
    q, k, v = (
        rng.normal(size=(len(layouts), length, n, dim)).astype(np.float32) for n in (heads, kv_heads, kv_heads)
    )
    positions = np.zeros((len(layouts), length), np.int32)
    segments = np.full((len(layouts), length), -1, np.int32)
    for pack, samples in enumerate(layouts):
        at = 0
        for sample, size in enumerate(samples):
            positions[pack, at : at + size] = np.arange(size)
            segments[pack, at : at + size] = sample
            at += size
    return q, k, v, positions, segments


def plain(q: jax.Array, k: jax.Array, v: jax.Array, positions: np.ndarray, segments: np.ndarray, window: int | None):
    """Independent of the implementation: repeats kv heads, one softmax over the whole pack."""
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, 2), jnp.repeat(v, group, 2)
    seen = (segments[:, :, None] == segments[:, None, :]) & (positions[:, :, None] >= positions[:, None, :])
    if window is not None:
        seen &= positions[:, :, None] - positions[:, None, :] < window
    scores = jnp.einsum("gqnh,gknh->gnqk", q, k) * q.shape[3] ** -0.5
    return jnp.einsum("gnqk,gknh->gqnh", jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf)), v)


@pytest.mark.also_gpu
@pytest.mark.parametrize("window", [None, 11])
def test_value_and_gradients_are_plain_attentions(window: int | None) -> None:
    q, k, v, positions, segments = map(jnp.asarray, make_packs([[70, 30, 28], [13, 90]], 128, 4, 2, 16))
    cotangent = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
    run = partial(pack_attention, positions=positions, segments=segments, scale=0.25, window=window)
    out, transpose = jax.vjp(jax.jit(run), q, k, v)
    expected, expected_transpose = jax.vjp(
        lambda q, k, v: plain(q, k, v, positions, segments, window), *map(jnp.asarray, (q, k, v))
    )
    assert_close(out, expected, "f32")
    for got, want in zip(transpose(cotangent), expected_transpose(cotangent), strict=True):
        assert_close(got, want, "f32")


def cached(k: np.ndarray, v: np.ndarray, page_size: int, columns: int) -> tuple[np.ndarray, ...]:
    """One sample's keys and values on shuffled pages; everything else is NaN. -> k_pages, v_pages, tables."""
    ids = 1 + np.random.default_rng(len(k)).permutation(2 * columns)[:columns]
    pages = np.full((2, 2 * columns + 1, page_size, *k.shape[1:]), np.nan, np.float32)
    for t in range(len(k)):
        pages[:, ids[t // page_size], t % page_size] = k[t], v[t]
    return pages[0], pages[1], np.stack([np.zeros_like(ids), ids]).astype(np.int32)


def serve(
    q: np.ndarray, caches: tuple[np.ndarray, ...], window: int | None, starts: list[int], block_rows: int
) -> np.ndarray:
    """The sample's rows through paged attention, blocks beginning at `starts`, then one padding block."""
    k_pages, v_pages, tables = caches
    ends = [*starts[1:], len(q)]
    blocks = [
        (first, min(block_rows, end - first))
        for start, end in zip(starts, ends, strict=True)
        for first in range(start, end, block_rows)
    ]
    rows = np.zeros(((len(blocks) + 1) * block_rows, *q.shape[1:]), np.float32)
    for i, (first, count) in enumerate(blocks):
        rows[i * block_rows : i * block_rows + count] = q[first : first + count]
    pos, length = (np.array([*column, 0], np.int32) for column in zip(*blocks, strict=True))
    plan = AttentionPlan((length > 0).astype(np.int32), pos, length, tables)
    out = np.asarray(
        paged(rows, k_pages, v_pages, plan, block_rows=block_rows, scale=q.shape[-1] ** -0.5, window=window)
    )
    return np.concatenate([out[i * block_rows : i * block_rows + count] for i, (_, count) in enumerate(blocks)])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("implementation", "dtype"), [("cudnn", jnp.bfloat16), ("xla", jnp.bfloat16), ("xla", jnp.float32)]
)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (14, 2, 64), (8, 1, 256)])
@pytest.mark.parametrize("window", [None, 300])
def test_real_sizes_value_and_gradients(
    implementation: str, dtype: jnp.dtype, heads: int, kv_heads: int, dim: int, window: int | None
) -> None:
    *rows, positions, segments = make_packs([[700, 256, 20], [1024]], 1024, heads, kv_heads, dim)
    real = segments >= 0  # what padding sees is nobody's business
    cotangent = np.roll(rows[0], 1) * real[..., None, None]
    q, k, v, cotangent = (jnp.asarray(a, dtype) for a in (*rows, cotangent))
    options = {"positions": positions, "segments": segments, "scale": dim**-0.5, "window": window}
    run = jax.jit(partial(pack_attention, implementation=implementation, **options))
    exact = jax.jit(lambda q, k, v: plain(q, k, v, positions, segments, window))
    results = []
    for f, as_dtype in ((run, dtype), (exact, jnp.float32)):
        out, transpose = jax.vjp(f, *(a.astype(as_dtype) for a in (q, k, v)))
        results.append((out[real], *transpose(cotangent.astype(as_dtype))))
    for got, want in zip(*results, strict=True):
        assert got.dtype == dtype
        scale = float(jnp.abs(want).max())
        tolerance = "f32" if dtype == jnp.float32 else "bf16_grad"
        assert_close(got.astype(jnp.float32) / scale, want / scale, tolerance)


SERVING = (  # heads, kv heads, head size, window, pack length, page size, columns of the table
    (4, 4, 16, None, 64, 16, 4),
    (4, 1, 32, 19, 64, 16, 7),
    (8, 2, 64, None, 128, 32, 9),
    (4, 2, 32, 40, 128, 16, 40),
    (3, 3, 40, None, 128, 16, 8),
    (4, 2, 96, None, 128, 64, 3),
)
SOME = [*SERVING[:2], *(pytest.param(*shape, marks=pytest.mark.slow) for shape in SERVING[2:])]


@pytest.mark.bits
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window", "length", "page_size", "columns"), SOME)
def test_serving_equals_training_bit_for_bit(
    heads: int, kv_heads: int, dim: int, window: int | None, length: int, page_size: int, columns: int
) -> None:
    second = length - 29  # starts at row 21: on no boundary of anything
    q, k, v, positions, segments = make_packs([[21, second]], length, heads, kv_heads, dim)
    trained = np.asarray(attend(q, k, v, positions, segments, scale=dim**-0.5, window=window))[0, 21 : 21 + second]
    q, k, v = (x[0, 21 : 21 + second] for x in (q, k, v))
    caches = cached(k, v, page_size, columns)
    for starts, block_rows in (([0], 16), ([0, 7, 16], 16), ([0], 1)):
        served = serve(q, caches, window, starts, block_rows)
        np.testing.assert_array_equal(served, trained, err_msg=f"chunks at {starts}, blocks of {block_rows}")
    alone = serve(q[:1], cached(k[:1], v[:1], page_size, columns), window, [0], 1)
    np.testing.assert_array_equal(alone, trained[:1])


def vjp_of(packs: Pack, cotangent: np.ndarray) -> list[np.ndarray]:
    q, k, v, positions, segments = packs
    out, transpose = jax.vjp(lambda q, k, v: attend(q, k, v, positions, segments, scale=0.25), q, k, v)
    return [np.asarray(x) for x in (out, *transpose(cotangent))]


def test_a_pack_does_not_depend_on_its_neighbours() -> None:
    packs = make_packs([[64], [40, 24], [10]], 64, 4, 2, 16)
    cotangent = np.random.default_rng(1).normal(size=packs[0].shape).astype(np.float32)
    together = vjp_of(packs, cotangent)
    alone = vjp_of(tuple(x[1:2] for x in packs), cotangent[1:2])
    for got, want in zip(together, alone, strict=True):
        np.testing.assert_array_equal(got[1:2], want)
    poisoned = tuple(x.copy() for x in packs)
    for x in poisoned[:3]:
        x[0] = np.nan
        x[2] = np.inf
    for got, want in zip(vjp_of(poisoned, cotangent), alone, strict=True):
        np.testing.assert_array_equal(got[1:2], want)
        assert np.isnan(got[0]).all()


def test_queries_in_parts_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, positions, segments = map(jnp.asarray, make_packs([[100, 28], [128]], 128, 4, 2, 16))
    run = partial(pack_attention, q, k, v, positions, segments, scale=0.25)
    whole = jax.jit(run)()
    monkeypatch.setattr(module, "SCORE_BYTES", 1)
    assert module.rows_at_once(128, 4) == 64
    np.testing.assert_array_equal(jax.jit(lambda: run())(), whole)


def test_memory_does_not_grow_with_packs_or_length_squared() -> None:
    def temporary(packs: int, length: int) -> int:
        def gradient(q, k, v, positions, segments):
            out = pack_attention(q, k, v, positions, segments, scale=0.1)
            return out.sum()

        rows = [jax.ShapeDtypeStruct((packs, length, 8, 32), jnp.float32)] * 3
        marks = [jax.ShapeDtypeStruct((packs, length), jnp.int32)] * 2
        compiled = jax.jit(jax.grad(gradient, argnums=(0, 1, 2))).lower(*rows, *marks).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Scores of 4 packs of 1024 rows are 134 MB.
    assert temporary(4, 1024) < 60e6


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"implementation": "flash"}, ValueError, "implementation: got 'flash'"),
        ({"implementation": "cudnn"}, NotImplementedError, "got 'cudnn' with float32"),
        ({"window": 0}, ValueError, "window: got 0"),
        ({"q": jnp.zeros((1, 40, 4, 16))}, ValueError, r"q: got shape \(1, 40, 4, 16\).*multiple of 64"),
        ({"k": jnp.zeros((1, 64, 3, 16))}, ValueError, "k: got shape .* N a multiple of K"),
        ({"v": jnp.zeros((1, 64, 1, 16))}, ValueError, "v: got shape"),
        ({"segments": jnp.zeros((64,), jnp.int32)}, ValueError, "segments: got shape"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_refuses(changes: dict[str, object], error: type[Exception], message: str) -> None:
    names, arrays = ("q", "k", "v", "positions", "segments"), map(jnp.asarray, make_packs([[64]], 64, 4, 2, 16))
    arguments: dict[str, object] = dict(zip(names, arrays, strict=True), scale=1.0)
    with pytest.raises(error, match=message):
        pack_attention(**arguments | changes)


def test_cudnn_lowers_causal_with_a_mask_and_no_gradient_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # cuDNN's version is all that jax asks this machine for.
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)

    def both(q, k, v, positions, segments, cotangent):
        run = partial(pack_attention, positions=positions, segments=segments, scale=0.1, implementation="cudnn")
        out, transpose = jax.vjp(run, q, k, v)
        return out, transpose(cotangent)

    q, k = (jax.ShapeDtypeStruct((2, 128, n, 64), jnp.bfloat16) for n in (8, 2))
    marks = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    text = jax.jit(both).trace(q, k, k, marks, marks, q).lower(lowering_platforms=("cuda",)).as_text()
    forward, backward = (line for line in text.splitlines() if "custom_call @__cudnn$fmha" in line)
    assert "ScaleBiasSoftmax" in forward and "ScaleBiasSoftmaxBackward" in backward
    assert all(r"mask_type\22: \22CAUSAL" in line for line in (forward, backward))
    if jax.__version_info__ >= (0, 11):  # before, a gradient of the mask is computed and dropped
        assert "128x128" not in backward.split("->")[-1]
