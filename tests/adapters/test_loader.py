"""Loads in the background: order, room, errors, and what becomes of a load whose version is no longer wanted."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loquetier_jax.adapters.folder import read_folder
from loquetier_jax.adapters.lora import LoraModule, LoraShape
from loquetier_jax.adapters.peft import write_peft
from loquetier_jax.adapters.store import AdapterStore
from loquetier_jax.adapters.version import Version
from loquetier_jax.errors import AdapterError, CapacityError, IntegrityError
from tests.adapters.cases import SPEC, random_weights

LIMIT = 60.0  # seconds after which a test that waits for ever fails


def shape_of(pages: int) -> LoraShape:
    return LoraShape((LoraModule(0, "o_proj", 16 * pages, 1.0),))


class World:
    """A store of seven pages, and what happens to it: workers run when `work` is called, reads go through `read`."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder, self.reads, self.staged = folder, [], []
        self.written: dict[int, str] = {}
        self.workers: list[Callable[[], None]] = []
        self.read: Callable[[Version], str] = lambda version: version.source.name
        transfers = {"cast": lambda weights, shape: "cast", "read": self._read, "stage": self._stage}
        fields = {"num_pages": 8, "max_pages": 4, "max_host_adapters": 3} | changes
        self.store = AdapterStore(SPEC, **fields, **transfers, write=self._write)
        self.store.loader.start = self.workers.append

    def _read(self, version: Version) -> str:
        self.reads.append(version.name)
        return self.read(version)

    def _stage(self, pages: str) -> str:
        self.staged.append(pages)
        return pages

    def _write(self, ids: tuple[int, ...], pages: str) -> None:
        self.written.update(dict.fromkeys(ids, pages))

    def load(self, name: str, pages: int = 1, folder: str = "") -> Version:
        path = self.folder / (folder or name)
        if not path.exists():
            write_peft(path, random_weights(shape_of(pages)), shape_of(pages), SPEC)
        return self.store.take_in(name, read_folder(path, SPEC), replace=True)

    def work(self) -> None:
        """Lets all workers run that have been started, and those started meanwhile."""
        while self.workers:
            self.workers.pop(0)()
        self.store.check_integrity()

    def request(self, name: str) -> Version:
        """A request arrives."""
        version = self.store.hold(name)
        self.store.prepare(version)
        return version

    def serve(self, version: Version) -> set[str]:
        """It is admitted, runs and ends; returns what was in its pages."""
        self.store.acquire(version)
        try:
            found = {self.written[page] for page in self.store.ensure_loaded(version)}
        finally:
            self.store.release(version, 0)
        self.store.drop(version)
        return found


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, max_host_adapters=0)  # nothing is copied ahead of time


def test_a_folder_replaced_while_it_is_read_is_refused(world: World) -> None:
    """What was read may be of either adapter, and would be kept as the copy of the old one."""
    version = world.load("a")

    def replaced(version: Version) -> str:
        write_peft(version.source, random_weights(shape_of(2)), shape_of(2), SPEC)
        return "mixture"

    world.read = replaced
    world.store.hold("a")
    world.store.prepare(version)
    world.work()
    assert version.copy is None and "mixture" not in world.staged
    with pytest.raises(AdapterError, match="changed"):
        world.store.ensure_loaded(version)
    world.store.drop(version)


def test_a_request_comes_back_until_its_adapter_is_staged(world: World) -> None:
    version = world.load("a")
    world.request("a")
    assert not world.store.is_ready(version) and world.store.loader.busy
    with pytest.raises(CapacityError, match="'a' is being loaded"):
        world.serve(version)
    assert not world.reads, "the thread that asks reads nothing"
    world.work()
    assert world.store.is_ready(version) and not world.store.loader.busy and version.pages is None
    assert world.serve(version) == {"a"} and world.reads == ["a"] and version.residency == "device"
    world.store.check_integrity()


