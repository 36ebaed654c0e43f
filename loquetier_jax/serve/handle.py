"""The caller's handle to a submitted prompt."""

from dataclasses import dataclass

from loquetier_jax.serve.output import RequestOutput
from loquetier_jax.serve.request import Request, collect


@dataclass
class RequestHandle:
    """A submitted prompt with its n completions."""

    requests: list[Request]

    @property
    def request_id(self) -> str:
        return self.requests[0].request_id

    @property
    def finished(self) -> bool:
        """Whether every completion has ended and prompt log-probs, if requested, are available."""
        first = self.requests[0]
        scored = first.params.prompt_logprobs is None or first.prompt_logprobs is not None
        aborted = first.finish_reason in ("abort", "error")
        return all(r.finished for r in self.requests) and (scored or aborted)

    def output(self) -> RequestOutput:
        """The output so far."""
        return collect(self.requests)
