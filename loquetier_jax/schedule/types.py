"""What the scheduler sees and what it decides: plain frozen data, seconds unless a name ends in _ms."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from loquetier_jax.config import Bucket, SLOConfig

JobStatus = Literal["ready", "in_pass", "optimizer", "waiting"]
Stage = Literal["forward", "backward"]
QuantumKind = Literal["forward", "forward_slice", "backward_slice", "optimizer"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """A request whose prompt is done and whose first token exists.

    Attributes:
        id: Of the request.
        first_token_time, last_token_time: When its first and its latest token came, or are expected to come out of
            the work in flight.
        num_output: Tokens dispatched so far, >= 1.
        remaining: Most tokens still to come.
        pages: KV pages that it gives back at its end.
    """

    id: str
    first_token_time: float
    last_token_time: float
    num_output: int
    remaining: int = 1
    pages: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefilling:
    """An admitted request with prompt tokens left; `adapter` is the unit of fairness ("" for the base)."""

    id: str
    adapter: str = ""
    arrival: float
    remaining: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """A request not admitted yet.

    Attributes:
        id, adapter, arrival: As above.
        prompt_tokens: Length of its prompt.
        pages: KV pages of prompt + max_tokens.
        adapter_pages: Adapter pages that admitting it pins: 0 when a running request has pinned its adapter.
    """

    id: str
    adapter: str = ""
    arrival: float
    prompt_tokens: int
    pages: int
    adapter_pages: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class JobView:
    """A fine-tuning job.

    Attributes:
        name: Unique.
        status: "ready": has packs to run; "in_pass": its packs are in the pass in flight; "optimizer": its
            optimizer step is due; "waiting": has nothing to do (paused, finished) and claims nothing.
        pack_tokens: Rows of its packs.
        packs: Packs that may still be started before its next optimizer step. 0 for a job in a pass says that
            the step is due when the pass is done.
        group: Jobs of equal pack_tokens and group may ride one step; e.g. the name of a job's own loss.
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
        slices_left: Of this stage, >= 1; a pass without any left is no longer in flight.
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
    """How long the sampler of `rows` rows is predicted to take: ms, and by how many more once in a hundred times."""

    rows: int
    ms: float
    late: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreView:
    """`packs` packs of at most `tokens` rows to be scored: evaluation, log_probs, prompt_logprobs."""

    id: str
    tokens: int
    packs: int = 1


@dataclass(frozen=True, kw_only=True)
class Fairness:
    """What one decision leaves to the next; the engine hands it back unread.

    Attributes:
        adapters: Prompt tokens that adapters are ahead of the least served one.
        jobs: Packs that jobs are ahead of the least served one.
        overtaken: How many later requests were admitted before a waiting one that did not fit.
        credit_ms: Device time that training may take before inference has had its share again.
        prefill_waits: Decisions in a row that put prefill off.
        score_turn: Whether scoring goes before training when both wait.
    """

    adapters: Mapping[str, float] = field(default_factory=dict)
    jobs: Mapping[str, float] = field(default_factory=dict)
    overtaken: Mapping[str, int] = field(default_factory=dict)
    credit_ms: float = 0.0
    prefill_waits: int = 0
    score_turn: bool = True


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All that a decision depends on.

    Attributes:
        now: When what is decided can start, seconds on the engine's clock: the host is a step ahead of the device, so
            that is when the work in flight is predicted to end.
        late_ms: By how much later that is once in a hundred times.
        buckets: The forwards that are compiled now.
        samplers: What runs behind a forward whose rows sample, at the level that the admitted requests ask for; where
            a number of rows is not here, the forward's time is that of both.
        running: Requests that decode.
        prefilling: Admitted requests with prompt left, in order of arrival.
        waiting: Requests not admitted, in order of arrival (a prefix of the queue will do).
        free_slots, free_pages: Slots and KV pages that can be taken now.
        free_adapter_pages: Adapter pages free or evictable: those that no running request and no job pins.
        jobs: Fine-tuning jobs in order of creation.
        train_pass: The pass in flight, if any; only one is.
        sliced: Pass shapes with compiled forward slices.
        slices: Backward slices of a pass.
        score: Score work in order of arrival.
        slo: The promise to requests.
        fairness: From the decision before; Fairness() at first.
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
    """A piece of training or scoring that is dispatched after the step's forward.

    Attributes:
        kind: "forward": run `bucket` with `packs` or `score` and no inference row. "forward_slice",
            "backward_slice": the next `count` slices of the pass in flight, or, if `packs` are named, of a
            new sliced pass. "optimizer": the optimizer step of `jobs`.
        count: Slices.
        packs: One job name per pack of a new pass, in order.
        score: One id per score pack.
        jobs: Whose optimizer steps.
        bucket: The train or score bucket of a "forward"; the pass shape of a new sliced pass.
        ms: Predicted.
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
        bucket: The forward to run; None when there is none.
        decode: Requests that decode in it.
        prefill: (id, prompt tokens) in it, admitted ones included.
        packs: One job name per training pack fused into it: starts a pass.
        score: One id per score pack fused into it.
        quanta: What is dispatched after it, in order: one quantum, or several stages of one pass where the
            promise leaves time for them.
        forward_ms: Predicted time of the forward.
        fairness: To be put into the next snapshot.
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
        """Whether there is nothing to do."""
        return self.bucket is None and not self.quanta

    @property
    def predicted_ms(self) -> float:
        """Forward and quanta together."""
        return self.forward_ms + sum(q.ms for q in self.quanta)
