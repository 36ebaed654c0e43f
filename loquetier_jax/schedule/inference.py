"""The inference rows of a step: all decodes, and the prompt chunks that are worth their time."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from loquetier_jax.config import Bucket
from loquetier_jax.errors import CapacityError
from loquetier_jax.schedule.admission import Admission
from loquetier_jax.schedule.buckets import blocks, cheapest, forward_late, forward_ms, serving_need
from loquetier_jax.schedule.deadlines import first_gap_ms, step_slack
from loquetier_jax.schedule.fairness import FairShare
from loquetier_jax.schedule.latency import LatencyModel
from loquetier_jax.schedule.types import Prefilling, Snapshot, Waiting


@dataclass(kw_only=True)
class Plan:
    """Inference rows of one step.

    Attributes:
        decode, admit, prefill: As in Decision.
        finishing: Requests whose prompt ends in this step: they get their first token.
        bucket: The cheapest that covers them; None without rows.
        ms: Its predicted time.
        late: By how much one such forward in a hundred takes longer.
        share: Prompt tokens served per adapter, afterwards.
        overtaken: See Fairness, afterwards.
        prefill_waits: See Fairness, afterwards.
    """

    decode: tuple[str, ...] = ()
    admit: tuple[str, ...] = ()
    prefill: tuple[tuple[str, int], ...] = ()
    finishing: tuple[str, ...] = ()
    bucket: Bucket | None = None
    ms: float = 0.0
    late: float = 0.0
    share: dict[str, float] = field(default_factory=dict)
    overtaken: dict[str, int] = field(default_factory=dict)
    prefill_waits: int = 0

    @property
    def need(self) -> Bucket | None:
        """The shape of the rows."""
        rows = sum(blocks(tokens) for _, tokens in self.prefill)
        return serving_need(len(self.decode), rows, len(self.prefill))


def plan_inference(
    snapshot: Snapshot,
    latency: LatencyModel,
    *,
    max_overtakes: int,
    max_prefill_waits: int,
) -> Plan:
    """Chooses the inference rows of the next step.

    All running requests decode. Of the buckets with prefill rows, the one that moves most prompt tokens per
    millisecond is taken, if it ends before the next token of anybody is due; if none does, prefill waits a
    few steps for slack, then goes anyway. A promise that decodes alone cannot keep holds no prompt up. Where no
    bucket holds decodes and a prompt together, they take turns.

    Raises:
        CapacityError: more requests run than any bucket can decode: admission was not the scheduler's.
    """
    decode_only = _decode_plan(snapshot, latency)
    if not snapshot.prefilling and not snapshot.waiting:
        return decode_only
    able = prefill_buckets(snapshot.buckets)
    mixed = [b for b in able if b.decode >= len(snapshot.running)]
    waits = snapshot.fairness.prefill_waits
    slack = math.inf if decode_only.ms > first_gap_ms(snapshot.slo) else step_slack(snapshot)
    if mixed:
        plans = [_fill(snapshot, b, latency, decode_only, max_overtakes) for b in mixed]
    else:
        alone = Plan(share=decode_only.share, overtaken=decode_only.overtaken)
        plans = [_fill(snapshot, b, latency, alone, max_overtakes) for b in able]
        plans = plans if waits or not snapshot.running else []
        slack -= decode_only.ms  # the decodes come only after it
    plans = [p for p in plans if p.prefill]
    in_time = [p for p in plans if p.ms <= slack]
    if in_time:
        return max(in_time, key=_rate)
    if plans and (not snapshot.running or waits >= max_prefill_waits):
        return min(plans, key=lambda p: p.ms)
    if plans or not mixed:
        decode_only.prefill_waits = waits + 1
    return decode_only


def _rate(plan: Plan) -> float:
    return sum(tokens for _, tokens in plan.prefill) / plan.ms


def prefill_buckets(buckets: Sequence[Bucket]) -> list[Bucket]:
    """Buckets with prefill rows; those that also carry train or score rows only where no other is there."""
    able = [b for b in buckets if b.prefill]
    return [b for b in able if not b.packs and not b.score_packs] or able


def _decode_plan(snapshot: Snapshot, latency: LatencyModel) -> Plan:
    candidates = [*snapshot.prefilling, *snapshot.waiting]
    waiting = {w.id for w in snapshot.waiting}
    plan = Plan(
        decode=tuple(r.id for r in snapshot.running),
        share=FairShare(snapshot.fairness.adapters, (c.adapter for c in candidates)).state(),
        overtaken={i: n for i, n in snapshot.fairness.overtaken.items() if i in waiting},
    )
    if plan.decode:
        plan.bucket = cheapest(snapshot, plan.need, latency)
        if plan.bucket is None:
            raise CapacityError(
                f"decode: got {len(plan.decode)} running requests, expected a bucket that holds them "
                f"among {[b.name for b in snapshot.buckets]}"
            )
        plan.ms, plan.late = forward_ms(snapshot, plan.bucket, latency), forward_late(snapshot, plan.bucket, latency)
    return plan


def _fill(snapshot: Snapshot, bucket: Bucket, latency: LatencyModel, base: Plan, max_overtakes: int) -> Plan:
    """`base` and as many prompt chunks as `bucket` holds, in the cheapest bucket that then covers them."""
    filling = Filling(snapshot, bucket, max_overtakes)
    plan = Plan(
        decode=base.decode,
        admit=tuple(filling.admission.admitted),
        prefill=tuple(filling.prefill),
        finishing=tuple(filling.finishing),
        share=filling.share.state(),
        overtaken=filling.admission.overtaken(),
    )
    if plan.prefill:
        plan.bucket = cheapest(snapshot, plan.need, latency)
        plan.ms, plan.late = forward_ms(snapshot, plan.bucket, latency), forward_late(snapshot, plan.bucket, latency)
    return plan


Candidate = Prefilling | Waiting
LOOKAHEAD = 8  # waiting requests of one adapter looked at when its first ones do not fit


class Filling:
    """Prompt chunks for one bucket.

    Attributes:
        prefill: (id, tokens) in order.
        finishing: Requests whose prompt ends here.
        share: Prompt tokens served per adapter, this step's included.
        admission: Room left, and who was admitted.
    """

    def __init__(self, snapshot: Snapshot, bucket: Bucket, max_overtakes: int) -> None:
        """Fills `bucket`."""
        self._queues: dict[str, deque[Candidate]] = {}
        for candidate in (*snapshot.prefilling, *snapshot.waiting):
            self._queues.setdefault(candidate.adapter, deque()).append(candidate)
        self._rows = bucket.prefill
        self.prefill: list[tuple[str, int]] = []
        self.finishing: list[str] = []
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
        if isinstance(candidate, Waiting):
            self.admission.take(candidate)
        self._rows -= blocks(tokens)
        self.prefill.append((candidate.id, tokens))
        self.share.charge(candidate.adapter, tokens)
        if tokens == left:
            self.finishing.append(candidate.id)
        queue.remove(candidate)
        return True

    def _can_go_on(self, candidate: Candidate) -> bool:
        return isinstance(candidate, Prefilling) or self.admission.fits(candidate)

    def _note_heads(self) -> None:
        """Lets admission see the first of every adapter, so that who has no room is known to be overtaken."""
        for queue in self._queues.values():
            if queue and isinstance(queue[0], Waiting):
                self.admission.fits(queue[0])
