"""Where each version's weights are: device pages, host memory, a PEFT folder; who makes room for whom."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np

from loquetier_jax.adapters.lora import LoraShape, LoraWeights, check_weights
from loquetier_jax.adapters.peft import fingerprint, read_weights
from loquetier_jax.adapters.version import Version
from loquetier_jax.errors import AdapterError, CapacityError, IntegrityError
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.pool import IdPool

JOBS = "jobs"
"""Owner of the pages that training jobs have; those of a version are owned by its id."""

CastPages = Callable[[LoraWeights, LoraShape], Any]
WritePages = Callable[[tuple[int, ...], Any], None]


def host_copy(weights: LoraWeights) -> LoraWeights:
    """The same weights in numpy arrays of their own, f32."""
    return {key: {n: np.array(a, np.float32) for n, a in arrays.items()} for key, arrays in weights.items()}


class Residency:
    """Moves versions between device, host and disk; knows nothing of names.

    Args:
        spec: The base.
        pool: The page ids.
        versions: The living versions by id; the registry's own, only read here.
        cast, write: See `AdapterStore`.
        max_host_adapters: See `AdapterStore`.
        pinned: Whether a version must stay on the device.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        pool: IdPool,
        versions: Mapping[int, Version],
        cast: CastPages,
        write: WritePages,
        max_host_adapters: int | None,
        pinned: Callable[[Version], bool],
    ) -> None:
        self._spec = spec
        self._pool = pool
        self._versions = versions
        self._cast, self._write = cast, write
        self._max_host = max_host_adapters
        self._pinned = pinned

    def ensure(self, version: Version) -> tuple[int, ...]:
        """The version's pages, written now when it has none.

        Raises:
            AdapterError: its weights cannot be read.
            CapacityError: no room now; nothing is changed.
        """
        if version.pages is not None:
            return version.pages
        # Asked before weights are read: whoever retries at every step must not read a folder each time.
        victims = self._victims(version.shape.num_pages, None)
        prepared = version.prepared or self._cast(self.load_host(version), version.shape)
        pages = self._take(version.shape.num_pages, version.id, victims)
        try:
            self._write(pages, prepared)
        except BaseException:
            self._pool.give_back(pages, 0, version.id)
            raise
        version.pages, version.prepared = pages, None
        self.trim_host()
        return pages

    def take(self, count: int, owner: Hashable, doomed: Version | None = None) -> tuple[int, ...]:
        """`count` pages for `owner`, evicting idle versions, the least recently used first.

        Args:
            count: Pages.
            owner: Who gets them.
            doomed: A version that is about to vanish: if idle it goes first, and its weights need not be
                kept.

        Raises:
            CapacityError: no room now; nothing is changed.
        """
        return self._take(count, owner, self._victims(count, doomed))

    def load_host(self, version: Version) -> LoraWeights:
        """The version's weights, read from where they are, and kept on the host until `trim_host`.

        Raises:
            AdapterError: they cannot be read, or the folder holds other ones by now.
        """
        if version.host is None and version.snapshot is not None:
            weights = version.snapshot()
            check_weights(weights, version.shape, self._spec)
            version.host, version.snapshot = host_copy(weights), None
        elif version.host is None:
            version.host = self.read_source(version)
        return version.host

    def read_source(self, version: Version) -> LoraWeights:
        """The version's weights, read from its folder; changes nothing.

        Raises:
            AdapterError: they cannot be read, or the folder holds other ones by now.
        """
        if not self._source_holds(version):
            raise AdapterError(f"{version.name}: {version.source} has changed since it was loaded")
        return read_weights(version.source, version.shape, self._spec)

    def trim_host(self) -> None:
        """Drops host copies beyond `max_host_adapters` that a folder holds too, least recently used first."""
        if self._max_host is None:
            return
        copies = [v for v in self._versions.values() if v.host is not None]
        excess = len(copies) - self._max_host
        for version in sorted(copies, key=lambda v: v.last_used):
            if excess <= 0:
                break
            if version.source is not None and self._source_holds(version):
                version.host = None
                excess -= 1

    def free(self, version: Version) -> None:
        """Takes the version's pages, if any; they wait for the last step that read them."""
        if version.pages is not None:
            self._pool.give_back(version.pages, version.last_epoch, version.id)
            version.pages = None

    def check_integrity(self) -> None:
        """Raises IntegrityError unless pages and versions agree and every version's weights are somewhere."""
        self._pool.check_integrity()
        for version in self._versions.values():
            owned = self._pool.owned_by(version.id)
            if owned != set(version.pages or ()) or (version.pages and len(owned) != version.shape.num_pages):
                raise IntegrityError(f"version {version.id} has pages {version.pages}, in the pool {owned}")
            if version.residency == "disk" and version.source is None:
                raise IntegrityError(f"version {version.id} of {version.name!r}: its weights are nowhere")
        strange = self._pool.owners() - self._versions.keys() - {JOBS}
        if strange:
            raise IntegrityError(f"adapter pages are owned by versions {strange}, which are no more")

    def _take(self, count: int, owner: Hashable, victims: list[Version]) -> tuple[int, ...]:
        for victim in victims:
            self.free(victim)
        return self._pool.take(count, owner)

    def _victims(self, count: int, doomed: Version | None) -> list[Version]:
        """Versions whose eviction frees `count` pages at once; their weights are safe elsewhere by then."""
        short = count - self._pool.num_free
        idle = [v for v in self._versions.values() if self._is_idle(v)]
        victims: list[Version] = []
        for version in sorted(idle, key=lambda v: (v is not doomed, v.last_used)):
            if short <= 0:
                break
            if version is doomed or (not self._pinned(version) and self.is_elsewhere(version)):
                victims.append(version)
                short -= version.shape.num_pages
        if short > 0:
            raise CapacityError(
                f"adapter pages: {count} asked for; {self._pool.num_free} are free, the others in flight, "
                "pinned, with jobs, or waiting for a step to complete"
            )
        for version in victims:
            if version.snapshot is not None and version is not doomed:
                self.load_host(version)
        return victims

    def _is_idle(self, version: Version) -> bool:
        # Pages of a step that has not completed would not be free at once.
        done = version.last_epoch <= self._pool.completed
        return version.pages is not None and version.in_flight == 0 and done

    def is_elsewhere(self, version: Version) -> bool:
        """Whether its weights can be had again once its pages are gone."""
        return version.host is not None or version.snapshot is not None or self._source_holds(version)

    def _source_holds(self, version: Version) -> bool:
        if version.source is None:
            return False
        try:
            return fingerprint(version.source) == version.stamp
        except AdapterError:
            return False
