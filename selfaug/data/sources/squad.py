"""The packaged SQuAD questions as retrieval-augmented examples of a chosen length.

Each question comes with its own paragraph and with the paragraphs that BM25 ranks highest for it, up to
`context_tokens` tokens; for some questions the own paragraph is withheld and "I don't know" is right.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfaug.data.retrieval import Retriever, fill_context
from selfaug.data.schema import DONT_KNOW, SPLITS, Document, Example, Split
from selfaug.data.text import (
    check_file,
    check_shares,
    choose_split,
    decode_object,
    document_text,
    hash_share,
    hash_sources,
    json_type,
    normalise_answer,
    read_lines,
    unique_answers,
)
from selfaug.errors import UserError

_log = logging.getLogger(__name__)
_DISTRACTORS = ("split", "split+leads")
# BM25 ranks this many candidates at least, and enough for this many times the context: what does not fit is passed
# over, so that there must be more of them than fit. All of 10,000 leads would only cost time.
_MIN_CANDIDATES, _CANDIDATE_FACTOR = 200, 8


@dataclass(frozen=True, slots=True)
class _Question:
    id: str
    question: str
    answers: tuple[str, ...]
    gold: Document


class SquadSource:
    """SQuAD v1.1 questions (Rajpurkar et al. 2016, CC BY-SA 4.0) with their gold paragraph and BM25 distractors.

    `path`: a JSON-lines file with {"id", "title", "question", "answers", "paragraph"}; None takes the packaged one
    (1,000 questions of the validation set, 803 paragraphs, 48 titles; `python -m selfaug.assets`). Scores on it
    cannot be compared with published SQuAD scores.
    `context_tokens`: tokens of all documents of an example together (titles and texts, without the prompt around
    them). Only a gold paragraph that is longer by itself exceeds it.
    `unanswerable_share`: share of each split's questions (0 to 1) whose gold paragraph is withheld, with every
    distractor that holds an accepted answer, and whose answer is `DONT_KNOW`.
    `val_share`, `test_share`: shares of the questions; whole titles go to one split, so that no paragraph is in two,
    and distractors come from the split's own paragraphs.
    `distractors`: "split", or "split+leads", which adds the packaged Wikipedia leads (CC BY-SA 4.0) for contexts
    longer than a split's paragraphs; `leads_path` names another file with {"id", "title", "text"}. A lead is in one
    split only, the one of the SQuAD title of the same name if there is one.

    Raises UserError for a missing or malformed file and for impossible settings.
    """

    VERSION = 1  # goes into the fingerprint: raise it when the same file would give other examples

    def __init__(
        self,
        path: str | Path | None = None,
        context_tokens: int = 512,
        unanswerable_share: float = 0.1,
        val_share: float = 0.1,
        test_share: float = 0.2,
        seed: int = 0,
        distractors: str = "split",
        leads_path: str | Path | None = None,
    ):
        check_shares(val_share, test_share)
        if context_tokens < 1:
            raise UserError(f"data.context_tokens={context_tokens} must be at least 1")
        if not 0 <= unanswerable_share <= 1:
            raise UserError(f"data.source.unanswerable_share={unanswerable_share} must lie between 0 and 1")
        if distractors not in _DISTRACTORS:
            raise UserError(f"data.source.distractors={distractors} must be one of: {', '.join(_DISTRACTORS)}")
        self.path = _file(path, "squad", "squad.jsonl", "data.path")
        self.leads_path: Path | None = None
        if distractors == "split+leads":
            self.leads_path = _file(leads_path, "wikipedia-leads", "leads.jsonl", "data.source.leads_path")
        self.context_tokens = context_tokens
        self.unanswerable_share = unanswerable_share
        self.val_share = val_share
        self.test_share = test_share
        self.seed = seed

    def fingerprint(self) -> str:
        """sha256 over the files' contents, all settings, and the version of this class."""
        settings = {
            "context_tokens": self.context_tokens,
            "unanswerable_share": self.unanswerable_share,
            "val_share": self.val_share,
            "test_share": self.test_share,
            "seed": self.seed,
        }
        files = {"squad": self.path} | ({"leads": self.leads_path} if self.leads_path else {})
        return hash_sources(type(self).__name__, self.VERSION, settings, files)

    def examples(self, split: Split, count_tokens: Callable[[list[str]], list[int]]) -> Iterator[Example]:
        """The examples of one split in a seeded order. `count_tokens` is called once, for all paragraphs together."""
        questions = [_question(self.path, number, value) for number, value in _objects(self.path)]
        # A paragraph that stands under two titles goes with the first of them, so that it is in one split only.
        title_of: dict[str, str] = {}
        titles = [title_of.setdefault(q.gold.text, q.gold.title) for q in questions]
        split_of = _split_titles(titles, self.val_share, self.test_share, self.seed)
        chosen = [q for q, title in zip(questions, titles, strict=True) if split_of[title] == split]
        chosen.sort(key=lambda q: (hash_share(q.id, self.seed, "order"), q.id))
        pool = list(dict.fromkeys(_distractor(q.gold) for q in chosen))
        if self.leads_path and chosen:
            taken = {q.gold.text for q in questions}
            pool += [lead for lead in self._leads(split, split_of) if lead.text not in taken]
        return self._fill(split, chosen, pool, count_tokens)

    def _fill(
        self,
        split: Split,
        questions: list[_Question],
        pool: list[Document],
        count_tokens: Callable[[list[str]], list[int]],
    ) -> Iterator[Example]:
        if not questions:
            _log.warning("%s gives no example for the split %s: see data.%s_share", self.path, split, split)
            return
        texts = [document_text(document) for document in pool]
        lengths = dict(zip(texts, count_tokens(texts), strict=True))
        total = sum(lengths.values())
        if total < self.context_tokens:
            _log.warning(
                "the split %s has only %d tokens of documents, fewer than data.context_tokens=%d: "
                "set data.source.distractors=split+leads for longer contexts",
                split,
                total,
                self.context_tokens,
            )
        mean_length = max(1.0, total / len(pool))
        depth = max(_MIN_CANDIDATES, round(_CANDIDATE_FACTOR * self.context_tokens / mean_length))
        normalised = [normalise_answer(text) for text in texts]
        unanswerable = self._unanswerable(questions)
        retriever = Retriever(texts)
        for question in questions:
            ranked = retriever.top([question.question], depth)[0]
            gold: Document | None = question.gold
            if question.id in unanswerable:
                gold = None
                forbidden = [short for answer in question.answers if (short := normalise_answer(answer))]
                hidden = _distractor(question.gold)
                ranked = [
                    i for i in ranked if pool[i] != hidden and not any(answer in normalised[i] for answer in forbidden)
                ]
            candidates = [pool[i] for i in ranked]
            if gold is not None and _distractor(gold) not in candidates:
                candidates.append(_distractor(gold))  # ranked below all that were looked at
            yield Example(
                id=question.id,
                question=question.question,
                answers=question.answers if gold is not None else (DONT_KNOW,),
                documents=fill_context(
                    gold, candidates, self.context_tokens, lambda some: [lengths[text] for text in some]
                ),
                answerable=gold is not None,
            )

    def _unanswerable(self, questions: list[_Question]) -> set[str]:
        """Exactly the share asked for, rounded: with 100 questions a coin for each would miss it by several."""
        ordered = sorted(questions, key=lambda q: (hash_share(q.id, self.seed, "unanswerable"), q.id))
        return {q.id for q in ordered[: round(self.unanswerable_share * len(ordered))]}

    def _leads(self, split: Split, split_of: dict[str, Split]) -> Iterator[Document]:
        assert self.leads_path is not None
        by_name = {title.casefold(): title_split for title, title_split in split_of.items()}
        seen: set[str] = set()
        for number, value in _objects(self.leads_path):
            title, text = _texts(self.leads_path, number, value, ("title", "text"))
            if text in seen:
                continue
            seen.add(text)
            own = by_name.get(title.casefold())
            if (own or choose_split(text, self.val_share, self.test_share, self.seed)) == split:
                yield Document(text, title)