def test_loads_run_in_order_and_no_more_are_staged_than_there_is_room_for(world: World) -> None:
    for name, pages in (("a", 2), ("b", 1), ("c", 4), ("d", 1)):
        world.load(name, pages)
    held = {name: world.request(name) for name in "abcd"}
    world.work()
    assert world.reads == ["a", "b"], "four pages are staged at most, and a small one does not pass a large one"
    assert not world.store.loader.busy
    assert world.serve(held["a"]) == {"a"}
    world.work()
    assert world.reads == ["a", "b"]
    assert world.serve(held["b"]) == {"b"}
    world.work()
    assert world.reads == ["a", "b", "c"]
    assert world.serve(held["c"]) == {"c"}
    world.work()
    assert world.serve(held["d"]) == {"d"}


def test_a_request_that_is_cancelled_makes_room(world: World) -> None:
    for name in "ab":
        world.load(name, 4)
    first, second = world.request("a"), world.request("b")
    world.work()
    assert world.store.is_ready(first) and not world.store.is_ready(second)
    world.store.drop(first)
    assert not world.store.is_ready(first)
    world.work()
    assert world.serve(second) == {"b"}


def test_an_error_ends_those_that_wait_and_the_next_request_tries_again(world: World) -> None:
    world.load("a"), world.load("b")
    for error in (AdapterError("gone"), ZeroDivisionError("a bug")):

        def fails(version: Version, error: Exception = error) -> str:
            if version.name == "a":
                raise error
            return "b"

        world.read = fails
        waiting = [world.request("a"), world.request("a"), world.request("b")]
        world.work()
        for version in waiting[:2]:
            with pytest.raises(AdapterError, match=str(error)):
                world.serve(version)
        assert world.serve(waiting[2]) == {"b"}
        world.store.drop(waiting[0]), world.store.drop(waiting[1])
    world.read = lambda version: "a"
    version = world.request("a")
    world.work()
    assert world.serve(version) == {"a"}


def test_no_thread_is_an_error_of_the_request(world: World) -> None:
    def start(work: Callable[[], None]) -> None:
        raise RuntimeError("can't start new thread")

    world.store.loader.start = start
    world.load("a")
    with pytest.raises(AdapterError, match="can't start new thread"):
        world.serve(world.request("a"))


def test_eviction_while_another_is_loaded_loads_what_was_evicted_again(world: World) -> None:
    for name, pages in (("a", 4), ("b", 3), ("c", 4)):
        world.load(name, pages)
    for name in "ab":
        held = world.request(name)
        world.work()
        world.serve(held)
    waits, held = world.request("a"), world.request("c")  # a is resident, and stays so if it can
    world.work()
    with pytest.raises(CapacityError):  # b alone is too small, and steps read a
        world.store.acquire(waits)
        world.serve(held)
    world.store.release(waits, 0)
    assert world.serve(held) == {"c"} and waits.pages is None
    world.store.prepare(waits)
    world.work()
    assert world.serve(waits) == {"a"}


def test_versions_that_requests_wait_for_are_evicted_last(world: World) -> None:
    for name in ("a", "b"):
        world.load(name, 3)
        held = world.request(name)
        world.work()
        world.serve(held)
    waits = world.store.hold("a")  # used less recently
    world.load("c", 3)
    held = world.request("c")
    world.work()
    world.serve(held)
    assert waits.pages is not None and world.store.get("b").pages is None


def test_names_of_one_folder_share_a_host_copy_and_nothing_else(tmp_path: Path) -> None:
    world = World(tmp_path)
    versions = [world.load(f"n{i}", folder="a") for i in range(5)]
    world.work()
    assert world.reads == ["n0"] and world.store.loader.busy is False
    for version in versions:
        world.request(version.name)
        world.work()
        world.serve(version)
    assert world.reads == ["n0"] and len({version.pages for version in versions}) == 5
    assert len({id(version.copy) for version in versions}) == 1
    write_peft(tmp_path / "a", random_weights(shape_of(2)), shape_of(2), SPEC)
    newer = world.load("n0", folder="a")
    world.work()
    assert world.reads == ["n0", "n0"] and newer.copy is not versions[1].copy
    for i in range(5):
        world.store.unload(f"n{i}")
    world.store.check_integrity()
    assert world.store.pool.num_free == 7


