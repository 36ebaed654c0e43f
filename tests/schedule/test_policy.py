"""Single decisions, each rule of the policy by itself."""

import copy
import dataclasses

import pytest

from loquetier_jax.config import Bucket, SLOConfig
from loquetier_jax.errors import CapacityError, ConfigError
from loquetier_jax.schedule.latency import FORWARD, FORWARD_SLICE, LatencyModel
from loquetier_jax.schedule.policy import PolicyConfig, decide
from loquetier_jax.schedule.types import (
    Decision,
    Decoding,
    Fairness,
    JobView,
    PassView,
    Prefilling,
    SamplerTime,
    ScoreView,
    SlicedShape,
    Snapshot,
    Waiting,
)


def running(n: int, tokens: int = 2, last: float = 10.0) -> tuple[Decoding, ...]:
    return tuple(
        Decoding(id=f"r{i}", first_token_time=9.99, last_token_time=last, num_output=tokens) for i in range(n)
    )


def waiting(i: int, adapter: str = "", prompt: int = 40, pages: int = 4, **kwargs) -> Waiting:
    arrival = 9.0 + 0.01 * i
    return Waiting(id=f"w{i}", adapter=adapter, arrival=arrival, prompt_tokens=prompt, pages=pages, **kwargs)


def job(name: str, status: str = "ready", **kwargs) -> JobView:
    return JobView(**{"name": name, "status": status, "pack_tokens": 256, **kwargs})


def trains(decision: Decision) -> bool:
    return bool(decision.packs or decision.quanta)


class Case:
    """decide() with the bucket list of the fixtures and room for everybody."""

    def __init__(self, buckets: tuple[Bucket, ...], latency: LatencyModel, **config) -> None:
        self.base = Snapshot(now=10.0, buckets=buckets, free_slots=16, free_pages=1000, slices=4)
        self.latency, self.config = latency, PolicyConfig(**config)

    def __call__(self, **fields) -> Decision:
        return decide(dataclasses.replace(self.base, **fields), self.latency, self.config)


@pytest.fixture
def case(buckets: tuple[Bucket, ...], latency: LatencyModel) -> Case:
    return Case(buckets, latency)


def test_nothing_to_do(case: Case) -> None:
    assert case().idle
    assert case(jobs=(job("a", "waiting"), job("b", "in_pass"))).idle


def test_decodes_take_the_cheapest_bucket_that_holds_them(case: Case) -> None:
    assert case(running=running(3)).bucket.name == "decode4"
    assert case(running=running(5)).bucket.name == "decode16"
    with pytest.raises(CapacityError, match="got 17 running requests, which fit no bucket"):
        case(running=running(17))


def test_small_prompts_share_a_bucket_and_decodes_stay(case: Case) -> None:
    d = case(running=running(3), waiting=tuple(waiting(i, prompt=10 + i) for i in range(3)))
    assert d.bucket.name == "prefill64-decode16"
    assert d.decode == ("r0", "r1", "r2") and d.admit == ("w0", "w1", "w2")
    assert d.prefill == (("w0", 10), ("w1", 11), ("w2", 12))


def test_a_long_prompt_is_cut_at_the_bucket(case: Case) -> None:
    d = case(waiting=(waiting(0, prompt=700),))
    assert (d.prefill, d.bucket.prefill) == ((("w0", 256),), 256)
    d = case(prefilling=(Prefilling(id="p", arrival=9.0, remaining=188),))
    assert d.prefill == (("p", 188),) and d.admit == ()


def test_prompt_chunks_start_on_blocks(case: Case) -> None:
    bucket_list = (Bucket(prefill=64, chunks=4, decode=4),)
    d = case(waiting=tuple(waiting(i, prompt=33) for i in range(2)), buckets=bucket_list)
    assert d.prefill == (("w0", 33), ("w1", 16))  # 33 tokens take 48 rows


def test_adapters_take_turns(case: Case) -> None:
    queue = tuple(waiting(i, adapter, 64) for i, adapter in enumerate("aaabc"))
    only = tuple(b for b in case.base.buckets if b.prefill == 64 and not b.packs)
    served, fairness = [], Fairness()
    while queue:
        d = case(waiting=queue, buckets=only, fairness=fairness)
        served += [i for i, _ in d.prefill]
        queue, fairness = tuple(w for w in queue if w.id not in served), d.fairness
    assert served == ["w0", "w3", "w4", "w1", "w2"]


