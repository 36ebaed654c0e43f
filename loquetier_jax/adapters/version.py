"""One immutable state of an adapter, and where its weights are."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from loquetier_jax.adapters.lora import LoraConfig, LoraShape, LoraWeights

Residency = Literal["device", "host", "disk"]


@dataclass(eq=False, kw_only=True)
class Version:
    """What a name meant at some time. Only `AdapterStore` changes it; everybody else reads.

    Attributes:
        id: Unique and increasing: the later version has the larger id.
        name: The name it was made under (or has been renamed to); `AdapterStore.is_current` says if it still
            holds.
        shape: Modules, ranks and scalings.
        config: The settings it was made with, where known.
        pages: Its device pages, or None.
        host: Its f32 weights, or None; not to be written to.
        snapshot: Gives `host` where neither `host` nor `source` does, or None.
        source: The PEFT folder that holds the same weights, or None.
        stamp: `peft.fingerprint(source)` when it was read.
        prepared: Its pages on the host, ready to be written to the device; None again once they are.
        in_flight: Users whose steps read its pages: as long as there is one, they stay where they are.
        holds: Users that wait: the version stays, its pages need not.
        last_epoch: The last step dispatched with its pages by users that have released it.
        last_used: Larger for the more recently used.
        failure: Why there are no weights and never will be (`snapshot` raises it); None of all others.
    """

    id: int
    name: str
    shape: LoraShape
    config: LoraConfig | None = None
    pages: tuple[int, ...] | None = None
    host: LoraWeights | None = None
    snapshot: Callable[[], LoraWeights] | None = None
    source: Path | None = None
    stamp: tuple[tuple[int, int], ...] = ()
    prepared: Any = None
    in_flight: int = 0
    holds: int = 0
    last_epoch: int = 0
    last_used: int = 0
    failure: str | None = None

    @property
    def residency(self) -> Residency:
        """The nearest place that has the weights; a snapshot counts as host."""
        if self.pages is not None:
            return "device"
        return "host" if self.host is not None or self.snapshot is not None else "disk"


class Published(NamedTuple):
    """What `AdapterStore.publish` did.

    Attributes:
        version: Serves the name from now on.
        pages: The job's own from its next cast on: fresh ones, or the same as before when there was no room
            (the version is then on the host), or () when the job wanted none.
    """

    version: Version
    pages: tuple[int, ...]
