"""BM25 retrieval and filling a context up to a length in tokens."""

import logging
from collections.abc import Callable, Iterable

import bm25s
import numpy as np
from tqdm import tqdm

from selfaug.data.schema import Document
from selfaug.data.text import document_text

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG and reports every index


class Retriever:
    """BM25 over a list of texts: the variant of Lucene (k1 = 1.5, b = 0.75), by bm25s (Lù 2024, arXiv 2407.03618).

    Words are runs of at least two letters or digits, in lower case, without English stop words, not stemmed.
    """

    def __init__(self, texts: list[str]):
        self._size = len(texts)
        words = _words(texts)
        # bm25s cannot index a collection without a single word; every score is then 0.
        self._index = bm25s.BM25() if any(words) else None
        if self._index is not None:
            self._index.index(words, show_progress=False)

    def top(self, queries: list[str], k: int, progress: bool = False) -> list[list[int]]:
        """For each query the indices of its `k` best texts (all of them if there are fewer), the best first.

        Equal scores stand in the order of the texts, so that the result never depends on how a sort is done.
        `progress=True` shows a bar.
        """
        k = min(k, self._size)
        if k <= 0:
            return [[] for _ in queries]
        ranked = []
        for words in tqdm(_words(queries), desc="retrieving", disable=not progress):
            scores = self._scores(words)
            ranked.append([int(i) for i in np.argsort(-scores, kind="stable")[:k]])
        return ranked

    def _scores(self, words: list[str]) -> np.ndarray:
        ids = self._index.get_tokens_ids(words) if self._index is not None else []
        if self._index is None or not ids:  # no word of the query occurs in any text
            return np.zeros(self._size, dtype=np.float32)
        return self._index.get_scores_from_ids(ids)


def _words(texts: list[str]) -> list[list[str]]:
    return bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)


def fill_context(
    gold: Document | None,
    candidates: Iterable[Document],
    budget: int,
    count: Callable[[list[str]], list[int]],
) -> tuple[Document, ...]:
    """The documents of a context of at most `budget` tokens, the best first.

    `candidates` come in rank order and are taken while they fit; one that does not fit is passed over for a
    smaller one further down. The gold document is always in, even where it alone exceeds the budget, and keeps
    its place where it is one of the candidates (the same title and text). Where it is not, it stands first,
    so that truncation, which takes the last documents, reaches it last.
    `count` gives the number of tokens of each text, here of title and text together (`document_text`).
    """
    left = budget
    if gold is not None:
        left -= count([document_text(gold)])[0]
    taken: list[Document] = []
    gold_placed = gold is None
    for document in candidates:
        if gold is not None and document.text == gold.text and document.title == gold.title:
            if not gold_placed:
                taken.append(gold)
            gold_placed = True
            continue
        if left <= 0:
            if gold_placed:
                break
            continue
        length = count([document_text(document)])[0]
        if length <= left:
            taken.append(document)
            left -= length
    if gold is not None and not gold_placed:
        taken.insert(0, gold)
    return tuple(taken)
