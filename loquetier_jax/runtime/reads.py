"""What the attention of a step reads, for the latency model."""

from loquetier_jax.batch.pack import StepItems
from loquetier_jax.schedule.latency import Reads, chunk_pairs


def reads_of(items: StepItems) -> Reads:
    """What the step's inference rows read, before `RequestQueue.sent` counts them as dispatched."""
    return Reads(
        kv_tokens=sum(len(r.prompt_ids) + r.num_dispatched for r in items.decode),
        pairs=sum(chunk_pairs(r.num_prefilled, count) for r, count in items.prefill),
    )
