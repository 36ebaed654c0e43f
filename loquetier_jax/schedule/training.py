"""Lists the training and scoring work that could run next, as options with a size and a cost."""

from collections.abc import Iterator
from dataclasses import dataclass

from loquetier_jax.config import Bucket
from loquetier_jax.schedule.buckets import cheapest, forward_late, forward_ms, pass_shape, slices_times
from loquetier_jax.schedule.fairness import FairShare, pack_order
from loquetier_jax.schedule.inference import Plan
from loquetier_jax.schedule.latency import OPTIMIZER, LatencyModel
from loquetier_jax.schedule.types import JobView, Quantum, Snapshot


@dataclass(frozen=True, kw_only=True)
class WorkOption:
    """One piece of work that could run next.

    Attributes:
        ms: Milliseconds that it adds to the iteration.
        late: Milliseconds by which one in a hundred exceeds that.
        size: Amount of work in rows, slices or jobs; only comparable within one list of options.
        fused: The bucket that replaces the plan's, if the rows share the plan's forward.
        packs, score: Packs in that forward.
        quantum: What runs after the forward, if not fused.
    """

    ms: float
    late: float
    size: float
    fused: Bucket | None = None
    packs: tuple[str, ...] = ()
    score: tuple[str, ...] = ()
    quantum: Quantum | None = None

    @property
    def charged(self) -> tuple[str, ...]:
        """One job name per pack started."""
        return self.packs or (self.quantum.packs if self.quantum else ())

    @property
    def scored(self) -> tuple[str, ...]:
        """One id per pack scored."""
        return self.score or (self.quantum.score if self.quantum else ())


def job_share(snapshot: Snapshot) -> FairShare:
    """Packs served per job that wants service."""
    active = [job.name for job in snapshot.jobs if job.status != "waiting"]
    return FairShare(snapshot.fairness.jobs, active)


def train_options(
    snapshot: Snapshot, plan: Plan, latency: LatencyModel, share: FairShare, max_lead: int
) -> Iterator[list[WorkOption]]:
    """Yields lists of options, to be tried in order: due optimizer steps, else the pass in flight, else new passes.

    Optimizer steps come first because they are short and their jobs cannot continue without them. Among new passes,
    those with the least served job come first.
    """
    due = [job.name for job in snapshot.jobs if job.status == "optimizer"]
    if due:
        yield list(_optimizer_options(due, latency))
    elif snapshot.train_pass is not None:
        yield list(_pass_options(snapshot, latency))
    else:
        yield from _new_pass_options(snapshot, plan, latency, share, max_lead)


def _optimizer_options(due: list[str], latency: LatencyModel) -> Iterator[WorkOption]:
    ms = late = 0.0
    for i, name in enumerate(due, 1):
        ms += latency.predict((OPTIMIZER, name), 1)
        late += latency.late((OPTIMIZER, name), 1)
        yield WorkOption(ms=ms, late=late, size=i, quantum=Quantum(kind="optimizer", jobs=tuple(due[:i]), ms=ms))


def _pass_options(snapshot: Snapshot, latency: LatencyModel) -> Iterator[WorkOption]:
    view = snapshot.train_pass
    backward = view.stage == "backward"
    kind = "backward_slice" if backward else "forward_slice"
    for count in range(1, view.slices_left + 1):
        ms, late = slices_times(backward, view.packs, view.pack_tokens, count, view.slices, latency)
        yield WorkOption(ms=ms, late=late, size=count, quantum=Quantum(kind=kind, count=count, ms=ms))


def _new_pass_options(
    snapshot: Snapshot, plan: Plan, latency: LatencyModel, share: FairShare, max_lead: int
) -> Iterator[list[WorkOption]]:
    shapes = {b.pack_tokens for b in snapshot.buckets if b.packs} | {s.pack_tokens for s in snapshot.sliced}
    ready = [j for j in snapshot.jobs if j.status == "ready" and j.packs > 0 and j.pack_tokens in shapes]
    while ready:
        first = share.first(j.name for j in ready)
        kind = next((j.pack_tokens, j.group) for j in ready if j.name == first)
        together = [j for j in ready if (j.pack_tokens, j.group) == kind]
        ready = [j for j in ready if (j.pack_tokens, j.group) != kind]
        options = list(_pack_options(snapshot, plan, latency, together, share, max_lead))
        if options:
            yield options


