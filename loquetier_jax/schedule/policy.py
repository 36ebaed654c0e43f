"""The scheduling policy: a pure function from a snapshot of the queues to a decision; no device, no clock.

Every step, in this order: all running decodes; the prompt chunks that are efficient and make no token late; then
training or scoring. With latency targets (SLO), that is the largest quantum that fits into the headroom, followed by
later stages while there is time; without targets, an occasional quantum, so that training gets its share of device
time; without requests, the largest quantum available.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loquetier_jax.config import BLOCK, Bucket, is_int, is_number, require
from loquetier_jax.schedule.buckets import (
    cheapest,
    decode_context,
    decode_reads,
    forward_late,
    forward_ms,
    limit_of,
    prefill_buckets,
    serving_need,
)
from loquetier_jax.schedule.choose import Budget, choose
from loquetier_jax.schedule.deadlines import arrival_budget, first_token_budget, step_headroom, token_budget
from loquetier_jax.schedule.inference import Plan, plan_inference
from loquetier_jax.schedule.latency import LatencyModel
from loquetier_jax.schedule.training import WorkOption, job_share
from loquetier_jax.schedule.types import Decision, Fairness, Snapshot


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Settings of the policy.

    Attributes:
        train_share: Fraction of device time for training and scoring while there are requests, without latency
            targets; in [0, 1].
        train_floor: The same with latency targets, guaranteed even if it violates them.
        max_quantum_ms: Longest quantum while there are requests without latency targets, unless all are longer.
        margin: With latency targets, plans reserve this many times the measured p99 excess over the predicted time; 0
            plans with the mean.
        max_lead: Maximum packs that a job may be ahead of the least served job that wants to train.
        max_overtakes: Maximum later requests admitted before one that does not fit.
        max_prefill_waits: Maximum consecutive steps that prefill waits for headroom.
        long_prompt_share: Fraction of device time for prompts of more than LONG_STEPS steps while others are served, in
            (0, 1]; with 0.5, a token takes twice as long beside them on average.
    """

    train_share: float = 0.5
    train_floor: float = 0.0
    max_quantum_ms: float = 50.0
    margin: float = 1.0
    max_lead: int = 1
    max_overtakes: int = 16
    max_prefill_waits: int = 8
    long_prompt_share: float = 0.5

    def __post_init__(self) -> None:
        for name in ("train_share", "train_floor"):
            value = getattr(self, name)
            require(is_number(value) and 0 <= value <= 1, name, value, "a number in [0, 1]")
        share = self.long_prompt_share
        require(is_number(share) and 0 < share <= 1, "long_prompt_share", share, "a number in (0, 1]")
        quantum, margin, lead = self.max_quantum_ms, self.margin, self.max_lead
        require(is_number(quantum) and quantum > 0, "max_quantum_ms", quantum, "a number > 0")
        require(is_number(margin) and margin >= 0, "margin", margin, "a number >= 0")
        require(is_int(lead) and lead >= 1, "max_lead", lead, "an integer >= 1")
        for name in ("max_overtakes", "max_prefill_waits"):
            value = getattr(self, name)
            require(is_int(value) and value >= 0, name, value, "an integer >= 0")


def decide(snapshot: Snapshot, latency: LatencyModel, config: PolicyConfig) -> Decision:
    """Decides what the engine does next.

    Args:
        snapshot: State of the queues; not modified.
        latency: Predictions; not modified.
        config: Settings.

    Returns:
        A decision that only uses buckets and shapes of the snapshot. Its `fairness` goes into the next snapshot. Equal
        arguments give equal decisions.

    Raises:
        CapacityError: more requests are running than any bucket can decode.
    """
    plan = plan_inference(
        snapshot,
        latency,
        max_overtakes=config.max_overtakes,
        max_prefill_waits=config.max_prefill_waits,
        long_share=config.long_prompt_share,
    )
    budget = _budget(snapshot, plan, latency, config)
    share = job_share(snapshot)
    chosen, any_work = choose(snapshot, plan, budget, latency, share, config.max_lead)
    for name in (n for option in chosen for n in option.charged):
        share.charge(name, 1)
    fairness = Fairness(
        adapters=plan.share,
        jobs=share.state(),
        overtaken=plan.overtaken,
        credit_ms=_credit_left(budget, chosen) if any_work else 0.0,
        prefill_waits=plan.prefill_waits,
        long_ms=plan.long_ms,
        score_turn=not chosen[0].scored if chosen else snapshot.fairness.score_turn,
    )
    return _decision(snapshot, plan, chosen, latency, fairness)


