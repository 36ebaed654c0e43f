"""The scheduler's input and output: frozen dataclasses; times are in seconds unless a name ends in _ms."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from loquetier_jax.config import Bucket, SLOConfig

JobStatus = Literal["ready", "in_pass", "optimizer", "waiting"]
Stage = Literal["forward", "backward"]
QuantumKind = Literal["forward", "forward_slice", "backward_slice", "optimizer"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """A request past its prefill.

    Attributes:
        id: Id of the request.
        first_token_time, last_token_time: When its first and latest token were read, or are expected to be if in
            flight.
        num_output: Tokens dispatched so far, >= 1.
        remaining: Maximum tokens still to come.
        pages: KV pages that it will return at its end; those that others use are not counted.
        context: Tokens that its next row attends to.
    """

    id: str
    first_token_time: float
    last_token_time: float
    num_output: int
    remaining: int = 1
    pages: int = 0
    context: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefilling:
    """An admitted request with prompt tokens left.

    Attributes:
        id: Id of the request.
        adapter: The unit of fairness; "" for the base.
        arrival: When it arrived.
        remaining: Prompt tokens left.
        done: Prompt tokens in the KV cache.
    """

    id: str
    adapter: str = ""
    arrival: float
    remaining: int
    done: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """A request not yet admitted.

    Attributes:
        id, adapter, arrival: As in Prefilling.
        prompt_tokens: Tokens of its prompt to compute: those that are not in the KV cache.
        done: Tokens of its prompt in the KV cache.
        pages: Pages out of `Snapshot.free_pages` that it takes for prompt + max_tokens; fewer if it shares some.
        adapter_pages: Adapter pages that admitting it pins; 0 if a running request already pins its adapter.
        resident: Whether its adapter is on the device; if not, admitting it writes its pages and may evict others.
    """

    id: str
    adapter: str = ""
    arrival: float
    prompt_tokens: int
    pages: int
    done: int = 0
    adapter_pages: int = 0
    resident: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class JobView:
    """A fine-tuning job.

    Attributes:
        name: Unique name.
        status: "ready": has packs to run; "in_pass": its packs are in the pass in flight; "optimizer": its
            optimizer step is due; "waiting": has no work (paused, finished) and is not counted for fairness.
        pack_tokens: Rows of its packs.
        packs: Packs that may still be started before its next optimizer step. For a job in a pass, 0 means that the
            optimizer step is due after the pass.
        group: Jobs with equal pack_tokens and group can share a pass, e.g. the name of a custom loss.
    """

    name: str
    status: JobStatus
    pack_tokens: int
    packs: int = 1
    group: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PassView:
    """The training pass in flight.

    Attributes:
        packs, pack_tokens: Shape of its compiled functions.
        stage: "forward" while forward slices are left (sliced passes only), then "backward".
        slices: Slices of a whole forward, or of a whole backward.
        slices_left: Slices left in this stage, >= 1; a pass with none left is no longer in flight.
    """

    packs: int
    pack_tokens: int
    stage: Stage
    slices: int
    slices_left: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SlicedShape:
    """A pass shape whose forward is also compiled in `slices` slices without inference rows."""

    packs: int
    pack_tokens: int
    slices: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerTime:
    """Predicted time of the sampler for `rows` rows: `ms`, exceeded by `late` ms once in a hundred times."""

    rows: int
    ms: float
    late: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreView:
    """`packs` packs of at most `tokens` rows to score, for evaluations, log_probs or prompt_logprobs."""

    id: str
    tokens: int
    packs: int = 1


@dataclass(frozen=True, kw_only=True)
class Fairness:
    """State carried from one decision to the next; opaque to the engine.

    Attributes:
        adapters: Prompt tokens by which adapters are ahead of the least served one.
        jobs: Packs by which jobs are ahead of the least served one.
        overtaken: Waiting request that did not fit, or whose adapter is not resident -> number of later requests
            admitted before it.
        credit_ms: Device time that training has earned; negative if inference is owed time.
        prefill_waits: Number of consecutive decisions that postponed prefill.
        score_turn: Whether scoring goes before training if both have work.
        long_ms: Device time that long prompts may take before others; negative if they owe it to others.
    """

    adapters: Mapping[str, float] = field(default_factory=dict)
    jobs: Mapping[str, float] = field(default_factory=dict)
    overtaken: Mapping[str, int] = field(default_factory=dict)
    credit_ms: float = 0.0
    prefill_waits: int = 0
    score_turn: bool = True
    long_ms: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything a decision depends on.

    Attributes:
        now: When the decided work can start, in seconds on the engine's clock: the predicted end of the work in
            flight, since the host is one step ahead of the device.
        late_ms: Milliseconds by which one in a hundred such predictions is exceeded.
        buckets: The forwards that are compiled now.
        samplers: Times of the samplers, at the level needed by the running requests; for row counts not listed, the
            forward's time includes the sampler.
        running: Requests that decode.
        prefilling: Admitted requests with prompt tokens left, in order of arrival.
        waiting: Requests not admitted, in order of arrival; may be a prefix of the queue. Those whose adapter is still
            being loaded are not among them.
        free_slots, free_pages: Slots and KV pages that can be taken now, unreferenced cached pages included.
        free_adapter_pages: Adapter pages that are free or evictable, i.e. not pinned by a running request or a job.
        jobs: Fine-tuning jobs in order of creation.
        train_pass: The pass in flight, if any; there is at most one.
        sliced: Pass shapes with compiled forward slices.
        slices: Backward slices of a pass.
        score: Score work in order of arrival.
        slo: The latency targets.
        fairness: From the previous decision; initially Fairness().
    """

    now: float
    late_ms: float = 0.0
    buckets: tuple[Bucket, ...]
    samplers: tuple[SamplerTime, ...] = ()
    running: tuple[Decoding, ...] = ()
    prefilling: tuple[Prefilling, ...] = ()
    waiting: tuple[Waiting, ...] = ()
    free_slots: int = 0
    free_pages: int = 0
    free_adapter_pages: int = 1 << 30
    jobs: tuple[JobView, ...] = ()
    train_pass: PassView | None = None
    sliced: tuple[SlicedShape, ...] = ()
    slices: int = 1
    score: tuple[ScoreView, ...] = ()
    slo: SLOConfig = field(default_factory=SLOConfig)
    fairness: Fairness = field(default_factory=Fairness)


