"""More adapters than pages: loads run beside the steps, whoever waits for one waits alone, and outputs are the same."""

import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import loquetier_jax.step.state as state_module
from loquetier_jax.engine import Engine
from loquetier_jax.errors import AdapterError, EngineError
from loquetier_jax.loop_thread import EngineThread
from tests.engine.engines import add_random_adapter, greedy, random_data, random_prompt, reset
from tests.engine.evidence import LORA, quick, settle

LIMIT = 60.0  # seconds after which a test that waits for ever fails
FOLDERS = 4


@pytest.fixture(scope="module")
def shared(make_engine: Callable[..., Engine]) -> Engine:
    """Nine pages, two host copies."""
    return make_engine(max_host_adapters=2)


@pytest.fixture
def engine(shared: Engine) -> Iterator[Engine]:
    start = shared.adapters.loader.start
    yield shared
    shared.adapters.loader.start = start
    reset(shared)


@pytest.fixture
def folders(engine: Engine, tmp_path: Any) -> list[Any]:
    """PEFT folders of adapters of rank 8 to 24."""
    for i in range(FOLDERS):
        add_random_adapter(engine, "made", i + 1, 8 * (1 + i % 3))
        engine.save_adapter("made", tmp_path / f"f{i}")
        engine.unload_adapter("made")
    return [tmp_path / f"f{i}" for i in range(FOLDERS)]


class Held:
    """Loads of an engine, which run when `work` is called."""

    def __init__(self, engine: Engine) -> None:
        self.workers: list[Callable[[], None]] = []
        engine.adapters.loader.start = self.workers.append

    def work(self) -> None:
        while self.workers:
            self.workers.pop(0)()


def gated(engine: Engine) -> threading.Event:
    """Lets the threads of an engine's loader begin once the event is set."""
    gate = threading.Event()

    def start(work: Callable[[], None]) -> None:
        EngineThread(lambda: gate.wait(LIMIT) and work(), "held-loader").start()

    engine.adapters.loader.start = start
    return gate


def numbers(submitted: Any) -> tuple[list[int], list[float]]:
    one = submitted.output().outputs[0]
    return one.token_ids, [position[token].logprob for token, position in zip(one.token_ids, one.logprobs, strict=True)]


def test_many_names_on_few_pages_give_what_each_adapter_gives_alone(engine: Engine, folders: list[Any]) -> None:
    rng, params = np.random.default_rng(0), greedy(4, logprobs=0)
    prompts = [random_prompt(rng, int(n)) for n in rng.integers(2, 60, 24)]
    alone = {}
    for f, folder in enumerate(folders):
        engine.load_adapter("alone", folder)
        for i in range(f, len(prompts), FOLDERS):
            one = engine.submit(prompts[i], "alone", params)
            engine.wait(lambda one=one: one.finished)
            alone[i] = numbers(one)
        engine.unload_adapter("alone")
    versions = [engine.load_adapter(f"n{i}", folders[i % FOLDERS]) for i in range(22)]
    names = [f"n{int(rng.integers(5)) * FOLDERS + i % FOLDERS}" for i in range(len(prompts))]
    crowd = [engine.submit(prompt, name, params) for prompt, name in zip(prompts, names, strict=True)]
    while not all(one.finished for one in crowd):
        engine.step()
        engine.check_integrity()
    assert {i: numbers(one) for i, one in enumerate(crowd)} == alone
    assert sum(v.copy is not None for v in versions) < 22 and len({id(v.copy) for v in versions if v.copy}) <= 2
    assert len({one.output().version for one in crowd}) > 9, "more versions than there are pages"


