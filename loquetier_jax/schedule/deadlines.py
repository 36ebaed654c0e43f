"""How much time the promise to requests leaves: milliseconds, inf where nothing is promised.

These are averages: callers add a margin for what takes longer than predicted.
"""

import math
from collections.abc import Collection, Iterable

from loquetier_jax.config import SLOConfig
from loquetier_jax.schedule.types import Decoding, Prefilling, Snapshot, Waiting


def first_gap_ms(slo: SLOConfig) -> float:
    """Longest gap after a first token: it is the mean of all gaps so far."""
    return min(slo.longest_gap_ms, math.inf if slo.tpot_ms is None else slo.tpot_ms)


def next_deadline(request: Decoding, slo: SLOConfig) -> float:
    """When the next token must come, seconds.

    TPOT is a mean, so a request ahead of it has time in hand, but no single gap may be longer than `longest_gap_ms`.
    Every token may be the last one, so the mean is kept at each of them: an end token leaves nothing to make up with.
    """
    mean = math.inf if slo.tpot_ms is None else request.first_token_time + request.num_output * slo.tpot_ms / 1e3
    return min(mean, request.last_token_time + slo.longest_gap_ms / 1e3)


def step_slack(snapshot: Snapshot) -> float:
    """From now to the earliest moment when a running request must have its next token; may be negative."""
    return 1e3 * (min((next_deadline(r, snapshot.slo) for r in snapshot.running), default=math.inf) - snapshot.now)


def token_budget(snapshot: Snapshot, decoded: bool, finishing: int, at: float, next_ms: float) -> float:
    """What may be put between this forward and the next one without a token coming late.

    Args:
        snapshot: Before this forward.
        decoded: Whether the running requests get a token in it.
        finishing: Requests that get their first token in it.
        at: When it ends, seconds.
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
    """The same for first tokens of pending prompts.

    Each needs the steps until there is room for it, then those of its prompt, all of `next_ms`.

    Args:
        snapshot: Before this forward.
        pending: Whose prompts do not end in it, in order of arrival.
        admit: Requests admitted to it.
        at: When it ends, seconds.
        next_ms: Predicted time of the next forward.
        rows: Prompt tokens of one forward.
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
    """Longest quantum beside which the first token of a request that has not come yet is in time.

    It may come just after a step has been decided, and the host is a step ahead of the device: it waits for two.

    Args:
        ttft_ms: Promised, if anything is.
        prompt_ms: Predicted time of a step with a whole prompt in it.

    Returns:
        Milliseconds; inf also where the prompt alone takes longer than promised: waiting less would not keep it.
    """
    if ttft_ms is None or ttft_ms <= prompt_ms:
        return math.inf
    return (ttft_ms - prompt_ms) / 2


class Reservations:
    """Reservations in the order in which they are made, nobody having to end before his max_tokens.

    Counted are free slots and KV pages, and those of the requests that decode. Not counted, so that a reservation is
    no promise: adapter pages; what requests still in their prompt, those admitted now and those with a reservation
    give back in their turn; who ends early, by a stop or a cancel.

    Attributes:
        slots, pages: What is left at the moment of the last reservation, once that is taken; negative when it can
            never be had from the running requests.
    """

    def __init__(self, snapshot: Snapshot, admit: Collection[str] = ()) -> None:
        """Starts from what is free, less what the waiting requests of `admit` take."""
        taken = [w.pages for w in snapshot.waiting if w.id in admit]
        self.slots, self.pages = snapshot.free_slots - len(taken), snapshot.free_pages - sum(taken)
        self._ending = sorted(((r.remaining, r.pages) for r in snapshot.running), reverse=True)
        self._steps = 0

    def reserve(self, request: Waiting) -> int:
        """Steps until there is room for one more, which it then takes."""
        while self._ending and (self.slots < 1 or self.pages < request.pages):
            self._steps, pages = self._ending.pop()
            self.slots, self.pages = self.slots + 1, self.pages + pages
        self.slots, self.pages = self.slots - 1, self.pages - request.pages
        return self._steps