def test_who_does_not_fit_is_overtaken_only_so_often(buckets: tuple[Bucket, ...], latency: LatencyModel) -> None:
    case = Case(buckets, latency, max_overtakes=3)
    big, fairness, admitted = waiting(0, pages=100), Fairness(), []
    for i in range(1, 9):
        queue = (big, waiting(i, "other" if i % 2 else ""))
        d = case(waiting=queue, free_pages=50, fairness=fairness)
        admitted += d.admit
        fairness = d.fairness
    assert admitted == ["w1", "w2", "w3"] and fairness.overtaken == {"w0": 3}
    d = case(waiting=(big, waiting(9)), free_pages=101, fairness=fairness)
    assert d.admit == ("w0",) and d.fairness.overtaken == {}


@pytest.mark.parametrize(
    ("fields", "admitted"),
    [
        ({"free_slots": 1}, 1),
        ({"free_pages": 8}, 2),
        ({"free_adapter_pages": 4}, 2),
        ({"running": running(14)}, 2),
        ({"running": running(15)}, 1),
    ],
)
def test_admission_respects_every_limit(case: Case, fields: dict, admitted: int) -> None:
    queue = tuple(waiting(i, f"a{i}", prompt=16, adapter_pages=2) for i in range(3))
    assert len(case(waiting=queue, **fields).admit) == admitted
    same = tuple(waiting(i, "a", prompt=16, adapter_pages=2) for i in range(3))
    assert len(case(waiting=same, free_adapter_pages=2).admit) == 3


def test_nobody_is_admitted_where_nothing_prefills(case: Case) -> None:
    assert case(waiting=(waiting(0),), buckets=(Bucket(decode=4),)).admit == ()


def test_a_step_takes_as_long_as_its_forward_and_the_sampler_behind_it(case: Case) -> None:
    times = SamplerTime(rows=4, ms=0.2), SamplerTime(rows=16, ms=0.1, late=9.0), SamplerTime(rows=20, ms=7.0)
    d = case(running=running(3), samplers=times)
    assert (d.bucket.name, d.forward_ms) == ("decode4", pytest.approx(5.28))
    assert case(running=running(5), samplers=times).forward_ms == pytest.approx(5.42)
    assert case(running=running(3), samplers=times[2:]).forward_ms == pytest.approx(5.08)
    fields = {"jobs": (job("a"),), "running": running(3, tokens=1, last=9.99), "now": 9.993}
    fields |= {"slo": SLOConfig(tpot_ms=30.0), "samplers": (SamplerTime(rows=4, ms=0.0),)}
    assert trains(case(**fields))
    late = SamplerTime(rows=4, ms=0.0, late=40.0)
    assert not trains(case(**fields | {"samplers": (late, SamplerTime(rows=16, ms=50.0))})), "its error is planned for"


def test_a_bucket_that_covers_another_is_never_cheaper(
    buckets: tuple[Bucket, ...], own_latency: LatencyModel
) -> None:
    """Noise may have measured it so: 128 requests once ran in a bucket of 256."""
    noisy = own_latency
    noisy.seed((FORWARD, "decode16"), [1.0], 16)
    noisy.seed((FORWARD, "train1x256-decode4"), [1.0], 260)
    case = Case(buckets, noisy)
    assert case(running=running(3)).bucket.name == "decode4"
    [quantum] = case(jobs=(job("a"),)).quanta
    assert quantum.bucket.name == "train1x256"
    fused = case(running=running(3), jobs=(job("a"),))
    assert fused.forward_ms >= 1.0 and fused.predicted_ms >= fused.forward_ms


