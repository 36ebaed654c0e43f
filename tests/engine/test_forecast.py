"""The scheduler plans from when the device will be free, not from when the host looks at it."""

from collections.abc import Iterator

import pytest

from loquetier_jax.adapters.lora import LoraConfig
from loquetier_jax.config import SLOConfig
from loquetier_jax.engine import Engine
from loquetier_jax.runtime.loop import Loop
from loquetier_jax.runtime.pending import Pending
from loquetier_jax.schedule.latency import Reads, Run, chunk_pairs, sampler_run
from loquetier_jax.train.config import TrainConfig
from tests.engine.engines import greedy, random_data


@pytest.fixture
def loop(tiny_engine: Engine) -> Iterator[Loop]:
    """The loop of the shared engine; clock, promise and callback are put back."""
    loop = tiny_engine.loop
    before = loop.clock, loop.slo
    yield loop
    loop.on_iteration, (loop.clock, loop.slo) = None, before


def test_what_is_in_flight_comes_first(tiny_engine: Engine, loop: Loop) -> None:
    """A step was planned as if it began at once: its tokens came a whole step later than they had been promised."""
    now = loop.clock()
    loop.clock = lambda: now
    tiny_engine.submit([5, 6, 7], None, greedy(9))
    assert loop.snapshot().now == now and loop.snapshot().late_ms == 0
    loop.iterate()  # the prompt is dispatched and not read
    seen, able = loop.snapshot(), [b for b in loop.cfg.buckets if b.prefill and not b.packs]
    reads = Reads(pairs=chunk_pairs(0, 3))
    steps = [[Run(("forward", b.name), b.rows, reads), sampler_run(b.samples, "greedy")] for b in able]
    ends = [now + sum(loop.latency.predict(*run) for run in step) / 1e3 for step in steps]
    [step] = [s for s, end in zip(steps, ends, strict=True) if seen.now == pytest.approx(end, abs=1e-9)]
    assert seen.late_ms == pytest.approx(sum(loop.latency.late(*run) for run in step))
    [request] = seen.running
    assert request.num_output == 1
    assert request.first_token_time == request.last_token_time == seen.now
    loop.iterate()  # the second token is dispatched, the first one has been read
    seen = loop.snapshot()
    [request] = seen.running
    assert request.num_output == 2
    assert request.first_token_time == now < request.last_token_time == seen.now


def test_steps_are_planned_with_the_sampler_of_who_runs(tiny_engine: Engine, loop: Loop) -> None:
    """Penalties take longer: a promise is kept only if the plan knows that somebody asks for them."""
    sizes = {b.samples for b in loop.cfg.buckets if b.samples}
    for changes, level in (({}, "greedy"), ({"logprobs": 2}, "greedy_logprobs"), ({"frequency_penalty": 0.5}, "full")):
        tiny_engine.submit([5, 6, 7], None, greedy(4, **changes))
        loop.iterate()
        seen = {(s.rows, s.ms, s.late) for s in loop.snapshot().samplers}
        runs = [sampler_run(rows, level) for rows in sizes]
        assert seen == {(run.rows, loop.latency.predict(*run), loop.latency.late(*run)) for run in runs}


def test_tokens_do_not_wait_for_training_after_them(tiny_engine: Engine, loop: Loop) -> None:
    """The last token of a request came with the end of the quantum behind it, which had been planned for others."""
    train = TrainConfig(max_steps=200, pack_tokens=64, per_device_train_batch_size=2)
    job = tiny_engine.finetune("job", random_data(1), lora=LoraConfig(r=8), train=train)
    tiny_engine.wait(lambda: job.step >= 1)
    loop.slo = SLOConfig(tpot_ms=1e6)  # any quantum fits
    ends, ahead = [0.0], []

    def note(pending: Pending, ms: float) -> None:
        ends.append(max(ends[-1], pending.started) + ms / 1e3)
        if len(ends) > 2 and pending.rows and pending.quanta and not pending.fused:
            ahead.append(ends[-1] - pending.rows[0][1].metrics.last_token_time)

    loop.on_iteration = note
    tiny_engine.generate([[5, 6, 7]], None, greedy(20))
    assert ahead and min(ahead) > 1e-6
