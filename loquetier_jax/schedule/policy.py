"""Who runs next: a pure function from a snapshot of the queues to a decision; no device, no clock.

Every step, in this order: all running decodes; prompt chunks, as many as are worth their time and make no
token late; then training or scoring. With a promise to keep (SLO), the largest quantum that fits what the
promise leaves, and the stages after it while there is time; without one, a quantum now and then, so that
training has its share of the device time; when no request is there, the largest quantum there is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loquetier_jax.config import BLOCK, Bucket, require
from loquetier_jax.schedule.buckets import cheapest, forward_late, forward_ms, serving_need
from loquetier_jax.schedule.choose import Budget, choose
from loquetier_jax.schedule.deadlines import arrival_budget, first_token_budget, step_slack, token_budget
from loquetier_jax.schedule.inference import Plan, plan_inference, prefill_buckets
from loquetier_jax.schedule.latency import LatencyModel
from loquetier_jax.schedule.training import Option, job_share
from loquetier_jax.schedule.types import Decision, Fairness, Snapshot


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Settings of the policy.

    Attributes:
        train_share: Share of the device time that training and scoring get beside requests when nothing is
            promised to those, in [0, 1].
        train_floor: The same, guaranteed even where it breaks the promise.
        max_quantum_ms: Longest quantum beside requests when nothing is promised, if there is any shorter one.
        margin: With a promise, plans leave room for this many times what one run in a hundred takes longer than was
            predicted, as measured; 0 plans with the mean alone.
        max_lead: Most packs a job may be ahead of the least served job that wants to train.
        max_overtakes: Most later requests admitted before one that does not fit.
        max_prefill_waits: Most steps in a row that prefill waits for slack.
    """

    train_share: float = 0.5
    train_floor: float = 0.0
    max_quantum_ms: float = 50.0
    margin: float = 1.0
    max_lead: int = 1
    max_overtakes: int = 16
    max_prefill_waits: int = 8

    def __post_init__(self) -> None:
        for name in ("train_share", "train_floor"):
            value = getattr(self, name)
            require(0 <= value <= 1, name, value, "a number in [0, 1]")
        require(self.max_quantum_ms > 0, "max_quantum_ms", self.max_quantum_ms, "a number > 0")
        require(self.margin >= 0, "margin", self.margin, "a number >= 0")
        require(self.max_lead >= 1, "max_lead", self.max_lead, "an integer >= 1")
        for name in ("max_overtakes", "max_prefill_waits"):
            value = getattr(self, name)
            require(value >= 0, name, value, "an integer >= 0")


def decide(snapshot: Snapshot, latency: LatencyModel, config: PolicyConfig) -> Decision:
    """Chooses what the engine does next.

    Args:
        snapshot: The queues; not changed.
        latency: Predictions; not changed.
        config: Settings.

    Returns:
        A decision whose bucket and shapes are among those of the snapshot. Its `fairness` belongs in the
        next snapshot. Equal arguments give equal decisions.

    Raises:
        CapacityError: more requests run than any bucket can decode.
    """
    plan = plan_inference(
        snapshot,
        latency,
        max_overtakes=config.max_overtakes,
        max_prefill_waits=config.max_prefill_waits,
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
        score_turn=not chosen[0].scored if chosen else snapshot.fairness.score_turn,
    )
    return _decision(snapshot, plan, chosen, latency, fairness)


def _credit_left(budget: Budget, chosen: Sequence[Option]) -> float:
    if budget.idle or math.isinf(budget.credit):
        return 0.0
    left = budget.credit - sum(option.ms for option in chosen)
    return max(0.0, left) if budget.promised else left  # what fits a promise is no debt


def _decision(
    snapshot: Snapshot, plan: Plan, chosen: Sequence[Option], latency: LatencyModel, fairness: Fairness
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
        forward_ms=forward_ms(snapshot, riding.fused, latency) if riding else plan.ms,
        fairness=fairness,
    )


def _budget(snapshot: Snapshot, plan: Plan, latency: LatencyModel, config: PolicyConfig) -> Budget:
    served = dict(plan.prefill)
    pending = [r for r in snapshot.prefilling if served.get(r.id, 0) < r.remaining]
    pending += [r for r in snapshot.waiting if served.get(r.id, 0) < r.prompt_tokens]
    idle = not snapshot.running and not plan.prefill and not pending
    following = _next_forward(snapshot, plan, bool(pending), latency)
    next_ms = sum(forward_ms(snapshot, b, latency) for b in following)
    rows = max((b.prefill for b in following), default=0)
    at = snapshot.now + plan.ms / 1e3
    decoded = bool(plan.decode)
    late = config.margin * (snapshot.late_ms + plan.late)
    due = min(
        token_budget(snapshot, decoded, len(plan.finishing), at, next_ms),
        first_token_budget(snapshot, pending, plan.admit, at, next_ms, rows),
    )
    slack = due - late - config.margin * sum(forward_late(snapshot, b, latency) for b in following)
    prompt_ms = max((forward_ms(snapshot, b, latency) for b in prefill_buckets(snapshot.buckets)), default=0.0)
    unseen = arrival_budget(snapshot.slo.ttft_ms, prompt_ms)
    share = config.train_share if math.isinf(slack) else config.train_floor
    # With no inference row in this step nobody is held up: requests are there, but cannot be admitted.
    earned = math.inf if share == 1 or plan.bucket is None else plan.ms * share / (1 - share)
    return Budget(
        idle=idle,
        slack=slack if math.isinf(slack) else min(slack, unseen),
        step=step_slack(snapshot) - late if decoded else math.inf,
        margin=config.margin,
        credit=snapshot.fairness.credit_ms + earned,
        longest=unseen if idle else min(unseen, config.max_quantum_ms),
    )


def _next_forward(snapshot: Snapshot, plan: Plan, pending: bool, latency: LatencyModel) -> list[Bucket]:
    """The forward after this one; two where prompts and decodes take turns."""
    running = len(snapshot.running) + len(plan.finishing)
    chunk = (BLOCK, 1) if pending else (0, 0)
    need = serving_need(running, *chunk)
    if need is None:
        return []
    bucket = cheapest(snapshot, need, latency)
    if bucket is not None:
        return [bucket]
    halves = [serving_need(running), serving_need(0, *chunk)]  # they take turns
    found = [cheapest(snapshot, h, latency) for h in halves if h is not None]
    return [b for b in found if b is not None]
