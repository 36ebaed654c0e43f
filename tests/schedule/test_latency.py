"""The latency table: seeding, running mean, guesses for unknown keys, JSON."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loquetier_jax.errors import ConfigError
from loquetier_jax.schedule.latency import FORWARD, MS_PER_ROW, LatencyModel

KEY = (FORWARD, "decode8-greedy")


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


def test_json_round_trip(tmp_path: Path) -> None:
    model = LatencyModel()
    model.seed(KEY, [5.0, 6.0], 8)
    model.observe(("backward", "train1x64"), 12.5, 64)
    model.dump(tmp_path / "latency.json")
    again = LatencyModel.load(tmp_path / "latency.json")
    assert again.to_json() == model.to_json()
    assert again.known(KEY) and again.predict(KEY, 8) == 5.5


def test_bad_values_are_refused() -> None:
    model = LatencyModel()
    with pytest.raises(ConfigError, match="smoothing: got 0"):
        LatencyModel(0)
    for ms, rows in (([], 8), ([0.0], 8), ([1.0], 0)):
        with pytest.raises(ConfigError, match="expected"):
            model.seed(KEY, ms, rows)
    with pytest.raises(ConfigError, match=r"latency\[0\]: got .*expected keys"):
        LatencyModel.from_json('[{"function": "forward", "bucket": "x", "rows": 1, "ms": 1.0}]')
    assert not model.known(KEY)
