"""Sums over packs, exact on the host; evaluation of a job on held-out data; early stopping."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from loquetier_jax.errors import JobError
from loquetier_jax.jobs.config import TrainConfig
from loquetier_jax.jobs.data import Dataset, Pack
from loquetier_jax.jobs.packing import build_pack, eval_packs

Loss = str | Callable[[Any, Any], Any]


def pack_loss(loss: Loss, pack: Pack, logp: Float[np.ndarray, " L"]) -> float:
    """Sum of a pack's token losses.

    Args:
        loss: "cross_entropy" (-sum(weights * logp), correctly rounded) or a function of (logp, weights).
        pack: Its weights say which rows count; log-probs of other rows may be anything.
        logp: f32, log-probs of the pack's targets.
    """
    if callable(loss):
        return float(np.asarray(loss(logp, pack.weights)))
    rows = pack.weights != 0
    terms = np.asarray(logp, np.float64)[rows] * pack.weights[rows].astype(np.float64)
    return -math.fsum(terms.tolist())


@dataclass
class Tally:
    """What the packs of a step or of an evaluation add up to.

    Attributes:
        losses: Loss sum of each pack, in the job's order.
        targets, tokens: Rows with a target, rows with a token.
        correct: Targets that were the model's first choice; None when not all packs said so.
    """

    losses: list[float] = field(default_factory=list)
    targets: int = 0
    tokens: int = 0
    correct: int | None = 0

    def add(
        self, loss: Loss, pack: Pack, logp: Float[np.ndarray, " L"], correct: Bool[np.ndarray, " L"] | None
    ) -> None:
        """Adds one pack."""
        self.losses.append(pack_loss(loss, pack, logp))
        self.targets += pack.num_targets
        self.tokens += pack.num_tokens
        if correct is None or self.correct is None:
            self.correct = None
        else:
            self.correct += int(np.count_nonzero(np.asarray(correct)[pack.weights != 0]))

    @property
    def loss(self) -> float:
        """Mean loss per target over all packs, exact up to the last division."""
        return math.fsum(self.losses) / self.targets

    @property
    def accuracy(self) -> float | None:
        """Share of targets that were the model's first choice, or None."""
        return None if self.correct is None else self.correct / self.targets


class Evaluation:
    """The evaluations of one job: which packs, their sums, the best so far and whether to stop.

    Args:
        data: Held-out samples.
        cfg: pack_tokens, loss and early stopping are used.
    """

    def __init__(self, data: Dataset, cfg: TrainConfig) -> None:
        self.data = data
        self.cfg = cfg
        self.bins = eval_packs(data, cfg)
        self.active = False
        self.best: float | None = None
        self.misses = 0
        self._tally = Tally()
        self._next = 0
        self._in_flight: list[Pack] = []

    def start(self) -> None:
        """Begins an evaluation at its first pack."""
        self.active, self._next, self._tally = True, 0, Tally()

    @property
    def in_flight(self) -> int:
        """Packs dispatched whose results have not come back."""
        return len(self._in_flight)

    def next_pack(self) -> Pack | None:
        """The next pack to score; None when all have been dispatched."""
        if not self.active or self._next == len(self.bins):
            return None
        last = self._next + 1 == len(self.bins)
        ids, rows = self.bins[self._next], self.cfg.pack_rows
        return build_pack(self.data.samples, ids, rows, index=self._next, is_last=last)

    def pack_dispatched(self, pack: Pack) -> None:
        """Moves on to the next pack."""
        if not self.active or pack.index != self._next:
            raise JobError(f"evaluation pack: got {pack.index}, expected {self._next}")
        self._in_flight.append(pack)
        self._next += 1

    def pack_finished(
        self, pack: Pack, logp: Float[np.ndarray, " L"], correct: Bool[np.ndarray, " L"] | None = None
    ) -> bool:
        """Adds a pack's log-probs; returns whether the evaluation is complete."""
        if not self._in_flight or self._in_flight[0] is not pack:
            raise JobError(f"evaluation pack {pack.index} is not the oldest one in flight")
        self._in_flight.pop(0)
        self._tally.add(self.cfg.loss, pack, logp, correct)
        return self._next == len(self.bins) and not self._in_flight

    def abandon(self) -> None:
        """Forgets packs in flight: their results will not be taken."""
        self.active = False
        self._in_flight.clear()

    def finish(self) -> dict[str, float]:
        """Ends a complete evaluation and counts it towards early stopping.

        Returns:
            {"eval_loss", "eval_mean_token_accuracy" when known}.
        """
        self.active = False
        loss = self._tally.loss
        # transformers' EarlyStoppingCallback: any fall moves the best, one beyond threshold restores patience
        improved = self.best is None or (
            loss < self.best and self.best - loss > self.cfg.early_stopping_threshold
        )
        self.misses = 0 if improved else self.misses + 1
        self.best = loss if self.best is None else min(self.best, loss)
        accuracy = self._tally.accuracy
        return {"eval_loss": loss} | ({} if accuracy is None else {"eval_mean_token_accuracy": accuracy})

    @property
    def should_stop(self) -> bool:
        """Whether patience is exhausted."""
        return 0 < self.cfg.early_stopping_patience <= self.misses

    def state_dict(self) -> dict[str, Any]:
        """JSON data. An evaluation under way starts over on resume: it ends the same."""
        return {"active": self.active, "best": self.best, "misses": self.misses}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.best, self.misses = state["best"], state["misses"]
        if state["active"]:
            self.start()