@dataclass(frozen=True, kw_only=True)
class Quantum:
    """A piece of training or scoring work dispatched after the step's forward.

    Attributes:
        kind: "forward": run `bucket` with `packs` or `score` and no inference rows. "forward_slice",
            "backward_slice": the next `count` slices of the pass in flight, or of a new sliced pass if `packs` are
            given. "optimizer": the optimizer steps of `jobs`.
        count: Number of slices.
        packs: One job name per pack of a new pass, in order.
        score: One id per score pack.
        jobs: Names of the jobs whose optimizer steps run.
        bucket: The train or score bucket of a "forward"; the pass shape of a new sliced pass.
        ms: Predicted time.
    """

    kind: QuantumKind
    count: int = 1
    packs: tuple[str, ...] = ()
    score: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()
    bucket: Bucket | None = None
    ms: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do next, in this order.

    Attributes:
        admit: Waiting requests to give a slot and KV pages.
        bucket: The forward to run, or None.
        decode: Requests that decode in it.
        prefill: (id, number of prompt tokens) in it, including newly admitted requests.
        packs: One job name per training pack fused into it, which starts a pass.
        score: One id per score pack fused into it.
        quanta: What is dispatched after it, in order: one quantum, or several stages of one pass if the latency targets
            leave time for them.
        forward_ms: Predicted time of the forward.
        fairness: To be passed in the next snapshot.
    """

    admit: tuple[str, ...] = ()
    bucket: Bucket | None = None
    decode: tuple[str, ...] = ()
    prefill: tuple[tuple[str, int], ...] = ()
    packs: tuple[str, ...] = ()
    score: tuple[str, ...] = ()
    quanta: tuple[Quantum, ...] = ()
    forward_ms: float = 0.0
    fairness: Fairness = field(default_factory=Fairness)

    @property
    def idle(self) -> bool:
        """Whether there is no work."""
        return self.bucket is None and not self.quanta

    @property
    def predicted_ms(self) -> float:
        """Predicted time of the forward and all quanta."""
        return self.forward_ms + sum(q.ms for q in self.quanta)
