"""The store, case by case; test_store_machine.py plays random games with it."""

from pathlib import Path

import numpy as np
import pytest

from loquetier_jax.adapters.folder import read_folder
from loquetier_jax.adapters.lora import LoraModule, LoraShape
from loquetier_jax.adapters.peft import write_peft
from loquetier_jax.adapters.store import AdapterStore
from loquetier_jax.errors import AdapterError, CapacityError, IntegrityError
from loquetier_jax.pool import IdPool
from tests.adapters.cases import MIXED, SPEC, random_weights, uniform


def shape_of(pages: int) -> LoraShape:
    return LoraShape((LoraModule(0, "o_proj", 16 * pages, 1.0),))


class Device:
    """Remembers whose weights are in which page."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, ...]] = []
        self.content: dict[int, np.ndarray] = {}

    def write(self, pages: tuple[int, ...], prepared: tuple[dict, LoraShape]) -> None:
        weights, shape = prepared
        assert len(pages) == shape.num_pages
        self.writes.append(pages)
        self.content.update(dict.fromkeys(pages, weights["layers.0.o_proj"]["lora_A"]))


def together(weights: dict, shape: LoraShape) -> tuple[dict, LoraShape]:
    """Pages that show what they were made of."""
    return weights, shape


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def store(device: Device) -> AdapterStore:
    """Room for four pages."""
    return AdapterStore(SPEC, num_pages=5, max_pages=3, cast=together, write=device.write)


def add(store: AdapterStore, name: str, pages: int = 1, seed: int = 0, **kwargs):
    return store.add(name, random_weights(shape_of(pages), seed), shape_of(pages), **kwargs)


def serve(store: AdapterStore, name: str, epoch: int) -> tuple[int, ...]:
    """One request, from its first step to its last, `epoch`."""
    version = store.acquire(name)
    pages = store.ensure_resident(version)
    store.release(version, epoch)
    return pages


def state(store: AdapterStore) -> list:
    return [
        (v.id, v.name, v.pages, v.residency, v.in_flight, v.holds, v.host is None) for v in store.versions()
    ] + [store.names(), store.pool.num_free]


def test_versions_count_up_and_take_pages_only_when_used(store: AdapterStore, device: Device) -> None:
    a, b = add(store, "a"), add(store, "b", pages=2)
    assert (a.id, b.id, a.residency, store.names(), device.writes) == (1, 2, "host", ["a", "b"], [])
    pages = store.ensure_resident(b)
    assert len(pages) == 2 and 0 not in pages and store.ensure_resident(b) == pages
    assert device.writes == [pages] and b.residency == "device"
    store.check_integrity()


def test_the_least_recently_used_idle_version_goes_first(store: AdapterStore) -> None:
    for name in "abcd":
        add(store, name)
        serve(store, name, epoch=0)
    serve(store, "a", epoch=0)
    add(store, "e", pages=2)
    serve(store, "e", epoch=0)
    assert [store.get(n).residency for n in "abcde"] == ["device", "host", "host", "device", "device"]
    store.check_integrity()


def test_neither_flying_nor_pinned_nor_unfinished_versions_are_evicted(store: AdapterStore) -> None:
    for name in "abcde":
        add(store, name)
    flying = store.acquire("a")
    store.ensure_resident(flying)
    store.pin("b")
    serve(store, "c", epoch=7)  # step 7 has not completed
    job = store.reserve(1)
    before = state(store)
    e = store.acquire("e")
    with pytest.raises(CapacityError, match="requested"):
        store.ensure_resident(e)
    with pytest.raises(CapacityError):
        store.reserve(1)
    store.release(e, 0)
    assert state(store) == before
    store.complete(6)
    with pytest.raises(CapacityError):
        store.pin("e")
    store.complete(7)
    store.pin("e")
    assert store.get("c").residency == "host"
    store.give_back(job, epoch=9)
    with pytest.raises(CapacityError):
        store.reserve(1)
    store.complete(9)
    assert store.reserve(1) == job
    store.unpin("b")
    store.check_integrity()


def test_a_request_keeps_its_version_when_the_name_is_replaced(store: AdapterStore, device: Device) -> None:
    first = add(store, "a", seed=1)
    old = store.acquire("a")
    pages = store.ensure_resident(old)
    second = add(store, "a", seed=2, replace=True)
    assert old is first and store.get("a") is second and second.id > first.id
    assert store.ensure_resident(old) == pages and store.ensure_resident(second) != pages
    np.testing.assert_array_equal(device.content[pages[0]], old.host["layers.0.o_proj"]["lora_A"])
    store.release(old, epoch=3)
    assert store.versions() == [second] and store.pool.num_free == 2
    store.complete(3)
    assert store.pool.num_free == 3
    with pytest.raises(AdapterError, match="has been unloaded"):
        store.ensure_resident(old)
    store.check_integrity()


def test_unload_waits_for_the_last_request(store: AdapterStore) -> None:
    version = add(store, "a")
    store.acquire("a")
    waiting = store.hold("a")
    store.ensure_resident(version)
    store.unload("a")
    assert "a" not in store and store.versions() == [version]
    with pytest.raises(AdapterError, match="'a'"):
        store.acquire("a")
    store.release(version, epoch=2)
    store.complete(2)
    assert store.acquire(waiting) is version and store.ensure_resident(version)
    store.drop(waiting)
    store.release(version, epoch=4)
    assert store.versions() == [] and store.pool.num_free == 3
    store.check_integrity()


def test_pages_wait_for_the_newest_step_of_all_users(store: AdapterStore) -> None:
    version = add(store, "a", pages=3)
    store.acquire("a"), store.acquire("a")
    store.ensure_resident(version)
    store.release(version, epoch=5)
    store.release(version, epoch=0)  # cancelled before its first step
    store.complete(4)
    with pytest.raises(CapacityError):
        store.reserve(2)
    store.complete(5)
    assert len(store.reserve(2)) == 2


def test_held_versions_may_be_evicted_but_come_back(store: AdapterStore) -> None:
    version = add(store, "a")
    store.hold("a")
    store.ensure_resident(version)
    job = store.reserve(4)
    assert version.residency == "host"
    store.give_back(job, epoch=0)
    assert len(store.ensure_resident(version)) == 1


def test_rename_keeps_version_and_pin(store: AdapterStore) -> None:
    version = add(store, "a")
    store.pin("a")
    add(store, "b")
    with pytest.raises(AdapterError, match="exists"):
        store.rename("a", "b")
    store.rename("a", "c")
    assert store.get("c") is version and version.name == "c" and store.names() == ["b", "c"]
    with pytest.raises(CapacityError):
        store.reserve(4)
    store.unpin("c")
    assert len(store.reserve(4)) == 4
    store.check_integrity()


def test_publish_takes_over_pages_and_hands_out_fresh_ones(store: AdapterStore, device: Device) -> None:
    add(store, "a", seed=1)
    old = store.acquire("a")
    store.ensure_resident(old)
    pages = store.reserve(1)
    calls = []

    def weights() -> dict:
        calls.append(1)
        return random_weights(shape_of(1), seed=5)

    version, fresh = store.publish("a", shape_of(1), pages, weights, epoch=4)
    assert version.pages == pages and fresh != pages and store.get("a") is version and not calls
    assert len(device.writes) == 1  # the old version's: publishing copies nothing
    assert store.ensure_resident(old) != store.ensure_resident(version) == pages
    store.release(old, epoch=4)
    # The job still reads the version's pages until its next cast.
    with pytest.raises(CapacityError):
        store.reserve(3)
    store.release(version, epoch=5)
    store.complete(5)
    assert len(store.reserve(3)) == 3 and calls == [1] and version.residency == "host"
    np.testing.assert_array_equal(
        store.weights(version)["layers.0.o_proj"]["lora_B"], weights()["layers.0.o_proj"]["lora_B"]
    )
    store.check_integrity()


def test_publish_without_room_copies_to_the_host(store: AdapterStore) -> None:
    pages = store.reserve(3)
    other = store.reserve(1)
    version, kept = store.publish("a", shape_of(3), pages, lambda: random_weights(shape_of(3)), epoch=4)
    assert (kept, version.pages, version.in_flight, version.residency) == (pages, None, 0, "host")
    store.check_integrity()
    store.give_back(kept, epoch=4)
    store.give_back(other, epoch=4)
    store.complete(4)
    assert len(store.ensure_resident(version)) == 3


def test_the_last_publish_leaves_the_pages_with_the_version(store: AdapterStore) -> None:
    pages = store.reserve(3)
    published = store.publish("a", shape_of(3), pages, lambda: {}, epoch=2, fresh=False)
    assert published.pages == () and published.version.pages == pages and published.version.in_flight == 0
    store.check_integrity()
    # Publishing again needs no room but that of the version it replaces, and does not ask for its weights.
    store.complete(2)
    job = store.reserve(1)
    again = store.publish("a", shape_of(1), job, lambda: random_weights(shape_of(1)), epoch=3)
    assert len(again.pages) == 1 and store.versions() == [again.version]
    store.check_integrity()


def test_publishing_again_and_again_needs_room_for_two(store: AdapterStore) -> None:
    pages = store.reserve(2)
    for epoch in range(1, 6):
        version, fresh = store.publish(
            "a", shape_of(2), pages, lambda: random_weights(shape_of(2)), epoch=epoch
        )
        assert version.pages == pages and len(fresh) == 2
        store.release(version, epoch)
        store.complete(epoch)
        pages = fresh
        store.check_integrity()


def test_foreign_pages_cannot_be_published_or_given_back(store: AdapterStore) -> None:
    owned = store.ensure_resident(add(store, "a"))
    job = store.reserve(2)
    before = state(store)
    for pages in (owned, (4, 4), job, (0,), ()):
        with pytest.raises(IntegrityError):
            store.publish("b", shape_of(1), pages, dict, epoch=0)
    for pages in (owned, (job[0], job[0]), (0,)):
        with pytest.raises(IntegrityError):
            store.give_back(pages, epoch=0)
    with pytest.raises(AdapterError, match="rank 64"):
        store.publish("b", shape_of(4), job, dict, epoch=0)
    with pytest.raises(IntegrityError):
        store.release(store.get("a"), 0)
    with pytest.raises(IntegrityError):
        store.drop(store.get("a"))
    assert state(store) == before


def test_refused_adapters_change_nothing(store: AdapterStore, tmp_path: Path) -> None:
    add(store, "a")
    before = state(store)
    with pytest.raises(AdapterError, match="replace=True"):
        add(store, "a")
    with pytest.raises(AdapterError, match=r"rank 64.*48"):
        add(store, "b", pages=4)
    with pytest.raises(AdapterError, match="missing"):
        store.add("b", {}, MIXED)
    with pytest.raises(AdapterError, match="name"):
        add(store, "")
    with pytest.raises(AdapterError, match="no such file"):
        store.take_in("b", read_folder(tmp_path, SPEC))
    for unknown in (store.get, store.unload, store.pin, store.unpin, store.hold, store.acquire):
        with pytest.raises(AdapterError, match="'zzz'"):
            unknown("zzz")
    assert state(store) == before


def test_failed_writes_return_the_pages(device: Device) -> None:
    def write(pages: tuple[int, ...], prepared: tuple[dict, LoraShape]) -> None:
        raise MemoryError("device")

    store = AdapterStore(SPEC, num_pages=5, max_pages=3, cast=together, write=write)
    version = add(store, "a", pages=3)
    with pytest.raises(MemoryError):
        store.ensure_resident(version)
    assert version.pages is None and store.pool.num_free == 4
    store.check_integrity()


def test_added_weights_are_copies(store: AdapterStore) -> None:
    weights = random_weights(shape_of(1))
    version = store.add("a", weights, shape_of(1))
    weights["layers.0.o_proj"]["lora_A"][:] = 0
    assert np.all(store.weights(version)["layers.0.o_proj"]["lora_A"] != 0)


def test_host_copies_are_bounded(tmp_path: Path) -> None:
    store = AdapterStore(SPEC, num_pages=5, max_pages=3, cast=together, write=lambda *_: None, max_host_adapters=1)
    store.loader.start = lambda work: work()
    for i, name in enumerate("abc"):
        write_peft(tmp_path / name, random_weights(uniform(4), i), uniform(4), SPEC)
        store.take_in(name, read_folder(tmp_path / name, SPEC))
    kept = add(store, "kept")
    assert [store.get(n).residency for n in "abc"] == ["host", "disk", "disk"], "ahead of time while there is room"
    store.check_integrity()
    store.ensure_resident(store.get("b"))
    assert [store.get(n).copy is None for n in "abc"] == [True, False, True] and kept.residency == "host"
    store.ensure_resident(kept)
    assert [store.get(n).copy is None for n in "abc"] == [True] * 3 and kept.copy is not None
    np.testing.assert_array_equal(
        store.weights(store.get("b"))["layers.1.up_proj"]["lora_B"],
        random_weights(uniform(4), 1)["layers.1.up_proj"]["lora_B"],
    )
    store.check_integrity()


def test_a_folder_written_anew_is_not_taken_for_the_old_version(tmp_path: Path) -> None:
    store = AdapterStore(SPEC, num_pages=2, max_pages=1, cast=together, write=lambda *_: None, max_host_adapters=0)
    write_peft(tmp_path / "a", random_weights(uniform(4), 1), uniform(4), SPEC)
    version = store.take_in("a", read_folder(tmp_path / "a", SPEC))
    store.ensure_resident(version)
    assert version.host is None
    write_peft(tmp_path / "a", random_weights(uniform(4), 2), uniform(4), SPEC)
    with pytest.raises(CapacityError):  # it exists on the device alone by now: not evicted
        store.reserve(1)
    with pytest.raises(AdapterError, match="changed"):
        store.weights(version)
    newer = store.take_in("a", read_folder(tmp_path / "a", SPEC), replace=True)
    assert store.versions() == [newer]
    store.check_integrity()


def test_check_integrity_finds_what_is_wrong(store: AdapterStore) -> None:
    version = add(store, "a")
    pages = store.ensure_resident(version)
    version.pages = None
    with pytest.raises(IntegrityError, match="version 1"):
        store.check_integrity()
    version.pages = pages
    version.in_flight = -1
    with pytest.raises(IntegrityError, match="users"):
        store.check_integrity()


class TwiceFree(IdPool):
    """A pool that has an id twice."""

    def __init__(self) -> None:
        super().__init__((1, 2), "adapter pages")
        self._free.append(2)


def test_an_id_that_is_free_twice_is_found() -> None:
    pool = TwiceFree()
    with pytest.raises(IntegrityError, match="adapter pages"):
        pool.check_integrity()