def test_contexts_are_part_of_the_prediction(buckets: tuple[Bucket, ...], own_latency: LatencyModel) -> None:
    own_latency.seed_attention(kv_token_ms=1e-3, pair_ms=1e-4)
    case = Case(buckets, own_latency)
    short = tuple(dataclasses.replace(r, context=10) for r in running(3))
    long = tuple(dataclasses.replace(r, context=10_000) for r in running(3))
    assert case(running=short).forward_ms == pytest.approx(5.08 + 0.03)
    assert case(running=long).forward_ms == pytest.approx(5.08 + 30.0)
    chunk = Prefilling(id="p", arrival=9.0, remaining=64, done=10_000)
    deep = case(running=short, prefilling=(chunk,))
    pairs = 64 * 10_000 + 64 * 65 / 2
    assert deep.forward_ms == pytest.approx(5 + 0.02 * 80 + 0.03 + 1e-4 * pairs)
    promised = {"slo": SLOConfig(itl_p99_ms=60.0), "running": short, "now": 9.99}
    assert case(**promised, prefilling=(dataclasses.replace(chunk, done=0),)).prefill
    assert case(**promised, prefilling=(chunk,)).prefill == (("p", 48),), "all 64 would make running requests late"
    assert 48 * 10_048 * 1e-4 < 63.4 < 64 * 10_064 * 1e-4
    deeper = dataclasses.replace(chunk, done=1_000_000)
    assert not case(**promised, prefilling=(deeper,)).prefill, "not even a block is in time, so it waits"
    patient = case(**promised, prefilling=(deeper,), fairness=Fairness(prefill_waits=8))
    assert patient.prefill == (("p", 64),), "but not for ever"


def test_prompts_and_decodes_take_turns_where_no_bucket_holds_both(case: Case) -> None:
    bucket_list = (Bucket(decode=4), Bucket(prefill=64, chunks=4, decode=0))
    fields = {"buckets": bucket_list, "running": running(2), "waiting": (waiting(0),)}
    first = case(**fields)
    assert (first.decode, first.prefill) == (("r0", "r1"), ())
    second = case(**fields, fairness=first.fairness)
    assert (second.decode, second.prefill) == ((), (("w0", 40),))
    assert case(**fields, fairness=second.fairness).decode == ("r0", "r1")


def test_prefill_waits_for_headroom_but_not_for_ever(buckets: tuple[Bucket, ...], latency: LatencyModel) -> None:
    case = Case(buckets, latency, max_prefill_waits=2)
    slo = SLOConfig(tpot_ms=6.0)  # a decode step takes 5.08, one with 64 prompt rows 6.6
    fields = {"running": running(2, tokens=3, last=10.0), "waiting": (waiting(0),), "slo": slo, "now": 10.002}
    fairness = Fairness()
    for expected in ((), (), (("w0", 40),)):
        d = case(**fields, fairness=fairness)
        assert d.prefill == expected
        fairness = d.fairness
    assert fairness.prefill_waits == 0
    relaxed = case(**{**fields, "now": 9.998}, fairness=Fairness())
    assert relaxed.prefill == (("w0", 40),)


def test_a_promise_that_decodes_alone_break_holds_no_prompt_up(case: Case) -> None:
    fields = {"running": running(2, tokens=3, last=10.0), "waiting": (waiting(0),)}
    assert case(**fields, slo=SLOConfig(tpot_ms=5.0)).prefill == (("w0", 40),)


def test_training_leaves_the_steps_until_there_is_room(case: Case) -> None:
    """A prompt without KV pages needs the others to end: 100 steps of 6.6 ms, or 2."""
    slo = SLOConfig(ttft_ms=400.0)
    fields = {"waiting": (waiting(0, pages=9),), "free_pages": 8, "slo": slo, "now": 9.05, "jobs": (job("a"),)}
    late, soon = (
        (Decoding(id="r", first_token_time=9.0, last_token_time=9.04, num_output=2, remaining=steps, pages=pages),)
        for steps, pages in ((100, 4), (2, 4))
    )
    assert not trains(case(**fields, running=late))
    assert trains(case(**fields, running=soon))
    assert trains(case(**{**fields, "free_pages": 9, "free_slots": 0}, running=soon))
    assert not trains(case(**{**fields, "free_pages": 9, "free_slots": 0}, running=late))