def test_who_waits_for_a_load_waits_alone(engine: Engine, folders: list[Any]) -> None:
    add_random_adapter(engine, "there", 1)
    engine.generate([[5, 6]], "there", greedy(1))
    held, version = Held(engine), engine.load_adapter("late", folders[0])
    late = engine.submit([5, 6, 7], "late", greedy(5))
    others = [engine.submit([5, 6, i], name, greedy(9)) for i in (8, 9) for name in ("there", None)]
    job = engine.finetune("job", random_data(0), lora=LORA, train=quick())
    engine.wait(lambda: all(one.finished for one in others) and job.released)
    assert [len(one.output().outputs[0].token_ids) for one in others] == [9] * 4
    assert engine.step() and not late.finished, "what is left waits, which is not the same as nothing to do"
    assert version.pages is None and late.requests[0].status == "waiting"
    engine.check_integrity()
    held.work()
    engine.wait(lambda: late.finished)
    assert len(late.output().outputs[0].token_ids) == 5 and not engine.adapters.loader.busy


@pytest.mark.parametrize("threaded", [False, True])
def test_callers_wait_for_a_load(engine: Engine, folders: list[Any], threaded: bool) -> None:
    """Whether they drive the loop or its thread does; a base request that ends tells the loader to begin."""
    gate = gated(engine)
    engine.load_adapter("late", folders[1])
    engine.submit([5, 6], None, greedy(3), listener=lambda piece: piece.finish_reason and gate.set())
    if threaded:
        engine.start()
    try:
        assert len(engine.generate([[5, 6, 7]], "late", greedy(4))[0].outputs[0].token_ids) == 4
        assert gate.is_set()
    finally:
        engine.stop()
    assert np.isfinite(engine.log_probs([[5, 6, 7]], "late")[0]).all()


def test_scores_wait_for_a_load_and_others_do_not_wait_for_them(engine: Engine, folders: list[Any]) -> None:
    held = Held(engine)
    engine.load_adapter("late", folders[2])
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(engine.log_probs([[5, 6, 7]], "late")))
    thread.start()
    while not engine.loop.scoring:
        engine.step()
    assert np.isfinite(engine.log_probs([[5, 6, 7]])[0]).all() and not results
    while thread.is_alive():
        held.work()
        engine.step()
    assert np.isfinite(results[0][0]).all()


def test_a_load_that_ends_within_the_step_that_asked_for_it_is_used_by_the_next(
    engine: Engine, folders: list[Any]
) -> None:
    """Whoever waited was told that nothing was left to do: the load was over before and after the step."""
    engine.adapters.loader.start = lambda work: work()
    engine.load_adapter("a", folders[0])
    assert np.isfinite(engine.log_probs([[5, 6, 7]], "a")[0]).all()
    engine.load_adapter("b", folders[1])
    assert len(engine.generate([[5, 6]], "b", greedy(2))[0].outputs[0].token_ids) == 2


@pytest.mark.parametrize("change", ["cancel", "unload", "replace", "rename"])
def test_what_changes_while_an_adapter_is_loaded(engine: Engine, folders: list[Any], change: str) -> None:
    held, version = Held(engine), engine.load_adapter("a", folders[0])
    request = engine.submit([5, 6, 7], "a", greedy(4), request_id="x")
    engine.step()
    {
        "cancel": lambda: engine.cancel("x"),
        "unload": lambda: engine.unload_adapter("a"),
        "replace": lambda: engine.load_adapter("a", folders[1], replace=True),
        "rename": lambda: engine.rename_adapter("a", "z"),
    }[change]()
    engine.check_integrity()
    held.work()
    engine.wait(lambda: request.finished)
    settle(engine)
    assert request.requests[0].finish_reason == ("abort" if change == "cancel" else "length")
    assert request.output().version == version.id
    alive = version in engine.adapters.versions()
    assert alive == (change in ("cancel", "rename")) and (version.pages is not None) == (change == "rename")
    engine.check_integrity()


