"""One version of an adapter: fixed weights, and the bookkeeping of where they are and who uses them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from loquetier_jax.adapters.lora import LoraConfig, LoraShape, LoraWeights
from loquetier_jax.adapters.stored import StoredTensor

Residency = Literal["device", "host", "disk"]


@dataclass(eq=False, kw_only=True)
class Version:
    """One version of an adapter, whose weights never change. Only `AdapterStore` modifies the bookkeeping.

    Attributes:
        id: Unique and increasing.
        name: The name it was created under or renamed to; see `AdapterStore.is_current`.
        shape: Modules, ranks and scalings.
        config: The settings it was created with, if known.
        pages: Its device pages, or None.
        host: Its f32 weights if no folder has them, else None; read-only.
        snapshot: Returns the weights if neither `host` nor `source` has them, else None.
        source: The PEFT folder with the same weights, or None.
        fingerprint: `peft.fingerprint(source)` when it was loaded.
        tensors: Where its tensors are in the weights file of `source`.
        copy: Its host copy in page form, possibly shared, or None; see `host_copies`.
        finite: Whether its pages are free of NaN and infinity; None until they have been made on the host.
        in_flight: Number of users whose steps read its pages; while > 0 the pages are not evicted.
        holds: Number of waiting users; while > 0 the version lives, but its pages may be evicted.
        last_epoch: The last step dispatched with its pages by users that have released it.
        last_used: Larger means more recently used.
        failure: For the placeholder of a failed name, the reason, which `snapshot` raises; otherwise None.
    """

    id: int
    name: str
    shape: LoraShape
    config: LoraConfig | None = None
    pages: tuple[int, ...] | None = None
    host: LoraWeights | None = field(default=None, repr=False)
    snapshot: Callable[[], LoraWeights] | None = None
    source: Path | None = None
    fingerprint: tuple[tuple[int, int], ...] = ()
    tensors: tuple[StoredTensor, ...] = field(default=(), repr=False)
    copy: Any = field(default=None, repr=False)
    finite: bool | None = None
    in_flight: int = 0
    holds: int = 0
    last_epoch: int = 0
    last_used: int = 0
    failure: str | None = None

    @property
    def residency(self) -> Residency:
        """The fastest tier that has the weights; a snapshot counts as host."""
        if self.pages is not None:
            return "device"
        elsewhere = (self.host, self.snapshot, self.copy)
        return "disk" if all(one is None for one in elsewhere) else "host"


class Published(NamedTuple):
    """Result of `AdapterStore.publish`.

    Attributes:
        version: The version that the name now points to.
        pages: The job's pages from its next cast on: fresh ones, or the old ones if there was no room (the
            version is then on the host), or () for `fresh=False`.
    """

    version: Version
    pages: tuple[int, ...]
