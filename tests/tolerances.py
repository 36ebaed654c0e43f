"""The tolerances of the whole suite, by name. A changed entry needs a derivation in its comment."""

import numpy as np

# name -> (rtol, atol) of numpy.testing.assert_allclose.
TOL: dict[str, tuple[float, float]] = {
    # One op in f32 against its definition: ~2^-23 a rounding, a few hundred of them.
    "f32": (1e-5, 1e-5),
    # bf16 keeps 8 significant bits: half a unit in the last place is 2^-9 = 2e-3, twice or so in a row.
    "bf16": (5e-3, 1e-2),
    # A gradient adds one more rounded factor.
    "bf16_grad": (5e-3, 2e-2),
    # A whole model in f32 against transformers or PEFT: the same sums in another order, layer after layer.
    "logits_f32": (1e-4, 1e-4),
    # 100 steps of AdamW against torch, relative; losses are O(1), so no absolute part.
    "loss_curve_f32": (1e-4, 0.0),
    # f32 across GPU buckets: the library picks GEMM algorithms by row count.
    "f32_buckets": (1e-4, 1e-4),
}


def assert_close(actual: object, expected: object, name: str) -> None:
    """Compares two arrays under the named tolerance and reports max-abs and max-rel on failure.

    Args:
        actual: An array of any shape.
        expected: An array of the same shape.
        name: A key of TOL.
    """
    rtol, atol = TOL[name]
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol, err_msg=f"tolerance {name!r}")