def _distractor(document: Document) -> Document:
    """The document without its gold mark: one question's gold paragraph is another's distractor."""
    return Document(document.text, document.title)


def _split_titles(question_titles: list[str], val_share: float, test_share: float, seed: int) -> dict[str, Split]:
    """The split of each title. Titles are few and of unequal size, so hashing each would miss the shares by far:
    they are taken in a seeded order, for test and then for val, as long as that comes nearer to the share."""
    sizes = Counter(question_titles)
    titles = sorted(sizes, key=lambda title: (hash_share(title, seed, "title"), title))
    split_of: dict[str, Split] = {}
    shares: tuple[tuple[Split, float], ...] = (("test", test_share), ("val", val_share))
    for split, share in shares:
        target, filled = share * len(question_titles), 0
        for title in titles:
            if title not in split_of and abs(filled + sizes[title] - target) < abs(filled - target):
                split_of[title] = split
                filled += sizes[title]
    return {title: split_of.get(title, SPLITS[0]) for title in titles}


def _file(path: str | Path | None, asset: str, name: str, setting: str) -> Path:
    if path is not None:
        file = Path(path).expanduser()
        check_file(file, f"{setting}={file} does not exist: set {setting} to a file, or to null for the packaged one")
        return file
    from selfaug.assets import asset_path  # here, because an explicit path needs no assets at all

    file = Path(asset_path(asset)) / name
    check_file(file, f"{file} does not exist: run `python -m selfaug.assets` to fetch it, or set {setting}")
    return file


def _objects(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in read_lines(file):
        try:
            yield number, decode_object(line)
        except ValueError as error:
            raise UserError(f"{file}:{number}: {error}") from error


def _texts(file: Path, number: int, value: dict[str, Any], keys: tuple[str, ...]) -> list[str]:
    for key in keys:
        if not isinstance(value.get(key), str) or not value[key].strip():
            found = json_type(value[key]) if key in value else "nothing"
            raise UserError(f"{file}:{number}: {key!r} must be a string with some text, found {found}")
    return [value[key] for key in keys]


def _question(file: Path, number: int, value: dict[str, Any]) -> _Question:
    name, title, question, paragraph = _texts(file, number, value, ("id", "title", "question", "paragraph"))
    answers = value.get("answers")
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"{file}:{number}: 'answers' must be a list of strings")
    accepted = unique_answers(answers)
    if not accepted:
        raise UserError(f"{file}:{number}: 'answers' holds no answer")
    # SQuAD writes its titles as in the page's address: Super_Bowl_50
    return _Question(name, question.strip(), accepted, Document(paragraph, title.replace("_", " "), gold=True))