def test_when_nobody_is_there_the_largest_quantum_runs(case: Case) -> None:
    d = case(jobs=tuple(job(n) for n in "abcd"))
    assert d.bucket is None and d.quanta[0].bucket.name == "train4x256"
    assert d.quanta[0].packs == ("a", "b", "c", "d")
    view = PassView(packs=4, pack_tokens=256, stage="backward", slices=4, slices_left=4)
    d = case(jobs=tuple(job(n, "in_pass") for n in "abcd"), train_pass=view)
    assert (d.quanta[0].kind, d.quanta[0].count) == ("backward_slice", 4)
    d = case(jobs=(job("a", "optimizer"), job("b", "optimizer"), job("c")))
    assert (d.quanta[0].kind, d.quanta[0].jobs) == ("optimizer", ("a", "b"))


def test_packs_ride_with_inference_and_only_equal_ones_together(case: Case) -> None:
    mixed = (job("a"), job("b", pack_tokens=512), job("c"), job("d", group="dpo"))
    d = case(jobs=mixed)
    assert d.quanta[0].packs == ("a", "c")
    d = case(jobs=mixed, fairness=d.fairness)
    assert d.quanta[0].packs == ("b",) and d.quanta[0].bucket.name == "train2x512"
    d = case(jobs=mixed, fairness=d.fairness)
    assert d.quanta[0].packs == ("d",)
    fused = case(jobs=(job("a"),), running=running(3))
    assert fused.bucket.name == "train1x256-decode4"
    assert fused.packs == ("a",) and fused.quanta == ()


def test_jobs_whose_shape_is_not_compiled_hold_nobody_up(case: Case) -> None:
    d = case(jobs=(job("slow", pack_tokens=4096), job("a")))
    assert d.quanta[0].packs == ("a",)


def test_training_has_its_share_beside_requests(buckets: tuple[Bucket, ...], latency: LatencyModel) -> None:
    for share in (0.0, 0.25, 0.5, 0.75):
        case = Case(buckets, latency, train_share=share)
        fairness, inference, training = Fairness(), 0.0, 0.0
        for _ in range(400):
            d = case(jobs=(job("a", packs=100),), running=running(3), fairness=fairness)
            fairness = d.fairness
            alone = 5 + 0.02 * 4
            inference, training = inference + alone, training + d.predicted_ms - alone
        assert training / (training + inference) == pytest.approx(share, abs=0.01)


def test_a_promise_leaves_what_it_leaves(
    buckets: tuple[Bucket, ...], latency: LatencyModel, sliced: tuple[SlicedShape, ...]
) -> None:
    case = Case(buckets, latency, margin=0.0)
    fields = {"jobs": (job("a"),), "running": running(3, tokens=1, last=9.99), "sliced": sliced, "slices": 4}
    # due at 9.99 + 6 ms: late already, nothing but decode
    assert case(**fields, slo=SLOConfig(tpot_ms=6.0)).predicted_ms == pytest.approx(5.08)
    loose = case(**fields, slo=SLOConfig(tpot_ms=200.0))
    assert loose.packs == ("a",)
    # The token is due in 8.5 ms: 5.1 are in time, the 10.2 of a fused pack are not. After it 14.9 - 5.1 are
    # left until the next forward must start: three forward slices of 2.8 fit, the forward of 10.1 does not.
    tight = case(**fields, slo=SLOConfig(tpot_ms=11.5), now=9.993)
    assert tight.packs == () and tight.forward_ms == pytest.approx(5.08)
    assert (tight.quanta[0].kind, tight.quanta[0].count) == ("forward_slice", 3)


@pytest.mark.parametrize(("error", "slices"), [(0.01, 3), (0.5, 2), (1.0, 1)])
def test_a_plan_leaves_room_for_the_error_of_its_own_predictions(
    buckets: tuple[Bucket, ...], latency: LatencyModel, sliced: tuple[SlicedShape, ...], error: float, slices: int
) -> None:
    """9.8 ms are left between two forwards of 5.1 and their own margin: three slices of 2.8 if these are on time."""
    measured, key = copy.deepcopy(latency), (FORWARD_SLICE, Bucket(packs=1, pack_tokens=256).name)
    ms = latency.predict(key, 256)
    measured.seed(key, [ms] * 99, 256)
    for took in (1 + error, 1 + error, *(126 * [1.0])):
        measured.observe(key, ms * took, 256)
    assert measured.predict(key, 256) == pytest.approx(ms, rel=1e-3)
    fields = {"jobs": (job("a"),), "running": running(3, tokens=1, last=9.99), "sliced": sliced, "slices": 4}
    fields |= {"slo": SLOConfig(tpot_ms=12.0), "now": 9.993}
    d = Case(buckets, measured)(**fields)
    assert (d.quanta[0].kind, d.quanta[0].count) == ("forward_slice", slices)
    assert Case(buckets, measured)(**fields, late_ms=9.0).quanta == ()  # nor is it sure when this one can start


