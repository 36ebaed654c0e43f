"""The lock on the folder of a run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loquetier_jax.errors import JobError
from loquetier_jax.train.metrics import MetricsWriter, read_metrics
from loquetier_jax.train.run_folder import RunLock

HOLDER = """
import sys
from loquetier_jax.train.run_folder import RunLock
lock = RunLock(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_is_refused_while_another_process_has_it(tmp_path: Path):
    """Two processes wrote lines and checkpoints into one another's run; kill -9 leaves nothing to clear away."""
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        for take in (RunLock, lambda folder: MetricsWriter(folder / "metrics.jsonl")):
            with pytest.raises(JobError, match=rf"'{folder}' is in use by another process \({holder.pid}\)"):
                take(folder)
        os.kill(holder.pid, signal.SIGKILL)
    with RunLock(folder) as mine, RunLock(tmp_path / "other" / ".." / "run"):
        writer = MetricsWriter(folder / "metrics.jsonl")  # of the same process
        mine.release()
    assert subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 1, "the writer has it"
    writer.close()
    assert subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_lines_that_a_full_disk_does_not_take_wait(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """The job failed at its next line."""
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write({"step": 1})
    writer.path.rename(tmp_path / "aside")
    writer.path.symlink_to("/dev/full")
    writer.write({"step": 2})
    assert "metrics.jsonl: 1 lines cannot be written yet: [Errno 28]" in caplog.text
    with pytest.raises(OSError, match="No space left"):
        writer.flush()
    writer.path.unlink()
    (tmp_path / "aside").rename(writer.path)
    writer.write({"step": 3})
    assert [line["step"] for line in read_metrics(writer.path)] == [1, 2, 3]
