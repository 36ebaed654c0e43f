"""Picking quanta: what the time left beside inference is spent on."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loquetier_jax.schedule.fairness import FairShare
from loquetier_jax.schedule.inference import Plan
from loquetier_jax.schedule.latency import LatencyModel
from loquetier_jax.schedule.progress import after
from loquetier_jax.schedule.snapshot import Snapshot
from loquetier_jax.schedule.training import Option, score_options, train_options


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What quanta may cost, milliseconds.

    Attributes:
        idle: No request is there: anything goes.
        slack: What the promise leaves after the forward; inf when nothing is promised to those here.
        step: What it leaves for the forward itself.
        credit: Of device time, this step's share included.
        longest: Longest quantum on credit, if there is any shorter one.
    """

    idle: bool
    slack: float
    step: float
    credit: float
    longest: float

    @property
    def promised(self) -> bool:
        """Whether a promise limits the quanta."""
        return not self.idle and not math.isinf(self.slack)


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
        snapshot = after(snapshot, chosen[-1])
        budget = dataclasses.replace(budget, slack=budget.slack - chosen[-1].ms, credit=0.0)
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
    if budget.idle:
        return list(options)
    if budget.promised:
        in_time = [o for o in options if o.ms <= budget.slack]
        in_time = [o for o in in_time if not o.fused or forward + o.ms <= budget.step]
        if in_time:
            return in_time
    if budget.credit <= 0:
        return []
    # A share of time: one quantum, then none until inference has had its share.
    shortest = min((o.ms for o in options), default=0.0)
    return [o for o in options if o.ms <= max(budget.longest, shortest)]
