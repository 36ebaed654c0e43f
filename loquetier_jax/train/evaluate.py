"""Exact loss sums over packs on the host, evaluation on held-out data, and early stopping."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from loquetier_jax.batch.packs import Pack
from loquetier_jax.errors import JobError
from loquetier_jax.train.config import TrainConfig
from loquetier_jax.train.data import Dataset
from loquetier_jax.train.packing import build_pack, eval_packs


def pack_loss(pack: Pack, logp: Float[np.ndarray, " L"]) -> float:
    """Cross-entropy summed over a pack: -sum(weights * logp), correctly rounded.

    Args:
        pack: The pack; log-probs of rows with weight 0 may be anything.
        logp: f32 log-probs of the pack's targets.
    """
    rows = pack.weights != 0
    terms = np.asarray(logp, np.float64)[rows] * pack.weights[rows].astype(np.float64)
    return -math.fsum(terms.tolist())


def denominator(pack: Pack, data: Dataset, cfg: TrainConfig) -> int:
    """A pack's contribution to the divisor of a step's summed losses."""
    counts = {
        "target": pack.num_targets,
        "sample": len(pack.sample_ids),
        "group": len(pack.sample_ids) // data.group_size,
    }
    return counts[cfg.loss_per]


@dataclass
class Tally:
    """Sums over the packs of a step or an evaluation.

    Attributes:
        losses: Loss sum of each pack, in the job's order.
        finite: Whether all log-probs of targets were finite.
        denominator: Divisor of the sum of losses.
        targets, tokens: Number of rows with a target, and with a token.
        correct: Number of targets that were the model's argmax; None unless known for all packs.
    """

    losses: list[float] = field(default_factory=list)
    denominator: int = 0
    targets: int = 0
    tokens: int = 0
    correct: int | None = 0
    finite: bool = True

    def add(
        self,
        pack: Pack,
        denominator: int,
        logp: Float[np.ndarray, " L"],
        correct: Bool[np.ndarray, " L"] | None,
        loss: float | None,
    ) -> None:
        """Adds one pack; `loss` None means its cross-entropy."""
        self.losses.append(pack_loss(pack, logp) if loss is None else loss)
        self.finite &= bool(np.isfinite(np.asarray(logp)[pack.weights != 0]).all())
        self.denominator += denominator
        self.targets += pack.num_targets
        self.tokens += pack.num_tokens
        if correct is None or self.correct is None:
            self.correct = None
        else:
            self.correct += int(np.count_nonzero(np.asarray(correct)[pack.weights != 0]))

    @property
    def loss(self) -> float:
        """Mean loss over all packs, exact except for the final division."""
        return math.fsum(self.losses) / self.denominator

    @property
    def accuracy(self) -> float | None:
        """Fraction of targets that were the model's argmax, or None."""
        return None if self.correct is None else self.correct / self.targets


class Evaluation:
    """The evaluations of one job: their packs and sums, the best result so far, and early stopping.

    Args:
        data: Held-out samples.
        cfg: Provides pack_tokens, loss_per and early stopping.

    Attributes:
        best, best_step: The lowest loss so far, and the number of optimizer steps at that time.
        misses: Evaluations since the last improvement.
    """

    def __init__(self, data: Dataset, cfg: TrainConfig) -> None:
        self.data = data
        self.cfg = cfg
        self.bins = eval_packs(data, cfg)
        self.active = False
        self.best: float | None = None
        self.best_step: int | None = None
        self.misses = 0
        self._tally = Tally()
        self._next = 0
        self._in_flight: list[Pack] = []

    def start(self) -> None:
        """Begins an evaluation at its first pack."""
        self.active, self._next, self._tally = True, 0, Tally()

    @property
    def in_flight(self) -> int:
        """Number of packs dispatched whose results have not been read."""
        return len(self._in_flight)

    def next_pack(self) -> Pack | None:
        """The next pack to score; None when all have been dispatched."""
        if not self.active or self._next == len(self.bins):
            return None
        last = self._next + 1 == len(self.bins)
        ids, rows = self.bins[self._next], self.cfg.pack_rows
        return build_pack(self.data.samples, ids, rows, index=self._next, is_last=last)

    def pack_dispatched(self, pack: Pack) -> None:
        """Advances to the next pack."""
        if not self.active or pack.index != self._next:
            raise JobError(f"evaluation pack: got {pack.index}, expected {self._next}")
        self._in_flight.append(pack)
        self._next += 1

    def pack_finished(
        self,
        pack: Pack,
        logp: Float[np.ndarray, " L"],
        correct: Bool[np.ndarray, " L"] | None = None,
        loss: float | None = None,
    ) -> bool:
        """Adds a pack's log-probs and, for a custom loss, its loss; returns whether it was the last pack."""
        if not self._in_flight or self._in_flight[0] is not pack:
            raise JobError(f"evaluation pack {pack.index} is not the oldest one in flight")
        self._in_flight.pop(0)
        self._tally.add(pack, denominator(pack, self.data, self.cfg), logp, correct, loss)
        return self._next == len(self.bins) and not self._in_flight

    def abandon(self) -> None:
        """Ends an evaluation early; results of packs in flight are dropped."""
        self.active = False
        self._in_flight.clear()

    def finish(self, step: int) -> dict[str, float]:
        """Ends a complete evaluation and counts it towards early stopping.

        Args:
            step: Optimizer steps done.

        Returns:
            {"eval_loss", "eval_mean_token_accuracy" when known}.
        """
        self.active = False
        loss = self._tally.loss
        # Like transformers' EarlyStoppingCallback: any decrease updates the best, one beyond threshold resets patience.
        improved = self.best is None or (
            loss < self.best and self.best - loss > self.cfg.early_stopping_threshold
        )
        self.misses = 0 if improved else self.misses + 1
        if self.best is None or loss < self.best:
            self.best, self.best_step = loss, step
        accuracy = self._tally.accuracy
        return {"eval_loss": loss} | ({} if accuracy is None else {"eval_mean_token_accuracy": accuracy})

    def forget_best(self) -> None:
        """Resets the best result."""
        self.best, self.best_step = None, None

    @property
    def should_stop(self) -> bool:
        """Whether patience is exhausted."""
        return 0 < self.cfg.early_stopping_patience <= self.misses

    def state_dict(self) -> dict[str, Any]:
        """JSON data. An evaluation in progress starts over on resume, with the same result."""
        return {"active": self.active, "best": self.best, "best_step": self.best_step, "misses": self.misses}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.best, self.best_step, self.misses = state["best"], state["best_step"], state["misses"]
        if state["active"]:
            self.start()
