"""Models for the step benchmark: a real one by name, or the shape of a known one with random weights."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, PretrainedConfig, Qwen2Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from selfaug.assets import asset_path
from selfaug.data.packaged import wikipedia_texts
from selfaug.model.load import add_adapter, load_base, locate

RANDOM = "random:"
_LONG = 65_536  # max_position_embeddings: none of them is asked how well it does there


def _qwen2(hidden: int, inner: int, layers: int, heads: int, tied: bool = True) -> PretrainedConfig:
    return Qwen2Config(
        vocab_size=151_936, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=2, max_position_embeddings=_LONG, tie_word_embeddings=tied,
    )  # fmt: skip


def _llama(vocabulary: int, hidden: int, inner: int, layers: int, heads: int, groups: int) -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=_LONG, tie_word_embeddings=True,
    )  # fmt: skip


SHAPES: dict[str, PretrainedConfig] = {
    "tiny": _llama(512, 32, 64, 2, 4, 2),
    "two-layers": _llama(49_152, 64, 128, 2, 2, 1),
    "smollm2-135m": _llama(49_152, 576, 1536, 30, 9, 3),
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12),
}


def model_folder(name: str, work: Path) -> str:
    """What load_base takes: the name itself, or a folder below `work` with random weights of that shape."""
    if not name.startswith(RANDOM):
        return name
    shape = name.removeprefix(RANDOM)
    if shape not in SHAPES:
        raise SystemExit(f"--model {name} is unknown: set it to {RANDOM} and one of {', '.join(SHAPES)}.")
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp(dir=work))
    AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.bfloat16).save_pretrained(folder)
    return str(folder)


def adapted(folder: str, device: str, rank: int = 16) -> PeftModel:
    """The model with a fresh LoRA on all linear layers, as the packaged configuration trains it under bf16-mixed. Its B
    is not 0, as it is after the first steps: a KL of exactly 0 might be cheaper than another."""
    base = load_base(folder, dtype="auto", mixed=True)
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = add_adapter(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.002)
    return model.to(device)


def contexts(model: str, vocabulary: int, examples: int, length: int) -> Tensor:
    """[examples, length] tokens: Wikipedia articles for a packaged model, else random."""
    wanted = examples * length
    if model.startswith(RANDOM):
        return torch.randint(5, vocabulary, (examples, length), generator=torch.Generator().manual_seed(0))
    tokenizer: Any = AutoTokenizer.from_pretrained(locate(model))
    asset_path("wikipedia-articles")
    ids: list[int] = []
    for text in wikipedia_texts():
        ids += tokenizer(text, verbose=False)["input_ids"]
        if len(ids) >= wanted:
            break
    else:
        ids *= -(-wanted // len(ids))
    return torch.tensor(ids[:wanted]).view(examples, length)
