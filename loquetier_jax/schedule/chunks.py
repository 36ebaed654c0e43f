"""Fills a bucket with prompt chunks, in fair order of adapters."""

import functools
import math
from collections import deque
from itertools import islice

from loquetier_jax.config import BLOCK, Bucket
from loquetier_jax.schedule.admission import Admission
from loquetier_jax.schedule.buckets import blocks, prefill_buckets
from loquetier_jax.schedule.fairness import FairShare
from loquetier_jax.schedule.latency import chunk_pairs
from loquetier_jax.schedule.types import Prefilling, Snapshot, Waiting

Candidate = Prefilling | Waiting
LOOKAHEAD = 8  # candidates examined per adapter if its first ones do not fit
LONG_STEPS = 8  # a prompt that fills the largest bucket more often is long


@functools.lru_cache(maxsize=256)
def step_rows(buckets: tuple[Bucket, ...]) -> int:
    """Most prompt rows of a step."""
    return max((b.prefill for b in prefill_buckets(buckets)), default=0)


def tokens_left(candidate: Candidate) -> int:
    """Prompt tokens that are not in the KV cache yet."""
    return candidate.prompt_tokens if isinstance(candidate, Waiting) else candidate.remaining


def is_long(candidate: Candidate, rows: int) -> bool:
    """Whether what is left of a prompt keeps steps of `rows` prompt rows so busy that others must not wait for it."""
    return 0 < LONG_STEPS * rows < tokens_left(candidate)


def affordable(start: int, pairs: float) -> float:
    """Most tokens of a chunk behind `start` tokens that has at most so many (row, key) pairs, in whole blocks."""
    if math.isinf(pairs):
        return math.inf
    at = start + 0.5  # chunk_pairs(start, n) = n * at + n^2 / 2
    most = math.sqrt(at * at + 2 * max(pairs, 0.0)) - at
    return int(most + 1e-6) // BLOCK * BLOCK


def others_wait(snapshot: Snapshot) -> bool:
    """Whether anybody but long prompts wants to be served."""
    rows = step_rows(snapshot.buckets)
    return bool(snapshot.running) or not all(is_long(c, rows) for c in (*snapshot.prefilling, *snapshot.waiting))


class PrefillBuilder:
    """Fills one bucket with prompt chunks, in fair order of adapters.

    Attributes:
        prefill: (id, tokens) in order.
        finishing: Requests whose prompt ends in this step.
        pairs: As in Reads.
        context: Most tokens that a row attends to.
        long: Whether one of them is long.
        share: Prompt tokens served per adapter, including this step.
        admission: Room left, and admitted requests.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        bucket: Bucket,
        max_overtakes: int,
        *,
        without_long: bool = False,
        most_pairs: float = math.inf,
    ) -> None:
        """Fills `bucket`.

        Args:
            snapshot: The requests.
            bucket: What to fill.
            max_overtakes: See Admission.
            without_long: Whether to leave long prompts out.
            most_pairs: Maximum of `pairs`; chunks are shortened to keep it.
        """
        self._queues: dict[str, deque[Candidate]] = {}
        rows = step_rows(snapshot.buckets)
        for candidate in (*snapshot.prefilling, *snapshot.waiting):
            if not (without_long and is_long(candidate, rows)):
                self._queues.setdefault(candidate.adapter, deque()).append(candidate)
        self._step_rows, self._most_pairs, self._bucket = rows, most_pairs, bucket
        self._rows = bucket.prefill
        self.prefill: list[tuple[str, int]] = []
        self.finishing: list[str] = []
        self.pairs = 0
        self.context = 0
        self.long = False
        self.share = FairShare(snapshot.fairness.adapters, self._queues)
        self.admission = Admission(snapshot, max_overtakes)
        queues = dict(self._queues)
        while queues and self._rows and len(self.prefill) < bucket.chunks:
            adapter = self.share.first(self._first_served(queues))
            if not self._serve(queues[adapter]) or not queues[adapter]:
                del queues[adapter]
        self._note_heads()

    def _first_served(self, queues: dict[str, deque[Candidate]]) -> list[str]:
        """The adapters to choose from: those that are resident, if any is."""
        steps_back = self.admission.steps_back
        first = [a for a, queue in queues.items() if isinstance(queue[0], Prefilling) or not steps_back(queue[0])]
        return first or list(queues)

    def _serve(self, queue: deque[Candidate]) -> bool:
        """Gives a chunk to the next eligible candidate of an adapter; False if there is none."""
        candidate = next((c for c in islice(queue, LOOKAHEAD) if self._can_go_on(c)), None)
        if candidate is None:
            return False
        left, start = tokens_left(candidate), candidate.done
        tokens = min(left, self._rows)
        if not self._bucket.fits(start + tokens):
            tokens = (self._bucket.context - start) // BLOCK * BLOCK
        if self.pairs + chunk_pairs(start, tokens) > self._most_pairs:
            tokens = min(tokens, int(affordable(start, self._most_pairs - self.pairs)))
        if tokens <= 0:
            return False
        if isinstance(candidate, Waiting):
            self.admission.take(candidate)
        self._rows -= blocks(tokens)
        self.prefill.append((candidate.id, tokens))
        self.pairs += chunk_pairs(start, tokens)
        self.context = max(self.context, start + tokens)
        self.long |= is_long(candidate, self._step_rows)
        self.share.charge(candidate.adapter, tokens)
        if tokens == left:
            self.finishing.append(candidate.id)
        queue.remove(candidate)
        return True

    def _can_go_on(self, candidate: Candidate) -> bool:
        fits = self._bucket.fits(candidate.done + min(tokens_left(candidate), BLOCK))
        return fits and (isinstance(candidate, Prefilling) or self.admission.fits(candidate))

    def _note_heads(self) -> None:
        """Shows admission the first waiting request of every adapter, so that those without room count as overtaken."""
        for queue in self._queues.values():
            if queue and isinstance(queue[0], Waiting):
                self.admission.fits(queue[0])
