"""Latency tables in files."""

from pathlib import Path

import pytest

from loquetier_jax.errors import ConfigError
from loquetier_jax.presets import engine_config, preset_path
from loquetier_jax.schedule.latency import BACKWARD_SLICE, FORWARD, OPTIMIZER
from loquetier_jax.schedule.table import LatencyTable


def test_round_trip(tmp_path: Path) -> None:
    table = LatencyTable.load(preset_path("latency", "h100"))
    table.dump(tmp_path / "again.yaml")
    assert LatencyTable.load(tmp_path / "again.yaml") == table


def test_the_h100_table_covers_the_gpu_preset() -> None:
    table = LatencyTable.load(preset_path("latency", "h100"))
    model = table.latency()
    assert set(engine_config("gpu").buckets) <= set(table.buckets)
    assert all(model.known((FORWARD, b.name)) for b in table.buckets)
    assert {(s.packs, s.pack_tokens) for s in table.sliced} == {(1, 1024), (4, 1024)}
    assert model.known((BACKWARD_SLICE, "train4x1024"))
    assert model.predict((OPTIMIZER, "whose job it is does not matter"), 1) == table.optimizer_step_ms
    for small, large in ((a, b) for a in table.buckets for b in table.buckets if b.covers(a)):
        assert model.predict((FORWARD, small.name), 1) <= 1.05 * model.predict((FORWARD, large.name), 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("forward: [{ms: 0, bucket: {decode: 8}}]", "ms of decode8: got 0, expected a number > 0"),
        ("forward: [{ms: 1.0, bucket: {decodes: 8}}]", "decodes"),
        (
            "forward: [{ms: 1.0, bucket: {decode: 8, sampling: greedy}}]",
            r"bucket.sampling: got 'greedy', expected no such key any more; every bucket serves every way of sampling",
        ),
        ("peer: vllm", "peer: got 'vllm', expected one of the keys"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, line: str, message: str) -> None:
    text = preset_path("latency", "h100").read_text()
    text = text[: text.index("forward:")] if line.startswith("forward") else text
    path = tmp_path / "table.yaml"
    path.write_text(f"{text}\n{line}\n")
    with pytest.raises(ConfigError, match=message):
        LatencyTable.load(path)
