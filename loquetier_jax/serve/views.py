"""The scheduler's views of requests."""

from collections.abc import Iterable, Iterator, Mapping

from loquetier_jax.adapters.store import AdapterStore
from loquetier_jax.adapters.version import Version
from loquetier_jax.schedule.types import Decoding, Prefilling, Waiting
from loquetier_jax.serve.kv import KVPages
from loquetier_jax.serve.request import Request

SCANNED = 1024  # waiting requests looked at per scheduling decision, or more until one is found that can run


def ready(
    waiting: Iterable[Request], versions: Mapping[str, Version], store: AdapterStore
) -> Iterator[Request]:
    """The first of the waiting requests that do not wait for an adapter; begins to load the adapters of the others.

    Args:
        waiting: Requests in order of arrival.
        versions: The version of each, by request id; none for the base.
        store: Their adapters.
    """
    found = False
    for i, request in enumerate(waiting):
        if found and i >= SCANNED:
            return
        version = versions.get(request.id)
        if version is None or store.is_ready(version):
            found = True
            yield request
        else:
            store.prepare(version)


def decoding(request: Request, expected: float, kv: KVPages) -> Decoding:
    """View of a decoding request; a token in flight counts as read at time `expected`."""
    times = request.metrics.token_times
    in_flight = request.num_dispatched > len(times)
    return Decoding(
        id=request.id,
        first_token_time=times[0] if times else expected,
        last_token_time=expected if in_flight else times[-1],
        num_output=request.num_dispatched,
        remaining=request.params.max_tokens - request.num_dispatched,
        pages=kv.returned(request.kv_pages),
        context=len(request.prompt_ids) + request.num_dispatched,
    )


def prefilling(request: Request) -> Prefilling:
    """View of a running request whose prompt is not fully dispatched."""
    return Prefilling(
        id=request.id,
        adapter=request.adapter or "",
        arrival=request.metrics.arrival_time,
        remaining=request.num_remaining,
        done=request.num_prefilled,
    )


def waiting(request: Request, version: Version | None, kv: KVPages) -> Waiting:
    """View of a waiting request; looks its prompt up in the prefix cache.

    Args:
        request: The request.
        version: Its adapter version; None for the base.
        kv: The KV pages.
    """
    cached = kv.look_up(request.prefix)
    stays = version is None or version.in_flight > 0
    return Waiting(
        id=request.id,
        adapter=request.adapter or "",
        arrival=request.metrics.arrival_time,
        prompt_tokens=len(request.prompt_ids) - cached,
        done=cached,
        pages=kv.needed(request.num_tokens, request.prefix),
        adapter_pages=0 if stays else version.shape.num_pages,
        resident=version is None or version.pages is not None,
    )


def awaits_sibling(request: Request, first: Request) -> bool:
    """Whether a waiting request should wait until the KV of its prompt, which a sibling computes, can be shared.

    Not once the sibling has a token, when that KV is cached unless there was no room; the sibling ends otherwise, and
    the next one is first.

    Args:
        request: The request, after its prompt was looked up.
        first: The first live completion of the same prompt.
    """
    prefix = request.prefix
    return first is not request and not first.output_ids and prefix is not None and len(prefix.path) < prefix.readable
