"""Scoring on a caller's wish: `log_probs` and `prompt_logprobs`, each under a version that stays put meanwhile."""

from collections.abc import Callable, Sequence

import numpy as np

from loquetier_jax.adapters.store import AdapterStore
from loquetier_jax.adapters.version import Version
from loquetier_jax.batch.score import Place, pack_sequences
from loquetier_jax.errors import AdapterError
from loquetier_jax.runtime.scoring import Scores, ScoreTask
from loquetier_jax.serve.output import Logprob

PromptLogprobs = list[dict[int, Logprob] | None]


class ScoreRequests:
    """Makes score tasks of token sequences.

    Args:
        store: Where versions are acquired and released.
        rows: Rows of a score pack, 0 when the engine has no score bucket.
        epoch: Gives the last step dispatched.
    """

    def __init__(self, store: AdapterStore, rows: int, epoch: Callable[[], int]) -> None:
        self._store, self.rows, self._epoch = store, rows, epoch

    def task(
        self,
        sequences: Sequence[Sequence[int]],
        adapter: str | None,
        on_done: Callable[[list[Scores]], None],
        on_error: Callable[[AdapterError], None],
    ) -> ScoreTask:
        """A task for `sequences` under the version `adapter` means now; on_done gets one Scores per sequence.

        on_error is called instead when the adapter's weights cannot be read any more.

        Raises:
            RequestError: a sequence too short or too long.
            AdapterError: an unknown adapter.
        """
        packs, places = pack_sequences(sequences, self.rows)
        version = None if adapter is None else self._store.get(adapter)
        if version is not None and packs:  # a task without packs is never opened, so nobody would drop it
            self._store.hold(adapter)

        def done(scores: list[Scores]) -> None:
            if version is not None and packs:
                self._store.release(version, self._epoch())
            on_done([_cut(scores[p.pack], p) for p in places])

        def failed(error: AdapterError) -> None:
            if version is not None:
                self._store.drop(version)
            on_error(error)

        return ScoreTask(packs, lambda: self._open(version), done, failed)

    def _open(self, version: Version | None) -> tuple[int, ...]:
        if version is None:
            return ()
        self._store.acquire(version)
        try:
            pages = self._store.ensure_resident(version)
        except BaseException:
            self._store.release(version, self._epoch())
            raise
        self._store.drop(version)
        return pages


def _cut(scores: Scores, place: Place) -> Scores:
    rows = slice(place.start, place.start + place.count)
    return {name: value[rows] for name, value in scores.items()}


def prompt_logprobs(ids: Sequence[int], scores: Scores, count: int) -> PromptLogprobs:
    """vLLM's prompt_logprobs: None for the first token, then {id: Logprob} with the `count` most likely and its own.

    Args:
        ids: The prompt, n tokens.
        scores: Of its n - 1 rows.
        count: Alternatives per token.
    """
    out: PromptLogprobs = [None]
    for row, token in enumerate(ids[1:]):
        top = zip(scores["top_ids"][row, :count], scores["top_logp"][row, :count], strict=True)
        entry = {int(i): Logprob(float(lp), place) for place, (i, lp) in enumerate(top, 1)}
        entry.setdefault(
            int(token), Logprob(float(scores["logp"][row]), int(np.asarray(scores["rank"])[row]))
        )
        out.append(entry)
    return out
