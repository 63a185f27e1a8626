"""A model of ours as lm-eval sees it (lm_eval.api.model.LM).

Of a multiple-choice question lm-eval asks for the log-likelihood of every choice after the same context. Here the
context runs through the model once, its keys and values are shared by the choices, and logits are taken of the rows
that predict a choice's tokens and of no others, without autocast and summed in float32 at least.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache

from selfaug.data.chat import ChatFormat
from selfaug.errors import UserError
from selfaug.evaluation.generation import evaluating, generate, keep_rows, settings_of
from selfaug.evaluation.retention.benchmarks import GENERATION
from selfaug.model.decoder import Decoder

_ROWS_AT_ONCE = 256  # whose logits [rows, V] are held together
# Sharing a context takes a second pass: it must save this share of the tokens. And batches that have enough tokens to
# be fast are kept free of padding.
_WORTH_SHARING, _ENOUGH_TOKENS, _LEAST_REAL = 0.3, 1024, 0.8
_UNLIMITED = 1 << 20  # tokens, for a model whose configuration names no limit


class Scored(NamedTuple):
    """Of one continuation: its log-likelihood in nats, and whether every token of it is the most likely one."""

    log_likelihood: float
    greedy: bool


class _Context(NamedTuple):
    """A context and the continuations [(number of the request, tokens)] that are asked for after it."""

    tokens: list[int]
    continuations: list[tuple[int, list[int]]]


class RetentionLM(TemplateLM):
    """lm-eval's view of `model`, in whatever state it is (adapters on or off).

    Args:
        model: a transformers causal language model or a PeftModel around one.
        chat: its chat template, for benchmarks that are asked as dialogues.
        tokens_per_batch: tokens of one forward pass, padding included.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        chat: ChatFormat | None = None,
        *,
        tokens_per_batch: int = 8192,
        progress: bool = True,
    ):
        super().__init__()
        self.model, self.tokenizer, self.chat = model, tokenizer, chat
        self.tokens_per_batch, self.progress = tokens_per_batch, progress
        self.description = ""  # of the progress bar
        self._decoder = Decoder(model)
        self._device: torch.device = next(model.parameters()).device
        self.max_length = int(getattr(settings_of(model), "max_position_embeddings", None) or _UNLIMITED)

    # ---- text and tokens -------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """As lm-eval's own backend: with the tokenizer's bos, if it has that habit and the text none of its own."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        assert self.chat is not None  # the harness has checked it
        return self.chat.render(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # ---- log-likelihoods -------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(list(requests), disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        raise UserError("evaluation.retention: benchmarks of whole-text perplexity are not supported, choose others.")

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        """requests: (texts, context tokens, continuation tokens) each."""
        shared: dict[tuple[int, ...], _Context] = {}
        for number, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise UserError(
                    f"A choice of {len(continuation)} tokens does not fit a model of {self.max_length}: leave its "
                    "benchmark out of evaluation.retention.benchmarks."
                )
            # What is too long loses its beginning, as in lm-eval's own backend.
            context = context[max(len(context) + len(continuation) - self.max_length - 1, 0) :]
            entry = shared.setdefault(tuple(context), _Context(list(context), []))
            entry.continuations.append((number, list(continuation)))
        found: list[Scored] = [Scored(0.0, False)] * len(requests)
        with (
            torch.inference_mode(),
            evaluating(self.model),
            tqdm(total=len(requests), desc=self.description, unit=" choices", disable=not self.progress) as bar,
        ):
            asked = [one for context in shared.values() for one in _asked(context)]
            for batch in _batches(asked, self.tokens_per_batch):
                numbers, hidden, targets, lengths = self._states(batch)
                for number, scored in zip(numbers, self._scores(hidden, targets, lengths), strict=True):
                    found[number] = scored
                bar.update(len(numbers))
        return [(scored.log_likelihood, scored.greedy) for scored in found]

    def _states(self, batch: list["_Asked"]) -> tuple[list[int], Tensor, Tensor, list[int]]:
        """Numbers of the requests [R]; hidden states [N, d] and the tokens they are to predict [N], the rows of one
        request after the other; and how many each has [R]."""
        owner = torch.tensor([i for i, asked in enumerate(batch) for _ in asked.context.continuations])  # [R]
        continuations = [entry for asked in batch for entry in asked.context.continuations]
        tails = [
            tokens[:-1] if asked.tail is None else [] for asked in batch for _, tokens in asked.context.continuations
        ]
        ids, mask = _padded([asked.prefix for asked in batch], self._device, left=True)  # [B, T]
        longest = max(map(len, tails))
        cache = DynamicCache(config=settings_of(self.model)) if longest else None
        states = self._body(ids, mask, cache)  # [B, T, d]
        after = None
        if cache is not None:
            keep_rows(cache, owner.to(self._device))
            more, more_mask = _padded(tails, self._device, left=False)  # [R, C]
            after = self._body(more, torch.cat([mask[owner.to(self._device)], more_mask], 1), cache)  # [R, C, d]
        rows, targets, lengths = [], [], []
        for r, (_, tokens) in enumerate(continuations):
            asked = batch[int(owner[r])]
            if asked.tail is not None:  # the only one of its context, in one piece with it
                rows.append(states[int(owner[r]), -len(tokens) :])
            else:
                rows.append(states[int(owner[r]), -1:])
                if after is not None:
                    rows.append(after[r, : len(tokens) - 1])
            targets += tokens
            lengths.append(len(tokens))
        return [number for number, _ in continuations], torch.cat(rows), torch.tensor(targets), lengths

    def _body(self, ids: Tensor, mask: Tensor, cache: DynamicCache | None) -> Tensor:
        """Last hidden states of `ids` [B, T], which follow what is in the cache; mask [B, past + T]."""
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        return self._decoder.body(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state  # fmt: skip

    def _scores(self, hidden: Tensor, targets: Tensor, lengths: list[int]) -> Iterator[Scored]:
        """One for each request, whose rows follow each other in hidden [N, d] and targets [N]."""
        weight = self._decoder.head.arguments()["weight"]
        likelihoods, greedy = [], []
        with torch.autocast(self._device.type, enabled=False):
            for start in range(0, len(hidden), _ROWS_AT_ONCE):
                rows = slice(start, start + _ROWS_AT_ONCE)
                logits = self._decoder.head.logits(hidden[rows].to(weight.dtype))  # [n, V]
                wanted = targets[rows].to(self._device)
                chosen = logits.gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
                likelihoods.append((chosen - logits.logsumexp(-1)).double().cpu())
                greedy.append((logits.argmax(-1) == wanted).cpu())
        for values, hits in zip(torch.cat(likelihoods).split(lengths), torch.cat(greedy).split(lengths), strict=True):
            yield Scored(float(values.sum()), bool(hits.all()))

    # ---- answers ---------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        alike: dict[tuple[Any, ...], list[int]] = {}
        for number, request in enumerate(requests):
            settings = request.args[1]
            if settings.get("do_sample") or settings.get("temperature"):
                raise UserError("evaluation.retention: only greedy answers are supported, choose another benchmark.")
            until = settings.get("until") or []
            limit = int(settings["max_gen_toks"])  # the harness has set it
            key = (tuple([until] if isinstance(until, str) else until), limit)
            alike.setdefault(key, []).append(number)
        for (until, limit), numbers in alike.items():
            room = max(self.max_length - limit, 1)
            prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
            texts = generate(
                self.model, self.tokenizer, prompts, max_new_tokens=limit,
                tokens_per_batch=GENERATION * self.tokens_per_batch,
                progress=self.progress, description=self.description, until=[end for end in until if end], strip=False,
                also_stop=self.chat.end_ids[-1:] if self.chat else (),
            )  # fmt: skip
            for number, text in zip(numbers, texts, strict=True):
                answers[number] = text
        return answers


class _Asked(NamedTuple):
    """A context as it runs through the model. tail: of an only continuation the tokens that run with it, else None."""

    context: _Context
    prefix: list[int]
    tail: list[int] | None

    @property
    def width(self) -> int:
        """Tokens of the longest continuation in a second pass; its last token needs none."""
        return 0 if self.tail is not None else max(len(tokens) - 1 for _, tokens in self.context.continuations)


def _asked(context: _Context) -> list[_Asked]:
    """The context once for all its continuations, or, where that saves little, with each of them."""
    tails = [len(tokens) - 1 for _, tokens in context.continuations]
    saved = len(context.tokens) * (len(tails) - 1)
    if len(tails) > 1 and (saved > _WORTH_SHARING * (len(context.tokens) + sum(tails)) or not any(tails)):
        return [_Asked(context, context.tokens, None)]
    one_each = [_Context(context.tokens, [one]) for one in context.continuations]
    return [_Asked(one, one.tokens + (tail := one.continuations[0][1][:-1]), tail) for one in one_each]


def _batches(asked: list[_Asked], tokens: int) -> Iterator[list[_Asked]]:
    """Of similar length, at least one each, so that with padding they take at most so many tokens. A batch that is
    large enough to be fast takes no more in if they would be padded much."""

    def order(one: _Asked) -> tuple[Any, ...]:
        # Those with and without a second pass apart, or the few that need one would make it for all. The second pass
        # pads all continuations to the longest: they are sorted by their own length first, in steps of a third.
        return one.tail is None, -round(math.log(1 + one.width) / math.log(4 / 3)), -len(one.prefix), one.prefix

    batch: list[_Asked] = []
    size = _Size()
    for one in sorted(asked, key=order):
        more = size.with_(one)
        padded = size.tokens >= _ENOUGH_TOKENS and more.real < _LEAST_REAL * more.tokens
        if batch and ((batch[0].tail is None) != (one.tail is None) or more.tokens > tokens or padded):
            yield batch
            batch, more = [], _Size().with_(one)
        batch.append(one)
        size = more
    if batch:
        yield batch


class _Size(NamedTuple):
    """Of a batch: contexts, their longest, the continuations of a second pass, and their longest."""

    contexts: int = 0
    prefix: int = 0
    continuations: int = 0
    width: int = 0
    real: int = 0  # tokens that are no padding

    def with_(self, one: _Asked) -> "_Size":
        tails = [len(tokens) - 1 for _, tokens in one.context.continuations]
        return _Size(
            self.contexts + 1,
            max(self.prefix, len(one.prefix)),
            self.continuations + (len(tails) if one.width else 0),
            max(self.width, one.width),
            self.real + len(one.prefix) + (len(tails) * len(one.prefix) + sum(tails) if one.width else 0),
        )

    @property
    def tokens(self) -> int:
        """What is held: the contexts, and for each continuation a copy of its context and its own tokens."""
        return self.contexts * self.prefix + self.continuations * (self.prefix + self.width)


def _padded(rows: list[list[int]], device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """Tokens and mask, both [B, T]."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, where], mask[i, where] = torch.tensor(row, dtype=torch.long), 1
    return ids.to(device), mask.to(device)
