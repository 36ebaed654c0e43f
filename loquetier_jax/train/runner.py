"""Runs training jobs beside requests: which packs may run, the pass in flight, and the handling of results."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from loquetier_jax.adapters.store import AdapterStore
from loquetier_jax.adapters.version import Version
from loquetier_jax.batch.pack import TrainItem
from loquetier_jax.batch.rows import shapes_of
from loquetier_jax.config import Bucket, EngineConfig
from loquetier_jax.errors import CapacityError, ConfigError, JobError
from loquetier_jax.pool import IdPool
from loquetier_jax.schedule.types import JobStatus, JobView, PassView
from loquetier_jax.serve.scoring import Scores, ScoreTask, Scoring
from loquetier_jax.step.compiled import StepFunctions, TrainKey
from loquetier_jax.step.compiler import BackgroundCompiler
from loquetier_jax.step.state import DeviceState
from loquetier_jax.train.device_job import DeviceJob
from loquetier_jax.train.micro_step import MicroStep, OptimizerResult, RunningPass
from loquetier_jax.train.optimizer import hyperparams


@dataclass
class JobRunner:
    """All jobs of an engine.

    Attributes:
        on_step: Called after a job completes an optimizer step or an evaluation; checkpoints are saved here.
        on_end: Called once, when a job has ended and its last save has been written, before its pages are returned.
        device_jobs: Jobs by name that have not been retired, in order of creation.
        current: The pass in flight, at most one; or None.
    """

    cfg: EngineConfig
    state: DeviceState
    functions: StepFunctions
    store: AdapterStore
    compiler: BackgroundCompiler
    scoring: Scoring
    on_step: Callable[[DeviceJob], None] = lambda device_job: None
    on_end: Callable[[DeviceJob], None] = lambda device_job: None
    device_jobs: dict[str, DeviceJob] = field(default_factory=dict)
    current: RunningPass | None = None

    def __post_init__(self) -> None:
        self.grad_pool = IdPool(range(1, self.cfg.train_pages + 1), "train pages")
        self._optimizing: set[str] = set()
        self._evaluating: set[str] = set()
        self._unread: Counter[str] = Counter()  # job -> passes not read yet

    def add(self, device_job: DeviceJob) -> None:
        """Queues a job, which starts as soon as pages are free. Its functions are compiled in the background."""
        self.device_jobs[device_job.name] = device_job
        shapes, arrays = shapes_of(self.state), shapes_of((device_job.master, device_job.opt_state))
        self.compiler.request(
            ("optimizer", device_job.number),
            lambda: device_job.compile_optimizer(self.functions, shapes, arrays),
        )
        for key in self.keys(device_job):
            fused = [b for b in self.cfg.buckets if (b.packs, b.pack_tokens) == (key.packs, key.pack_tokens)]
            self.compiler.request(key, partial(self._build, key, fused))

    def _build(self, key: TrainKey, fused: list[Bucket]) -> None:
        self.functions.prepare_training(key)
        for bucket in fused:
            self.functions.forward(bucket, key.dropout)

    def _start(self, device_job: DeviceJob) -> None:
        """Gives a queued job its pages, if there is room now."""
        count = device_job.shape.num_pages
        try:
            grad_pages = self.grad_pool.take(count)
        except CapacityError:
            return
        try:
            pages = self.store.reserve(count)
        except CapacityError:
            self.grad_pool.give_back(grad_pages, 0)
            return
        device_job.enter(self.state, pages, grad_pages)
        if device_job.job.status == "queued":
            device_job.job.start()

    # For the scheduler.

    def pack_counts(self, pack_tokens: int) -> list[int]:
        """The numbers of packs a pass may have, for jobs of that pack length."""
        return sorted({1, *(b.packs for b in self.cfg.buckets if b.packs and b.pack_tokens == pack_tokens)})

    def keys(self, device_job: DeviceJob) -> list[TrainKey]:
        """The keys of every pass shape that may carry the job."""
        return [device_job.key(n) for n in self.pack_counts(device_job.job.cfg.pack_rows)]

    def buckets(self) -> list[Bucket]:
        """Train buckets that some job can use now, including those of train-only passes."""
        found: dict[Bucket, None] = {}
        for device_job in self.device_jobs.values():
            if self._ready(device_job):
                counts = self.pack_counts(device_job.job.cfg.pack_rows)
                shapes = [(n, device_job.job.cfg.pack_rows) for n in counts]
                found |= dict.fromkeys(Bucket(packs=n, pack_tokens=size) for n, size in shapes)
                found |= dict.fromkeys(b for b in self.cfg.buckets if (b.packs, b.pack_tokens) in shapes)
        return list(found)

    def _ready(self, device_job: DeviceJob) -> bool:
        """Whether a started job's functions are compiled; a job whose functions cannot be compiled fails."""
        try:
            keys = (("optimizer", device_job.number), *self.keys(device_job))
            return all(self.compiler.ready(key) for key in keys) and bool(device_job.pages)
        except Exception as error:  # whatever the compiler raised in its thread
            if not device_job.job.finished:
                own = isinstance(error, ConfigError)  # from its loss (`step.loss`), with a complete message
                device_job.job.fail(f"{'' if own else 'compiling failed: '}{error}")
            return False

    def views(self) -> tuple[JobView, ...]:
        """The jobs, in order of creation."""
        return tuple(self._view(t) for t in self.device_jobs.values())

    def _view(self, device_job: DeviceJob) -> JobView:
        job = device_job.job
        status: JobStatus = "waiting"
        packs = job.stream.packs_in_step(job.step) - job.cursor.pack if job.cursor.step == job.step else 0
        rests = device_job.held or job.evaluating or job.name in self._optimizing
        if job.status == "running" and not rests:
            if self.current is not None and device_job in self.current.owners:
                status = "in_pass"
            elif not self._ready(device_job):
                status = "waiting"  # also a migrated or resumed job whose optimizer step is due
            elif job.cursor.step > job.step:
                if not device_job.copying:  # else it would overwrite what is being copied
                    status = "optimizer"  # all packs have been dispatched, though maybe not read
            elif not device_job.awaits_save and job.next_pack() is not None:
                status = "ready"
        return JobView(
            name=job.name, status=status, pack_tokens=job.cfg.pack_rows, packs=packs, group=device_job.group
        )  # fmt: skip

    def pass_view(self) -> PassView | None:
        """The pass in flight."""
        if self.current is None:
            return None
        run = self.current.run
        backward = run.forward_done
        return PassView(
            packs=run.key.packs,
            pack_tokens=run.key.pack_tokens,
            stage="backward" if backward else "forward",
            slices=len(self.functions.slices(run.slice_layers)),
            slices_left=len(run.backward if backward else run.forward),
        )

    def busy(self, name: str) -> bool:
        """Whether steps dispatched for a job have not been read, or its packs are in the pass in flight."""
        riding = self.current is not None and any(t.job.name == name for t in self.current.owners)
        return riding or name in self._optimizing or name in self._evaluating or self._unread[name] > 0

    # For the loop.

    def start_pass(self, names: Sequence[str], packs: int) -> RunningPass:
        """Creates a pass of shape `packs` with the next pack of each named job, in order."""
        if self.current is not None:
            raise JobError(f"a pass of {len(self.current.packs)} packs is in flight, expected none")
        owners = [self.device_jobs[name] for name in names]
        items, taken = [], []
        for device_job in owners:
            pack = device_job.job.next_pack()
            device_job.job.pack_dispatched(pack)
            taken.append(pack)
            items.append(TrainItem(pack, device_job.pages, device_job.grad_pages, device_job.lora.lora_dropout))
        self._unread.update({t.job.name for t in owners})
        self.current = RunningPass(MicroStep(owners[0].key(packs), items, self.cfg.slice_layers), owners, taken)
        return self.current

    def close_pass(self) -> RunningPass | None:
        """Returns the pass and clears `current` if its last gradient has been dispatched; for `accept_pass`."""
        if self.current is None or not self.current.run.done:
            return None
        done, self.current = self.current, None
        return done

    def accept_pass(self, done: RunningPass) -> None:
        """Reads a closed pass's results and passes them to its jobs."""
        for device_job, pack, result in zip(done.owners, done.packs, done.run.results(), strict=True):
            with device_job.job.fail_on_error():
                device_job.job.pack_finished(pack, **result)
        self._unread.subtract({t.job.name for t in done.owners})

    def optimize(self, names: Iterable[str], epoch: int) -> list[OptimizerResult]:
        """Dispatches the optimizer steps of the named jobs."""
        results = []
        for name in names:
            device_job = self.device_jobs[name]
            job = device_job.job
            rate = hyperparams(job.cfg, job.step, job.total_steps)["learning_rate"]
            results.append(OptimizerResult(device_job, device_job.optimize(self.state, self.store, epoch), rate))
            self._optimizing.add(name)
        return results

    def accept_optimizer(self, result: OptimizerResult) -> None:
        """Reads an optimizer step's norms; the job then continues, evaluates, ends or fails."""
        job = result.device_job.job
        self._optimizing.discard(job.name)
        grad_norm, weight_norm = (float(result.metrics[key]) for key in ("grad_norm", "weight_norm"))
        with job.fail_on_error():
            job.finish_step(grad_norm, result.learning_rate, weight_norm)
            self.on_step(result.device_job)

    def tick(self, epoch: int) -> None:
        """Called before each decision: retires ended jobs, starts queued ones, and starts due evaluations.

        Does all that is possible in one call: the loop's caller may stop when the scheduler finds no work.
        """
        for device_job in list(self.device_jobs.values()):
            self._ready(device_job)  # a job that cannot be compiled fails here and is retired below
            saved = device_job.saving is None
            if device_job.job.finished and saved and not self.busy(device_job.name):
                self._retire(device_job, epoch)
        for device_job in self.device_jobs.values():
            job = device_job.job
            if not device_job.pages and not job.finished:
                self._start(device_job)
            elif job.status == "queued":  # paused before it had its pages, and resumed
                job.start()
            due = job.status == "running" and job.evaluating and job.name not in self._evaluating
            if due and not device_job.held and self._ready(device_job):
                self._evaluate(device_job)

    def _evaluate(self, device_job: DeviceJob) -> None:
        job, packs = device_job.job, []
        while (pack := job.next_eval_pack()) is not None:
            job.eval_pack_dispatched(pack)
            packs.append(pack)

        def done(scores: list[Scores]) -> None:
            self._evaluating.discard(job.name)
            with job.fail_on_error():
                device_job.accept_evaluation(self.functions, packs, scores)
                self.on_step(device_job)

        if packs:
            self._evaluating.add(job.name)
            self.scoring.add(ScoreTask(packs, lambda: device_job.pages, done, lambda error: job.fail(str(error))))

    def _retire(self, device_job: DeviceJob, epoch: int) -> None:
        self.on_end(device_job)
        del self.device_jobs[device_job.name]
        del self._unread[device_job.name]
        self.compiler.forget(("optimizer", device_job.number))
        if device_job.published is not None:
            self.store.release(device_job.published, epoch)
            device_job.published = None
        if device_job.write_pages:
            self.store.give_back(device_job.write_pages, epoch)
        self.grad_pool.give_back(device_job.grad_pages, epoch)
        device_job.pages = device_job.write_pages = device_job.grad_pages = ()

    def publish(self, device_job: DeviceJob, epoch: int, *, fresh: bool = True) -> Version:
        """Points the job's name to its current weights without copying them (see `AdapterStore.publish`)."""
        name, shape, published = device_job.job.name, device_job.shape, device_job.published
        if published is not None and name in self.store and self.store.get(name) is published:
            return published  # unchanged since the last publish
        if published is not None:  # unloaded, renamed or replaced since; that version still owns the pages
            weights = device_job.host_weights()
            return self.store.add(name, weights, shape, config=device_job.lora, replace=True)
        more = {"epoch": epoch, "fresh": fresh, "config": device_job.lora}
        made = self.store.publish(name, shape, device_job.pages, device_job.host_weights, **more)
        device_job.write_pages, device_job.latest = made.pages, made.version
        if not fresh:
            device_job.pages = ()
        if made.version.pages is not None and fresh:
            device_job.published = made.version
        return made.version

    def complete(self, epoch: int) -> None:
        """Frees pages whose last use was up to `epoch`: those steps have completed."""
        self.grad_pool.complete(epoch)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless the gradient pool's accounting is consistent."""
        self.grad_pool.check_integrity()
