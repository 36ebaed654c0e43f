"""Jobs beside the requests: which packs may run, the pass in flight, and what happens when results come back."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from loquetier_jax.adapters.store import AdapterStore
from loquetier_jax.adapters.version import Version
from loquetier_jax.batch.pack import TrainItem
from loquetier_jax.batch.segments import shapes_of
from loquetier_jax.config import Bucket, EngineConfig
from loquetier_jax.errors import CapacityError, ConfigError, JobError
from loquetier_jax.jobs.optimizer import hyperparams
from loquetier_jax.kv.pool import EpochPool
from loquetier_jax.runtime.passes import OptimizerResult, RunningPass
from loquetier_jax.runtime.scoring import Scores, ScoreTask, Scoring
from loquetier_jax.runtime.trainee import Trainee
from loquetier_jax.runtime.warmup import BackgroundCompiler
from loquetier_jax.schedule.snapshot import JobStatus, JobView, PassView
from loquetier_jax.step.functions import StepFunctions, TrainKey
from loquetier_jax.step.state import DeviceState
from loquetier_jax.step.train_pass import TrainPass


@dataclass
class Training:
    """All jobs of an engine.

    Attributes:
        on_step: Called after a job closed an optimizer step or an evaluation (checkpoints hang here).
        on_end: Called once when a job has ended, before its pages go back.
        trainees: Jobs by name that have not been retired, in order of creation.
        current: The pass in flight; only one is.
    """

    cfg: EngineConfig
    state: DeviceState
    functions: StepFunctions
    store: AdapterStore
    compiler: BackgroundCompiler
    scoring: Scoring
    on_step: Callable[[Trainee], None]
    on_end: Callable[[Trainee], None]
    trainees: dict[str, Trainee] = field(default_factory=dict)
    current: RunningPass | None = None

    def __post_init__(self) -> None:
        self.grad_pool = EpochPool(range(1, self.cfg.train_pages + 1), "train pages")
        self._optimizing: set[str] = set()
        self._evaluating: set[str] = set()
        self._unread: Counter[str] = Counter()  # job -> passes dispatched and not read

    def add(self, trainee: Trainee) -> None:
        """Queues a job; it starts as soon as there are pages for it. Compiling begins now, in the background."""
        self.trainees[trainee.name] = trainee
        shapes, arrays = shapes_of(self.state), shapes_of((trainee.master, trainee.opt_state))
        self.compiler.request(
            ("optimizer", trainee.number),
            lambda: trainee.compile_optimizer(shapes, self.functions.spec, arrays),
        )
        for key in self.keys(trainee):
            fused = [b for b in self.cfg.buckets if (b.packs, b.pack_tokens) == (key.packs, key.pack_tokens)]
            self.compiler.request(key, partial(self._build, key, fused))

    def _build(self, key: TrainKey, fused: list[Bucket]) -> None:
        self.functions.prepare_training(key)
        for bucket in fused:
            self.functions.forward(bucket, key.dropout)

    def _start(self, trainee: Trainee) -> None:
        """Gives a queued job its pages, if there is room now."""
        count = trainee.shape.num_pages
        try:
            grad_pages = tuple(self.grad_pool.take(count))
        except CapacityError:
            return
        try:
            pages = self.store.reserve(count)
        except CapacityError:
            self.grad_pool.give(grad_pages, -1)
            return
        trainee.enter(self.state, self.functions.spec, pages, grad_pages)
        if trainee.job.status == "queued":
            trainee.job.start()

    # What the scheduler sees.

    def pack_counts(self, pack_tokens: int) -> list[int]:
        """Packs of a pass for which there are functions, for jobs of that pack length."""
        return sorted({1, *(b.packs for b in self.cfg.buckets if b.packs and b.pack_tokens == pack_tokens)})

    def keys(self, trainee: Trainee) -> list[TrainKey]:
        """Every compiled pass shape the job may ride in."""
        return [trainee.key(n) for n in self.pack_counts(trainee.job.cfg.pack_rows)]

    def buckets(self) -> list[Bucket]:
        """Train buckets that some job may use now, those of passes alone included."""
        found: dict[Bucket, None] = {}
        for trainee in self.trainees.values():
            if self._ready(trainee):
                counts = self.pack_counts(trainee.job.cfg.pack_rows)
                shapes = [(n, trainee.job.cfg.pack_rows) for n in counts]
                found |= dict.fromkeys(Bucket(packs=n, pack_tokens=size) for n, size in shapes)
                found |= dict.fromkeys(b for b in self.cfg.buckets if (b.packs, b.pack_tokens) in shapes)
        return list(found)

    def _ready(self, trainee: Trainee) -> bool:
        """Whether a started job's functions are compiled; a job whose functions cannot be compiled fails."""
        try:
            keys = (("optimizer", trainee.number), *self.keys(trainee))
            return all(self.compiler.ready(key) for key in keys) and bool(trainee.pages)
        except Exception as error:  # whatever the compiler raised in its thread
            if not trainee.job.finished:
                own = isinstance(error, ConfigError)  # of its loss, see `step.loss`; it says all
                trainee.job.fail(f"{'' if own else 'compiling failed: '}{error}")
            return False

    def views(self) -> tuple[JobView, ...]:
        """The jobs, in order of creation."""
        return tuple(self._view(t) for t in self.trainees.values())

    def _view(self, trainee: Trainee) -> JobView:
        job = trainee.job
        status: JobStatus = "waiting"
        packs = job.stream.packs_in_step(job.step) - job.cursor.pack if job.cursor.step == job.step else 0
        if job.status == "running" and not job.evaluating and job.name not in self._optimizing:
            if self.current is not None and trainee in self.current.owners:
                status = "in_pass"
            elif not self._ready(trainee):
                status = "waiting"  # one that came with its step due, from elsewhere, waits for its compile, too
            elif job.cursor.step > job.step:
                status = "optimizer"  # all packs are dispatched; the host need not have read them
            elif job.next_pack() is not None:
                status = "ready"
        return JobView(
            name=job.name, status=status, pack_tokens=job.cfg.pack_rows, packs=packs, group=trainee.group
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

    # What the loop does.

    def start_pass(self, names: Sequence[str], packs: int) -> RunningPass:
        """Takes the next pack of each named job, in order, into a new pass of the shape `packs`."""
        if self.current is not None:
            raise JobError(f"a pass of {len(self.current.packs)} packs is in flight, expected none")
        owners = [self.trainees[name] for name in names]
        items, taken = [], []
        for trainee in owners:
            pack = trainee.job.next_pack()
            trainee.job.pack_dispatched(pack)
            taken.append(pack)
            items.append(TrainItem(pack, trainee.pages, trainee.grad_pages, trainee.lora.lora_dropout))
        self._unread.update({t.job.name for t in owners})
        self.current = RunningPass(TrainPass(owners[0].key(packs), items, self.cfg.slice_layers), owners, taken)
        return self.current

    def close_pass(self) -> RunningPass | None:
        """Takes the pass out of flight if its last gradient has been dispatched; hand it to `accept_pass` later."""
        if self.current is None or not self.current.run.done:
            return None
        done, self.current = self.current, None
        return done

    def accept_pass(self, done: RunningPass) -> None:
        """Reads a closed pass's log-probs into its jobs."""
        for trainee, pack, result in zip(done.owners, done.packs, done.run.results(), strict=True):
            with trainee.job.blamed():
                trainee.job.pack_finished(pack, **result)
        self._unread.subtract({t.job.name for t in done.owners})

    def optimize(self, names: Iterable[str], epoch: int) -> list[OptimizerResult]:
        """Dispatches the optimizer steps of the named jobs."""
        results = []
        for name in names:
            trainee = self.trainees[name]
            job = trainee.job
            rate = hyperparams(job.cfg, job.step, job.total_steps)["learning_rate"]
            results.append(OptimizerResult(trainee, trainee.optimize(self.state, self.store, epoch), rate))
            self._optimizing.add(name)
        return results

    def accept_optimizer(self, result: OptimizerResult) -> None:
        """Reads an optimizer step's norms; the job goes on, evaluates, ends or fails."""
        job = result.trainee.job
        self._optimizing.discard(job.name)
        grad_norm, weight_norm = (float(result.metrics[key]) for key in ("grad_norm", "weight_norm"))
        with job.blamed():
            job.finish_step(grad_norm, result.learning_rate, weight_norm)
            self.on_step(result.trainee)

    def tick(self, epoch: int) -> None:
        """Before each decision: retires jobs that have ended, starts others, and evaluations that are due.

        All that can happen happens in one call: whoever drives the loop may stop when nothing was left to decide.
        """
        for trainee in list(self.trainees.values()):
            self._ready(trainee)  # what cannot be compiled fails, and is retired now
            if trainee.job.finished and not self.busy(trainee.name):
                self._retire(trainee, epoch)
        for trainee in self.trainees.values():
            job = trainee.job
            if not trainee.pages and not job.finished:
                self._start(trainee)
            elif job.status == "queued":  # paused before it had its pages, and resumed
                job.start()
            due = job.status == "running" and job.evaluating and job.name not in self._evaluating
            if due and self._ready(trainee):
                self._evaluate(trainee)

    def _evaluate(self, trainee: Trainee) -> None:
        job, packs = trainee.job, []
        while (pack := job.next_eval_pack()) is not None:
            job.eval_pack_dispatched(pack)
            packs.append(pack)

        def done(scores: list[Scores]) -> None:
            self._evaluating.discard(job.name)
            with job.blamed():
                trainee.accept_evaluation(self.functions, packs, scores)
                self.on_step(trainee)

        if packs:
            self._evaluating.add(job.name)
            self.scoring.add(ScoreTask(packs, lambda: trainee.pages, done, lambda error: job.fail(str(error))))

    def _retire(self, trainee: Trainee, epoch: int) -> None:
        self.on_end(trainee)
        del self.trainees[trainee.name]
        del self._unread[trainee.name]
        self.compiler.forget(("optimizer", trainee.number))
        if trainee.published is not None:
            self.store.release(trainee.published, epoch)
            trainee.published = None
        if trainee.write_pages:
            self.store.give_back(trainee.write_pages, epoch)
        self.grad_pool.give(trainee.grad_pages, epoch)
        trainee.pages = trainee.write_pages = trainee.grad_pages = ()

    def publish(self, trainee: Trainee, epoch: int, *, fresh: bool = True) -> Version:
        """Points the job's name to its present weights; nothing is copied (see `AdapterStore.publish`)."""
        name, published = trainee.job.name, trainee.published
        if published is not None and name in self.store and self.store.get(name) is published:
            return published  # nothing has changed since the last time
        if published is not None:  # the name was unloaded, renamed or replaced since; the pages are that version's
            return self.store.add(name, trainee.host_weights(), trainee.shape, config=trainee.lora, replace=True)
        weights, lora = trainee.host_weights, trainee.lora
        made = self.store.publish(name, trainee.shape, trainee.pages, weights, epoch=epoch, fresh=fresh, config=lora)
        trainee.write_pages, trainee.latest = made.pages, made.version
        if not fresh:
            trainee.pages = ()
        if made.version.pages is not None and fresh:
            trainee.published = made.version
        return made.version

    def complete(self, epoch: int) -> None:
        """Steps up to `epoch` have completed."""
        self.grad_pool.complete(epoch)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless train pages add up."""
        self.grad_pool.check_integrity()
