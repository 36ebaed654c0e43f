"""The adapter store: adapters by name, their versions, and where each version's weights are."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from loquetier_jax.adapters.folder import FoundAdapter
from loquetier_jax.adapters.lora import LoraConfig, LoraShape, LoraWeights, check_weights
from loquetier_jax.adapters.peft import fingerprint
from loquetier_jax.adapters.registry import Registry, locked
from loquetier_jax.adapters.residency import JOBS, CastPages, Residency, WritePages, host_copy
from loquetier_jax.adapters.version import Published, Version
from loquetier_jax.config import RANK_PAGE
from loquetier_jax.errors import AdapterError, CapacityError, IntegrityError
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.pool import IdPool


@locked("take_in", "fail", "pin", "unpin", "complete", "ensure_resident", "num_reclaimable")
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
        cast: `cast(weights, shape)` casts host weights to pages, on the host (see `pages.pages_of`); thread-safe.
        write: `write(page_ids, pages)` writes them to the device (see `pages.write_pages`).
        max_host_adapters: Host copies kept of adapters that are also in a folder, least recently used dropped
            first; those without a folder are always kept. None keeps all.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        *,
        num_pages: int,
        max_pages: int,
        cast: CastPages,
        write: WritePages,
        max_host_adapters: int | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.pool = IdPool(range(1, num_pages), "adapter pages")
        self._max_pages = min(max_pages, num_pages - 1)
        self._cast = cast
        parts = self.pool, self._versions, cast, write
        self._residency = Residency(spec, *parts, max_host_adapters, self.is_pinned)

    def add(
        self,
        name: str,
        weights: LoraWeights,
        shape: LoraShape,
        *,
        config: LoraConfig | None = None,
        source: str | os.PathLike[str] | None = None,
        replace: bool = False,
    ) -> Version:
        """Adds an adapter from weights, which are copied to the host; takes no device pages.

        Args:
            name: Any non-empty string.
            weights: numpy or jax arrays.
            shape: Its modules.
            config: Stored with the version.
            source: A PEFT folder with the same weights, from which they may be read again.
            replace: Whether to add a new version if the name is in use; otherwise it is refused.

        Raises:
            AdapterError: weights that do not fit, too high a rank, or a name in use; nothing is changed.
        """
        self.check_new(name, shape, replace=replace)
        check_weights(weights, shape, self.spec)
        on_disk, host = () if source is None else fingerprint(source), host_copy(weights)
        with self.lock:
            self.check_new(name, shape, replace=replace)
            return self._serve(name, shape, config, host, source, on_disk)

    def take_in(self, name: str, found: FoundAdapter, *, replace: bool = False) -> Version:
        """Adds an adapter returned by `read_folder`; its folder must not change while the version is in use.

        Raises:
            AdapterError: too high a rank, or a name in use; nothing is changed.
        """
        config, shape, weights = found.adapter
        self.check_new(name, shape, replace=replace)
        return self._serve(name, shape, config, weights, found.folder, found.fingerprint)

    def fail(self, name: str, reason: str) -> None:
        """Takes a name out of service after an error: further requests for it raise `reason`; it can be reused.

        Requests that already use its version keep it until they end.

        Raises:
            AdapterError: unknown name.
        """

        def nothing() -> LoraWeights:
            raise AdapterError(reason)

        shape = self.get(name).shape
        self._pinned.discard(name)
        self._point(name, Version(id=next(self._ids), name=name, shape=shape, snapshot=nothing, failure=reason))

    def pin(self, name: str) -> None:
        """Makes an adapter resident and keeps it resident, whichever version its name points to.

        Raises:
            AdapterError: unknown name, or weights that cannot be read.
            CapacityError: not enough pages can be freed now; nothing is changed.
        """
        self.ensure_resident(self.get(name))
        self._pinned.add(name)

    def unpin(self, name: str) -> None:
        """Lets an adapter be evicted again.

        Raises:
            AdapterError: unknown name.
        """
        self.get(name)
        self._pinned.discard(name)

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

    def weights(self, version: Version) -> LoraWeights:
        """The version's f32 weights on the host; read-only.

        A job calls this before its masters change, so that a version published from them has its own copy.

        Raises:
            AdapterError: they cannot be read.
        """
        with self.lock:
            self._alive(version)
            if version.host is not None or version.snapshot is not None:
                return self._residency.load_host(version)
        read = self._residency.read_source(version)  # slow, so without the lock
        with self.lock:
            version.host = read if version.host is None else version.host
            return version.host

    def prepare(self, version: Version) -> None:
        """Reads a version that is not on the device and casts it to pages, ready to be written.

        For the thread that submits a request, so that the loop need not. The caller must hold the version.

        Raises:
            AdapterError: its weights cannot be read.
        """
        if version.pages is not None or version.prepared is not None or version.snapshot is not None:
            return
        prepared = self._cast(self.weights(version), version.shape)
        with self.lock:
            if version.pages is None:
                version.prepared = prepared
            self._residency.trim_host()

    def num_reclaimable(self) -> int:
        """Number of pages that are free or belong to versions that may be evicted."""
        idle = [v for v in self.versions() if v.pages and not v.in_flight and not self.is_pinned(v)]
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

    def _serve(
        self,
        name: str,
        shape: LoraShape,
        config: LoraConfig | None,
        host: LoraWeights,
        source: str | os.PathLike[str] | None,
        on_disk: tuple[tuple[int, int], ...],
    ) -> Version:
        folder = None if source is None else Path(source).absolute()
        version = Version(
            id=next(self._ids), name=name, shape=shape, config=config, host=host, source=folder, fingerprint=on_disk
        )
        self._point(name, version)
        self._residency.trim_host()
        return version

    def is_pinned(self, version: Version) -> bool:
        """Whether the version must stay on the device."""
        return version.name in self._pinned and self.is_current(version)

    def _of_a_job(self, pages: Sequence[int], count: int) -> tuple[int, ...]:
        if not len(pages) == len(set(pages)) == count or not set(pages) <= self.pool.owned_by(JOBS):
            raise IntegrityError(f"pages: got {pages}, expected {count} of a job's pages")
        return tuple(pages)

    def _doomed(self, name: str) -> Version | None:
        version = self._names.get(name)
        return None if version is None or version.holds or version.in_flight else version

    def _forget(self, version: Version) -> None:
        super()._forget(version)
        self._residency.free(version)
