"""CRAG, the benchmark on which the paper fine-tunes: questions with five full web pages each.

Data set: https://github.com/facebookresearch/CRAG (docs/dataset.md; Yang et al. 2024, arXiv 2406.04744), licence
CC BY-NC 4.0, to be downloaded by hand. Split as in SelfAug, section 4.1: fine-tuning on CRAG's validation
set, evaluation on its public test set, Task 1.
"""

import importlib.util
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup, CData, NavigableString, Tag
from bs4.element import PageElement
from bs4.exceptions import ParserRejectedMarkup

from selfaug.data.retrieval import Retriever
from selfaug.data.schema import DONT_KNOW, Document, Example, Split
from selfaug.data.text import (
    check_file,
    check_shares,
    choose_split,
    decode_object,
    document_text,
    hash_sources,
    json_type,
    normalise_answer,
    question_key,
    read_lines,
    unique_answers,
)
from selfaug.errors import UserError

FILE_NAME = "crag_task_1_and_2_dev_v4.jsonl.bz2"
ADDRESS = f"https://github.com/facebookresearch/CRAG/raw/refs/heads/main/data/{FILE_NAME}"

# What a browser does not show as the page's text, or shows around it on every page.
_HIDDEN = {
    *("script", "style", "noscript", "template", "svg", "iframe", "head"),
    *("nav", "header", "footer", "aside", "form", "button", "select"),
}
# Lines end around these; everything else (links, bold) stands inside a line, and "H<sub>2</sub>O" stays one word.
_BLOCKS = {
    *("p", "div", "section", "main", "article", "blockquote", "pre", "figure", "figcaption", "br", "hr"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "dl", "dt", "dd", "table", "tr", "td", "th"),
}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_NO_ANSWER = {"i dont know", "i do not know", "dont know", "do not know", "idk"}


class CragSource:
    """CRAG Task 1 from its original file: split 0 (validation) trains, split 1 (public test) tests.

    `path`: crag_task_1_and_2_dev_v4.jsonl.bz2, or the same unpacked. The pages of a question are turned into text,
    cut into pieces of about `chunk_words` words and ranked by BM25 against the question; the `top_k` best
    are the documents, none of them marked gold, because CRAG does not say where an answer stands.
    `val_share` (0 to 1) of split 0 is held out as val, by a seeded hash of the question. The answers are `answer`
    and then `alt_ans`; "invalid question" (a false premise) is an answer like any other, "i don't know" makes the
    example unanswerable.

    HTML is parsed by lxml where that is installed (several times faster), otherwise by Python's own parser; which
    of them is part of the fingerprint. The file is read line by line.
    Raises UserError for a missing file or a Git LFS pointer on construction, and `file:line: what is wrong` from
    `examples` on reaching a bad line (checking 2,706 sets of pages beforehand would take minutes).
    """

    VERSION = 1  # goes into the fingerprint: raise it when the same file would give other examples

    def __init__(
        self, path: str | Path, chunk_words: int = 100, top_k: int = 10, val_share: float = 0.1, seed: int = 0
    ):
        check_shares(val_share)
        if chunk_words < 1 or top_k < 1:
            raise UserError(f"data.chunk_words={chunk_words} and data.top_k={top_k} must be at least 1")
        how = f"download {ADDRESS} (CC BY-NC 4.0, Git LFS) and set data.path to where it lies"
        if path is None or not str(path).strip():
            raise UserError(f"data.path is not set: {how}")
        self.path = Path(path).expanduser()
        check_file(self.path, f"data.path={self.path} does not exist: {how}")
        self.chunk_words = chunk_words
        self.top_k = top_k
        self.val_share = val_share
        self.seed = seed
        self._parser = "lxml" if importlib.util.find_spec("lxml") else "html.parser"

    def fingerprint(self) -> str:
        """sha256 over the file's content, all settings, the HTML parser, and the version of this class."""
        settings = {
            "chunk_words": self.chunk_words,
            "top_k": self.top_k,
            "val_share": self.val_share,
            "seed": self.seed,
            "parser": self._parser,
        }
        return hash_sources(type(self).__name__, self.VERSION, settings, {"crag": self.path})

    def examples(self, split: Split, count_tokens: Callable[[list[str]], list[int]]) -> Iterator[Example]:
        """The examples of `split` in the order of the file. `count_tokens` is not used: `top_k` sets the length."""
        for number, line in read_lines(self.path):
            try:
                value = decode_object(line)
                _check(value)
                if self._split_of(value) == split:  # before the pages are parsed, which is what takes the time
                    yield self._example(value)
            except ValueError as error:
                raise UserError(f"{self.path}:{number}: {error}") from error

    def _split_of(self, value: dict[str, Any]) -> Split:
        if value["split"] == 1:
            return "test"
        return choose_split(question_key(value["query"]), self.val_share, 0.0, self.seed)

    def _example(self, value: dict[str, Any]) -> Example:
        answers = unique_answers([str(value["answer"]), *map(str, value.get("alt_ans") or [])])
        answerable = normalise_answer(answers[0].replace("\u2019", "'")) not in _NO_ANSWER
        chunks = list(
            dict.fromkeys(
                Document(chunk, str(page.get("page_name") or "").strip())
                for page in value["search_results"]
                for chunk in split_chunks(_page_text(page, self._parser), self.chunk_words)
            )
        )
        ranked = Retriever([document_text(chunk) for chunk in chunks]).top([value["query"]], self.top_k)[0]
        return Example(
            id=str(value["interaction_id"]),
            question=value["query"].strip(),
            answers=answers if answerable else (DONT_KNOW,),
            documents=tuple(chunks[i] for i in ranked),
            answerable=answerable,
        )


