"""Filling the prefill rows of one bucket: adapters by fair share, first come first served inside one."""

from collections import deque
from itertools import islice

from loquetier_jax.config import SAMPLING_LEVELS, Bucket, Sampling
from loquetier_jax.schedule.admission import Admission, highest
from loquetier_jax.schedule.fairness import FairShare
from loquetier_jax.schedule.lattice import blocks
from loquetier_jax.schedule.snapshot import Prefilling, Snapshot, Waiting

Candidate = Prefilling | Waiting
LOOKAHEAD = 8  # waiting requests of one adapter looked at when its first ones do not fit


def rank(sampling: Sampling) -> int:
    """Place of a sampling level: greedy 0, plain 1, full 2."""
    return SAMPLING_LEVELS.index(sampling)


class Filling:
    """Prompt chunks for one bucket.

    Attributes:
        prefill: (id, tokens) in order.
        finishing: Requests whose prompt ends here.
        sampling: Highest level among those.
        head: Whether the candidate whose turn it was is served.
        share: Prompt tokens served per adapter, this step's included.
        admission: Room left, and who was admitted.
    """

    def __init__(self, snapshot: Snapshot, bucket: Bucket, max_overtakes: int) -> None:
        """Fills `bucket`; a chunk that would end a prompt needs a bucket of the request's sampling level."""
        self._queues: dict[str, deque[Candidate]] = {}
        for candidate in (*snapshot.prefilling, *snapshot.waiting):
            self._queues.setdefault(candidate.adapter, deque()).append(candidate)
        self._bucket, self._rows = bucket, bucket.prefill
        self.prefill: list[tuple[str, int]] = []
        self.finishing: list[str] = []
        self.sampling: Sampling = "greedy"
        self.head: bool | None = None
        self.share = FairShare(snapshot.fairness.adapters, self._queues)
        self.admission = Admission(snapshot, max_overtakes)
        queues = dict(self._queues)
        while queues and self._rows and len(self.prefill) < bucket.chunks:
            adapter = self.share.first(queues)
            if not self._serve(queues[adapter]) or not queues[adapter]:
                del queues[adapter]
        self._note_heads()

    def _serve(self, queue: deque[Candidate]) -> bool:
        """Gives the next of an adapter's queue a chunk; False when nobody of it can have one."""
        candidate = next((c for c in islice(queue, LOOKAHEAD) if self._can_go_on(c)), None)
        if candidate is None:
            return False
        left = candidate.remaining if isinstance(candidate, Prefilling) else candidate.prompt_tokens
        tokens = min(left, self._rows)
        able = tokens < left or rank(candidate.sampling) <= rank(self._bucket.sampling)
        self.head = able if self.head is None else self.head
        if not able:  # its turn comes in another bucket, and nobody of its adapter passes it
            return False
        if isinstance(candidate, Waiting):
            self.admission.take(candidate)
        self._rows -= blocks(tokens)
        self.prefill.append((candidate.id, tokens))
        self.share.charge(candidate.adapter, tokens)
        if tokens == left:
            self.finishing.append(candidate.id)
            self.sampling = highest((self.sampling, candidate.sampling))
        queue.remove(candidate)
        return True

    def _can_go_on(self, candidate: Candidate) -> bool:
        return isinstance(candidate, Prefilling) or self.admission.fits(candidate)

    def _note_heads(self) -> None:
        """Lets admission see the first of every adapter, so that who has no room is known to be overtaken."""
        for queue in self._queues.values():
            if queue and isinstance(queue[0], Waiting):
                self.admission.fits(queue[0])
