"""What only a GPU can show of the SMLM kernels: numerics at real shapes, isolation, one bit pattern."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import smlm_fwd
from pallas_kernels.smlm import SmlmPlan, build_plan, num_tiles_bound, num_wide_bound
from pallas_kernels.smlm.plan import WIDE
from pallas_kernels.smlm.triton import smlm_triton
from pallas_kernels.smlm.tuning import SmlmConfig, smlm_config
from pallas_kernels.smlm_glu.triton import smlm_glu_triton
from tests.kernels.smlm_cases import Case, Segments, brute_force, brute_S, make_case
from tests.tolerances import assert_close

pytestmark = pytest.mark.gpu

REPEATS = 1000
S_ROWS = 512
LAYOUTS = {  # (first row, rows, pages) of each adapter
    "decode": [(i, 1, 1) for i in range(32)],
    "mixed": [(0, 500, 1), (512, 250, 4), (768, 33, 2), (820, 4, 1), (824, 1, 4), (825, 7, 8)],
}
SHAPES = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
    "odd": (896, (4864, 160)),
}
DTYPES = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])


def plan_of(segments: Segments, rows: int, max_pages: int) -> SmlmPlan:
    """One capacity for every choice of segments."""
    tiles, wide = (bound([rows], [32]) for bound in (num_tiles_bound, num_wide_bound))
    return build_plan(segments, rows, tiles, max_pages, wide)


def device_case(layout: str, size: int, out_features: tuple[int, ...], dtype: jnp.dtype = jnp.bfloat16) -> Case:
    """Every run has pages of its own; arrays are on the device."""
    rows, segments, page = max(first + count for first, count, _ in LAYOUTS[layout]) + 3, [], 1
    for first, count, pages in LAYOUTS[layout]:
        segments.append((first, count, tuple(range(page, page + pages))))
        page += pages
    options = {"num_tiles": rows, "num_wide": 2 * rows, "max_pages": max(len(pages) for *_, pages in segments)}
    case = make_case(segments, rows, size, out_features, num_pages=page, dtype=dtype, seed=size, **options)
    arrays = {name: jnp.asarray(getattr(case, name)) for name in ("x", "A", "B", "y")}
    return replace(case, plan=plan_of(segments, rows, options["max_pages"]), **arrays)


def run(case: Case, segments: Segments | None = None, config: SmlmConfig | None = None) -> np.ndarray:
    """y of the case, of some of its segments if told so."""
    max_pages = case.plan.tile_pages.shape[1]
    plan = case.plan if segments is None else plan_of(segments, len(case.x), max_pages)
    return np.asarray(smlm_triton(case.x, case.A, case.B, plan, case.out_features, case.y, config=config)[0])


def on_host(case: Case) -> Case:
    """In float64, as the brute force takes it."""
    return replace(case, **{name: np.asarray(getattr(case, name), np.float64) for name in ("x", "A", "B", "y")})


def assert_scaled(got: object, want: np.ndarray, dtype: jnp.dtype) -> None:
    """Errors in units of the largest value."""
    scale = np.abs(want).max()
    assert_close(np.asarray(got, np.float64) / scale, want / scale, "bf16" if dtype == jnp.bfloat16 else "f32")


@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_op_is_the_formula(shape: str, layout: str, dtype: jnp.dtype) -> None:
    case = device_case(layout, *SHAPES[shape], dtype)
    rows, known = min(S_ROWS, len(case.x)), on_host(case)
    y, S, _ = smlm_triton(case.x, case.A, case.B, case.plan, case.out_features, case.y, S_rows=rows)
    assert_scaled(y, known.y + brute_force(known), dtype)
    assert_scaled(S, brute_S(known, rows), dtype)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_the_delta_beside_the_gemm_is_the_formula(shape: str, dtype: jnp.dtype) -> None:
    case = device_case("decode", *SHAPES[shape], dtype)
    known = on_host(case)
    options = {"out_features": case.out_features, "y": case.y, "implementation": "triton"}
    assert_scaled(smlm_fwd(case.x, case.A, case.B, case.plan, **options)[0], known.y + brute_force(known), dtype)


@DTYPES
@pytest.mark.parametrize(("half", "layout"), [(14336, "mixed"), (4864, "mixed"), (14336, "decode")])
def test_gated_has_the_bits_of_smlm_and_one_result(half: int, layout: str, dtype: jnp.dtype) -> None:
    """gate and up have the bits of `smlm`, every time; the product is the formula's, with the quick silu."""
    case = device_case(layout, 4096, (half, half), dtype)

    def once() -> tuple[jax.Array, ...]:
        return smlm_glu_triton(case.x, case.A, case.B, case.plan, case.y, "silu", len(case.x))

    found, y = once(), run(case)
    np.testing.assert_array_equal(np.asarray(found[1]), y)
    gate, up = (part.astype(np.float64) for part in np.split(y, 2, axis=1))
    want = gate / (1 + np.exp(-gate)) * up
    error = float(np.max(np.abs(np.asarray(found[0], np.float64) - want) / (np.abs(want) + 1e-3)))
    assert error < (2**-7 if dtype == jnp.bfloat16 else 2**-18)
    for number in range(100):
        assert bool(jnp.all(once()[0] == found[0])), f"run {number} differs from the first"


