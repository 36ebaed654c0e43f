"""Plans the inference rows of a step: all decodes, and the most efficient set of prompt chunks."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from loquetier_jax.config import Bucket
from loquetier_jax.errors import CapacityError
from loquetier_jax.schedule.admission import Admission
from loquetier_jax.schedule.buckets import blocks, cheapest, forward_late, forward_ms, serving_need
from loquetier_jax.schedule.deadlines import first_gap_ms, step_headroom
from loquetier_jax.schedule.fairness import FairShare
from loquetier_jax.schedule.latency import LatencyModel
from loquetier_jax.schedule.types import Prefilling, Snapshot, Waiting


@dataclass(kw_only=True)
class Plan:
    """The inference rows of one step.

    Attributes:
        decode, admit, prefill: As in Decision.
        finishing: Requests whose prompt ends in this step, and which get their first token.
        bucket: The cheapest bucket that covers the rows; None without rows.
        ms: Its predicted time.
        late: Milliseconds by which one such forward in a hundred exceeds the prediction.
        share: Prompt tokens served per adapter, after this step.
        overtaken, prefill_waits: See Fairness; after this step.
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

    All running requests decode. Among the buckets with prefill rows that end before any running request's next token
    is due, the one with the most prompt tokens per millisecond is used; if there is none, prefill waits a few steps
    for headroom and then runs anyway. Targets that decode alone cannot meet do not delay prompts. If no bucket can
    hold the decodes and a prompt together, they alternate.

    Raises:
        CapacityError: more requests are running than any bucket can decode, i.e. not admitted by this scheduler.
    """
    decode_only = _decode_plan(snapshot, latency)
    if not snapshot.prefilling and not snapshot.waiting:
        return decode_only
    able = prefill_buckets(snapshot.buckets)
    mixed = [b for b in able if b.decode >= len(snapshot.running)]
    waits = snapshot.fairness.prefill_waits
    headroom = math.inf if decode_only.ms > first_gap_ms(snapshot.slo) else step_headroom(snapshot)
    if mixed:
        plans = [_fill(snapshot, b, latency, decode_only, max_overtakes) for b in mixed]
    else:
        alone = Plan(share=decode_only.share, overtaken=decode_only.overtaken)
        plans = [_fill(snapshot, b, latency, alone, max_overtakes) for b in able]
        plans = plans if waits or not snapshot.running else []
        headroom -= decode_only.ms  # the decodes run after it
    plans = [p for p in plans if p.prefill]
    in_time = [p for p in plans if p.ms <= headroom]
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
    """Buckets with prefill rows and no train or score rows, or all with prefill rows if there are none."""
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
                f"decode: got {len(plan.decode)} running requests, which fit no bucket of "
                f"{[b.name for b in snapshot.buckets]}"
            )
        plan.ms, plan.late = forward_ms(snapshot, plan.bucket, latency), forward_late(snapshot, plan.bucket, latency)
    return plan


def _fill(snapshot: Snapshot, bucket: Bucket, latency: LatencyModel, base: Plan, max_overtakes: int) -> Plan:
    """`base` plus as many prompt chunks as fit `bucket`, in the cheapest bucket that covers the result."""
    builder = PrefillBuilder(snapshot, bucket, max_overtakes)
    plan = Plan(
        decode=base.decode,
        admit=tuple(builder.admission.admitted),
        prefill=tuple(builder.prefill),
        finishing=tuple(builder.finishing),
        share=builder.share.state(),
        overtaken=builder.admission.overtaken(),
    )
    if plan.prefill:
        plan.bucket = cheapest(snapshot, plan.need, latency)
        plan.ms, plan.late = forward_ms(snapshot, plan.bucket, latency), forward_late(snapshot, plan.bucket, latency)
    return plan


Candidate = Prefilling | Waiting
LOOKAHEAD = 8  # candidates examined per adapter if its first ones do not fit


class PrefillBuilder:
    """Fills one bucket with prompt chunks, in fair order of adapters.

    Attributes:
        prefill: (id, tokens) in order.
        finishing: Requests whose prompt ends in this step.
        share: Prompt tokens served per adapter, including this step.
        admission: Room left, and admitted requests.
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
        """Shows admission the first waiting request of every adapter, so that those without room count as overtaken."""
        for queue in self._queues.values():
            if queue and isinstance(queue[0], Waiting):
                self.admission.fits(queue[0])
