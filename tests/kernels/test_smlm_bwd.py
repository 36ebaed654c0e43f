"""The backward of packs against the plain formula and its autodiff, every implementation; packs never mix.

On a CPU the kernels take small blocks: several even of small packs. A GPU takes the blocks that it takes in earnest.
"""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import smlm_bwd
from pallas_kernels.smlm import pack_glu as glu_launch
from pallas_kernels.smlm import pack_plan, smlm_expand
from pallas_kernels.smlm import pack_triton as launches
from pallas_kernels.smlm.pack_tuning import Block, DyConfig, GluConfig, XConfig
from tests.kernels.glu_cases import GLU_CASES, glu_arrays, gradients_glu, reference_glu
from tests.kernels.pack_cases import CASES, F32, Case, Gradients, flat, ids_of, plain, pool_of, reference, shrink
from tests.kernels.quick import quick_jit
from tests.tolerances import assert_close

BOTH = pytest.mark.parametrize("implementation", ["xla", "triton"])
SLOW = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """What was traced is forgotten: a patched constant is no argument of a trace."""
    kernels = (launches.pack_dy_triton, launches.pack_x_triton, glu_launch.pack_glu_triton)
    with pytest.MonkeyPatch.context() as patch:
        if jax.default_backend() == "cpu":
            dy = DyConfig(Block(16, 32), Block(32, 32, 64), turns=2)
            patch.setattr(launches, "default_dy_config", lambda *_: dy)
            patch.setattr(launches, "default_x_config", lambda *_: XConfig(Block(16, 32), Block(32, 16, 32)))
            patch.setattr(glu_launch, "default_glu_config", lambda *_: GluConfig(Block(16, 32)))
        for f in kernels:
            f.clear_cache()
        yield
    for f in kernels:
        f.clear_cache()


@partial(quick_jit, static_argnames=("case", "implementation"))
def gradients(
    case: Case, implementation: str, x: jax.Array, A: jax.Array, B: jax.Array, dy: jax.Array,
    dx: jax.Array | None = None, ids: jax.Array | None = None,
) -> Gradients:  # fmt: skip
    """dX (added to dx), dA, dB, of pages in a pool; S has a page more than the packs, which is none of theirs."""
    ids = ids_of(*A.shape[:2]) if ids is None else ids
    S = jnp.pad(flat(shrink(x, A)), ((0, 0), (0, 0), (0, 1), (0, 0)), constant_values=jnp.nan)
    options = {"out_features": case.outs, "implementation": implementation, "dx": None if dx is None else flat(dx)}
    plan = pack_plan(ids, x.shape[1])
    dX, dA, dB = smlm_bwd(S, flat(x), pool_of(A), pool_of(B), plan, flat(dy), **options)
    return dX.reshape(x.shape), dA, dB


@pytest.mark.also_gpu
@BOTH
@pytest.mark.parametrize("name", [pytest.param(c, marks=SLOW) if c in ("rank 128", "pages") else c for c in CASES])
def test_gradients_are_those_of_the_formula(name: str, implementation: str) -> None:
    case = CASES[name]
    x, A, B, dy = case.arrays()
    got = gradients(case, implementation, x, A, B, dy)
    for one, other, like in zip(got, reference(case, x, A, B, dy), (x, A, B), strict=True):
        assert (one.shape, one.dtype) == (like.shape, like.dtype)
        assert_close(one, other, "logits_f32")


@pytest.mark.also_gpu
@pytest.mark.parametrize("name", ["targets", pytest.param("all odd", marks=SLOW)])
def test_the_delta_of_a_kept_S_is_that_of_the_formula(name: str) -> None:
    case = CASES[name]
    x, A, B, _ = case.arrays()
    plan = pack_plan(ids_of(*B.shape[:2]), x.shape[1])
    got = smlm_expand(flat(shrink(x, A)), pool_of(B), plan, out_features=case.outs)
    assert_close(got, flat(plain(x, A, B, case.outs)), "logits_f32")


@pytest.mark.also_gpu
@BOTH
@pytest.mark.parametrize("name", ["targets", pytest.param("all odd", marks=SLOW)])
def test_bfloat16_pages_have_float32_gradients(name: str, implementation: str) -> None:
    case = CASES[name]
    arrays = case.arrays(jnp.bfloat16)
    got = gradients(case, implementation, *arrays)
    assert [a.dtype for a in got] == [jnp.bfloat16, F32, F32]
    for one, other in zip(got, reference(case, *arrays), strict=True):
        scale = float(jnp.abs(other).max())
        assert_close(one.astype(F32) / scale, other / scale, "bf16_grad")