@pytest.mark.parametrize(("shape", "layout"), [("o", "decode"), ("qkv", "mixed")])
def test_repeats_give_one_bit_pattern(shape: str, layout: str) -> None:
    case = device_case(layout, *SHAPES[shape])
    plan = jax.tree.map(jnp.asarray, case.plan)

    def once() -> jax.Array:
        return smlm_triton(case.x, case.A, case.B, plan, case.out_features, case.y)[0]

    first, differ = once(), jnp.int32(0)
    count = jax.jit(lambda so_far, a, b: so_far + jnp.any(a != b).astype(jnp.int32))  # on the device: nobody waits
    for _ in range(REPEATS):
        differ = count(differ, first, once())
    assert int(differ) == 0


ISOLATED = pytest.mark.parametrize(("shape", "layout"), [("qkv", "decode"), ("qkv", "mixed"), ("odd", "mixed")])


@ISOLATED
def test_a_segment_keeps_its_bits_alone_and_beside_nan(shape: str, layout: str) -> None:
    case = device_case(layout, *SHAPES[shape])
    whole = run(case)
    for first, count, pages in case.segments:
        rows = slice(first, first + count)
        alone = run(case, [(first, count, pages)])
        np.testing.assert_array_equal(alone[rows], whole[rows], err_msg=f"segment at {first}, alone")
    first, count, pages = case.segments[0]
    x, A = case.x.at[first : first + count].set(jnp.nan), case.A.at[pages[0]].set(jnp.nan)
    got = run(replace(case, x=x, A=A))
    np.testing.assert_array_equal(got[first + count :], whole[first + count :])


@ISOLATED
def test_a_segment_keeps_its_bits_wherever_it_lies(shape: str, layout: str) -> None:
    case = device_case(layout, *SHAPES[shape])
    whole, (moved, places) = run(case), permuted(case)
    got = run(moved, moved.segments)
    for (first, count, _), place in zip(case.segments, places, strict=True):
        np.testing.assert_array_equal(got[place : place + count], whole[first : first + count])


def permuted(case: Case) -> tuple[Case, list[int]]:
    """The segments in reverse order, each moved by one row more than it needs, and their new first rows."""
    rows, segments, places, at = np.zeros(len(case.x), np.int32), [], {}, 0
    for first, count, pages in case.segments[::-1]:
        at = min(at + 1, rows.size - sum(n for f, n, _ in case.segments if f not in places))
        rows[at : at + count] = first + np.arange(count)
        segments.append((at, count, pages))
        places[first], at = at, at + count
    moved = replace(case, x=case.x[rows], y=case.y[rows], segments=segments)
    return moved, [places[first] for first, _, _ in case.segments]


@ISOLATED
def test_bits_do_not_depend_on_the_cut(shape: str, layout: str) -> None:
    case = device_case(layout, *SHAPES[shape])
    whole, max_pages = run(case), case.plan.tile_pages.shape[1]
    config = smlm_config(*case.x.shape, case.out_features, max_pages, case.x.dtype)
    for other in (
        SmlmConfig(tile_rows=16, programs_k=4, block_k=64, block_n=64),
        SmlmConfig(tile_rows=16, programs_k=2, block_k=32, block_n=128, shrink_stages=2, group=2),
        SmlmConfig(tile_rows=WIDE, programs_k=2, block_k=32, block_n=64, shrink_stages=2),
        replace(config, reduce=not config.reduce, early=not config.early, branch=not config.branch),
    ):
        np.testing.assert_array_equal(run(case, config=other), whole, err_msg=str(other))
