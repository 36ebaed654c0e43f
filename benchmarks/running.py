"""Requests in the middle of their life, for what measures single steps."""

from collections.abc import Sequence

from loquetier_jax.sampling_params import SamplingParams
from loquetier_jax.serve.output import RequestMetrics
from loquetier_jax.serve.request import Request


def running(
    slot: int,
    adapter_pages: Sequence[int],
    kv_pages: Sequence[int],
    params: SamplingParams,
    prompt: Sequence[int],
    produced: int = 0,
) -> Request:
    """One that has a slot and pages; with `produced` tokens its next row is a decode row, with 0 it is its prompt."""
    return Request(
        id=str(slot),
        request_id=str(slot),
        prompt_ids=tuple(prompt),
        params=params,
        seed=slot,
        metrics=RequestMetrics(0.0),
        slot=slot,
        adapter_pages=tuple(adapter_pages),
        kv_pages=tuple(kv_pages),
        num_prefilled=len(prompt) if produced else 0,
        num_dispatched=produced,
    )
