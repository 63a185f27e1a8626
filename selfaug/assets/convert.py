"""GGUF -> a model directory that `from_pretrained` loads in a second: float32 safetensors, tokenizer, chat template.

Reading the GGUF takes about 20 s and 1.2 GB, so it is done once, when the asset is fetched. torch and transformers
are imported inside the functions: the rest of `selfaug.assets` does without them.
"""

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from selfaug.errors import UserError

CONTEXT_LENGTH = 8192  # of SmolLM2; the GGUF's tokenizer leaves model_max_length unset
PROBE = "\n\n1."
PROBE_TOKENS = ["ĊĊ", "1", "."]


def gguf_to_safetensors(gguf: Path, out: Path) -> int:
    """Writes the model of the GGUF file to `out` and returns its number of parameters."""
    import torch

    # disable=None: no bar where stderr is not a terminal.
    with tqdm(total=3, desc="converting: tokenizer", unit="step", disable=None) as bar:
        _convert_tokenizer(gguf, out)
        bar.update()
        bar.set_description("converting: weights")
        # A run that happens to fetch the model must draw the same random numbers as one that finds it there.
        with torch.random.fork_rng():
            parameters = _convert_model(gguf, out)
        bar.update()
        bar.set_description("converting: check")
        check_model(out)
        bar.update()
    return parameters


def _convert_tokenizer(gguf: Path, out: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers drops the digit splitting of the "smollm" pre-tokenizer: "\n\n1." would lose its double newline.
    # With these two steps the tokens equal llama.cpp's.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.model_max_length = CONTEXT_LENGTH
    tokenizer.save_pretrained(out)


def _convert_model(gguf: Path, out: Path) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True, **_dequantize()
    )
    model.save_pretrained(out)
    for weights in out.glob("*.safetensors"):
        weights.chmod(0o644)  # safetensors writes 0600; a cache may be shared by a group
    return model.num_parameters()


def _dequantize() -> dict[str, Any]:
    """Asks for plain float weights. Without it the model counts as quantised and cannot be saved or trained."""
    try:
        from transformers import GgufConfig
    except ImportError:  # older transformers always dequantise
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def check_model(out: Path) -> None:
    """Reloads what was written: the digit fix must survive, and the model must count as an ordinary one."""
    import transformers

    tokens = transformers.AutoTokenizer.from_pretrained(out).tokenize(PROBE)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    if tokens != PROBE_TOKENS or "quantization_config" in config:
        raise UserError(
            f"transformers {transformers.__version__} does not convert the packaged model rightly; "
            "install a version that pyproject.toml names and run again."
        )
