"""Scoring on behalf of callers: `log_probs` and `prompt_logprobs`, each pinned to one adapter version."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from loquetier_jax.adapters.store import AdapterStore
from loquetier_jax.adapters.version import Version
from loquetier_jax.batch.packs import Pack, aligned
from loquetier_jax.driver import Driver
from loquetier_jax.errors import AdapterError, RequestError
from loquetier_jax.serve.output import Logprob
from loquetier_jax.serve.prompts import prompts_of
from loquetier_jax.serve.request import Request
from loquetier_jax.serve.scoring import Scores, ScoreTask, Scoring
from loquetier_jax.serve.tokenizer import Prompt, encode_prompt
from loquetier_jax.serve.tokenizer_type import PreTrainedTokenizerBase

PromptLogprobs = list[dict[int, Logprob] | None]


@dataclass(frozen=True)
class Place:
    """Location of a sequence's scores: rows [start, start + count) of packs[pack]; count = tokens - 1."""

    pack: int
    start: int
    count: int


class ScoreRequests:
    """Creates score tasks from token sequences. Thread-safe.

    Args:
        store: Adapter versions.
        scoring: The queue of score tasks.
        driver: The loop's driver.
        rows: Rows of a score pack; 0 if the engine has no score bucket.
        epoch: Returns the number of the last step dispatched.
        tokenizer, vocab_size: The base model's.
    """

    def __init__(
        self,
        store: AdapterStore,
        scoring: Scoring,
        driver: Driver,
        rows: int,
        epoch: Callable[[], int],
        tokenizer: PreTrainedTokenizerBase | None,
        vocab_size: int,
    ) -> None:
        self._store, self._scoring, self._driver = store, scoring, driver
        self.rows, self._epoch = rows, epoch
        self._tokenizer, self._vocab_size = tokenizer, vocab_size

    def log_probs(self, sequences: Sequence[Prompt] | str, adapter: str | None = None) -> list[np.ndarray]:
        """Log-probs of each sequence's tokens after the first, f32 [n - 1], computed by the training forward.

        A single string counts as a list of one sequence, as for `generate`.

        Raises:
            RequestError: a sequence with fewer than two tokens, or longer than a score pack.
            AdapterError: an unknown adapter, or one whose weights cannot be read.
        """
        sequences = prompts_of(sequences, "sequences")
        result: list[np.ndarray] = []
        errors: list[AdapterError] = []
        finished = threading.Event()

        def done(scores: list[dict[str, np.ndarray]]) -> None:
            result.extend(s["logp"] for s in scores)
            finished.set()

        def failed(error: AdapterError) -> None:
            errors.append(error)
            finished.set()

        self._driver.check_alive()
        ids = [encode_prompt(self._tokenizer, s, self._vocab_size) for s in sequences]
        task = self.task(ids, adapter, done, failed)
        self._driver.post(lambda: self._scoring.add(task))
        self._driver.wait(finished.is_set)
        if errors:
            raise errors[0]
        return result

    def task(
        self,
        sequences: Sequence[Sequence[int]],
        adapter: str | Version | None,
        on_done: Callable[[list[Scores]], None],
        on_error: Callable[[AdapterError], None],
    ) -> ScoreTask:
        """A task that scores `sequences` under the current version of `adapter`, or the version that it is.

        on_done gets one Scores per sequence.

        on_error is called instead if the adapter's weights can no longer be read.

        Raises:
            RequestError: a sequence is too short or too long.
            AdapterError: an unknown adapter.
        """
        packs, places = pack_sequences(sequences, self.rows)
        version = None
        if adapter is not None:
            version = self._store.hold(adapter)
            if not packs:  # such a task is never opened and would never drop the hold
                self._store.drop(version)

        def done(scores: list[Scores]) -> None:
            if version is not None and packs:
                self._store.release(version, self._epoch())
            on_done([_cut(scores[p.pack], p) for p in places])

        def failed(error: AdapterError) -> None:
            if version is not None:
                self._store.drop(version)
            on_error(error)

        return ScoreTask(packs, lambda: self._open(version), done, failed)

    def of_prompt(self, requests: Sequence[Request], version: Version | None) -> ScoreTask:
        """The task that fills in the prompt_logprobs of the completions of one prompt, which ask for them.

        If the adapter's weights cannot be read, the requests themselves end with that error, so it is ignored here.

        Args:
            requests: The completions.
            version: Their adapter version; None for the base.
        """
        ids, count = requests[0].prompt_ids, requests[0].params.prompt_logprobs

        def done(scores: list[Scores]) -> None:
            result = prompt_logprobs(ids, scores[0], count) if scores else [None]
            for request in requests:
                request.prompt_logprobs = result

        return self.task([ids] if len(ids) > 1 else [], version, done, on_error=lambda error: None)

    def _open(self, version: Version | None) -> tuple[int, ...]:
        if version is None:
            return ()
        self._store.acquire(version)
        try:
            pages = self._store.ensure_loaded(version)
        except BaseException:
            self._store.release(version, self._epoch())
            raise
        self._store.drop(version)
        return pages


def _cut(scores: Scores, place: Place) -> Scores:
    rows = slice(place.start, place.start + place.count)
    return {name: value[rows] for name, value in scores.items()}


def prompt_logprobs(ids: Sequence[int], scores: Scores, count: int) -> PromptLogprobs:
    """vLLM's prompt_logprobs: None for the first token, then {id: Logprob} of the top `count` and the actual token.

    Args:
        ids: The prompt, n tokens.
        scores: Scores of its n - 1 rows.
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


def pack_sequences(sequences: Sequence[Sequence[int]], size: int) -> tuple[list[Pack], list[Place]]:
    """Lays sequences out in packs of `size` rows, in order.

    Args:
        sequences: Token ids; n tokens take n - 1 rows, since the first token has no log-prob.
        size: Rows of a pack.

    Raises:
        RequestError: a sequence of fewer than 2 tokens, or too long for a pack.
    """
    fills: list[list[Sequence[int]]] = []
    places, used = [], size
    for i, ids in enumerate(sequences):
        rows = len(ids) - 1
        if not 1 <= rows <= size:
            raise RequestError(f"sequences[{i}]: got {len(ids)} tokens, expected 2 to {size + 1}")
        if used + rows > size:
            fills.append([])
            used = 0
        places.append(Place(len(fills) - 1, used, rows))
        fills[-1].append(ids)
        used += aligned(rows)  # aligned like a training sample, for identical bits
    packs = [
        _pack(fill, [p for p in places if p.pack == number], size, number)
        for number, fill in enumerate(fills)
    ]
    return packs, places


def _pack(sequences: list[Sequence[int]], places: list[Place], size: int, number: int) -> Pack:
    rows = {name: np.zeros(size, np.int32) for name in ("tokens", "targets", "positions")}
    segments, weights = np.full(size, -1, np.int32), np.zeros(size, np.float32)
    for segment, (ids, place) in enumerate(zip(sequences, places, strict=True)):
        cut = slice(place.start, place.start + place.count)
        rows["tokens"][cut], rows["targets"][cut] = ids[:-1], ids[1:]
        rows["positions"][cut] = np.arange(place.count)
        segments[cut], weights[cut] = segment, 1.0
    scored = int(weights.sum())
    return Pack(
        **rows,
        segments=segments,
        weights=weights,
        drop_keys=np.zeros(size, np.uint32),
        num_targets=scored,
        num_tokens=scored,
        step=0,
        index=number,
        is_last=False,
        sample_ids=tuple(range(len(sequences))),
    )
