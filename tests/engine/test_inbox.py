"""Nobody waits for a step that others run: calls return while the device works, and what they ask for comes next."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from loquetier_jax.driver import Driver
from loquetier_jax.errors import AdapterError, RequestError
from loquetier_jax.fair_lock import FairLock
from tests.engine.engines import add_random_adapter, greedy, random_adapter, random_data
from tests.engine.evidence import LORA, quick

LIMIT = 60.0  # seconds after which a test that waits for ever fails


class SlowDevice:
    """The device of an engine whose loop has a thread: it finishes nothing until it is let go."""

    def __init__(self, engine: Any, patch: pytest.MonkeyPatch) -> None:
        self.reached, self.go, read = threading.Event(), threading.Event(), engine.loop.read

        def waits() -> None:
            self.reached.set()
            assert self.go.wait(LIMIT)
            read()

        patch.setattr(engine.loop, "read", waits)


@pytest.fixture
def held(tiny_engine: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, SlowDevice]]:
    """An engine in the middle of a step of a request that has long to run."""
    engine, device = tiny_engine, SlowDevice(tiny_engine, monkeypatch)
    add_random_adapter(engine, "a", 1)
    first = engine.submit([5, 6, 7], "a", greedy(80), request_id="first")
    engine.start()
    assert device.reached.wait(LIMIT)
    yield engine, device
    device.go.set()
    engine.cancel(first.request_id)
    engine.stop()


def in_time(call: Callable[[], Any]) -> Any:
    """The call's result; it has to return although no step ends."""
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(call()), daemon=True)
    thread.start()
    thread.join(LIMIT / 2)
    assert not thread.is_alive(), "it waits for the step"
    return result[0]


def test_calls_return_while_a_step_runs(held: Any, tmp_path: Any) -> None:
    engine, device = held
    request = in_time(lambda: engine.submit([5, 6], "a", greedy(3)))
    gone = in_time(lambda: engine.submit([5, 6], "a", greedy(3), request_id="gone"))
    assert in_time(lambda: engine.cancel("gone")) and not in_time(lambda: engine.cancel("nobody"))
    shape, weights = random_adapter(engine.spec, 2)
    in_time(lambda: engine.add_adapter("b", weights, shape))
    folder = in_time(lambda: engine.save_adapter("b", tmp_path / "b"))
    in_time(lambda: engine.load_adapter("c", folder))
    in_time(lambda: engine.rename_adapter("c", "d"))
    in_time(lambda: engine.unload_adapter("d"))
    job = in_time(lambda: engine.finetune("job", random_data(0), lora=LORA, train=quick()))
    in_time(job.pause)
    assert job.status == "paused"
    in_time(job.resume)
    in_time(job.cancel)
    assert job.status == "cancelled" and not device.go.is_set()
    device.go.set()
    engine.wait(lambda: request.finished and gone.finished and job.released)
    assert [r.finish_reason for r in (*request.requests, *gone.requests)] == ["length", "abort"]
    assert len(request.output().outputs[0].token_ids) == 3 and not gone.output().outputs[0].token_ids


def test_refusals_come_at_once(held: Any) -> None:
    """They are told to who calls, not to the loop."""
    engine, device = held
    with pytest.raises(AdapterError, match="adapter: got 'nobody'"):
        engine.submit([5, 6], "nobody")
    with pytest.raises(RequestError, match="request_id: got 'first', expected an id not used by a live request"):
        engine.submit([5, 6], request_id="first")
    queued = engine.submit([5, 6], request_id="second")
    with pytest.raises(RequestError, match="request_id: got 'second'"):  # it waits in the inbox, and is live
        engine.submit([5, 6], request_id="second")
    assert not device.go.is_set() and not queued.finished


def test_a_request_keeps_the_version_its_name_had_at_submit(held: Any) -> None:
    """The name changes its meaning before the loop has seen the request."""
    engine, device = held
    before = engine.adapters.get("a").id
    request = engine.submit([5, 6, 7], "a", greedy(4))
    shape, weights = random_adapter(engine.spec, 9)
    engine.add_adapter("a", weights, shape, replace=True)
    device.go.set()
    engine.wait(lambda: request.finished)
    assert request.output().version == before != engine.adapters.get("a").id


def test_a_batch_is_accepted_whole_or_not_at_all(tiny_engine: Any) -> None:
    engine = tiny_engine
    with pytest.raises(AdapterError):
        engine.generate([[5, 6], [5, 7]], [None, "nobody"], greedy(2))
    assert not engine.loop.serving.waiting and not engine.loop.serving.is_live("request-0")
    engine.check_integrity()


class Nothing:
    """A loop that has nothing to do, and says when it is asked."""

    def __init__(self, lock: FairLock) -> None:
        self.lock, self.asked = lock, threading.Event()

    def iterate(self) -> bool:
        self.asked.set()
        return False

    def drain(self) -> None: ...

    def is_idle(self) -> bool:
        return True

    def fail(self, message: str) -> None: ...


def test_commands_run_in_order_and_under_the_lock() -> None:
    lock, seen = FairLock(), []
    driver = Driver(Nothing(lock), lambda: False)
    other = threading.Thread(target=lambda: [driver.post(lambda i=i: seen.append(i)) for i in range(3)])
    with lock:  # they are left, and the thread that leaves them does not wait
        other.start()
        other.join(LIMIT)
        assert not other.is_alive() and not seen
    driver.post(lambda: seen.append(3))
    assert seen == [0, 1, 2, 3]


def test_what_is_left_for_an_idle_thread_wakes_it() -> None:
    lock, done = FairLock(), threading.Event()
    loop = Nothing(lock)
    driver = Driver(loop, lambda: False)
    driver.start()
    try:
        assert loop.asked.wait(LIMIT)
        loop.asked.clear()
        driver.post(done.set)
        assert done.wait(LIMIT) and loop.asked.wait(LIMIT)
    finally:
        driver.stop()


def test_the_lock_comes_in_turn() -> None:
    """A loop that releases and takes it again at once kept everybody else out."""
    lock, turns, stop = FairLock(), [], threading.Event()

    def greedily() -> None:
        while not stop.is_set():
            with lock:
                turns.append("loop")

    thread = threading.Thread(target=greedily)
    thread.start()
    try:
        for _ in range(50):
            with lock, lock:  # reentrant
                turns.append("other")
    finally:
        stop.set()
        thread.join(LIMIT)
    waits = "".join("o" if turn == "other" else "." for turn in turns).split("o")[1:-1]
    assert sorted(map(len, waits))[len(waits) // 2] <= 2
    with pytest.raises(RuntimeError, match="does not hold it"):
        lock.release()
