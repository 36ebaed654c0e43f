"""Who is told of a request's output."""

import logging
from collections.abc import Callable

from loquetier_jax.serve.output import StreamPiece
from loquetier_jax.serve.request import Request

log = logging.getLogger(__name__)

Listener = Callable[[StreamPiece], None]


class Listeners(dict[str, Listener]):
    """Listeners by the id of their request."""

    def tell(self, request: Request, piece: StreamPiece | None) -> None:
        """Hands a piece of output to the request's listener, if it has one; forgets it when the request has finished.

        A listener that raises is logged and not called again.
        """
        listener = self.get(request.id)
        if listener is not None and piece is not None:
            try:
                listener(piece)
            except Exception:  # caller's code; the other requests of this step must still get their tokens
                log.exception("the listener of request %s failed and will not be called again", request.id)
                self.pop(request.id, None)
        if request.finished:
            self.pop(request.id, None)
