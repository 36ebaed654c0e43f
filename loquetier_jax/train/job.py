"""A fine-tuning job as a host state machine: which pack is next, when a step is due, how it ended. Without jax."""

import math
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from loquetier_jax.batch.packs import Pack
from loquetier_jax.errors import JobError
from loquetier_jax.train.config import TrainConfig
from loquetier_jax.train.data import Dataset
from loquetier_jax.train.data_checks import extra_names
from loquetier_jax.train.data_identity import data_identity
from loquetier_jax.train.evaluate import Evaluation, denominator
from loquetier_jax.train.lifecycle import Lifecycle
from loquetier_jax.train.metrics import MetricsWriter
from loquetier_jax.train.packing import Cursor, PackStream
from loquetier_jax.train.record import Record


class Job(Lifecycle):
    """One job, driven by the engine.

    Each step: `next_pack` -> `pack_dispatched` -> (forward, backward) -> `pack_finished`, until `step_due`;
    then the optimizer step, with gradients divided by `denominator_dispatched`, and `finish_step`. While `evaluating`,
    the same with `next_eval_pack`, `eval_pack_dispatched` and `eval_pack_finished`. Packs finish in dispatch order.
    The optimizer step must be dispatched only once: `step_due` stays true until `finish_step`.

    Args:
        name: The name of the job and its adapter.
        cfg: The training configuration.
        data: The training data.
        eval_data: Held-out data, or None.
        metrics: Writer of its lines, or None; `record.lines` has them in any case.
        clock: Returns wall-clock seconds.
        tokenized_at: When its records were tokenized: the date that chat templates see, also after a resume. None: now.
        untrained: Whether its adapter starts as a no-op, so that step 0 measures the base.

    Attributes:
        status, error: See `Lifecycle`.
        step: Optimizer steps done.
        cursor: The next pack to dispatch.
        record: Its losses and metrics.
        extras: Names of the extras that its samples carry for its loss.
        saved_step: The step of its last checkpoint.
    """

    def __init__(
        self,
        name: str,
        cfg: TrainConfig,
        data: Dataset,
        eval_data: Dataset | None = None,
        *,
        metrics: MetricsWriter | None = None,
        clock: Callable[[], float] = time.time,
        tokenized_at: datetime | None = None,
        untrained: bool = False,
    ) -> None:
        super().__init__(name)
        self.cfg = cfg
        self.tokenized_at = tokenized_at or datetime.now()
        self.untrained = untrained
        self.stream = PackStream(data, cfg)
        self.extras = extra_names(data.samples[0])
        self.evaluation = None if eval_data is None else Evaluation(eval_data, cfg)
        self.record = Record(metrics, clock)
        self.step = 0
        self.cursor = Cursor()
        self._in_flight: list[Pack] = []
        self.saved_step = 0
        self._pack: Pack | None = None

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole job, unless it stops early."""
        return self.stream.total_steps

    @property
    def evaluating(self) -> bool:
        """Whether evaluation packs come before the next training pack."""
        return self.evaluation is not None and self.evaluation.active

    @property
    def best_step(self) -> int | None:
        """The step with the lowest evaluation loss; None before the first evaluation."""
        return None if self.evaluation is None else self.evaluation.best_step

    @property
    def in_flight(self) -> int:
        """Packs dispatched whose results have not been read; must be 0 for a checkpoint."""
        return len(self._in_flight) + (0 if self.evaluation is None else self.evaluation.in_flight)

    @property
    def denominator_dispatched(self) -> int:
        """The denominator of the current step's loss, including packs in flight, so they need not be read first."""
        return self.record.tally.denominator + sum(map(self._denominator, self._in_flight))

    def _denominator(self, pack: Pack) -> int:
        return denominator(pack, self.stream.data, self.cfg)

    @property
    def step_due(self) -> bool:
        """Whether all packs of a step have been accumulated and the optimizer step may run."""
        return self.status == "running" and self._accumulated

    @property
    def _accumulated(self) -> bool:
        return self.cursor.step > self.step and not self._in_flight

    @property
    def save_due(self) -> bool:
        """Whether save_steps asks for a checkpoint now, after the evaluation of its step; `saved` clears it."""
        every, done = self.cfg.save_steps, self.status == "succeeded"
        due = every > 0 and self.step > 0 and (self.step % every == 0 or done) and not self.evaluating
        return due and self.saved_step != self.step and self.status not in ("failed", "cancelled")

    def tell_left_out(self) -> None:
        """Writes what was cut or left out of its data, if anything, as the line of step 0."""
        line: dict[str, Any] = dict(self.stream.data.left_out)
        if self.evaluation is not None:
            line |= {f"eval_{name}": count for name, count in self.evaluation.data.left_out.items()}
        if line:
            self._write(line)

    def saved(self, step: int) -> None:
        """Notes that a checkpoint of that step exists."""
        self.saved_step = step

    def next_pack(self) -> Pack | None:
        """The next training pack, the same until `pack_dispatched`; None if none can be dispatched now."""
        if self.status != "running" or self.evaluating or self.cursor.step > self.step:
            return None
        if self._pack is None:
            self._pack = self.stream.pack(self.cursor)
        return self._pack

    def pack_dispatched(self, pack: Pack) -> None:
        """Advances the cursor.

        Raises:
            JobError: not the pack that `next_pack` returned.
        """
        if pack is not self._pack:
            raise JobError(
                f"job {self.name!r}: pack {pack.step}/{pack.index} is not the next one, {self.cursor}"
            )
        self._in_flight.append(pack)
        self._pack = None
        self.cursor = self.stream.after(self.cursor)

    def pack_finished(
        self,
        pack: Pack,
        logp: Float[np.ndarray, " L"],
        correct: Bool[np.ndarray, " L"] | None = None,
        loss: float | None = None,
    ) -> None:
        """Adds a pack's loss; ignored if the job has ended meanwhile.

        Args:
            pack: The oldest one in flight.
            logp: f32 log-probs of its targets.
            correct: Whether each target was the model's most likely token, if known.
            loss: The pack's loss if the job has its own loss function; None: cross-entropy.

        Raises:
            JobError: not the oldest one in flight.
        """
        if self.finished:
            return
        if not self._in_flight or self._in_flight[0] is not pack:
            raise JobError(
                f"job {self.name!r}: pack {pack.step}/{pack.index} is not the oldest one in flight"
            )
        self._in_flight.pop(0)
        self.record.tally.add(pack, self._denominator(pack), logp, correct, loss)

    def finish_step(self, grad_norm: float, learning_rate: float, weight_norm: float) -> None:
        """Completes an optimizer step: writes metrics, starts a due evaluation, ends the job.

        Ignored if the job has ended meanwhile.

        Args:
            grad_norm: Gradient norm before clipping.
            learning_rate: Learning rate of the step.
            weight_norm: Norm of the updated weights, whose loss may never be computed. Unless it, the gradient
                norm and the loss are finite, the job fails.

        Raises:
            JobError: no step is due.
        """
        if self.finished:
            return
        if not self._accumulated:
            raise JobError(f"job {self.name!r}: no optimizer step is due at {self.cursor}")
        loss = self.record.tally.loss
        if not all(map(math.isfinite, (loss, grad_norm, weight_norm))):
            numbers = f"loss {loss}, gradient norm {grad_norm}, norm of the new weights {weight_norm}"
            self.fail(f"step {self.step}: {numbers}: not finite{self._whose_fault(loss)}")
            return
        self.record.close_step()
        self.step += 1
        last = self.step >= self.total_steps
        if last or self.step % self.cfg.logging_steps == 0:
            self._write(self.record.steps_line() | {"grad_norm": grad_norm, "learning_rate": learning_rate})
        every = self.cfg.eval_steps
        if self.evaluation is not None and (last or (every and self.step % every == 0)):
            self.evaluation.start()
        elif last:
            self.status = "succeeded"

    def _whose_fault(self, loss: float) -> str:
        """The certain cause of a non-finite step, for the message; "" if there is none."""
        if not self.record.tally.finite and self.step == 0 and self.untrained:
            return "; the base model's own log-probs of these tokens are not finite (nothing has been trained yet)"
        if self.record.tally.finite and not math.isfinite(loss):
            return "; the log-probs are finite, so the cause is the loss function"
        return ""

    def next_eval_pack(self) -> Pack | None:
        """The next evaluation pack; None if none can be dispatched now."""
        return self.evaluation.next_pack() if self.status == "running" and self.evaluating else None

    def eval_pack_dispatched(self, pack: Pack) -> None:
        """Advances to the next evaluation pack; raises JobError if `pack` was not the next one."""
        if not self.evaluating:
            raise JobError(f"job {self.name!r}: no evaluation is under way")
        self.evaluation.pack_dispatched(pack)

    def eval_pack_finished(
        self,
        pack: Pack,
        logp: Float[np.ndarray, " L"],
        correct: Bool[np.ndarray, " L"] | None = None,
        loss: float | None = None,
    ) -> None:
        """Adds an evaluation pack's loss; after the last one, writes the line and decides whether to continue."""
        if self.finished:
            return
        if not self.evaluation.pack_finished(pack, logp, correct, loss):
            return
        line = self.evaluation.finish(self.step)
        if not math.isfinite(line["eval_loss"]):
            self.fail(f"step {self.step}: evaluation loss {line['eval_loss']}: not finite")
            return
        self._write(line)
        if self.step >= self.total_steps or self.evaluation.should_stop:
            self.status = "succeeded"

    def state_dict(self) -> dict[str, Any]:
        """The host state as JSON data (Python's floats survive the round trip exactly).

        Raises:
            JobError: packs are in flight, so their gradients may or may not be in the accumulators.
        """
        if self.in_flight:
            raise JobError(f"job {self.name!r}: {self.in_flight} packs are in flight; wait for them first")
        evaluation = self.evaluation
        return {
            "name": self.name,
            "config": self.cfg.to_dict(),
            "status": self.status,
            "error": self.error,
            "step": self.step,
            "cursor": self.cursor.to_dict(),
            "paused_from": self.paused_from,
            "untrained": self.untrained,
            "tokenized_at": self.tokenized_at.isoformat(),
            "record": self.record.state_dict(),
            "data": data_identity(self.stream.data),
            "eval_data": data_identity(None if evaluation is None else evaluation.data),
            "evaluation": None if evaluation is None else evaluation.state_dict(),
        }

    def _write(self, line: dict[str, Any]) -> None:
        self.record.write(self.step, self.stream.epochs_done(self.step), line)

    def _drop(self) -> None:
        self._in_flight.clear()
        if self.evaluation is not None:
            self.evaluation.abandon()