@pytest.mark.also_gpu
@BOTH
@pytest.mark.parametrize("name", ["targets", pytest.param("one row packs", marks=SLOW)])
def test_dx_is_added_to_what_is_given(name: str, implementation: str) -> None:
    case = CASES[name]
    x, A, B, dy = case.arrays()
    want = gradients(case, implementation, x, A, B, dy)
    got = gradients(case, implementation, x, A, B, dy, jnp.sin(x))
    assert_close(got[0], jnp.sin(x) + want[0], "f32")
    for one, other in zip(got[1:], want[1:], strict=True):
        np.testing.assert_array_equal(one, other)


@BOTH
def test_dx_may_be_a_function_that_is_called_with_dy(implementation: str) -> None:
    case = CASES["targets"]
    x, A, B, dy = case.arrays()
    W = jnp.cos(jnp.arange(case.size * sum(case.outs), dtype=F32)).reshape(sum(case.outs), case.size)
    plan, S = pack_plan(ids_of(*A.shape[:2]), x.shape[1]), flat(shrink(x, A))
    arguments = (S, flat(x), pool_of(A), pool_of(B), plan, flat(dy))
    run = partial(smlm_bwd, *arguments, out_features=case.outs, implementation=implementation)
    for one, other in zip(run(dx=lambda dy: dy @ W), run(dx=flat(dy) @ W), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.also_gpu
@SLOW
def test_the_sum_with_a_given_dx_is_rounded_once() -> None:
    case = CASES["one pack"]
    x, A, B, dy = case.arrays(jnp.bfloat16)
    given = 8 * x
    got = gradients(case, "triton", x, A, B, dy, given)[0].astype(F32)
    want = given.astype(F32) + reference(case, x, A, B, dy)[0]
    assert float(jnp.abs(got - want).max() / jnp.abs(want).max()) < 2**-8


@BOTH
def test_a_pack_keeps_its_bits_beside_any_other(implementation: str) -> None:
    case = CASES["all odd"]
    x, A, B, dy = case.arrays()
    alone = gradients(case, implementation, x[1:2], A[1:2], B[1:2], dy[1:2])
    for bad in (x.at[0].set(jnp.nan), x.at[2, -1].set(jnp.inf)):
        beside = gradients(case, implementation, bad, A.at[2].set(jnp.inf), B.at[0].set(jnp.nan), dy)
        for one, other in zip(alone, beside, strict=True):
            np.testing.assert_array_equal(one[0], other[1])


@BOTH
def test_absent_pages_add_nothing(implementation: str) -> None:
    case = CASES["one pack"]
    x, A, B, dy = case.arrays()
    dx, dA, dB = gradients(case, implementation, x, A, B, dy)
    padded = [jnp.concatenate([a, jnp.zeros_like(a)], axis=1) for a in (A, B)]
    got = gradients(case, implementation, x, *padded, dy, ids=jnp.asarray([[2, 0]], jnp.int32))
    assert_close(got[0], dx, "f32")
    for one, other in zip(got[1:], (dA, dB), strict=True):
        assert_close(one[:, :1], other, "f32")
        np.testing.assert_array_equal(one[:, 1:], 0)


@pytest.mark.also_gpu
@pytest.mark.parametrize(
    ("name", "act", "implementation"),
    [
        *((name, "silu", "triton") for name in ("pages", "all odd")),
        *(pytest.param(name, "silu", "triton", marks=SLOW) for name in ("one pack", "one row packs", "rank 144")),
        ("all odd", "silu", "xla"),
        ("one pack", "gelu", "triton"),
        pytest.param("one pack", "gelu_pytorch_tanh", "triton", marks=SLOW),
        *(pytest.param("one pack", act, "xla", marks=SLOW) for act in ("relu", "gelu_pytorch_tanh", "gelu")),
    ],
)
def test_through_a_gated_activation(name: str, act: str, implementation: str) -> None:
    arrays = glu_arrays(GLU_CASES[name])
    got, want = gradients_glu(act, implementation, *arrays), reference_glu(act, *arrays)
    for one, other, like in zip(got, want, arrays, strict=False):
        assert (one.shape, one.dtype) == (like.shape, like.dtype)
        assert_close(one, other, "logits_f32")


@BOTH
def test_through_a_gated_activation_in_bfloat16(implementation: str) -> None:
    arrays = glu_arrays(GLU_CASES["all odd"], jnp.bfloat16)
    got, want = gradients_glu("silu", implementation, *arrays), reference_glu("silu", *arrays)
    assert [a.dtype for a in got] == [jnp.bfloat16, F32, F32]
    for one, other in zip(got, want, strict=True):
        scale = float(jnp.abs(other).max())
        assert_close(one.astype(F32) / scale, other / scale, "bf16_grad")


@BOTH
def test_through_a_gated_activation_a_pack_keeps_its_bits(implementation: str) -> None:
    gate_up, A, B, W, dy = glu_arrays(GLU_CASES["all odd"])
    alone = gradients_glu("silu", implementation, gate_up[1:], A[1:], B[1:], W, dy[1:])
    bad = gate_up.at[0].set(jnp.nan)
    beside = gradients_glu("silu", implementation, bad, A.at[0].set(jnp.inf), B, W, dy)
    for one, other in zip(alone, beside, strict=True):
        np.testing.assert_array_equal(one[0], other[1])


def zeros(*shape: int) -> jax.Array:
    return jnp.zeros(shape, F32)


BAD: list[tuple[dict[str, object], str]] = [
    ({"B": (3, 16, 32)}, r"B: got shape \(3, 16, 32\), expected \(3, 16, 64\)"),
    ({"A": (3, 16, 64)}, r"A: got shape \(3, 16, 64\), expected \(3, 16, 48\)"),
    ({"S": (32, 2, 1, 16)}, r"S: got shape \(32, 2, 1, 16\), expected \(32, 1, 1, 16\)"),
    ({"S": (32, 1, 16)}, r"S: got shape \(32, 1, 16\), expected 4 dimensions"),
    ({"S": (32, 1, 0, 16)}, "S: got 0 pages per row, expected at least plan.pack_pages' 1"),
    ({"dy": (31, 64)}, r"dy: got shape \(31, 64\), expected \(32, 64\)"),
    ({"x": (31, 48)}, r"x: got shape \(31, 48\), expected \(32, 48\)"),
    ({"dx": zeros(32, 64)}, r"dx: got shape \(32, 64\), expected \(32, 48\)"),
    ({"dx": lambda dy: dy}, r"dx: got shape \(32, 64\), expected \(32, 48\)"),
    ({"plan": pack_plan(jnp.ones((0, 1), jnp.int32), 16)}, "plan: got no train rows"),
    ({"glu": ("silu", zeros(32, 96))}, r"x: got shape \(32, 48\), expected None with glu"),
    ({"glu": ("tanh", zeros(32, 96))}, "activation: got 'tanh', expected one of"),
    ({"implementation": "cuda"}, "implementation: got 'cuda', expected"),
]


@BOTH
@pytest.mark.parametrize(("changes", "message"), BAD, ids=range(len(BAD)))
def test_bad_arguments_are_refused_with_both_values(
    changes: dict[str, object], message: str, implementation: str
) -> None:
    arguments: dict[str, object] = {"implementation": implementation, "plan": pack_plan(jnp.ones((2, 1), int), 16)}
    arguments |= {"S": (32, 1, 1, 16), "x": (32, 48), "A": (3, 16, 48), "B": (3, 16, 64), "dy": (32, 64)} | changes
    arguments = {name: zeros(*a) if isinstance(a, tuple) and name != "glu" else a for name, a in arguments.items()}
    with pytest.raises(ValueError, match=message):
        smlm_bwd(**arguments, out_features=(64,))


def test_a_dtype_that_is_not_x_s_is_refused() -> None:
    arrays = [zeros(32, 1, 1, 16), zeros(32, 48), zeros(3, 16, 48), zeros(3, 16, 64), zeros(32, 64)]
    call: Callable[..., object] = partial(smlm_bwd, out_features=(64,))
    plan = pack_plan(jnp.ones((2, 1), int), 16)
    for at, name in ((0, "S"), (2, "A"), (4, "dy")):
        S, x, A, B, dy = (a.astype(jnp.bfloat16) if i == at else a for i, a in enumerate(arrays))
        with pytest.raises(TypeError, match=f"{name}: got dtype bfloat16, expected x's float32"):
            call(S, x, A, B, plan, dy)