def test_a_folder_that_vanishes_while_it_is_to_be_loaded_ends_its_own_requests(
    engine: Engine, folders: list[Any]
) -> None:
    held = Held(engine)
    for name, folder in zip("ab", folders, strict=False):
        engine.load_adapter(name, folder)
    gone, other = (engine.submit([5, 6, 7], name, greedy(4)) for name in "ab")
    shutil.rmtree(folders[0])
    held.work()
    engine.wait(lambda: gone.finished and other.finished)
    assert gone.requests[0].finish_reason == "error" and str(folders[0]) in gone.requests[0].stop_reason
    assert other.requests[0].finish_reason == "length"
    for call in (lambda: engine.save_adapter("a", folders[0]), lambda: engine.pin_adapter("a")):
        with pytest.raises(AdapterError, match="changed"):
            call()
    engine.check_integrity()


def test_saving_over_a_folder_leaves_adapters_loaded_from_it_alone(engine: Engine, folders: list[Any]) -> None:
    """They may not have been read yet: registering reads only the header."""
    held = Held(engine)
    for name, folder in zip("ab", folders, strict=False):
        engine.load_adapter(name, folder)
    engine.save_adapter("b", folders[0])
    assert engine.adapters.get("a").copy is not None
    engine.load_adapter("overwritten", folders[0])
    requests = [engine.submit([5, 6, 7], name, greedy(4, logprobs=0)) for name in ("a", "b", "overwritten")]
    held.work()
    engine.wait(lambda: all(one.finished for one in requests))
    a, b, overwritten = map(numbers, requests)
    assert a != b and overwritten[0] == b[0]


def test_an_old_request_gets_its_adapter_while_resident_ones_keep_coming(engine: Engine, folders: list[Any]) -> None:
    """Nine pages, all of adapters that are asked for without a pause; theirs may go first, but not for ever."""
    for i in range(9):
        add_random_adapter(engine, f"r{i}", i, 8)
    flood = [engine.submit([5, 6, i], f"r{i % 9}", greedy(3)) for i in range(27)]
    engine.load_adapter("late", folders[0])
    late, steps = engine.submit([5, 6, 7], "late", greedy(3)), 0
    while not late.finished:
        flood.append(engine.submit([5, 6, 7], f"r{steps % 9}", greedy(3)))
        engine.step()
        steps += 1
        assert steps < 2000
    engine.check_integrity()
    engine.wait(lambda: all(one.finished for one in flood))


def test_a_load_is_one_call_for_all_its_pages(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, write_pages = [], state_module.write_pages

    def counted(pages: Any, ids: Any, new: Any, compiled: Any) -> Any:
        calls.append(len(ids))
        return write_pages(pages, ids, new, compiled)

    add_random_adapter(engine, "two", 1, 24)
    monkeypatch.setattr(state_module, "write_pages", counted)
    engine.generate([[5, 6, 7]] * 3, "two", greedy(2))
    assert calls == [2]


def test_folders_are_read_without_the_lock(
    engine: Engine, folders: list[Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, weights, owned = engine.load_adapter("a", folders[0]), engine.adapters.weights, []

    def watched(version: Any) -> Any:
        owned.append(engine.driver.lock.owned)
        return weights(version)

    monkeypatch.setattr(engine.adapters, "weights", watched)
    engine.save_adapter("a", tmp_path / "again")
    engine.finetune("job", random_data(0), init_from="a", train=quick(max_steps=1)).cancel()
    assert owned == [False, False] and version.holds == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folders[0] / name).read_bytes()


def test_closing_while_adapters_are_loaded(make_engine: Callable[..., Engine], folders: list[Any]) -> None:
    engine = make_engine(max_host_adapters=0)
    gate = gated(engine)
    engine.load_adapter("late", folders[0])
    request = engine.submit([5, 6, 7], "late", greedy(4))
    engine.step()
    closing = threading.Thread(target=engine.close)
    closing.start()
    while engine.driver.failure is None and not engine.driver.closed:
        try:
            engine.check_integrity()
        except EngineError:
            break
    gate.set()
    closing.join(LIMIT)
    assert not closing.is_alive() and request.requests[0].finish_reason == "error"
    assert "closed" in request.requests[0].stop_reason
