"""Chooses the training and scoring work that fits into the time left by inference."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loquetier_jax.schedule.fairness import FairShare
from loquetier_jax.schedule.inference import Plan
from loquetier_jax.schedule.latency import LatencyModel
from loquetier_jax.schedule.training import WorkOption, score_options, train_options
from loquetier_jax.schedule.types import JobView, PassView, Snapshot


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The time that quanta may take, in milliseconds.

    Attributes:
        idle: Whether there are no requests: then only `longest` limits quanta, for the next request's sake.
        headroom: Time that the latency targets leave after the forward; inf without targets for current requests.
        step: Time that they leave for the forward itself.
        margin: Safety factor: plans reserve this many times the p99 excess over the prediction.
        credit: Device time earned, including this step's share.
        longest: Longest quantum on credit or when idle, unless all are longer.
    """

    idle: bool
    headroom: float
    step: float
    margin: float
    credit: float
    longest: float

    @property
    def promised(self) -> bool:
        """Whether latency targets limit the quanta."""
        return not self.idle and not math.isinf(self.headroom)

    def cost(self, option: WorkOption) -> float:
        """The time to plan for an option, including the margin."""
        return option.ms + self.margin * option.late


def choose(
    snapshot: Snapshot, plan: Plan, budget: Budget, latency: LatencyModel, share: FairShare, max_lead: int
) -> tuple[list[WorkOption], bool]:
    """Chooses one option, or with latency targets as many consecutive stages of one pass as fit.

    Returns:
        (options in order, whether there was any work to choose from).
    """
    train = list(train_options(snapshot, plan, latency, share, max_lead))
    score = score_options(snapshot, plan, latency)
    kinds = [score, *train] if snapshot.fairness.score_turn else [*train, score]
    first = next((o for options in kinds if (o := _best(options, budget, plan.ms))), None)
    if first is None:
        return [], any(kinds)
    chosen = [first]
    while budget.promised and not chosen[-1].scored:
        snapshot = _after(snapshot, chosen[-1])
        budget = dataclasses.replace(budget, headroom=budget.headroom - budget.cost(chosen[-1]), credit=0.0)
        if snapshot.train_pass is None and all(job.status != "optimizer" for job in snapshot.jobs):
            break
        rest = [o for options in train_options(snapshot, plan, latency, share, max_lead) for o in options]
        option = _best(rest, budget, plan.ms)
        if option is None:
            break
        chosen.append(option)
    return chosen, True


def _best(options: Iterable[WorkOption], budget: Budget, forward: float) -> WorkOption | None:
    """The largest option that the budget allows, the cheapest among equals."""
    options = list(options)
    return max(_allowed(options, budget, forward), key=lambda o: (o.size, -o.ms), default=None)


def _allowed(options: Sequence[WorkOption], budget: Budget, forward: float) -> list[WorkOption]:
    if budget.promised:
        in_time = [o for o in options if budget.cost(o) <= budget.headroom]
        in_time = [o for o in in_time if not o.fused or forward + budget.cost(o) <= budget.step]
        if in_time:
            return in_time
    if budget.credit <= 0 and not budget.idle:
        return []
    # Time sharing: one quantum, then none until inference has had its share.
    prices = [budget.cost(o) if budget.idle else o.ms for o in options]
    longest = max([budget.longest, *sorted(prices)[:1]])
    return [o for o, price in zip(options, prices, strict=True) if price <= longest]


def _after(snapshot: Snapshot, option: WorkOption) -> Snapshot:
    """`snapshot` with the training state as it will be after `option`."""
    quantum = option.quantum
    if option.scored:
        return snapshot
    if quantum is not None and quantum.kind == "optimizer":
        return _replace(snapshot, [j for j in snapshot.jobs if j.name not in quantum.jobs], None)
    if option.charged:
        jobs = [_started(job, option.charged.count(job.name)) for job in snapshot.jobs]
        shape = option.fused or quantum.bucket
        sliced = quantum is not None and quantum.kind == "forward_slice"
        slices = next(
            (s.slices for s in snapshot.sliced if (s.packs, s.pack_tokens) == (shape.packs, shape.pack_tokens)),
            0,
        )
        left = slices - quantum.count if sliced else 0
        view = _view(shape.packs, shape.pack_tokens, snapshot.slices, left, slices)
        return _replace(snapshot, jobs, view)
    view = snapshot.train_pass
    left = view.slices_left - quantum.count
    if left == 0 and view.stage == "backward":
        return _replace(snapshot, [_done(job) for job in snapshot.jobs], None)
    if view.stage == "backward":
        return _replace(snapshot, snapshot.jobs, dataclasses.replace(view, slices_left=left))
    return _replace(snapshot, snapshot.jobs, _view(view.packs, view.pack_tokens, snapshot.slices, left, view.slices))


def _view(packs: int, pack_tokens: int, backward: int, forward_left: int, forward: int) -> PassView:
    """A pass with `forward_left` forward slices left, or at the start of its backward if 0."""
    stage, slices, left = ("forward", forward, forward_left) if forward_left else ("backward", backward, backward)
    return PassView(packs=packs, pack_tokens=pack_tokens, stage=stage, slices=slices, slices_left=left)


def _started(job: JobView, packs: int) -> JobView:
    return dataclasses.replace(job, status="in_pass", packs=job.packs - packs) if packs else job


def _done(job: JobView) -> JobView:
    """The job after its pass: the optimizer step is due, or it waits for the engine's next snapshot."""
    if job.status != "in_pass":
        return job
    return dataclasses.replace(job, status="waiting" if job.packs else "optimizer")


def _replace(snapshot: Snapshot, jobs: Sequence[JobView], view: PassView | None) -> Snapshot:
    return dataclasses.replace(snapshot, jobs=tuple(jobs), train_pass=view)
