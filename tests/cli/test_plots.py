"""The picture of a run says what a blank means."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from loquetier_jax.plots import save_timeline
from loquetier_jax.timeline import Timeline


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True])
def test_where_nothing_is_trained_yet_it_says_compiling(tmp_path: Path, trained: bool) -> None:
    now = [10.0]
    timeline = Timeline(lambda: now[0], start=10.0)
    record = timeline.listener()
    for now[0] in (11.0, 12.0, 13.0):
        record(SimpleNamespace(token_ids=[1]))
    now[0] = 15.0
    lines = [{"loss": 2.0, "num_tokens": 64}] if trained else []
    timeline.watch(SimpleNamespace(name="job", metrics=lines))
    assert timeline.training_since == (5.0 if trained else None)
    now[0] = 20.0
    picture = save_timeline(timeline, tmp_path / "run.svg", "a run").read_text()
    assert picture.count("<!-- compiling -->") == 2  # beside the loss and beside the tokens trained
