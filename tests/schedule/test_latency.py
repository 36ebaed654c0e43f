"""Predictions: seeding, running mean, measured errors, guesses for unknown keys."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loquetier_jax.errors import ConfigError
from loquetier_jax.schedule.latency import (
    FIRST_ERROR,
    FORWARD,
    MS_PER_ROW,
    NOTHING,
    STALE,
    LatencyModel,
    Reads,
    Run,
    chunk_pairs,
    sampler_run,
)

KEY = (FORWARD, "decode8")


def test_seed_is_the_median_and_later_ones_move_it() -> None:
    model = LatencyModel(smoothing=0.5)
    model.seed(KEY, [5.0, 5.2, 90.0], 8)
    assert model.predict(KEY, 8) == 5.2
    model.observe(KEY, 6.2, 8)
    assert model.predict(KEY, 8) == pytest.approx(5.7)


@settings(deadline=None, max_examples=50)
@given(stall=st.floats(1, 1e6), level=st.floats(0.1, 100))
def test_one_stall_moves_it_little_and_a_lasting_change_fully(stall: float, level: float) -> None:
    model = LatencyModel()
    model.seed(KEY, [10.0] * 10, 8)
    model.observe(KEY, 10.0 * stall, 8)
    assert model.predict(KEY, 8) <= 11.0 + 1e-9
    for _ in range(200):
        model.observe(KEY, level, 8)
    assert model.predict(KEY, 8) == pytest.approx(level, rel=0.01)


def test_the_first_run_of_a_function_is_forgotten() -> None:
    """It loads the executable; a job must not starve beside requests because of that."""
    model = LatencyModel()
    for ms in (200.0, 4.0, 4.0):
        model.observe(KEY, ms, 8)
    assert model.predict(KEY, 8) == 4.0


def test_unknown_keys_are_guessed_from_above() -> None:
    model = LatencyModel()
    assert model.predict((FORWARD, "x"), 100) == 100 * MS_PER_ROW
    model.seed((FORWARD, "small"), [5.0], 16)
    model.seed((FORWARD, "large"), [30.0], 1024)
    assert model.predict((FORWARD, "between"), 17) == 30.0
    assert model.predict((FORWARD, "smaller"), 1) == 5.0
    assert model.predict((FORWARD, "larger"), 2048) == 60.0
    assert model.predict(("backward", "large"), 100) == 100 * MS_PER_ROW  # other functions say nothing


def test_late_is_what_one_run_in_a_hundred_exceeds_the_prediction_by() -> None:
    model = LatencyModel()
    assert model.late(KEY, 100) == pytest.approx(FIRST_ERROR * 100 * MS_PER_ROW)
    model.seed(KEY, [10.0] * 10, 8)
    assert model.late(KEY, 8) == pytest.approx(1.0)  # nothing has been seen yet
    rng = np.random.default_rng(0)
    for factor in rng.normal(1, 0.05, 2000):
        model.observe(KEY, 10.0 * factor, 8)
    assert model.predict(KEY, 8) == pytest.approx(10.0, rel=0.03)
    assert model.late(KEY, 8) == pytest.approx(2.33 * 0.5, rel=0.3)
    model.observe(KEY, 1000.0, 8)  # one stall is no error of the predictions
    assert model.late(KEY, 8) < 2.0
    for _ in range(200):
        model.observe(KEY, 10.0, 8)
    assert model.late(KEY, 8) < 0.1


@pytest.mark.parametrize("forward_ms", [6.0, None])
def test_a_step_teaches_what_was_timed_apart(forward_ms: float | None) -> None:
    model, slices, step = LatencyModel(), ("backward_slice", "train1x64"), ("optimizer_step", "a")
    for key, ms in ((KEY, 5.0), (slices, 10.0), (step, 5.0)):
        model.seed(key, [ms] * 9, 8)
    model.observe_step([(KEY, 8)], [(slices, 8), (slices, 8), (step, 1)], 36.0, forward_ms)
    ratios = [model.predict(key, 8) / ms - 1 for key, ms in ((KEY, 5.0), (slices, 10.0), (step, 5.0))]
    assert ratios == pytest.approx([0.02, 0.02, 0.02])  # a tenth of what they were longer, all by a fifth
    model.observe_step([], [], 5.0, None)
    model.observe_step([(KEY, 8)], [(step, 1)], 5.0, 5.0)  # the clock is too coarse to say anything of the second
    assert model.predict(step, 1) == pytest.approx(5.1)


def test_a_forward_and_the_sampler_behind_it_share_what_they_took() -> None:
    """Their tokens come together: each is longer by as much as both were."""
    model, (sampler, rows, reads) = LatencyModel(), sampler_run(8, "full")
    assert (sampler, rows, reads) == (("sampler", "8-full"), 8, NOTHING)
    model.seed(KEY, [6.0] * 9, 8)
    model.seed(sampler, [2.0] * 9, 8)
    model.observe_step([(KEY, 8), (sampler, 8)], [], 10.0, 10.0)
    assert (model.predict(KEY, 8), model.predict(sampler, 8)) == pytest.approx((6.15, 2.05))


def test_pairs_count_every_earlier_token_and_the_row_itself() -> None:
    assert [chunk_pairs(start, n) for start, n in ((0, 1), (0, 4), (100, 3))] == [1, 1 + 2 + 3 + 4, 101 + 102 + 103]


def test_long_contexts_take_longer_and_leave_the_mean_of_short_ones_alone() -> None:
    """512 rows behind 100,000 tokens: the attention takes several times what the rest does."""
    model, deep = LatencyModel(), Reads(pairs=chunk_pairs(100_000, 512))
    model.seed(KEY, [15.0] * 9, 512)
    model.seed_attention(1e-5, 65.0 / deep.pairs)
    assert model.predict(KEY, 512) == 15.0
    assert model.predict(KEY, 512, deep) == pytest.approx(80.0)
    assert model.predict(KEY, 512, Reads(kv_tokens=100_000)) == pytest.approx(16.0)
    assert model.late(KEY, 512, deep) == pytest.approx(8.0)
    for reads, ms in ((deep, 80.0), (NOTHING, 15.0)) * 50:
        model.observe_step([Run(KEY, 512, reads)], [], ms, ms)
    assert model.predict(KEY, 512) == pytest.approx(15.0)
    assert model.late(KEY, 512, deep) < 1e-6
    model.observe(KEY, 1.0, 512, deep)  # less than the attention alone should take
    assert 0 < model.predict(KEY, 512) < 15.0


def test_what_was_not_used_for_long_is_believed_less() -> None:
    model, other = LatencyModel(), (FORWARD, "decode32")
    for key in (KEY, other):
        model.seed(key, [10.0] * 9, 8)
        for _ in range(200):
            model.observe(key, 10.0, 8)
    assert model.late(KEY, 8) < 0.1
    for _ in range(STALE):
        model.observe(other, 10.0, 8)
    assert model.late(KEY, 8) == pytest.approx(1.0) and model.late(other, 8) < 0.1
    model.observe(KEY, 18.0, 8)
    assert model.predict(KEY, 8) == pytest.approx(14.0)  # half of the change at once
    assert model.predict(other, 8) == 10.0
    model.observe(KEY, 10.0, 8)
    assert model.predict(KEY, 8) < 14.0


def test_bad_values_are_refused() -> None:
    model = LatencyModel()
    with pytest.raises(ConfigError, match="smoothing: got 0"):
        LatencyModel(0)
    for ms, rows in (([], 8), ([0.0], 8), ([1.0], 0)):
        with pytest.raises(ConfigError, match="expected"):
            model.seed(KEY, ms, rows)
    assert not model.known(KEY)
    for slopes in ((-1e-9, 0), (0, float("nan"))):
        with pytest.raises(ConfigError, match=r"_ms: got .*, expected"):
            model.seed_attention(*slopes)
