"""All that a job is, between two packs: what a checkpoint holds and what a migration carries."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from loquetier_jax.adapters.lora import LoraConfig, LoraModule, LoraShape
from loquetier_jax.adapters.pages import AdapterPages, LoraPages
from loquetier_jax.errors import CheckpointError
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.step.state import DeviceState
from loquetier_jax.train.checkpoint import read_arrays, read_state
from loquetier_jax.train.device_job import DeviceJob
from loquetier_jax.train.optimizer import init_state


@dataclass
class JobState:
    """The arrays and the numbers of a job.

    Attributes:
        arrays: {"master", "opt_state", "grads" (see `stored_pages`), "best" ({} where there is none)}: what the job
            itself has, on the device; after `fetch`, as in a checkpoint, numpy.
        host: JSON data: {"job", "lora", "shape", "base", "best"}, the last one whether there are best weights.
    """

    arrays: dict[str, Any]
    host: dict[str, Any]

    def fetch(self) -> None:
        """Copies the arrays to the host; none may be donated before this returns."""
        for leaf in jax.tree.leaves(self.arrays):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        self.arrays = jax.tree.map(np.array, self.arrays)  # on a CPU `asarray` would be a view of the device's buffer

    @property
    def grads(self) -> AdapterPages:
        """The accumulators."""
        layers = self.arrays["grads"]
        return AdapterPages([{group: LoraPages(*pair) for group, pair in layer.items()} for layer in layers])

    @property
    def lora(self) -> LoraConfig:
        return LoraConfig(**self.host["lora"])

    @property
    def shape(self) -> LoraShape:
        return shape_of(self.host)

    def check_base(self, fingerprint: str) -> None:
        """Raises CheckpointError unless the job was trained on the base of this fingerprint."""
        if self.host["base"] != fingerprint:
            raise CheckpointError(
                f"base: got {fingerprint[:12]}, expected {self.host['base'][:12]}: another base model"
            )


def shape_of(host: dict[str, Any]) -> LoraShape:
    """The adapter's shape of a saved job."""
    return LoraShape(modules=tuple(LoraModule(*module) for module in host["shape"]))


def stored_pages(pages: AdapterPages) -> list[dict[str, tuple[Any, Any]]]:
    """Pages in the tree that names them in a checkpoint: by layer, group, and 0 for A or 1 for B."""
    return [{group: (pair.A, pair.B) for group, pair in layer.items()} for layer in pages.layers]


def take_job_state(state: DeviceState, fingerprint: str, device_job: DeviceJob) -> JobState:
    """Refers to a job's state, as it is now; `JobState.fetch` copies it.

    Args:
        state: Of the engine.
        fingerprint: Of the base.
        device_job: The job.

    Raises:
        JobError: packs of it are in flight.
        OSError: the disk does not take its metrics.
    """
    host = {
        "job": device_job.job.state_dict(),
        "lora": asdict(device_job.lora),
        "shape": [list(module) for module in device_job.shape.modules],
        "base": fingerprint,
        "best": device_job.best is not None,
    }
    arrays = {"master": device_job.master, "opt_state": device_job.opt_state, "best": device_job.best or {}}
    return JobState(arrays | {"grads": stored_pages(device_job.accumulators(state))}, host)


def read_job_state(spec: DecoderSpec, path: Path) -> JobState:
    """Reads a committed checkpoint.

    Raises:
        CheckpointError: it is damaged, or holds other arrays than its own state says.
    """
    host = read_state(path)
    shape = shape_of(host)
    zeros = {
        key: {name: np.zeros(s, np.float32) for name, s in arrays.items()}
        for key, arrays in shape.array_shapes(spec).items()
    }
    master, opt_state = init_state(zeros, host["job"]["config"]["optim"])
    grads = stored_pages(AdapterPages.empty(spec, shape.num_pages, np.float32))
    like = {"master": master, "opt_state": opt_state, "grads": grads, "best": zeros if host["best"] else {}}
    return JobState(read_arrays(path, like), host)
