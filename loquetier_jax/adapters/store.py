"""The adapter store: adapters by name, their versions, and where each version's weights are."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from loquetier_jax.adapters.folder import FoundAdapter
from loquetier_jax.adapters.loader import Loader
from loquetier_jax.adapters.lora import LoraConfig, LoraShape, LoraWeights, check_weights
from loquetier_jax.adapters.registry import Registry, locked
from loquetier_jax.adapters.residency import JOBS, PageTransfers, Residency, host_copy
from loquetier_jax.adapters.version import Published, Version
from loquetier_jax.config import RANK_PAGE
from loquetier_jax.errors import AdapterError, CapacityError, IntegrityError
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.pool import IdPool


@locked("take_in", "pin", "complete", "ensure_resident", "num_reclaimable")
@locked("reserve", "give_back", "publish", "check_integrity")
class AdapterStore(Registry):
    """Bookkeeping of adapters and device page ids; touches the device only through `write`.

    A name points to one version. Loading or publishing repoints it; the old version keeps serving its users until the
    last of them releases it.

    Thread-safe, but methods that touch the device or a job's masters (`pin`, `ensure_resident`, `weights` of a version
    published by a job, `reserve`, `publish`) require the loop's lock.

    Args:
        spec: The base.
        num_pages: Pages in the device stacks, including page 0.
        max_pages: Maximum pages of one adapter.
        max_host_adapters: Maximum host copies in page form, least recently used dropped first; None keeps all. Names
            of one folder share one. Beside them, adapters without a folder keep their f32 weights.
        transfers: The fields of `PageTransfers`: how weights become pages on the device.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        *,
        num_pages: int,
        max_pages: int,
        max_host_adapters: int | None = None,
        **transfers: Callable[..., Any],
    ) -> None:
        super().__init__()
        self.spec = spec
        self.pool = IdPool(range(1, num_pages), "adapter pages")
        self._max_pages = min(max_pages, num_pages - 1)
        parts = self.pool, self._versions, PageTransfers(**transfers), max_host_adapters, self._max_pages
        self._residency = Residency(spec, *parts, self.is_pinned, self.lock)

    @property
    def loader(self) -> Loader:
        """Loads the versions that requests wait for."""
        return self._residency.loader

    def add(
        self,
        name: str,
        weights: LoraWeights,
        shape: LoraShape,
        *,
        config: LoraConfig | None = None,
        replace: bool = False,
    ) -> Version:
        """Adds an adapter from weights, which are copied to the host; takes no device pages.

        Args:
            name: Any non-empty string.
            weights: numpy or jax arrays.
            shape: Its modules.
            config: Stored with the version.
            replace: Whether to add a new version if the name is in use; otherwise it is refused.

        Raises:
            AdapterError: weights that do not fit, too high a rank, or a name in use; nothing is changed.
        """
        self.check_new(name, shape, replace=replace)
        check_weights(weights, shape, self.spec)
        host = host_copy(weights)
        with self.lock:
            self.check_new(name, shape, replace=replace)
            return self._serve(name, shape=shape, config=config, host=host)

    def take_in(self, name: str, found: FoundAdapter, *, replace: bool = False) -> Version:
        """Adds an adapter found by `read_folder`; its folder must not change while the version is in use.

        Its weights are read in the background, if there is room for another host copy, or for its first request.

        Raises:
            AdapterError: too high a rank, or a name in use; nothing is changed.
        """
        self.check_new(name, found.shape, replace=replace)
        folder = {"source": found.folder, "fingerprint": found.fingerprint, "tensors": found.tensors}
        version = self._serve(name, shape=found.shape, config=found.config, **folder)
        self.loader.copy_ahead(version)
        return version

    def pin(self, name: str) -> None:
        """Makes an adapter resident and keeps it resident, whichever version its name points to.

        Raises:
            AdapterError: unknown name, or weights that cannot be read.
            CapacityError: not enough pages can be freed now; nothing is changed.
        """
        self.ensure_resident(self.get(name))
        self._pinned.add(name)

    def complete(self, epoch: int) -> None:
        """Records that all steps up to `epoch` have completed on the device, so that their pages may be reused."""
        self.pool.complete(epoch)

    # Residency.

    def ensure_resident(self, version: Version) -> tuple[int, ...]:
        """The version's pages; if it has none, writes them, evicting the least recently used idle versions.

        The pages are valid for steps dispatched while the caller has the version acquired.

        Raises:
            AdapterError: the version has been unloaded, or its weights cannot be read.
            CapacityError: all pages are in flight, pinned, owned by jobs, or waiting for a step; nothing is
                changed.
        """
        self._alive(version)
        pages = self._residency.ensure(version)
        version.last_used = next(self._clock)
        return pages

    def ensure_loaded(self, version: Version) -> tuple[int, ...]:
        """`ensure_resident` for the loop, which does not wait for a load: it begins one, and has to come back.

        Raises:
            AdapterError, CapacityError: see `ensure_resident`; the latter also if the version is being loaded.
        """
        if not self.is_ready(version):
            self.prepare(version)
            raise CapacityError(f"adapter {version.name!r} is being loaded")
        return self.ensure_resident(version)

    def is_ready(self, version: Version) -> bool:
        """Whether `ensure_resident` need not read, cast or transfer anything: it is resident, staged, or has failed."""
        return self._residency.is_ready(version)

    def prepare(self, version: Version) -> None:
        """Begins to load a held version in the background, unless it is ready or on its way; returns at once."""
        if not (version.pages is not None or version.snapshot is not None):
            self.loader.request(version)

    def keep_copies(self, folder: str | os.PathLike[str]) -> None:
        """Makes host copies of the versions of a folder that is about to be overwritten; slow, without the loop's lock.

        A version that cannot be read is left to the requests that need it, which end with that error.
        """
        path = os.path.realpath(folder)
        with self.lock:
            found = [v for v in self._versions.values() if v.source is not None and os.path.realpath(v.source) == path]
        for version in found:
            with suppress(AdapterError):
                self._residency.copies.get(version)

    def load(self, version: Version) -> None:
        """Loads a held version in this thread, so that `ensure_resident` has only to write it; without the loop's lock.

        Raises:
            AdapterError: its weights cannot be read.
        """
        if not self.is_ready(version):
            self.loader.load_now(version)

    def weights(self, version: Version) -> LoraWeights:
        """The version's f32 weights on the host; read-only. Those in a folder are read anew.

        A job calls this before its masters change, so that a version published from them has its own copy.

        Raises:
            AdapterError: they cannot be read.
        """
        with self.lock:
            self._alive(version)
            if version.source is None:
                return self._residency.load_host(version)
        return self._residency.read_source(version)  # slow, so without the lock

    def staged(self, weights: LoraWeights, shape: LoraShape) -> Any:
        """Casts numpy weights and transfers them to the device, for `DeviceState.write_adapter`; in any thread."""
        return self._residency.staged(weights, shape)

    def close(self) -> None:
        """Ends loads under way and drops host copies: the engine is being closed."""
        self._residency.close()

    def num_reclaimable(self) -> int:
        """Number of pages that are free or belong to versions that may be evicted."""
        idle = [v for v in self._residency.resident() if not v.in_flight and not self.is_pinned(v)]
        return self.pool.num_free + sum(len(v.pages) for v in idle)

    # Jobs.

    def reserve(self, count: int) -> tuple[int, ...]:
        """Takes pages for a training job, evicting idle versions if needed; their contents are arbitrary.

        Raises:
            CapacityError: not enough pages can be freed now; nothing is changed.
        """
        return self._residency.take(count, JOBS)

    def give_back(self, pages: Sequence[int], epoch: int) -> None:
        """Returns a job's pages; they are free once step `epoch`, the last dispatched with them, has completed.

        Raises:
            IntegrityError: they are not owned by a job.
        """
        self.pool.give_back(pages, epoch, JOBS)

    def publish(
        self,
        name: str,
        shape: LoraShape,
        pages: Sequence[int],
        host_weights_fn: Callable[[], LoraWeights],
        *,
        epoch: int,
        fresh: bool = True,
        config: LoraConfig | None = None,
    ) -> Published:
        """Points `name` to a job's current state without copying: a new version takes over the job's pages.

        The job continues with fresh pages: it casts its next optimizer step into `Published.pages`. Until then its
        steps read `version.pages`, so the version is returned acquired once on its behalf (if `fresh` and
        `version.pages` is not None); the job calls `release(version, epoch)` after that cast. Without room for
        fresh pages, the weights are copied to the host instead and the job keeps its pages.

        Args:
            name: Created, or repointed to the new version.
            shape: Shape of the job's adapter.
            pages: The job's pages, holding the published state.
            host_weights_fn: Returns the published f32 weights; called at most once, at any later time, so the
                job calls `weights(version)` before its masters change.
            epoch: The last step dispatched with the pages.
            fresh: Whether the job continues; False for its final publish.
            config: Stored with the version.

        Raises:
            AdapterError: an invalid name.
            IntegrityError: `pages` are not `shape.num_pages` pages of a job; nothing is changed.
        """
        self.check_new(name, shape, replace=True)
        pages = self._of_a_job(pages, shape.num_pages)
        version = Version(id=next(self._ids), name=name, shape=shape, config=config, snapshot=host_weights_fn)
        kept: tuple[int, ...] = ()
        if fresh:
            try:
                kept = self._residency.take(len(pages), JOBS, doomed=self._doomed(name))
            except CapacityError:
                self._residency.load_host(version)
                return Published(self._point(name, version), pages)
        self.pool.transfer(pages, JOBS, version.id)
        version.pages, version.last_epoch, version.in_flight = pages, epoch, int(fresh)
        return Published(self._point(name, version), kept)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless every page is in one state and every version is in use and has weights."""
        self._residency.check_integrity()
        super().check_integrity()

    def check_new(self, name: str, shape: LoraShape, *, replace: bool = False) -> None:
        """Raises AdapterError unless an adapter of this shape can be added under this name; changes nothing."""
        self._check_name(name, replace)
        if shape.num_pages > self._max_pages:
            most = self._max_pages * RANK_PAGE
            raise AdapterError(f"{name}: got rank {shape.max_rank}, expected at most {most}")

    def _serve(self, name: str, **fields: Any) -> Version:
        return self._point(name, Version(id=next(self._ids), name=name, **fields))

    def _of_a_job(self, pages: Sequence[int], count: int) -> tuple[int, ...]:
        if not len(pages) == len(set(pages)) == count or not set(pages) <= self.pool.owned_by(JOBS):
            raise IntegrityError(f"pages: got {pages}, expected {count} of a job's pages")
        return tuple(pages)

    def _doomed(self, name: str) -> Version | None:
        version = self._names.get(name)
        return None if version is None or version.holds or version.in_flight else version

    def _unawaited(self, version: Version) -> None:
        self.loader.discard(version)

    def _forget(self, version: Version) -> None:
        super()._forget(version)
        self._residency.forget(version)
