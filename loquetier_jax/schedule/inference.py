"""Plans the inference rows of a step: all decodes, and the most efficient set of prompt chunks."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from loquetier_jax.config import Bucket
from loquetier_jax.errors import CapacityError
from loquetier_jax.schedule.buckets import (
    blocks,
    cheapest,
    decode_context,
    decode_reads,
    forward_late,
    forward_ms,
    limit_of,
    prefill_buckets,
    serving_need,
)
from loquetier_jax.schedule.chunks import PrefillBuilder, others_wait
from loquetier_jax.schedule.deadlines import first_gap_ms, step_headroom
from loquetier_jax.schedule.fairness import FairShare
from loquetier_jax.schedule.latency import NOTHING, LatencyModel, Reads
from loquetier_jax.schedule.types import Snapshot


@dataclass(kw_only=True)
class Plan:
    """The inference rows of one step.

    Attributes:
        decode, admit, prefill: As in Decision.
        finishing: Requests whose prompt ends in this step, and which get their first token.
        bucket: The cheapest bucket that covers the rows; None without rows.
        reads: What their attention reads.
        context: Most tokens that one of them attends to.
        ms: Its predicted time.
        late: Milliseconds by which one such forward in a hundred exceeds the prediction.
        share: Prompt tokens served per adapter, after this step.
        long: Whether a long prompt is among the prompts.
        overtaken, prefill_waits, long_ms: See Fairness; after this step.
    """

    decode: tuple[str, ...] = ()
    admit: tuple[str, ...] = ()
    prefill: tuple[tuple[str, int], ...] = ()
    finishing: tuple[str, ...] = ()
    bucket: Bucket | None = None
    reads: Reads = NOTHING
    context: int = 0
    ms: float = 0.0
    late: float = 0.0
    share: dict[str, float] = field(default_factory=dict)
    overtaken: dict[str, int] = field(default_factory=dict)
    prefill_waits: int = 0
    long: bool = False
    long_ms: float = 0.0

    def predict(self, snapshot: Snapshot, latency: LatencyModel) -> None:
        """Chooses the bucket and sets its predicted time."""
        self.bucket = cheapest(snapshot, self.need(snapshot), latency)
        if self.bucket is not None:
            self.ms = forward_ms(snapshot, self.bucket, latency, self.reads)
            self.late = forward_late(snapshot, self.bucket, latency, self.reads)

    def need(self, snapshot: Snapshot) -> Bucket | None:
        """The shape of the rows."""
        rows, context = sum(blocks(tokens) for _, tokens in self.prefill), limit_of(snapshot.buckets, self.context)
        return serving_need(len(self.decode), rows, len(self.prefill), context)


def plan_inference(
    snapshot: Snapshot,
    latency: LatencyModel,
    *,
    max_overtakes: int,
    max_prefill_waits: int,
    long_share: float = 1.0,
) -> Plan:
    """Chooses the inference rows of the next step.

    All running requests decode. Among the buckets with prefill rows that end before any running request's next token
    is due, the one with the most prompt tokens per millisecond is used; if there is none, prefill waits a few steps
    for headroom and then runs anyway. Targets that decode alone cannot meet do not delay prompts. If no bucket can
    hold the decodes and a prompt together, they alternate.

    Long prompts (see `is_long`) get at most `long_share` of the time while anybody else is served: what a step takes
    longer because of them is owed to others, who are served without them until it is paid back.

    Raises:
        CapacityError: more requests are running than any bucket can decode, i.e. not admitted by this scheduler.
    """
    decode_only = _decode_plan(snapshot, latency)
    if not snapshot.prefilling and not snapshot.waiting:
        return decode_only
    limits = max_overtakes, max_prefill_waits
    owed = snapshot.fairness.long_ms if others_wait(snapshot) else 0.0
    plan = _plan_prompts(snapshot, latency, decode_only, *limits, without_long=owed < 0)
    if owed < 0 and plan.bucket is None:  # the others have no room, so they are owed nothing
        owed = 0.0
        plan = _plan_prompts(snapshot, latency, decode_only, *limits, without_long=False)
    if long_share < 1:
        paid = -max(0.0, plan.ms - decode_only.ms) if plan.long else plan.ms * long_share / (1 - long_share)
        plan.long_ms = min(0.0, owed + paid)
    return plan


def _plan_prompts(
    snapshot: Snapshot,
    latency: LatencyModel,
    decode_only: Plan,
    max_overtakes: int,
    max_prefill_waits: int,
    *,
    without_long: bool,
) -> Plan:
    able = prefill_buckets(snapshot.buckets)
    mixed = [b for b in able if b.decode >= len(snapshot.running) and b.fits(decode_only.context)]
    waits = snapshot.fairness.prefill_waits
    headroom = math.inf if decode_only.ms > first_gap_ms(snapshot.slo) else step_headroom(snapshot)
    base, usable = decode_only, mixed
    if not mixed:
        base = Plan(share=decode_only.share, overtaken=decode_only.overtaken)
        usable = able if waits or not snapshot.running else []
        headroom -= decode_only.ms  # the decodes run after it

    def plans(limit: Callable[[Bucket], float]) -> list[Plan]:
        return _serving_the_first(
            [(b, _fill(snapshot, b, latency, base, max_overtakes, without_long, limit(b))) for b in usable]
        )

    in_time = [p for p in plans(lambda b: _most_pairs(snapshot, b, latency, base, headroom)) if p.ms <= headroom]
    if in_time:
        return max(in_time, key=_rate)
    late = [] if math.isinf(headroom) else plans(lambda _: math.inf)
    if late and (not snapshot.running or waits >= max_prefill_waits):
        return min(late, key=lambda p: p.ms)
    return replace(decode_only, prefill_waits=waits + 1) if late or not mixed else replace(decode_only)


def _serving_the_first(plans: list[tuple[Bucket, Plan]]) -> list[Plan]:
    """The plans with prompts; without those that pass over the first in fair order, as its context exceeds theirs."""
    able = [(bucket.context or math.inf, plan) for bucket, plan in plans if plan.prefill]
    if not able:
        return []
    first = max(able, key=lambda one: one[0])[1].prefill[0][0]
    return [plan for _, plan in able if any(name == first for name, _ in plan.prefill)]


def _most_pairs(snapshot: Snapshot, bucket: Bucket, latency: LatencyModel, base: Plan, headroom: float) -> float:
    """How many (row, key) pairs prompts may have for a step of this bucket to end within `headroom` ms."""
    per_pair = latency.attention_ms(Reads(pairs=1))
    if math.isinf(headroom) or not per_pair:
        return math.inf
    return (headroom - forward_ms(snapshot, bucket, latency, base.reads)) / per_pair


def _rate(plan: Plan) -> float:
    return sum(tokens for _, tokens in plan.prefill) / plan.ms


def _decode_plan(snapshot: Snapshot, latency: LatencyModel) -> Plan:
    candidates = [*snapshot.prefilling, *snapshot.waiting]
    waiting = {w.id for w in snapshot.waiting}
    plan = Plan(
        decode=tuple(r.id for r in snapshot.running),
        share=FairShare(snapshot.fairness.adapters, (c.adapter for c in candidates)).state(),
        overtaken={i: n for i, n in snapshot.fairness.overtaken.items() if i in waiting},
    )
    if plan.decode:
        plan.reads, plan.context = decode_reads(snapshot), decode_context(snapshot)
        plan.predict(snapshot, latency)
        if plan.bucket is None:
            raise CapacityError(
                f"decode: got {len(plan.decode)} running requests, which fit no bucket of "
                f"{[b.name for b in snapshot.buckets]}"
            )
    return plan


def _fill(
    snapshot: Snapshot,
    bucket: Bucket,
    latency: LatencyModel,
    base: Plan,
    max_overtakes: int,
    without_long: bool,
    most_pairs: float,
) -> Plan:
    """`base` plus as many prompt chunks as fit `bucket`, in the cheapest bucket that covers the result."""
    builder = PrefillBuilder(snapshot, bucket, max_overtakes, without_long=without_long, most_pairs=most_pairs)
    plan = Plan(
        decode=base.decode,
        admit=tuple(builder.admission.admitted),
        prefill=tuple(builder.prefill),
        finishing=tuple(builder.finishing),
        share=builder.share.state(),
        overtaken=builder.admission.overtaken(),
        reads=base.reads._replace(pairs=builder.pairs),
        long=builder.long,
        context=max(base.context, builder.context),
    )
    if plan.prefill:
        plan.predict(snapshot, latency)
    return plan
