"""Greedy answers from a causal language model, in batches.

Always argmax, whatever the model's own generation settings say: a sampled answer, or one steered by a repetition
penalty, would measure those settings and not the weights. In float32 an answer does not depend on what else is in
its batch; in bfloat16 the padding moves roundings and can flip a close call, so compare models only in one precision.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from selfaug.evaluation.roomy_cache import roomy_cache

# More sequences bring little on any machine and cost memory for their caches.
MAX_SEQUENCES = 128
# Every so many new tokens the answers that have ended leave the batch; the others need not wait for the longest.
STRIDE = 32


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    tokens_per_batch: int = 16384,
    progress: bool = True,
    description: str = "generating",
    also_stop: Collection[int] = (),
    until: Sequence[str] = (),
    strip: bool = True,
    if_cut: str | None = None,
) -> list[str]:
    """The greedy continuation of each prompt as text, in the order of `prompts`.

    Args:
        model: a transformers causal language model or a PeftModel around one; inside `adapters_off(model)` it is the
            base model that answers. Its training or eval mode is left as it was found.
        prompts: token ids, chat template and all; at least one token each.
        max_new_tokens: where an answer is cut that does not end by itself, in tokens.
        tokens_per_batch: sequences times (longest prompt + max_new_tokens) of one batch, at most; a single prompt that
            is longer is a batch of its own.
        also_stop: tokens that end an answer beside the tokenizer's and the model's own.
        until: texts that end an answer, which is cut before the first of them.
        strip: take off the white space around an answer.
        if_cut: stands for an answer that did not end by itself; None: as far as it came.

    Returns:
        The texts without special tokens.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if empty := [i for i, prompt in enumerate(prompts) if not len(prompt)]:
        raise ValueError(f"prompt {empty[0]} has no tokens")
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    device = next(model.parameters()).device
    stops = list(dict.fromkeys([*stop_ids(inner, tokenizer), *also_stop]))
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=filler,
        eos_token_id=stops or None,
        use_cache=True,
    )
    answers = [""] * len(prompts)
    lengths = [len(prompt) for prompt in prompts]
    with (
        ready_to_generate(model, settings),
        tqdm(total=len(prompts), desc=description, unit=" answers", disable=not progress) as bar,
    ):
        for indices in length_batches(lengths, tokens_per_batch, extra=max_new_tokens):
            width = max(lengths[i] for i in indices)
            # Padding stands on the left, so that every prompt's next token is the last column.
            ids = torch.full((len(indices), width), filler, dtype=torch.long)  # [B, T]
            mask = torch.zeros_like(ids)
            for row, i in enumerate(indices):
                ids[row, width - lengths[i] :] = torch.as_tensor(prompts[i])
                mask[row, width - lengths[i] :] = 1

            def ended(tokens: list[int]) -> bool:
                text = _text(tokenizer, tokens, stops) if until else ""
                return any(token in stops for token in tokens) or any(end in text for end in until)

            for row, tokens in grow(model, settings, ids.to(device), mask.to(device), max_new_tokens, ended):
                text = _text(tokenizer, tokens, stops)
                text = text[: min((at for end in until if (at := text.find(end)) >= 0), default=len(text))]
                if if_cut is not None and not ended(tokens):
                    text = if_cut
                answers[indices[row]] = text.strip() if strip else text
                bar.update()
    return answers


def grow(
    model: Any,
    settings: GenerationConfig,
    ids: torch.Tensor,
    mask: torch.Tensor,
    most: int,
    ended: Callable[[list[int]], bool],
    choose: Callable[[list[int], int, torch.Tensor], torch.Tensor] | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """(row, its new tokens) of a left-padded batch [B, T], as soon as the row has `ended` or has `most` tokens.

    choose: takes the rows that are still there [R], how many new tokens they have, and their logits [R, V]; returns
    the next token of each [R]. None: the likeliest one.
    """
    rows = list(range(len(ids)))
    width = ids.shape[1]
    cache = roomy_cache(settings_of(model))
    while rows:
        settings.max_new_tokens = min(STRIDE, width + most - ids.shape[1])
        out = model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=cache,
            logits_processor=None if choose is None else LogitsProcessorList([_Chosen(choose, rows, width)]),
        )  # fmt: skip
        new = out[:, width:].tolist()
        last = out.shape[1] - ids.shape[1] < settings.max_new_tokens or len(new[0]) >= most
        done = [last or ended(tokens) for tokens in new]
        yield from ((row, tokens) for row, tokens, end in zip(rows, new, done, strict=True) if end)
        kept = [i for i, end in enumerate(done) if not end]
        rows = [rows[i] for i in kept]
        mask = torch.nn.functional.pad(mask, (0, out.shape[1] - mask.shape[1]), value=1)[kept]
        ids = out[kept]
        if rows and len(kept) < len(done):
            keep_rows(cache, torch.as_tensor(kept, device=out.device))


