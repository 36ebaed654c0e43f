"""Random games with the store, checked against what a device would see.

The model remembers for every page the last step dispatched with it and what was written into it last. It
knows nothing of how the store decides.
"""

import atexit
import contextlib
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loquetier_jax.adapters.folder import read_folder
from loquetier_jax.adapters.lora import LoraModule, LoraShape
from loquetier_jax.adapters.peft import write_peft
from loquetier_jax.adapters.store import AdapterStore
from loquetier_jax.adapters.version import Version
from loquetier_jax.errors import AdapterError, CapacityError
from tests.adapters.cases import SPEC

KEY = "layers.1.k_proj"
NAMES = st.sampled_from(["a", "b", "c", "d", "e"])
SHAPES = tuple(LoraShape((LoraModule(1, "k_proj", r, 1.0),)) for r in (1, 17, 40))
FOLDERS = {101: SHAPES[0], 102: SHAPES[1]}


def tagged(shape: LoraShape, tag: int) -> dict:
    """Weights that tell whose they are."""
    sizes = shape.array_shapes(SPEC)[KEY]
    return {KEY: {name: np.full(size, tag, np.float32) for name, size in sizes.items()}}


def tag_of(weights: dict) -> int:
    return int(weights[KEY]["lora_A"][0, 0])


@functools.cache
def folders() -> Path:
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root)
    for tag, shape in FOLDERS.items():
        write_peft(root / str(tag), tagged(shape, tag), shape, SPEC)
    return root


@dataclass(eq=False)
class Request:
    version: Version
    tag: int
    last: int = 0