def _credit_left(budget: Budget, chosen: Sequence[WorkOption]) -> float:
    if budget.idle or math.isinf(budget.credit):
        return 0.0
    left = budget.credit - sum(option.ms for option in chosen)
    return max(0.0, left) if budget.promised else left  # time within the headroom is not owed back


def _decision(
    snapshot: Snapshot, plan: Plan, chosen: Sequence[WorkOption], latency: LatencyModel, fairness: Fairness
) -> Decision:
    riding = chosen[0] if chosen and chosen[0].fused else None
    return Decision(
        admit=plan.admit,
        bucket=riding.fused if riding else plan.bucket,
        decode=plan.decode,
        prefill=plan.prefill,
        packs=riding.packs if riding else (),
        score=riding.score if riding else (),
        quanta=tuple(option.quantum for option in chosen if option.quantum is not None),
        forward_ms=forward_ms(snapshot, riding.fused, latency, plan.reads) if riding else plan.ms,
        fairness=fairness,
    )


def _budget(snapshot: Snapshot, plan: Plan, latency: LatencyModel, config: PolicyConfig) -> Budget:
    served = dict(plan.prefill)
    pending = [r for r in snapshot.prefilling if served.get(r.id, 0) < r.remaining]
    pending += [r for r in snapshot.waiting if served.get(r.id, 0) < r.prompt_tokens]
    idle = not snapshot.running and not plan.prefill and not pending
    following = _next_forward(snapshot, plan, bool(pending), latency)
    attention = latency.attention_ms(decode_reads(snapshot))
    next_ms = sum(forward_ms(snapshot, b, latency) for b in following) + attention
    rows = max((b.prefill for b in following), default=0)
    at = snapshot.now + plan.ms / 1e3
    decoded = bool(plan.decode)
    late = config.margin * (snapshot.late_ms + plan.late)
    due = min(
        token_budget(snapshot, decoded, len(plan.finishing), at, next_ms),
        first_token_budget(snapshot, pending, plan.admit, at, next_ms, rows),
    )
    headroom = due - late - config.margin * sum(forward_late(snapshot, b, latency) for b in following)
    prompt_ms = max((forward_ms(snapshot, b, latency) for b in prefill_buckets(snapshot.buckets)), default=0.0)
    unseen = arrival_budget(snapshot.slo.ttft_ms, prompt_ms)
    share = config.train_share if math.isinf(headroom) else config.train_floor
    # A step without inference rows delays no request: those present cannot be admitted anyway.
    earned = math.inf if share == 1 or plan.bucket is None else plan.ms * share / (1 - share)
    return Budget(
        idle=idle,
        headroom=headroom if math.isinf(headroom) else min(headroom, unseen),
        step=step_headroom(snapshot) - late if decoded else math.inf,
        margin=config.margin,
        credit=snapshot.fairness.credit_ms + earned,
        longest=unseen if idle else min(unseen, config.max_quantum_ms),
    )


def _next_forward(snapshot: Snapshot, plan: Plan, pending: bool, latency: LatencyModel) -> list[Bucket]:
    """The bucket of the next forward, or of the next two if prompts and decodes alternate."""
    running = len(snapshot.running) + len(plan.finishing)
    chunk = (BLOCK, 1) if pending else (0, 0)
    context = limit_of(snapshot.buckets, max(decode_context(snapshot), plan.context) + 1)
    need = serving_need(running, *chunk, context)
    if need is None:
        return []
    bucket = cheapest(snapshot, need, latency)
    if bucket is not None:
        return [bucket]
    halves = [serving_need(running, context=context), serving_need(0, *chunk, context)]  # they alternate
    found = [cheapest(snapshot, h, latency) for h in halves if h is not None]
    return [b for b in found if b is not None]
