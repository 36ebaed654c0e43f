"""A prompt between its acceptance and the queue."""

from dataclasses import dataclass

from loquetier_jax.serve.handle import RequestHandle
from loquetier_jax.serve.listeners import Listener
from loquetier_jax.serve.scoring import ScoreTask


@dataclass
class Accepted:
    """A prompt whose requests are registered and not queued yet, and the task of its prompt log-probs, if any."""

    handle: RequestHandle
    listener: Listener | None
    scores: ScoreTask | None = None