class _Chosen(LogitsProcessor):
    """Leaves argmax, which transformers takes, no choice but the token that `choose` takes."""

    def __init__(self, choose: Callable[[list[int], int, torch.Tensor], torch.Tensor], rows: list[int], width: int):
        self.choose, self.rows, self.width = choose, rows, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens = self.choose(self.rows, input_ids.shape[1] - self.width, scores)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def keep_rows(cache: Any, rows: torch.Tensor) -> None:
    """In place: the sequences `rows` [R] of a cache, in this order; one may be there several times."""
    cache.reorder_cache(rows)  # of all kinds of layers, unlike batch_select_indices


def settings_of(model: nn.Module) -> Any:
    """The configuration of the text decoder: which kinds of cache its layers need."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner.config.get_text_config(decoder=True)


def stop_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's eos and those of the model's generation settings."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])]
    return list(dict.fromkeys(int(token) for token in found if token is not None))


def length_batches(lengths: Sequence[int], tokens_per_batch: int, *, extra: int = 0) -> Iterator[list[int]]:
    """Indices in batches of similar length, the longest first, so that what does not fit into memory fails at once.

    A batch holds at most MAX_SEQUENCES, and sequences * (longest + extra) <= tokens_per_batch unless it is only one.
    """
    batch: list[int] = []
    width = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) == MAX_SEQUENCES or (len(batch) + 1) * width > tokens_per_batch):
            yield batch
            batch = []
        if not batch:
            width = lengths[i] + extra
        batch.append(i)
    if batch:
        yield batch


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside (no dropout); every module has its own mode back afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def ready_to_generate(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Inside, model.generate() does what `settings` say and nothing else, without gradients, as fast as it can."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    with (
        torch.inference_mode(),
        evaluating(model),
        _settings(inner, settings),
        _contiguous_head(inner),
        _positions_in_autocast(inner),
    ):
        yield


@contextmanager
def _settings(model: nn.Module, settings: GenerationConfig) -> Iterator[None]:
    """`settings` in place of the model's own. Passed to generate() they would be merged with the model's, whose
    repetition penalty or top_p would then apply, or warn, wherever ours leave something open."""
    own = model.generation_config
    model.generation_config = settings  # type: ignore[assignment]
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _contiguous_head(model: nn.Module) -> Iterator[None]:
    """Hand the head a copy of its input: transformers gives it the last position as a view with gaps, for which torch
    on the CPU copies the whole head once per sequence (in bfloat16 5 s per batch of 16 instead of 0.01 s)."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _positions_in_autocast(model: nn.Module) -> Iterator[None]:
    """Under autocast, rotary tables in its dtype. In float32 they would make the keys float32, and every new token
    would convert the whole cache (with 64 answers of SmolLM2 1.4 times as slow)."""
    device = next(model.parameters()).device.type
    hooks = []
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)

        def cast(module: nn.Module, inputs: Any, tables: Any) -> Any:
            return tuple(t.to(dtype) for t in tables) if isinstance(tables, tuple) else tables

        rotary = [module for name, module in model.named_modules() if name.endswith("rotary_emb")]
        hooks = [module.register_forward_hook(cast) for module in rotary]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _text(tokenizer: Any, tokens: list[int], stops: list[int]) -> str:
    """The answer up to its end; what follows in the row is padding, which need not be a special token."""
    end = next((position for position, token in enumerate(tokens) if token in stops), len(tokens))
    return tokenizer.decode(tokens[:end], skip_special_tokens=True)