def test_no_gap_is_planned_longer_than_promised(
    buckets: tuple[Bucket, ...], latency: LatencyModel, sliced: tuple[SlicedShape, ...]
) -> None:
    """Requests far ahead of their TPOT: the mean would allow hundreds of milliseconds."""
    case = Case(buckets, latency, margin=0.0)
    ahead = (Decoding(id="r", first_token_time=9.0, last_token_time=10.0, num_output=100),)
    fields = {"jobs": (job("a"),), "running": ahead, "sliced": sliced, "slices": 4}
    longest = {}
    for name, slo in (
        ("default", SLOConfig(tpot_ms=20.0)),
        ("given", SLOConfig(tpot_ms=20.0, itl_p99_ms=18.0)),
        ("alone", SLOConfig(itl_p99_ms=18.0)),
    ):
        d = case(**fields, slo=slo)
        longest[name] = d.predicted_ms - d.forward_ms + 5.08  # to the end of the next decode
    assert longest["given"] == longest["alone"] <= 18.0 < longest["default"] <= 80.0


def test_the_next_to_arrive_is_thought_of(case: Case) -> None:
    """It may come just after a decision, the host is a step ahead: two quanta and 11 ms of prompt within its TTFT."""
    fields = {"jobs": tuple(job(n) for n in "abcd")}
    assert case(**fields).predicted_ms > 25
    assert case(**fields, slo=SLOConfig(ttft_ms=100.0)).predicted_ms > 25
    assert case(**fields, slo=SLOConfig(ttft_ms=60.0)).predicted_ms <= 24.5
    beside = {"running": running(3), **fields}
    assert case(**beside, slo=SLOConfig(ttft_ms=1000.0)) == case(**beside)  # a share of time, as without a promise


def test_the_floor_breaks_the_promise(buckets: tuple[Bucket, ...], latency: LatencyModel) -> None:
    fields = {"jobs": (job("a"),), "running": running(3), "slo": SLOConfig(tpot_ms=1.0)}
    assert Case(buckets, latency)(**fields).packs == ()
    assert Case(buckets, latency, train_floor=0.1)(**fields).packs == ("a",)


def test_scores_and_training_take_turns(case: Case) -> None:
    work = (ScoreView(id="s", tokens=200, packs=3), ScoreView(id="t", tokens=512))
    fields = {"score": work, "jobs": (job("a"),)}
    first = case(**fields)
    assert first.quanta[0].score in (("s",), ("s", "s")) and first.quanta[0].bucket.score_tokens >= 200
    second = case(**fields, fairness=first.fairness)
    assert second.quanta[0].packs == ("a",)
    assert case(**fields, fairness=second.fairness).quanta[0].score
    beside = case(score=work[1:], running=running(2))
    assert beside.bucket.name == "score1x512-decode16" and beside.score == ("t",)


def test_who_cannot_be_admitted_does_not_stop_training(case: Case) -> None:
    d = case(jobs=(job("a"),), waiting=(waiting(0),), free_pages=0)
    assert d.bucket is None and d.quanta[0].packs == ("a",)


def test_bad_settings_are_refused() -> None:
    for name, value in (("train_share", 1.1), ("train_floor", -1), ("max_quantum_ms", 0), ("margin", -1),
                        ("max_lead", 0), ("max_overtakes", -1), ("max_prefill_waits", -1)):  # fmt: skip
        with pytest.raises(ConfigError, match=f"^{name}: got {value}"):
            PolicyConfig(**{name: value})
