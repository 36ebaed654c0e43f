"""A request as the scheduler sees it."""

from loquetier_jax.adapters.version import Version
from loquetier_jax.schedule.types import Decoding, Prefilling, Waiting
from loquetier_jax.serve.request import Request


def decoding(request: Request, expected: float) -> Decoding:
    """A running request; a token of it that is in flight is `expected` then."""
    times = request.metrics.token_times
    in_flight = request.num_dispatched > len(times)
    return Decoding(
        id=request.id,
        first_token_time=times[0] if times else expected,
        last_token_time=expected if in_flight else times[-1],
        num_output=request.num_dispatched,
        remaining=request.params.max_tokens - request.num_dispatched,
        pages=len(request.kv_pages),
    )


def prefilling(request: Request) -> Prefilling:
    """A running request whose prompt has not all been dispatched."""
    return Prefilling(
        id=request.id,
        adapter=request.adapter or "",
        arrival=request.metrics.arrival_time,
        remaining=request.num_remaining,
    )


def waiting(request: Request, version: Version | None, kv_pages: int) -> Waiting:
    """A waiting request.

    Args:
        request: It.
        version: Its adapter's; None for the base.
        kv_pages: Pages that it will take.
    """
    stays = version is None or version.in_flight > 0
    return Waiting(
        id=request.id,
        adapter=request.adapter or "",
        arrival=request.metrics.arrival_time,
        prompt_tokens=len(request.prompt_ids),
        pages=kv_pages,
        adapter_pages=0 if stays else version.shape.num_pages,
    )
