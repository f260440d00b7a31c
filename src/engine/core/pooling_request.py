"""`PoolingRequest`: a list of texts to be turned into one vector each, and the batches of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine.outputs import RequestMetrics

Int32Array = npt.NDArray[np.int32]
IntpArray = npt.NDArray[np.intp]
FloatArray = npt.NDArray[np.float32]

_numbers = itertools.count()


@dataclass(slots=True, eq=False)
class PoolingRequest:
    """Texts of one call. N texts, M tokens in all. Owned by the engine thread after submit.

    A whole list is one request, with one handle and one answer: a thousand documents cost one
    hand-over and one wake-up. The scheduler cuts it into batches and mixes it with others.

    Attributes:
        token_ids: [M] int32, text after text.
        lens: [N] int32, tokens of each text, at least one.
        second_starts: [N] int32, for pairs where the second text begins within its row; else None.
        request_id: Unique in the process.
        metrics: Timings, written by the engine thread.
        vectors: [N, width] float32, filled by the engine thread; None before the first batch.
        order: [N] intp, the texts by length, so that a batch has few different lengths.
        num_scheduled: Texts of `order` that have been put into batches.
        num_done: Texts whose vectors are there.
    """

    token_ids: Int32Array
    lens: Int32Array
    second_starts: Int32Array | None = None
    request_id: str = ""
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(arrival_s=0.0))
    vectors: FloatArray | None = None
    order: IntpArray = field(init=False)
    num_scheduled: int = 0
    num_done: int = 0
    _starts: IntpArray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.request_id:
            self.request_id = f"pooling-{next(_numbers)}"
        self.order = np.argsort(self.lens, kind="stable")
        self._starts = np.zeros(len(self.lens) + 1, dtype=np.intp)
        np.cumsum(self.lens, out=self._starts[1:])

    @property
    def sequences(self) -> tuple[PoolingRequest]:
        """What the engine loop gives to the scheduler: the request as a whole."""
        return (self,)

    @property
    def num_texts(self) -> int:
        """N."""
        return len(self.lens)

    @property
    def num_tokens(self) -> int:
        """M."""
        return len(self.token_ids)

    @property
    def is_finished(self) -> bool:
        """True once every text has its vector."""
        return self.num_done == self.num_texts

    def tokens_of(self, index: int) -> Int32Array:
        """Token ids of text `index`, a view."""
        return self.token_ids[self._starts[index] : self._starts[index + 1]]


@dataclass(slots=True, frozen=True)
class TextRun:
    """Texts of one request in a batch: `indices` [R] intp into it, shortest first."""

    request: PoolingRequest
    indices: IntpArray


@dataclass(slots=True, frozen=True)
class PoolingBatch:
    """One step: whole texts of one or several requests. B texts, T tokens.

    Attributes:
        runs: Whose texts; their vectors come back in this order.
        token_ids: [T] int64, texts by length, shortest first.
        lens: [B] int64, tokens of each, not decreasing.
        second_starts: [B] int64, where the second text of a pair begins; `lens` where there is
            none.
        places: [B] intp, row of each text of `runs`, one run after the other, among the sorted.
    """

    runs: tuple[TextRun, ...]
    token_ids: npt.NDArray[np.int64]
    lens: npt.NDArray[np.int64]
    second_starts: npt.NDArray[np.int64]
    places: IntpArray

    @property
    def num_texts(self) -> int:
        """B."""
        return len(self.lens)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)


def make_batch(runs: list[TextRun]) -> PoolingBatch:
    """Lay the texts of `runs` out by length."""
    texts = [(run.request, int(index)) for run in runs for index in run.indices]
    lens = np.array([request.lens[index] for request, index in texts], dtype=np.int64)
    second_starts = lens.copy()
    for place, (request, index) in enumerate(texts):
        if request.second_starts is not None:
            second_starts[place] = request.second_starts[index]
    order = np.argsort(lens, kind="stable")
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    tokens = [texts[place][0].tokens_of(texts[place][1]) for place in order]
    return PoolingBatch(
        runs=tuple(runs),
        token_ids=np.concatenate(tokens).astype(np.int64),
        lens=lens[order],
        second_starts=second_starts[order],
        places=places,
    )
