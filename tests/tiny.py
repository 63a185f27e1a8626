"""Tiny random models of every supported family, and a tiny tokenizer: no network, milliseconds each.

The weights are scaled so that logits are several units wide (a flat distribution would hide a forgotten scale or
soft-cap), every vector (norms, biases) is random, and Granite, Cohere and Gemma 2 have a head that does something
between the product and the softmax.
"""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

VOCAB = 97
HIDDEN = 32
TOKENIZER_VOCAB = 300  # vocab_size of a model that goes with tiny_tokenizer(): a few rows more than it has tokens

_GEMMA2: dict[str, Any] = {
    "final_logit_softcapping": 3.0,  # logits are about 3 wide: it bites
    "attn_logit_softcapping": 20.0,
    "query_pre_attn_scalar": 8,
    "sliding_window": 16,
}
# family -> (config class, settings beside the common ones)
_CONFIGS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": False, "head_dim": 8}),
    "mistral": (MistralConfig, {"sliding_window": 8, "tie_word_embeddings": False}),
    "gemma2": (Gemma2Config, {"head_dim": 8, **_GEMMA2}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}),
    "phi3": (Phi3Config, {"tie_word_embeddings": False}),
    "gpt_neox": (GPTNeoXConfig, {"tie_word_embeddings": False}),
    "olmo2": (Olmo2Config, {"tie_word_embeddings": False}),
    "granite": (
        GraniteConfig,
        {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    ),
    "cohere": (CohereConfig, {"logit_scale": 0.5, "tie_word_embeddings": True}),
    "phi": (PhiConfig, {"tie_word_embeddings": False, "partial_rotary_factor": 0.5}),  # its head has a bias
}
FAMILIES: tuple[str, ...] = tuple(_CONFIGS)
_HEAD_SCALE = {"granite": 4.0, "cohere": 2.0}  # what makes up for the scale, so that logits stay several units wide


def tiny_config(
    family: str = "llama", *, vocab_size: int = VOCAB, layers: int = 2, **settings: Any
) -> PretrainedConfig:
    """The configuration of a tiny model: hidden size 32, 4 heads, 2 key-value heads where the family has them."""
    kind, own = _CONFIGS[family]
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "gpt_neox":
        del common["num_key_value_heads"]
    return kind(**{**common, **own, **settings})


def tiny_model(
    family: str = "llama",
    *,
    lora: bool | dict[str, Any] = False,
    random_b: bool = True,
    vocab_size: int = VOCAB,
    layers: int = 2,
    seed: int = 0,
    **settings: Any,
) -> PreTrainedModel | PeftModel:
    """A random float32 model of `family` in eval mode; the same for the same arguments.

    Args:
        lora: True wraps it in a PeftModel with LoRA on all linear layers but the head (in train mode, as a trainer
            would use it); a dict gives LoraConfig's arguments.
        random_b: give LoRA's B random values, so that tuned and base model differ (KL of the order of 0.1 to 1).
        settings: further settings of the family's configuration.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            tiny_config(family, vocab_size=vocab_size, layers=layers, **settings), attn_implementation="eager"
        )
        randomise(model, family)
        model.eval()
        if not lora:
            return model
        return tiny_lora(model, **(lora if isinstance(lora, dict) else {}), random_b=random_b)


@torch.no_grad()
def randomise(model: nn.Module, family: str = "llama") -> None:
    """Weights that give logits several units wide; norms and biases random as well."""
    head = model.get_output_embeddings()
    for name, parameter in model.named_parameters():
        if parameter is head.weight:
            parameter.normal_(0, 0.6 * _HEAD_SCALE.get(family, 1.0))
        elif "embed" in name:
            parameter.normal_(0, 1)
        elif parameter.dim() > 1:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.3)
        else:  # a norm's weight: around 1, or around 0 where the family adds 1
            parameter.add_(0.2 * torch.randn_like(parameter))
            if "gemma" in family and "post_" in name:  # its embeddings are large: let the layers be heard
                parameter.add_(3.0)
    if head.bias is not None:
        head.bias.normal_(0, 1)


def lora_config(**settings: Any) -> LoraConfig:
    """LoRA of rank 4 on all linear layers but the head, without dropout unless asked."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings})


def tiny_lora(model: PreTrainedModel, *, random_b: bool = True, **settings: Any) -> PeftModel:
    """`model` wrapped in a PeftModel in train mode; settings as for LoraConfig."""
    wrapped = get_peft_model(model, lora_config(**settings))
    if random_b:
        randomise_b(wrapped)
    return wrapped.train()


@torch.no_grad()
def randomise_b(model: nn.Module, std: float = 0.1) -> None:
    """Give every LoRA B random values (they start at 0, where the tuned model is the base model)."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            parameter.normal_(0, std)


def random_batch(
    lengths: tuple[int, ...] = (9, 14, 6),
    responses: tuple[int, ...] = (3, 5, 2),
    *,
    vocab_size: int = VOCAB,
    side: str = "right",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask, labels, all [B, T]: random sequences whose last `responses` tokens are the response.

    The same seed gives the same sequences on either padding side; padded ids are 0, which is a token like any other.
    """
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (length, response) in enumerate(zip(lengths, responses, strict=True)):
        tokens = torch.randint(1, vocab_size, (length,), generator=generator)
        start = width - length if side == "left" else 0
        ids[i, start : start + length] = tokens
        mask[i, start : start + length] = 1
        if response:
            labels[i, start + length - response : start + length] = tokens[-response:]
    return ids, mask, labels


SPECIAL_TOKENS = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_MERGES = (
    "Ġ t", "h e", "Ġt he", "i n", "e r", "o n", "Ġ a", "Ġ o", "Ġo f", "a n", "Ġa n", "Ġan d", "r e", "Ġ s", "Ġ i",
    "Ġi s", "e n", "a t", "o r", "Ġ w", "i t", "Ġ ?", "Ġ c", "Ġ 1", "in g",
)  # fmt: skip


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of all 256 bytes, a few merges and ChatML's special tokens: any text, offsets, chat template.

    <|pad|> is 0, the end of a turn <|im_end|> (the eos token) is 2. It has fewer tokens than TOKENIZER_VOCAB.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    merges = [tuple(merge.split(" ")) for merge in _MERGES]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|endoftext|>"],
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def save_tiny(directory: str | Path, family: str = "llama", **arguments: Any) -> Path:
    """Save a tiny model (tiny_model's arguments) and the tiny tokenizer as a model folder; returns the folder."""
    directory = Path(directory)
    arguments.setdefault("vocab_size", TOKENIZER_VOCAB)
    tokenizer = tiny_tokenizer()
    model = tiny_model(family, **arguments)
    for config in (model.config, model.generation_config):
        config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        config.bos_token_id = None
    model.save_pretrained(directory, safe_serialization=True)
    tokenizer.save_pretrained(directory)
    return directory
