"""What training will look like once something has run: one decision can plan several stages."""

import dataclasses
from collections.abc import Sequence

from loquetier_jax.schedule.snapshot import JobView, PassView, Snapshot
from loquetier_jax.schedule.training import Option


def after(snapshot: Snapshot, option: Option) -> Snapshot:
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