@dataclass(eq=False)
class Job:
    """`pages` are its own; `reads` is the version whose pages its steps read until its next cast."""

    shape: LoraShape
    pages: tuple[int, ...]
    tag: int
    last: int = 0
    reads: Request | None = None


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        device = {"cast": lambda *pair: pair, "write": self.write}
        self.store = AdapterStore(SPEC, num_pages=8, max_pages=3, **device, max_host_adapters=2)
        self.workers: list[Callable[[], None]] = []
        self.store.loader.start = self.workers.append
        self.content: dict[int, int] = {}
        self.busy: dict[int, int] = {}
        self.epoch = self.completed = self.tags = 0
        self.current: dict[str, int] = {}
        self.requests: list[Request] = []
        self.held: list[Request] = []
        self.jobs: list[Job] = []

    def write(self, pages: tuple[int, ...], prepared: tuple[dict, LoraShape]) -> None:
        weights, shape = prepared
        assert len(pages) == shape.num_pages
        self.handed_out(pages)
        self.content.update(dict.fromkeys(pages, tag_of(weights)))

    def handed_out(self, pages: tuple[int, ...]) -> None:
        """Pages that change hands are read by no step under way, and by nobody else's later."""
        assert 0 not in pages and len(set(pages)) == len(pages)
        assert all(self.busy.get(page, 0) <= self.completed for page in pages)
        taken = [p for job in self.jobs for p in job.pages]
        taken += [p for request in self.requests for p in request.version.pages or ()]
        assert not set(pages) & set(taken)

    @contextlib.contextmanager
    def refusable(self) -> Iterator[None]:
        """A refusal for want of room must change nothing."""
        before = [(v.id, v.pages) for v in self.store.versions()], self.store.pool.num_free
        try:
            yield
        except CapacityError:
            assert before == ([(v.id, v.pages) for v in self.store.versions()], self.store.pool.num_free)

    def new_tag(self) -> int:
        self.tags += 1
        return self.tags

    @rule(name=NAMES, shape=st.sampled_from(SHAPES), replace=st.booleans())
    def add(self, name: str, shape: LoraShape, replace: bool) -> None:
        tag = self.new_tag()
        if name in self.current and not replace:
            try:
                self.store.add(name, tagged(shape, tag), shape)
            except AdapterError:
                return
            raise AssertionError("a name in use was taken")
        self.store.add(name, tagged(shape, tag), shape, replace=replace)
        self.current[name] = tag

    @rule(name=NAMES, tag=st.sampled_from(sorted(FOLDERS)))
    def load(self, name: str, tag: int) -> None:
        self.store.take_in(name, read_folder(folders() / str(tag), SPEC), replace=True)
        self.current[name] = tag

    @precondition(lambda self: self.current)
    @rule(data=st.data())
    def unload(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.current)))
        self.store.unload(name)
        del self.current[name]

    @precondition(lambda self: self.current)
    @rule(data=st.data(), new=NAMES)
    def rename(self, data: st.DataObject, new: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.current)))
        if new not in self.current:
            self.store.rename(name, new)
            self.current[new] = self.current.pop(name)

    @precondition(lambda self: self.current)
    @rule(data=st.data(), pin=st.booleans())
    def pin(self, data: st.DataObject, pin: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.current)))
        with self.refusable():
            (self.store.pin if pin else self.store.unpin)(name)

    @precondition(lambda self: self.current)
    @rule(data=st.data(), wait=st.booleans())
    def submit(self, data: st.DataObject, wait: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.current)))
        if wait:
            self.held.append(Request(self.store.hold(name), self.current[name]))
        else:
            self.requests.append(Request(self.store.acquire(name), self.current[name]))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def prepare(self, data: st.DataObject) -> None:
        """A waiting request has its adapter loaded, sooner or later."""
        self.store.prepare(data.draw(st.sampled_from(self.held)).version)

    @precondition(lambda self: self.workers)
    @rule()
    def work(self) -> None:
        self.workers.pop(0)()

    @precondition(lambda self: self.held)
    @rule(data=st.data(), start=st.booleans())
    def start_or_cancel(self, data: st.DataObject, start: bool) -> None:
        request = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        if start:
            self.requests.append(Request(self.store.acquire(request.version), request.tag))
        self.store.drop(request.version)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        if all(job.reads is not request for job in self.jobs):
            self.requests.remove(request)
            self.store.release(request.version, request.last)

    @rule()
    def step(self) -> None:
        """Everybody who gets pages takes part in the next step, and must find its own weights there."""
        self.epoch += 1
        for request in self.requests:
            found: tuple[int, ...] = ()
            with self.refusable():
                found = self.store.ensure_resident(request.version)
            if not found:
                continue
            assert [self.content[page] for page in found] == [request.tag] * request.version.shape.num_pages
            self.busy.update(dict.fromkeys(found, self.epoch))
            request.last = self.epoch
        for job in self.jobs:
            if job.reads is None:
                assert {self.content[page] for page in job.pages} == {job.tag}
                self.busy.update(dict.fromkeys(job.pages, self.epoch))
                job.last = self.epoch

    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        self.completed = data.draw(st.integers(self.completed, self.epoch))
        self.store.complete(self.completed)

    @rule(shape=st.sampled_from(SHAPES))
    def start_job(self, shape: LoraShape) -> None:
        with self.refusable():
            pages = self.store.reserve(shape.num_pages)
            self.handed_out(pages)
            self.jobs.append(Job(shape, pages, 0))
            self.cast(self.jobs[-1])

    def cast(self, job: Job) -> None:
        job.tag = self.new_tag()
        self.content.update(dict.fromkeys(job.pages, job.tag))
        if job.reads is not None:
            self.requests.remove(job.reads)
            self.store.release(job.reads.version, job.reads.last)
            job.reads = None

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def optimizer_step(self, data: st.DataObject) -> None:
        self.cast(data.draw(st.sampled_from(self.jobs)))

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), name=NAMES, last=st.booleans())
    def publish(self, data: st.DataObject, name: str, last: bool) -> None:
        job = data.draw(st.sampled_from(self.jobs))
        if job.reads is not None:
            return  # nothing new since its last publish
        weights, fresh = functools.partial(tagged, job.shape, job.tag), not last
        self.jobs.remove(job)
        version, pages = self.store.publish(
            name, job.shape, job.pages, weights, epoch=job.last, fresh=fresh
        )
        self.current[name] = job.tag
        if version.pages is not None:
            assert version.pages == job.pages and all(self.content[page] == job.tag for page in version.pages)
        if last:
            return
        if pages != job.pages:
            job.reads = Request(version, job.tag, job.last)
            self.requests.append(job.reads)
            self.handed_out(pages)
            job.pages = pages
        self.jobs.append(job)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def end_job(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.jobs))
        self.jobs.remove(job)
        if job.reads is not None:
            self.requests.remove(job.reads)
            self.store.release(job.reads.version, job.reads.last)
        self.store.give_back(job.pages, job.last)

    @invariant()
    def everything_adds_up(self) -> None:
        self.store.check_integrity()
        assert self.store.names() == sorted(self.current)
        mine = {request.version for request in (*self.requests, *self.held)}
        mine |= {self.store.get(name) for name in self.current}
        assert set(self.store.versions()) == mine
        owned = [page for version in mine for page in version.pages or ()]
        owned += [page for job in self.jobs for page in job.pages]
        assert len(set(owned)) == len(owned)

    def teardown(self) -> None:
        """When everybody has gone, everything is free, and every current version has its own weights."""
        while self.workers:
            self.work()
        assert not self.store.loader.busy
        for name, tag in self.current.items():
            assert tag_of(self.store.weights(self.store.get(name))) == tag
        for job in list(self.jobs):
            if job.reads is not None:
                self.requests.remove(job.reads)
                self.store.release(job.reads.version, job.reads.last)
            self.store.give_back(job.pages, job.last)
        for request in self.requests:
            self.store.release(request.version, request.last)
        for request in self.held:
            self.store.drop(request.version)
        for name in self.current:
            self.store.unload(name)
        self.store.complete(self.epoch)
        self.store.check_integrity()
        assert self.store.pool.num_free == 7 and self.store.versions() == []


StoreMachine.TestCase.settings = settings(
    max_examples=80,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestStore = StoreMachine.TestCase
