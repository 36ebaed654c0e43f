"""How much time the promise to requests leaves: milliseconds, inf where nothing is promised."""

import math
from collections.abc import Collection, Iterable

from loquetier_jax.schedule.room import Room
from loquetier_jax.schedule.snapshot import Decoding, Prefilling, Snapshot, Waiting


def next_deadline(request: Decoding, tpot_ms: float, gap_factor: float) -> float:
    """When the next token must come, seconds.

    TPOT is a mean, so a request ahead of it has time in hand; but no single gap may be longer than gap_factor
    times the mean.
    """
    mean = request.first_token_time + request.num_output * tpot_ms / 1e3
    return min(mean, request.last_token_time + gap_factor * tpot_ms / 1e3)


def step_slack(snapshot: Snapshot, gap_factor: float) -> float:
    """From now to the earliest moment when a running request must have its next token; may be negative."""
    tpot = snapshot.slo.tpot_ms
    if tpot is None or not snapshot.running:
        return math.inf
    return 1e3 * (min(next_deadline(r, tpot, gap_factor) for r in snapshot.running) - snapshot.now)


def token_budget(snapshot: Snapshot, decoded: bool, finishing: int, at: float, next_ms: float, gap: float) -> float:
    """What may be put between this forward and the next one without a token coming late.

    Args:
        snapshot: Before this forward.
        decoded: Whether the running requests get a token in it.
        finishing: Requests that get their first token in it.
        at: When it ends, seconds.
        next_ms: Predicted time of the next forward.
        gap: gap_factor.
    """
    tpot = snapshot.slo.tpot_ms
    if tpot is None:
        return math.inf
    deadlines = [at + tpot / 1e3] if finishing else []
    for r in snapshot.running:
        if decoded:
            mean = r.first_token_time + (r.num_output + 1) * tpot / 1e3
            deadlines.append(min(mean, at + gap * tpot / 1e3))
        else:
            deadlines.append(next_deadline(r, tpot, gap))
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
    room = Room(snapshot, admit)
    for r in pending:
        tokens = r.remaining if isinstance(r, Prefilling) else r.prompt_tokens
        steps = -(-tokens // max(rows, 1))
        if isinstance(r, Waiting) and r.id not in admit:
            steps += room.reserve(r)
        budget = min(budget, 1e3 * (r.arrival - at) + ttft - steps * next_ms)
    return budget
