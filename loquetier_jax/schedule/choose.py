"""Picking quanta: what the time left beside inference is spent on."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loquetier_jax.schedule.fairness import FairShare
from loquetier_jax.schedule.inference import Plan
from loquetier_jax.schedule.latency import LatencyModel
from loquetier_jax.schedule.training import Option, score_options, train_options
from loquetier_jax.schedule.types import JobView, PassView, Snapshot


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What quanta may cost, milliseconds.

    Attributes:
        idle: No request is there: anything goes that does not keep the next one waiting longer than promised.
        slack: What the promise leaves after the forward; inf when nothing is promised to those here.
        step: What it leaves for the forward itself.
        margin: Times what one run in a hundred takes longer than predicted: so much of `slack` and `step` is kept.
        credit: Of device time, this step's share included.
        longest: Longest quantum on credit or when idle, if there is any shorter one.
    """

    idle: bool
    slack: float
    step: float
    margin: float
    credit: float
    longest: float

    @property
    def promised(self) -> bool:
        """Whether a promise limits the quanta."""
        return not self.idle and not math.isinf(self.slack)

    def cost(self, option: Option) -> float:
        """What a plan that must hold counts for an option."""
        return option.ms + self.margin * option.late


def choose(
    snapshot: Snapshot, plan: Plan, budget: Budget, latency: LatencyModel, share: FairShare, max_lead: int
) -> tuple[list[Option], bool]:
    """Picks one option, or under a promise as many stages of one pass as fit.

    Returns:
        (options in order, whether there was anything to choose from).
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
        budget = dataclasses.replace(budget, slack=budget.slack - budget.cost(chosen[-1]), credit=0.0)
        if snapshot.train_pass is None and all(job.status != "optimizer" for job in snapshot.jobs):
            break
        rest = [o for options in train_options(snapshot, plan, latency, share, max_lead) for o in options]
        option = _best(rest, budget, plan.ms)
        if option is None:
            break
        chosen.append(option)
    return chosen, True


def _best(options: Iterable[Option], budget: Budget, forward: float) -> Option | None:
    """The largest option that the budget allows, of equals the cheapest."""
    options = list(options)
    return max(_allowed(options, budget, forward), key=lambda o: (o.size, -o.ms), default=None)


def _allowed(options: Sequence[Option], budget: Budget, forward: float) -> list[Option]:
    if budget.promised:
        in_time = [o for o in options if budget.cost(o) <= budget.slack]
        in_time = [o for o in in_time if not o.fused or forward + budget.cost(o) <= budget.step]
        if in_time:
            return in_time
    if budget.credit <= 0 and not budget.idle:
        return []
    # A share of time: one quantum, then none until inference has had its share.
    prices = [budget.cost(o) if budget.idle else o.ms for o in options]
    longest = max([budget.longest, *sorted(prices)[:1]])
    return [o for o, price in zip(options, prices, strict=True) if price <= longest]


def _after(snapshot: Snapshot, option: Option) -> Snapshot:
    """`snapshot` as it will be for training after `option`; nothing else in it changes."""
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
    """A pass with forward slices left, or else at the start of its backward."""
    stage, slices, left = ("forward", forward, forward_left) if forward_left else ("backward", backward, backward)
    return PassView(packs=packs, pack_tokens=pack_tokens, stage=stage, slices=slices, slices_left=left)


def _started(job: JobView, packs: int) -> JobView:
    return dataclasses.replace(job, status="in_pass", packs=job.packs - packs) if packs else job


def _done(job: JobView) -> JobView:
    """After the pass: the optimizer step is due, or it is for the engine to say what comes."""
    if job.status != "in_pass":
        return job
    return dataclasses.replace(job, status="waiting" if job.packs else "optimizer")


def _replace(snapshot: Snapshot, jobs: Sequence[JobView], view: PassView | None) -> Snapshot:
    return dataclasses.replace(snapshot, jobs=tuple(jobs), train_pass=view)
