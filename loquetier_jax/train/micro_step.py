"""One training pass over a few packs: forward (fused with serving, or in slices), then backward in slices.

Also the records of passes and optimizer steps in flight.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from loquetier_jax.batch.pack import StepItems, TrainItem, pack_step
from loquetier_jax.batch.packs import Pack, pass_extras
from loquetier_jax.batch.rows import SegmentBatch, ravel
from loquetier_jax.config import EngineConfig
from loquetier_jax.step.compiled import StepFunctions, TrainKey
from loquetier_jax.step.state import DeviceState, head_params
from loquetier_jax.step.unified import ForwardOut, Kept
from loquetier_jax.train.device_job import DeviceJob


@dataclass
class MicroStep:
    """A training pass in flight, advanced quantum by quantum as the scheduler allows.

    It owns the kept activations: each backward slice drops its layers', which frees them on the device.

    Attributes:
        key: Selects the compiled functions.
        items: The packs, in order.
        slice_layers: Layers per quantum, 0 = all of them.
        logp, correct: [G * L] on the device, once the forward has been dispatched.
        losses: [G] on the device, for jobs with their own loss; None for cross-entropy.
        forward: (start, stop) layers of the forward slices still to dispatch, in order.
        backward: Backward slices still to dispatch, last layers first; empty before the forward is done.
    """

    key: TrainKey
    items: list[TrainItem]
    slice_layers: int = 0
    logp: Float[Array, " T"] | None = None
    correct: Bool[Array, " T"] | None = None
    losses: Float[Array, " G"] | None = None
    backward: list[tuple[int, int]] = field(default_factory=list)
    forward: list[tuple[int, int]] = field(default_factory=list)
    _kept: Kept = field(default_factory=list)
    _hidden: Float[Array, "T D"] | None = None
    _flat: Int[Array, " N"] | None = None  # the whole train-only batch, for forward slices
    _flat_train: Int[Array, " N"] | None = None  # the TrainRows, for the backward
    _dx: Float[Array, "T D"] | None = None

    @property
    def tail(self) -> Float[Array, "T D"] | None:
        """Output of the last dispatched quantum: ready when that quantum has completed."""
        return self._dx if self.forward_done else self._hidden

    @property
    def forward_done(self) -> bool:
        """Whether the log-probs have been dispatched."""
        return self.logp is not None

    @property
    def done(self) -> bool:
        """Whether every gradient has been dispatched."""
        return self.forward_done and not self.backward

    def take_fused(
        self, out: ForwardOut, batch: SegmentBatch, functions: StepFunctions, state: DeviceState
    ) -> None:
        """Takes over from a forward that ran these packs together with other rows; starts the backward.

        Args:
            out: That forward's result; the caller must drop its references to `out.kept` and `out.hidden`.
            batch: The host batch of that forward; its first `len(items)` packs are this pass's.
        """
        self._kept, self._hidden = out.kept, out.hidden
        self.logp, self.correct = out.train["logp"], out.train["correct"]
        self._start_backward(batch, functions, state)

    def start_slices(self, cfg: EngineConfig, functions: StepFunctions, state: DeviceState) -> None:
        """Begins a forward in slices, without other rows."""
        batch = pack_step(StepItems(train=list(self.items)), self.key.bucket, cfg).batch
        self._flat = jax.device_put(ravel(batch))
        self._flat_train = jax.device_put(ravel(batch.train))
        self._hidden = functions.forward_start(self.key)(state.params, self._flat)
        self.forward = functions.slices(self.slice_layers)

    def run_forward_slice(self, functions: StepFunctions, state: DeviceState) -> None:
        """Dispatches the next forward slice; after the last one, also the head and the start of the backward."""
        start, stop = self.forward.pop(0)
        run = functions.forward_slice(self.key, start, stop)
        self._hidden, kept = run(
            state.params["layers"][start:stop], state.pages.cut(start, stop), self._hidden, self._flat
        )
        self._kept += kept
        if not self.forward:
            out = functions.forward_end(self.key)(head_params(state.params), self._hidden, self._flat)
            self.logp, self.correct = out["logp"], out["correct"]
            self._flat = None
            self._start_backward(None, functions, state)

    def _start_backward(
        self, batch: SegmentBatch | None, functions: StepFunctions, state: DeviceState
    ) -> None:
        if batch is not None:
            self._flat_train = jax.device_put(ravel(batch.train))
        packs = [item.pack for item in self.items]
        extras = pass_extras(self.key.extras, packs, self.key.packs, self.key.pack_tokens)
        start = functions.backward_start(self.key)
        self._dx, self.losses = start(head_params(state.params), self._hidden, self.logp, self._flat_train, extras)
        self._hidden = None
        self.backward = functions.slices(self.slice_layers)[::-1]

    def run_backward(self, count: int, functions: StepFunctions, state: DeviceState) -> bool:
        """Dispatches the next `count` backward slices; returns whether it ran the whole backward as a single call."""
        whole = count >= len(self.backward) == len(functions.slices(self.slice_layers))
        if whole:
            self.backward = functions.slices(0)
        for _ in range(min(count, len(self.backward))):
            self.run_backward_slice(functions, state)
        return whole

    def run_backward_slice(self, functions: StepFunctions, state: DeviceState) -> None:
        """Dispatches the next backward slice, which adds to `state.grads`; frees the slice's activations."""
        start, stop = self.backward.pop(0)
        run = functions.backward_slice(self.key, start, stop)
        kept = self._kept[start:stop]
        del self._kept[start:]
        self._dx = state.backward(run, start, stop, kept, self._dx, self._flat_train)
        if not self.backward:
            self._flat_train = None

    def results(self) -> list[dict[str, Any]]:
        """Per pack {"logp": np [L], "correct": np [L], "loss": float, None for cross-entropy}; waits for the device."""
        size, count = self.key.pack_tokens, len(self.items)
        logp, correct = (np.asarray(a).reshape(-1, size)[:count] for a in (self.logp, self.correct))
        losses = [None] * count if self.losses is None else np.asarray(self.losses)[:count].tolist()
        rows = zip(logp, correct, losses, strict=True)
        return [{"logp": lp, "correct": hits, "loss": loss} for lp, hits, loss in rows]


@dataclass
class RunningPass:
    """A MicroStep with its packs and the jobs they belong to."""

    run: MicroStep
    owners: list[DeviceJob]
    packs: list[Pack]


@dataclass
class OptimizerResult:
    """A dispatched optimizer step."""

    device_job: DeviceJob
    metrics: dict[str, jax.Array]
    learning_rate: float