def test_host_copies_stay_within_their_bound_and_the_oldest_goes(tmp_path: Path) -> None:
    world = World(tmp_path, max_host_adapters=2)
    versions = {name: world.load(name) for name in "abcd"}
    world.work()
    assert world.reads == ["a", "b"], "ahead of time while there is room"
    for name in "cad":
        world.request(name)
        world.work()
        world.serve(versions[name])
        assert sum(v.copy is not None for v in versions.values()) == 2
    assert world.reads == ["a", "b", "c", "a", "d"] and [v.copy is None for v in versions.values()] == [0, 1, 1, 0]


class Blocked:
    """A loader whose thread has begun to read, and goes on when it is told."""

    def __init__(self, world: World) -> None:
        self.reached, self.go, self.threads = threading.Event(), threading.Event(), []
        world.read, world.store.loader.start = self.read, self.start

    def start(self, work: Callable[[], None]) -> None:
        self.threads.append(threading.Thread(target=work))
        self.threads[-1].start()

    def read(self, version: Version) -> str:
        self.reached.set()
        assert self.go.wait(LIMIT)
        return version.source.name

    def finish(self) -> None:
        self.go.set()
        for thread in self.threads:
            thread.join(LIMIT)
            assert not thread.is_alive()


@pytest.mark.parametrize("change", ["unload", "rename", "replace"])
def test_a_name_that_changes_while_its_version_is_loaded(world: World, change: str) -> None:
    blocked, old = Blocked(world), world.load("a")
    held = world.request("a")
    assert blocked.reached.wait(LIMIT)
    {
        "unload": lambda: world.store.unload("a"),
        "rename": lambda: world.store.rename("a", "z"),
        "replace": lambda: world.load("a", folder="b"),
    }[change]()
    world.store.check_integrity()
    blocked.finish()
    assert held is old and world.serve(held) == {"a"}
    assert (old in world.store.versions()) == (change == "rename")
    world.store.check_integrity()


def test_a_load_that_nobody_waits_for_any_more_is_dropped(world: World) -> None:
    blocked = Blocked(world)
    world.load("a")
    held = world.request("a")
    assert blocked.reached.wait(LIMIT)
    world.store.drop(held)
    world.store.unload("a")
    world.store.check_integrity()
    blocked.finish()
    assert not world.store.loader.is_done(held) and not world.store.versions() and not world.store.loader.busy
    world.store.check_integrity()


def test_closing_waits_for_the_load_under_way_and_drops_the_others(world: World) -> None:
    blocked = Blocked(world)
    versions = [world.load(name, 3) for name in "ab"]
    for version in versions:
        world.request(version.name)
    assert blocked.reached.wait(LIMIT)
    closing = threading.Thread(target=world.store.close)
    closing.start()
    blocked.finish()
    closing.join(LIMIT)
    assert not closing.is_alive() and world.reads == ["a"]
    world.store.prepare(versions[1])
    assert not any(map(world.store.is_ready, versions)) and not world.store.loader.busy and world.reads == ["a"]
    world.store.close()


def test_check_integrity_finds_what_is_wrong(tmp_path: Path) -> None:
    world = World(tmp_path, max_host_adapters=2)
    version = world.load("a")
    held = world.request("a")
    world.work()
    version.holds = 0
    with pytest.raises(IntegrityError, match="nobody waits"):
        world.store.check_integrity()
    version.holds, kept = 1, version.copy
    version.copy = None
    with pytest.raises(IntegrityError, match="host copy"):
        world.store.check_integrity()
    version.copy = kept
    assert world.serve(held) == {"a"}
    world.store.check_integrity()