def _pack_options(
    snapshot: Snapshot,
    plan: Plan,
    latency: LatencyModel,
    jobs: list[JobView],
    share: FairShare,
    max_lead: int,
) -> Iterator[WorkOption]:
    tokens = jobs[0].pack_tokens
    sliced = [s for s in snapshot.sliced if s.pack_tokens == tokens]
    limits = {b.packs for b in snapshot.buckets if b.packs and b.pack_tokens == tokens} | {s.packs for s in sliced}
    order = tuple(pack_order(jobs, share, max(limits), max_lead))
    if not order:
        return
    for limit in sorted(limits):
        packs = order[:limit]
        need = pass_shape(len(packs), tokens)
        for fused, bucket, ms, late in _forwards(snapshot, plan, latency, need):
            if fused:
                yield WorkOption(ms=ms, late=late, size=need.train_rows, fused=bucket, packs=packs)
            else:
                quantum = Quantum(kind="forward", packs=packs, bucket=bucket, ms=ms)
                yield WorkOption(ms=ms, late=late, size=need.train_rows, quantum=quantum)
    for shape in sliced:
        packs = order[: shape.packs]
        for count in range(1, shape.slices + 1):
            ms, late = slices_times(False, shape.packs, tokens, count, shape.slices, latency)
            bucket = pass_shape(shape.packs, tokens)
            quantum = Quantum(kind="forward_slice", count=count, packs=packs, bucket=bucket, ms=ms)
            yield WorkOption(ms=ms, late=late, size=len(packs) * tokens * count / shape.slices, quantum=quantum)


def _forwards(
    snapshot: Snapshot, plan: Plan, latency: LatencyModel, need: Bucket
) -> Iterator[tuple[bool, Bucket, float, float]]:
    """(fused, bucket, added ms, p99 excess over that) of the cheapest separate forward and the cheapest fused one."""
    alone = cheapest(snapshot, need, latency)
    if alone is not None:
        yield False, alone, forward_ms(snapshot, alone, latency), forward_late(snapshot, alone, latency)
    p = plan.need(snapshot)
    if p is None:
        return
    rows = {n: getattr(need, n) for n in ("packs", "pack_tokens", "score_packs", "score_tokens") if getattr(need, n)}
    both = Bucket(**rows, prefill=p.prefill, chunks=p.chunks, decode=p.decode, context=p.context)
    fused = cheapest(snapshot, both, latency)
    if fused is not None:
        late = max(0.0, forward_late(snapshot, fused, latency, plan.reads) - plan.late)
        yield True, fused, max(0.0, forward_ms(snapshot, fused, latency, plan.reads) - plan.ms), late


def score_options(snapshot: Snapshot, plan: Plan, latency: LatencyModel) -> list[WorkOption]:
    """Options for the oldest score work, together with whatever else fits into the bucket."""
    options: list[WorkOption] = []
    if not snapshot.score:
        return options
    waiting = [(view.id, view.tokens) for view in snapshot.score for _ in range(view.packs)]
    for packs, tokens in sorted({(b.score_packs, b.score_tokens) for b in snapshot.buckets if b.score_packs}):
        if waiting[0][1] > tokens:
            continue
        ids = tuple(i for i, length in waiting if length <= tokens)[:packs]
        need = Bucket(score_packs=len(ids), score_tokens=tokens)
        for fused, bucket, ms, late in _forwards(snapshot, plan, latency, need):
            if fused:
                options.append(WorkOption(ms=ms, late=late, size=len(ids), fused=bucket, score=ids))
            else:
                quantum = Quantum(kind="forward", score=ids, bucket=bucket, ms=ms)
                options.append(WorkOption(ms=ms, late=late, size=len(ids), quantum=quantum))
    return options
