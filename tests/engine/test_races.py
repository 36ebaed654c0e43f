"""What threads, listeners and garbage may do at any moment, and what then becomes of everybody else."""

import gc
import threading
from typing import Any

import pytest

from loquetier_jax.errors import EngineError, RequestError
from loquetier_jax.sampling_params import SamplingParams
from tests.engine.engines import add_random_adapter, greedy, random_data
from tests.engine.evidence import LORA, quick, settle

LIMIT = 60.0


def test_an_iterator_collected_inside_a_decision_cancels_after_it(tiny_engine: Any, monkeypatch: pytest.MonkeyPatch):
    """Its `finally` ran a cancel in the loop's thread, among the requests that were being looked at."""
    engine, kept = tiny_engine, []
    kept.append(engine.stream([5, 6, 7], None, greedy(60)))
    next(kept[0])
    other, decide = engine.submit([5, 6, 8], None, greedy(8)), engine.loop.serving.views

    def collects(expected: float) -> Any:
        kept.clear()
        gc.collect()
        assert engine.loop.serving.running, "it is cancelled once the decision has been carried out"
        return decide(expected)

    with monkeypatch.context() as patch:
        patch.setattr(engine.loop.serving, "views", collects)
        engine.step()
    engine.wait(lambda: other.finished)
    settle(engine)
    assert len(other.output().outputs[0].token_ids) == 8 and not engine.loop.serving.running
    engine.check_integrity()


def test_a_request_cancelled_before_the_loop_has_seen_it_never_runs(tiny_engine: Any, monkeypatch: pytest.MonkeyPatch):
    engine, store = tiny_engine, tiny_engine.adapters
    add_random_adapter(engine, "a", 1)
    prepare = store.prepare

    def meanwhile(version: Any) -> None:
        prepare(version)
        assert engine.cancel("x")

    with monkeypatch.context() as patch:
        patch.setattr(store, "prepare", meanwhile)
        gone = engine.submit([5, 6], "a", greedy(4), request_id="x")
    settle(engine)
    assert gone.finished and not gone.output().outputs[0].token_ids
    assert [v.holds for v in store.versions()] == [0] and not engine.loop.serving.is_live("x")


@pytest.mark.parametrize("scores", [None, 1], ids=["plain", "prompt_logprobs"])
def test_what_is_refused_or_interrupted_half_way_holds_nothing(tiny_engine: Any, monkeypatch: Any, scores: int | None):
    engine, store = tiny_engine, tiny_engine.adapters
    add_random_adapter(engine, "a", 1)
    params = greedy(4, prompt_logprobs=scores)
    with pytest.raises(RequestError):
        engine.generate([[5, 6, 7], [5] * 10_000], "a", params)

    def interrupted(version: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "prepare", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.submit([5, 6, 7], "a", params, request_id="x")
    assert [v.holds for v in store.versions()] == [0] and not engine.loop.serving.is_live("x")
    assert engine.generate([[5, 6, 7]], "a", params)[0].outputs[0].finish_reason == "length"


def test_a_listener_that_cancels_and_raises_hurts_itself_alone(tiny_engine: Any):
    engine = tiny_engine

    def listener(piece: Any) -> None:
        engine.cancel("x")
        raise ConnectionError

    first = engine.submit([5, 6, 7], None, greedy(20), request_id="x", listener=listener)
    other = engine.submit([5, 6, 8], None, greedy(8))
    engine.wait(lambda: first.finished and other.finished)
    assert first.requests[0].finish_reason == "abort" and other.requests[0].finish_reason == "length"


def test_a_listener_that_waits_is_refused_for_its_last_piece_too(tiny_engine: Any):
    engine, caught = tiny_engine, []

    def listener(piece: Any) -> None:
        if piece.finish_reason == "abort":
            for call in (engine.start, engine.stop, engine.step, lambda: engine.generate([[5, 6]])):
                with pytest.raises(RuntimeError, match="listener"):
                    call()
                caught.append(call)

    engine.submit([5, 6, 7], None, greedy(20), request_id="x", listener=listener)
    engine.cancel("x")
    assert len(caught) == 4


def test_a_command_that_fails_ends_nobody(tiny_engine: Any, caplog: pytest.LogCaptureFixture):
    tiny_engine.driver.post(lambda: 1 / 0)
    assert "a command to the loop has failed" in caplog.text
    assert tiny_engine.generate([[5, 6]], None, greedy(2))[0].outputs[0].finish_reason == "length"


@pytest.mark.parametrize("when", ["closed", "failed"])
def test_a_request_that_comes_too_late_ends_with_why(make_engine: Any, monkeypatch: pytest.MonkeyPatch, when: str):
    """It was accepted before, and reached the loop after the end: it waited for ever."""
    engine, pieces = make_engine(), []
    add_random_adapter(engine, "a", 1)
    prepare = engine.adapters.prepare

    def meanwhile(version: Any) -> None:
        prepare(version)
        if when == "closed":
            engine.close()
        else:
            monkeypatch.setattr(engine.loop, "iterate", lambda: 1 / 0)
            with pytest.raises(EngineError):
                engine.step()

    monkeypatch.setattr(engine.adapters, "prepare", meanwhile)
    late = engine.submit([5, 6], "a", greedy(4), listener=pieces.append)
    assert late.finished and pieces[-1].finish_reason == "error"
    assert ("closed" if when == "closed" else "ZeroDivisionError") in late.requests[0].stop_reason


def test_closing_is_not_kept_up_by_those_who_go_on(make_engine: Any):
    engine = make_engine()
    engine.start()

    def goes_on() -> None:
        while True:
            try:
                engine.generate([[5, 6, 7]], None, SamplingParams(temperature=0, max_tokens=3))
            except EngineError:
                return

    threads = [threading.Thread(target=goes_on) for _ in range(3)]
    for thread in threads:
        thread.start()
    closers = [threading.Thread(target=engine.close) for _ in range(2)]
    for thread in closers:
        thread.start()
    for thread in (*closers, *threads):
        thread.join(LIMIT)
        assert not thread.is_alive()
    assert engine.driver.closed


def test_a_checkpoint_of_an_ended_job_does_not_wait_for_the_next_of_its_name(tiny_engine: Any, tmp_path: Any):
    engine = tiny_engine
    first = engine.finetune("j", random_data(0), lora=LORA, train=quick()).wait()
    later = engine.finetune("j", random_data(0), lora=LORA, train=quick(max_steps=100), replace=True)
    engine.wait(lambda: later.step >= 1)
    first.checkpoint(tmp_path / "first")
    assert later.step < 90
    later.cancel()
    settle(engine)
