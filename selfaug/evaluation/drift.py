"""Drift: how far the tuned model has moved from the base model on text that has nothing to do with the task.

For held-out documents, next-token distributions of both models at every counted row:

    kl_base_tuned     mean over rows of KL(base || tuned), nats per token
    kl_tuned_base     mean over rows of KL(tuned || base), nats per token
    perplexity        exp(mean NLL), of both models
    perplexity_ratio  perplexity of the tuned model over that of the base model

Of plain text every row counts; of a dialogue only the rows that predict a response token, which is where the model
speaks. A mean is over tokens, its interval over documents. The corpora must not be trained on: who mixes the packaged
instructions into the training data measures something else with them.

The matrix products follow the caller's autocast, as in training.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from selfaug.data.chat import ChatFormat
from selfaug.data.packaged import (
    TURN,
    instruction_answers,
    records,
    sample,
    unmeasured_instructions,
    wikipedia_texts,
)
from selfaug.data.text import check_file
from selfaug.errors import UserError
from selfaug.evaluation.generation import length_batches
from selfaug.evaluation.items import by_item
from selfaug.evaluation.pair import Pair
from selfaug.evaluation.statistics import paired_weighted_difference, pseudo_values, weighted_bootstrap
from selfaug.objective.batch import Role
from selfaug.objective.rows import Position, alignment_rows
from selfaug.reporting.results import Metric

log = logging.getLogger(__name__)

Kind = Literal["text", "dialogue"]
_FIELDS: dict[str, tuple[str, ...]] = {"text": ("text",), "dialogue": TURN}
_POSITION: dict[str, Position] = {"text": "all_logits", "dialogue": "output_logits"}
_ASSETS = {"wikipedia-articles": "text", "alpaca-sample": "dialogue"}
_SETTING = "evaluation.drift.corpora"
_Instructions = Callable[[int | None, int], list[tuple[str, str]]]


@dataclass(frozen=True)
class CorpusConfig:
    """One corpus: a packaged `asset`, or a JSON-lines file at `path`.

    kind: text ({"text"} a line) or dialogue ({"prompt", "response"} a line, or {"messages"}, as self-dialogues are
        written, of which the first turn counts).
    limit: documents measured, a seeded sample; null for all. max_tokens: of each document, from its start.
    """

    kind: str
    asset: str | None = None
    path: str | None = None
    limit: int | None = None
    max_tokens: int = 512


def _packaged() -> dict[str, CorpusConfig]:
    return {
        "wikipedia": CorpusConfig("text", asset="wikipedia-articles", limit=10, max_tokens=384),
        "dialogues": CorpusConfig("dialogue", asset="alpaca-sample", limit=24, max_tokens=384),
    }


@dataclass(frozen=True)
class DriftConfig:
    """Which corpora are measured, and how. `corpora`: name -> CorpusConfig, or its settings as a mapping.

    tokens_per_batch: of one forward pass, padding included. seed: of the samples and the intervals.
    chat_template, template_arguments: as in data.prompt, for dialogues.
    """

    corpora: Mapping[str, Any] = field(default_factory=_packaged)
    tokens_per_batch: int = 4096
    seed: int = 0
    chat_template: str | None = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checked = {name: _checked(f"{_SETTING}.{name}", settings) for name, settings in (self.corpora or {}).items()}
        object.__setattr__(self, "corpora", checked)


def measure_drift(
    model: nn.Module, tokenizer: Any, config: DriftConfig, *, base: nn.Module | None = None, progress: bool = True
) -> dict[str, dict[str, Metric]]:
    """Drift of `model` (adapters on) from its base model, by corpus. base: None for `model` with its adapters off.

    Returns:
        corpus -> {"kl_base_tuned": {"tuned"}, "kl_tuned_base": {"tuned"}, "perplexity": {"base", "tuned",
        "difference"}, "perplexity_ratio": {"tuned"}}, the parts being Intervals; all but perplexity with their
        `by_item`.

    Raises:
        UserError: a corpus that cannot be read, or a model without a base model to switch back to.
    """
    pair = Pair(model, base)
    # All corpora are read before the first is measured: a wrong path is not worth the wait.
    corpora = {name: _tokenised(name, tokenizer, config) for name in config.corpora}
    drift = {}
    for name, documents in corpora.items():
        position = _POSITION[config.corpora[name].kind]
        with tqdm(total=len(documents), desc=f"drift on {name}", unit=" documents", disable=not progress) as bar:
            sums = _document_sums(pair, documents, position, config.tokens_per_batch, bar)
        drift[name] = _metrics(sums, config.seed, [document.input_ids for document in documents])
    return drift


def drift_on_answers(
    model: nn.Module,
    tokenizer: Any,
    turns: Sequence[tuple[str, str]],
    config: DriftConfig,
    *,
    base: nn.Module | None = None,
    max_tokens: int = 512,
    progress: bool = True,
) -> dict[str, Metric]:
    """As measure_drift, on (prompt, answer) turns that somebody has just written: the tuned model's own answers, where
    KL(tuned||base) is an estimate over what it says itself (Shenfeld et al., RL's Razor). The token that ends an
    answer counts too, so an empty one has a row. Of each turn the first max_tokens tokens count; those whose prompt
    alone is longer are left out. Nothing is returned where none is left."""
    pair = Pair(model, base)
    measured = [
        (_Document(ids[:max_tokens], roles[:max_tokens]), prompt)
        for (ids, roles), (prompt, _) in zip(_dialogues(tokenizer, config, turns), turns, strict=True)
        if int(Role.RESPONSE) in roles[1:max_tokens]
    ]
    if not measured:
        return {}
    documents = [document for document, _ in measured]
    with tqdm(total=len(documents), desc="drift on own answers", unit=" answers", disable=not progress) as bar:
        sums = _document_sums(pair, documents, _POSITION["dialogue"], config.tokens_per_batch, bar)
    # Two models are compared prompt by prompt: each answers in its own words.
    metrics = _metrics(sums, config.seed, [prompt for _, prompt in measured])
    # No perplexity: of an answer that was cut off nobody has written the token that ends it here.
    return {name: metrics[name] for name in ("kl_base_tuned", "kl_tuned_base")}


# ---- corpora -------------------------------------------------------------------------------------


def _checked(setting: str, settings: Any) -> CorpusConfig:
    """The settings of one corpus, or a UserError that names the one that is wrong."""
    if not isinstance(settings, CorpusConfig):
        names = set(settings) if isinstance(settings, Mapping) else set()
        if unknown := names - set(CorpusConfig.__dataclass_fields__):
            raise UserError(
                f"{setting}.{min(map(str, unknown))} is unknown: a corpus has kind, asset, path, limit and max_tokens."
            )
        if "kind" not in names:
            raise UserError(f"{setting} has no kind: set {setting}.kind to text or dialogue.")
        settings = CorpusConfig(**settings)
    if settings.kind not in _FIELDS:
        raise UserError(f"{setting}.kind={settings.kind} is unknown: set it to text or dialogue.")
    if (settings.asset is None) == (settings.path is None):
        raise UserError(f"{setting} needs a source: set either {setting}.path or {setting}.asset, and not both.")
    if settings.asset is not None and _ASSETS.get(settings.asset) != settings.kind:
        choice = ", ".join(f"{asset} ({kind})" for asset, kind in _ASSETS.items())
        raise UserError(
            f"{setting}.asset={settings.asset} is no packaged corpus of kind {settings.kind}: set it to one of "
            f"{choice}, or set {setting}.path to a JSON-lines file of your own."
        )
    if settings.limit is not None and settings.limit < 1:
        raise UserError(f"{setting}.limit={settings.limit} is not allowed: set a positive number or null.")
    if settings.max_tokens < 2:
        raise UserError(f"{setting}.max_tokens={settings.max_tokens} is not allowed: set it to 2 or more.")
    return settings


def _read(corpus: CorpusConfig, setting: str, seed: int, instructions: _Instructions) -> list[tuple[str, ...]]:
    """The sampled documents of a corpus: (text,) or (prompt, response). setting: its name in the configuration;
    instructions: samples the packaged ones."""
    if corpus.asset == "wikipedia-articles":
        return [(text,) for text in wikipedia_texts(corpus.limit, seed)]
    if corpus.asset == "alpaca-sample":
        return list(instructions(corpus.limit, seed))
    path, fields = Path(str(corpus.path)).expanduser(), _FIELDS[corpus.kind]
    setting = f"{setting}.path={corpus.path}"
    check_file(
        path, f"{setting} does not exist: set it to a JSON-lines file with {' and '.join(fields)} in every line."
    )
    documents = sample(records(path, fields, setting=setting), corpus.limit, seed)
    if not documents:
        raise UserError(f"{setting} is empty: set it to a JSON-lines file with {' and '.join(fields)} in every line.")
    return documents


# ---- tokens --------------------------------------------------------------------------------------


class _Document(NamedTuple):
    """input_ids, roles: [T]"""

    input_ids: list[int]
    roles: list[int]


def tokenised_corpus(
    tokenizer: Any, settings: Mapping[str, Any], setting: str, *, seed: int = 0, **chat: Any
) -> list[_Document]:
    """The documents of a corpus that a method needs, as (input_ids, roles); settings as of one in
    evaluation.drift.corpora, and their name in the configuration; chat: chat_template, template_arguments. Of the
    packaged instructions those that no shipped evaluation asks."""
    config = DriftConfig({}, seed=seed, **chat)
    return _documents(_checked(setting, settings), setting, tokenizer, config, unmeasured_instructions)


def _tokenised(name: str, tokenizer: Any, config: DriftConfig) -> list[_Document]:
    return _documents(config.corpora[name], f"{_SETTING}.{name}", tokenizer, config)


def _documents(
    corpus: CorpusConfig, setting: str, tokenizer: Any, config: DriftConfig,
    instructions: _Instructions = instruction_answers,
) -> list[_Document]:  # fmt: skip
    texts = _read(corpus, setting, config.seed, instructions)
    if corpus.kind == "text":
        # Special tokens as the tokenizer adds them to plain text: a model that begins with BOS expects it here too.
        encoded = tokenizer([text for (text,) in texts], return_attention_mask=False, verbose=False)["input_ids"]
        documents = [_Document(ids, [int(Role.DOCUMENT)] * len(ids)) for ids in encoded]
    else:
        documents = _dialogues(tokenizer, config, texts)
    cut = [_Document(ids[: corpus.max_tokens], roles[: corpus.max_tokens]) for ids, roles in documents]
    # A document counts if it has a row: a second token, and in a dialogue one of the response.
    needed = Role.DOCUMENT if corpus.kind == "text" else Role.RESPONSE
    kept = [document for document in cut if needed in document.roles[1:]]
    if len(kept) < len(cut):
        log.warning(
            "%s: %d of %d documents were left out, no token of them to be predicted lies within max_tokens=%d",
            setting, len(cut) - len(kept), len(cut), corpus.max_tokens,
        )  # fmt: skip
    if not kept:
        raise UserError(f"{setting} has no token to measure: raise its max_tokens={corpus.max_tokens}.")
    return kept


def _dialogues(tokenizer: Any, config: DriftConfig, turns: Sequence[tuple[str, ...]]) -> list[_Document]:
    """Prompts through the chat template, responses tokenised apart and ended as the model ends its own."""
    chat = ChatFormat(
        tokenizer, config.chat_template, config.template_arguments, setting="evaluation.drift.chat_template"
    )
    prompts = chat.encode([chat.prompt(chat.defuse(prompt)) for prompt, _ in turns])["input_ids"]
    responses = chat.encode([chat.defuse(response) for _, response in turns])["input_ids"]
    return [
        _Document(
            [*prompt, *response, *chat.end_ids],
            [int(Role.TEMPLATE)] * len(prompt) + [int(Role.RESPONSE)] * (len(response) + len(chat.end_ids)),
        )
        for prompt, response in zip(prompts, responses, strict=True)
    ]


# ---- measurement ---------------------------------------------------------------------------------


@torch.no_grad()
def _document_sums(
    pair: Pair, documents: list[_Document], position: Position, tokens_per_batch: int, bar: Any
) -> np.ndarray:
    """[5, n]: by document the sums over its counted rows of KL(base||tuned), KL(tuned||base), NLL of tuned, NLL of
    base, all in nats, and the number of the rows."""
    device = pair.device
    sums = np.zeros((5, len(documents)))
    for indices in length_batches([len(document.input_ids) for document in documents], tokens_per_batch):
        width = max(len(documents[i].input_ids) for i in indices)
        ids = torch.zeros(len(indices), width, dtype=torch.long)  # [B, T]
        roles = torch.full_like(ids, int(Role.PADDING))
        for row, i in enumerate(indices):
            length = len(documents[i].input_ids)
            ids[row, :length] = torch.as_tensor(documents[i].input_ids)
            roles[row, :length] = torch.as_tensor(documents[i].roles)
        counted = alignment_rows(roles, position)  # [B, T]
        owner = counted.nonzero()[:, 0]  # [N]
        targets = ids.roll(-1, dims=1)[counted].to(device)  # [N]
        ids, mask, counted = ids.to(device), (roles != Role.PADDING).to(device), counted.to(device)
        states = pair.hidden(ids, mask, counted)
        values = torch.stack(
            [
                pair.kl(*states, "kl_base_tuned"),
                pair.kl(*states, "kl_tuned_base"),
                *pair.nll(*states, targets),
            ]
        )  # [4, N]
        rows = torch.cat([values.cpu().double(), torch.ones(1, len(owner), dtype=torch.float64)])
        total = torch.zeros(5, len(indices), dtype=torch.float64).index_add_(1, owner, rows)
        sums[:, indices] = total.numpy()
        bar.update(len(indices))
    return sums


def _metrics(sums: np.ndarray, seed: int, asked: Sequence[Any]) -> dict[str, Metric]:
    """The metrics and their intervals from `_document_sums`. asked: what identifies each document."""
    kl_base_tuned, kl_tuned_base, nll_tuned, nll_base, tokens = sums
    surprise = pseudo_values(nll_tuned - nll_base, tokens)  # the logarithm of the perplexity ratio
    return {
        "kl_base_tuned": {
            "tuned": weighted_bootstrap(kl_base_tuned, tokens, seed=seed),
            **by_item(asked, pseudo_values(kl_base_tuned, tokens)),
        },
        "kl_tuned_base": {
            "tuned": weighted_bootstrap(kl_tuned_base, tokens, seed=seed),
            **by_item(asked, pseudo_values(kl_tuned_base, tokens)),
        },
        "perplexity": {
            "base": weighted_bootstrap(nll_base, tokens, transform=np.exp, seed=seed),
            "tuned": weighted_bootstrap(nll_tuned, tokens, transform=np.exp, seed=seed),
            "difference": paired_weighted_difference(nll_base, nll_tuned, tokens, transform=np.exp, seed=seed),
        },
        "perplexity_ratio": {
            "tuned": weighted_bootstrap(nll_tuned - nll_base, tokens, transform=np.exp, seed=seed),
            **by_item(asked, np.exp(surprise.mean()) * (1 + surprise - surprise.mean())),
        },
    }
