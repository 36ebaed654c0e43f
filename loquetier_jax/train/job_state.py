"""The complete state of a job between two packs, as checkpoints store it and migrations transfer it."""

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
    """A job's arrays and host state.

    Attributes:
        arrays: {"master", "opt_state", "grads" (see `stored_pages`), "best" ({} if there is none)}: the job's own
            arrays, on the device; numpy arrays after `fetch` or from a checkpoint.
        host: JSON data: {"job", "lora", "shape", "base", "best"}; "best" tells whether there are best weights.
    """

    arrays: dict[str, Any]
    host: dict[str, Any]

    def fetch(self) -> None:
        """Copies the arrays to the host; none of them may be donated before this returns."""
        for leaf in jax.tree.leaves(self.arrays):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        self.arrays = jax.tree.map(np.array, self.arrays)  # on CPU, `asarray` would be a view of the device buffer

    @property
    def grads(self) -> AdapterPages:
        """The accumulated gradients."""
        layers = self.arrays["grads"]
        return AdapterPages([{group: LoraPages(*pair) for group, pair in layer.items()} for layer in layers])

    @property
    def lora(self) -> LoraConfig:
        return LoraConfig(**self.host["lora"])

    @property
    def shape(self) -> LoraShape:
        return shape_of(self.host)

    def check_base(self, fingerprint: str) -> None:
        """Raises CheckpointError unless the job was trained on the base with this fingerprint."""
        if self.host["base"] != fingerprint:
            raise CheckpointError(
                f"base: got {fingerprint[:12]}, expected {self.host['base'][:12]}: another base model"
            )


def shape_of(host: dict[str, Any]) -> LoraShape:
    """The adapter shape of a saved job."""
    return LoraShape(modules=tuple(LoraModule(*module) for module in host["shape"]))


def stored_pages(pages: AdapterPages) -> list[dict[str, tuple[Any, Any]]]:
    """Pages as the pytree that names them in a checkpoint: by layer, group, and 0 for A or 1 for B."""
    return [{group: (pair.A, pair.B) for group, pair in layer.items()} for layer in pages.layers]


def take_job_state(state: DeviceState, fingerprint: str, device_job: DeviceJob) -> JobState:
    """References a job's current state without copying it; `JobState.fetch` copies it.

    Args:
        state: The engine's arrays.
        fingerprint: The base's fingerprint.
        device_job: The job.

    Raises:
        JobError: packs of the job are in flight.
        OSError: its metrics cannot be written.
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
        CheckpointError: it is damaged, or its arrays do not match its state.
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