def _check(value: dict[str, Any]) -> None:
    for key in ("interaction_id", "query", "answer", "split", "search_results"):
        if key not in value:
            raise ValueError(f"missing key {key!r}: is this CRAG's Task 1 file, {FILE_NAME}?")
    if not isinstance(value["query"], str) or not value["query"].strip():
        raise ValueError("'query' must be a string with some text")
    if not str(value["answer"] if value["answer"] is not None else "").strip():
        raise ValueError("'answer' is empty")
    if value["split"] not in (0, 1):
        raise ValueError(f"'split' must be 0 (validation) or 1 (public test), not {value['split']!r}")
    if not isinstance(value.get("alt_ans") or [], list):
        raise ValueError(f"'alt_ans' must be a list, not {json_type(value['alt_ans'])}")
    pages = value["search_results"]
    if not isinstance(pages, list) or not all(isinstance(page, dict) for page in pages):
        raise ValueError("'search_results' must be a list of objects")


def _page_text(page: dict[str, Any], parser: str) -> str:
    """The page's text; the search engine's snippet where the page is empty or cannot be parsed."""
    text = html_to_text(str(page.get("page_result") or ""), parser)
    return text or html_to_text(str(page.get("page_snippet") or ""), parser)


def html_to_text(html: str, parser: str = "html.parser") -> str:
    """The text that a reader of the page sees, a line for each block; empty for what is no HTML at all.

    Scripts, styles, menus, headers, footers and forms are left out. `parser`: "html.parser" or "lxml".
    """
    if not html.strip():
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bs4 remarks on texts that look like an address or like XML
            soup = BeautifulSoup(html, parser)
    except (ParserRejectedMarkup, RecursionError):
        return ""
    # A walk with its own stack: linear in the page's size and without recursion, whatever the nesting.
    pieces: list[str] = []
    stack: list[PageElement | str] = [soup]
    while stack:
        node = stack.pop()
        if isinstance(node, Tag):
            if node.name in _HIDDEN:
                continue
            if node.name in _BLOCKS:
                pieces.append("\n")
                stack.append("\n")
            stack.extend(reversed(node.contents))
        elif type(node) in (str, NavigableString, CData):  # its subclasses are comments, scripts, doctypes ...
            pieces.append(str(node))
    lines = (" ".join(line.split()) for line in "".join(pieces).splitlines())
    return "\n".join(line for line in lines if line)


def split_chunks(text: str, words: int) -> Iterator[str]:
    """Whole sentences (and lines) together up to `words` words; a longer sentence is cut at that length."""
    chunk: list[str] = []
    for line in text.splitlines():
        for sentence in _SENTENCE_END.split(line):
            tokens = sentence.split()
            if chunk and len(chunk) + len(tokens) > words:
                yield " ".join(chunk)
                chunk = []
            chunk += tokens
            while len(chunk) > words:
                yield " ".join(chunk[:words])
                chunk = chunk[words:]
    if chunk:
        yield " ".join(chunk)
