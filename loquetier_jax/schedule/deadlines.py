"""Time left by the latency targets, in milliseconds; inf without targets.

Based on mean predictions: callers subtract a margin for runs that take longer.
"""

import math
from collections.abc import Collection, Iterable

from loquetier_jax.config import SLOConfig
from loquetier_jax.schedule.types import Decoding, Prefilling, Snapshot, Waiting


def first_gap_ms(slo: SLOConfig) -> float:
    """Longest gap allowed after a first token, ms: that gap alone must also meet the TPOT, a mean over all gaps."""
    return min(slo.longest_gap_ms, math.inf if slo.tpot_ms is None else slo.tpot_ms)


def next_deadline(request: Decoding, slo: SLOConfig) -> float:
    """When the next token is due, in seconds.

    TPOT is a mean, so a request that is ahead of it has time in hand, but no gap may exceed `longest_gap_ms`. Any token
    may be the last one, so the mean must hold at every token: there may be no later tokens to make up for a late one.
    """
    mean = math.inf if slo.tpot_ms is None else request.first_token_time + request.num_output * slo.tpot_ms / 1e3
    return min(mean, request.last_token_time + slo.longest_gap_ms / 1e3)


def step_headroom(snapshot: Snapshot) -> float:
    """Milliseconds from now until the first running request's next token is due; may be negative."""
    return 1e3 * (min((next_deadline(r, snapshot.slo) for r in snapshot.running), default=math.inf) - snapshot.now)


def token_budget(snapshot: Snapshot, decoded: bool, finishing: int, at: float, next_ms: float) -> float:
    """Milliseconds that may be spent between this forward and the next one without making a token late.

    Args:
        snapshot: State before this forward.
        decoded: Whether the running requests get a token in it.
        finishing: Number of requests that get their first token in it.
        at: When it ends, in seconds.
        next_ms: Predicted time of the next forward.
    """
    slo = snapshot.slo
    deadlines = [at + first_gap_ms(slo) / 1e3] if finishing else []
    for r in snapshot.running:
        if decoded:
            mean = math.inf if slo.tpot_ms is None else r.first_token_time + (r.num_output + 1) * slo.tpot_ms / 1e3
            deadlines.append(min(mean, at + slo.longest_gap_ms / 1e3))
        else:
            deadlines.append(next_deadline(r, slo))
    return 1e3 * (min(deadlines, default=math.inf) - at) - next_ms


def first_token_budget(
    snapshot: Snapshot,
    pending: Iterable[Prefilling | Waiting],
    admit: Collection[str],
    at: float,
    next_ms: float,
    rows: int,
) -> float:
    """Like `token_budget`, for the first tokens of pending prompts.

    Each needs the steps until there is room for it and then those of its prompt, of `next_ms` each.

    Args:
        snapshot: State before this forward.
        pending: Requests whose prompts do not end in it, in order of arrival.
        admit: Ids of requests admitted to it.
        at: When it ends, in seconds.
        next_ms: Predicted time of the next forward.
        rows: Prompt tokens per forward.
    """
    ttft = snapshot.slo.ttft_ms
    if ttft is None:
        return math.inf
    budget = math.inf
    room = Reservations(snapshot, admit)
    for r in pending:
        tokens = r.remaining if isinstance(r, Prefilling) else r.prompt_tokens
        steps = -(-tokens // max(rows, 1))
        if isinstance(r, Waiting) and r.id not in admit:
            steps += room.reserve(r)
        budget = min(budget, 1e3 * (r.arrival - at) + ttft - steps * next_ms)
    return budget


def arrival_budget(ttft_ms: float | None, prompt_ms: float) -> float:
    """Longest quantum that keeps the first token of a request that has not arrived yet on time.

    The request may arrive just after a step is decided, and the host is one step ahead of the device, so it waits for
    two quanta.

    Args:
        ttft_ms: The TTFT target, or None.
        prompt_ms: Predicted time of a step with a whole prompt.

    Returns:
        Milliseconds; inf without a target, or if the prompt alone misses it, since shorter quanta would not help.
    """
    if ttft_ms is None or ttft_ms <= prompt_ms:
        return math.inf
    return (ttft_ms - prompt_ms) / 2


class Reservations:
    """Estimates when waiting requests will have room, in order, assuming that every request runs to max_tokens.

    Counts free slots and KV pages and those of decoding requests. Ignores adapter pages, early ends (stop, cancel), and
    whatever requests that are prefilling, admitted now or reserved will return, so a reservation is only an estimate.

    Attributes:
        slots, pages: Slots and pages left at the time of the last reservation, after taking it; negative if the
            running requests will never free enough.
    """

    def __init__(self, snapshot: Snapshot, admit: Collection[str] = ()) -> None:
        """Starts from the free slots and pages, minus those taken by the waiting requests in `admit`."""
        taken = [w.pages for w in snapshot.waiting if w.id in admit]
        self.slots, self.pages = snapshot.free_slots - len(taken), snapshot.free_pages - sum(taken)
        self._ending = sorted(((r.remaining, r.pages) for r in snapshot.running), reverse=True)
        self._steps = 0

    def reserve(self, request: Waiting) -> int:
        """Reserves room for a request; returns the number of steps until it is available."""
        while self._ending and (self.slots < 1 or self.pages < request.pages):
            self._steps, pages = self._ending.pop()
            self.slots, self.pages = self.slots + 1, self.pages + pages
        self.slots, self.pages = self.slots - 1, self.pages - request.pages
        return self._steps
