"""The folder that a run writes to: whose it is, and what a save that fails leaves there."""

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest

from loquetier_jax.errors import JobError
from loquetier_jax.train.checkpoint import CheckpointStore, read_state
from loquetier_jax.train.metrics import read_metrics
from tests.engine.engines import random_data
from tests.engine.evidence import LORA, quick

DATA = random_data(0)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("which", ["older", "copy"])
def test_a_checkpoint_that_is_not_the_newest_of_its_run_branches(tiny_engine: Any, tmp_path: Path, which: str):
    """metrics.jsonl was cut back and newer checkpoints pruned, in the folder of the run that had gone on."""
    engine, run = tiny_engine, tmp_path / "run"
    cfg = quick(save_steps=1, save_total_limit=3, output_dir=str(run))
    first = engine.finetune("job", DATA, lora=LORA, train=cfg).wait()
    assert first.output_dir == run
    before, checkpoint = contents(run), run / "checkpoints" / "checkpoint-00000001"
    if which == "copy":
        checkpoint = shutil.copytree(run / "checkpoints" / "checkpoint-00000003", tmp_path / "elsewhere")
    changes = {"max_steps": 4}
    job = engine.resume_job(checkpoint, DATA, train=changes).wait()
    assert contents(run) == before
    assert job.output_dir == tmp_path / "run-branch-1"
    assert [line["step"] for line in read_metrics(job.output_dir / "metrics.jsonl")] == [2, 3, 4][-len(job.metrics) :]
    assert engine.resume_job(checkpoint, DATA, train=changes).output_dir == tmp_path / "run-branch-2"
    engine.jobs["job"].cancel()
    newest = max((run / "checkpoints").iterdir())
    assert engine.resume_job(newest, DATA, train=changes).wait().output_dir == run
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4]


class FullOnce(CheckpointStore):
    """On a disk that is full at the first save."""

    full = True

    def save(self, arrays: Any, state: Any) -> Path:
        if FullOnce.full:
            FullOnce.full = False
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().save(arrays, state)


def test_a_save_that_fails_is_tried_again_at_the_next(
    tiny_engine: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """The job failed for ever, and with it all that it had learnt: a failed job cannot be checkpointed."""
    monkeypatch.setattr(tiny_engine.job_manager.saver, "store", FullOnce)
    cfg = quick(save_steps=1, max_steps=3, output_dir=str(tmp_path))
    job = tiny_engine.finetune("job", DATA, lora=LORA, train=cfg).wait()
    assert "job job: step 1 is not saved; the next save tries again: [Errno 28] No space left" in caplog.text
    assert job.status == "succeeded"
    steps = [read_state(path)["job"]["step"] for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert steps == [2, 3]
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_file_in_the_place_of_the_checkpoints_fails_the_job_alone(tiny_engine: Any, tmp_path: Path) -> None:
    """No later save could succeed."""
    job = tiny_engine.finetune("job", DATA, lora=LORA, train=quick(save_steps=1, output_dir=str(tmp_path / "run")))
    (tmp_path / "run" / "checkpoints").write_text("")
    other = tiny_engine.finetune("other", DATA, lora=LORA, train=quick())
    with pytest.raises(JobError, match="checkpoints"):
        job.wait()
    assert other.wait().status == "succeeded"
