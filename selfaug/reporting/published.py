"""The numbers of the SelfAug paper (arXiv 2509.03934), as printed, to stand beside ours and never among them.

They are of another model (Qwen2.5-7B-Instruct unless said otherwise), other data and another judge, each the best of
five runs, without a spread (appendix A.2). Scores in percent. Only rows that a run of ours can match are here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from selfaug.reporting.labels import constant, is_plain, position_of

SOURCE = "SelfAug, arXiv 2509.03934"
CAUTION = (
    "As printed in the paper: another model, other data and another judge (GPT-4o; ours matches words), each number "
    "the best of five runs, without a spread; compare orders of rows, not values."
)


@dataclass(frozen=True, slots=True)
class Published:
    """One row of one of the paper's tables. scores: by the key of our measure."""

    table: str
    row: str
    setting: str
    scores: dict[str, float]


_COLUMNS = ("task/crag_score", "retention/humaneval", "retention/ifeval", "retention/mmlu", "retention/arc_challenge",
            "retention/hellaswag")  # fmt: skip


def _of_table_1(data: str, row: str, *scores: float) -> Published:
    return Published("Table 1", row, f"Qwen2.5-7B-Instruct on {data}", dict(zip(_COLUMNS, scores, strict=True)))


# (data, our method) -> the paper's row
TABLE_1 = {
    ("crag", "base"): _of_table_1("CRAG", "base model", -13.11, 79.88, 71.90, 74.23, 86.78, 85.48),
    ("crag", "lora"): _of_table_1("CRAG", "LoRA", 8.76, 78.05, 48.80, 73.72, 88.47, 84.55),
    ("crag", "sft"): _of_table_1("CRAG", "SFT", 9.59, 76.83, 45.10, 72.24, 85.08, 83.72),
    ("crag", "magpie"): _of_table_1("CRAG", "+MAGPIE", 6.22, 78.05, 58.04, 73.56, 88.47, 83.68),
    ("crag", "sdft"): _of_table_1("CRAG", "+SDFT", 4.34, 76.83, 54.71, 73.29, 89.83, 82.54),
    ("crag", "orthogonal"): _of_table_1("CRAG", "+Orthogonal", 2.40, 79.88, 63.77, 74.45, 89.15, 85.11),
    ("crag", "selfaug"): _of_table_1("CRAG", "SelfAug", 10.94, 79.27, 62.11, 74.04, 90.17, 83.73),
    ("rag_instruct", "base"): _of_table_1("RAG-Instruct", "base model", -13.11, 79.88, 71.90, 74.23, 86.78, 85.48),
    ("rag_instruct", "lora"): _of_table_1("RAG-Instruct", "LoRA", -7.19, 76.83, 63.77, 73.36, 90.17, 83.45),
    ("rag_instruct", "sft"): _of_table_1("RAG-Instruct", "SFT", -13.63, 46.34, 55.64, 73.61, 90.85, 82.21),
    ("rag_instruct", "magpie"): _of_table_1("RAG-Instruct", "+MAGPIE", -11.16, 79.88, 64.32, 72.96, 86.78, 82.36),
    ("rag_instruct", "sdft"): _of_table_1("RAG-Instruct", "+SDFT", -17.00, 76.22, 66.73, 73.28, 89.49, 82.98),
    ("rag_instruct", "orthogonal"): _of_table_1(
        "RAG-Instruct", "+Orthogonal", -11.99, 79.27, 73.20, 74.61, 88.14, 85.82),
    ("rag_instruct", "selfaug"): _of_table_1("RAG-Instruct", "SelfAug", -6.22, 79.27, 68.02, 73.66, 92.20, 84.93),
}  # fmt: skip

# Where the constraint is applied; IFEval after training on CRAG. Our position -> the paper's row. The paper has no row
# for output logits, and does not say which loss the hidden states had.
TABLE_2 = {
    position: Published("Table 2", row, "Qwen2.5-7B-Instruct on CRAG", {"retention/ifeval": score})
    for position, (row, score) in {
        "none": ("LoRA", 48.80), "attention_q": ("Attention Q", 47.13), "attention_k": ("Attention K", 50.09),
        "attention_v": ("Attention V", 48.24), "attention_o": ("Attention O", 47.50),
        "attention_all": ("Attention All", 50.46), "feed_forward": ("FFN", 51.02), "all_layers": ("All layers", 49.35),
        "input_logits": ("SelfAug (input logits)", 62.11),
    }.items()
}  # fmt: skip

# Thousands of tokens -> IFEval of LoRA and of SelfAug.
TABLE_3 = {
    length: {
        name: Published("Table 3", f"{name}, {length}K", "Qwen2.5-7B-Instruct on CRAG", {"retention/ifeval": score})
        for name, score in (("LoRA", lora), ("SelfAug", selfaug))
    }
    for length, lora, selfaug in ((2, 58.23, 63.03), (4, 56.19, 62.48), (6, 52.87, 55.82), (8, 50.28, 57.67))
}

# Size of Qwen2.5 -> CRAG score and IFEval of LoRA and of SelfAug. SelfAug's CRAG score at 7B is 10.94 in Table 1.
TABLE_4 = {
    size: {
        name: Published("Table 4", f"{name}, {size}", f"Qwen2.5-{size}-Instruct on CRAG",
                        {"task/crag_score": crag, "retention/ifeval": ifeval})
        for name, crag, ifeval in (("LoRA", *lora), ("SelfAug", *selfaug))
    }
    for size, lora, selfaug in (
        ("3B", (6.37, 49.54), (7.19, 57.86)), ("7B", (8.76, 48.80), (11.24, 62.11)),
        ("14B", (14.31, 45.84), (15.81, 67.47)), ("32B", (17.98, 60.81), (19.10, 75.60)),
        ("72B", (19.92, 52.87), (19.93, 62.85)),
    )
}  # fmt: skip


def published_for(configs: Sequence[dict[str, Any]]) -> list[Published | None]:
    """For each row's configuration the paper's row, None where it has none.

    Which table is meant shows in what differs between the rows: the position of one method, the context length, the
    model's size, or the method.
    """
    others = [config for config in configs if not is_plain(config)]
    positions = {position_of(config) for config in others}
    methods = {(config.get("method") or {}).get("name") for config in others}
    contexts = {_thousands(config) for config in configs}
    sizes = {_size(config) for config in configs}
    if len(positions) > 1 and len(methods) == 1:
        return [TABLE_2.get(_position(config) or "") for config in configs]
    names = [_name(config) for config in configs]
    if len(contexts) > 1:
        return [TABLE_3.get(_thousands(c) or 0, {}).get(name or "") for c, name in zip(configs, names, strict=True)]
    if len(sizes) > 1:
        return [TABLE_4.get(_size(c) or "", {}).get(name or "") for c, name in zip(configs, names, strict=True)]
    return [
        TABLE_1.get((_data(c), name.lower() if name else _baseline(c))) for c, name in zip(configs, names, strict=True)
    ]


def published_base(configs: Sequence[dict[str, Any]]) -> Published | None:
    """The paper's base model, of the data set that all the rows share."""
    data = {_data(config) for config in configs}
    return TABLE_1[data.pop(), "base"] if len(data) == 1 else None


def _name(config: dict[str, Any]) -> str | None:
    """LoRA or SelfAug as the paper has them; None for anything else."""
    if is_plain(config):
        return "LoRA"
    return "SelfAug" if _position(config) == "input_logits" else None


def _baseline(config: dict[str, Any]) -> str:
    """The name of one of the paper's other methods, which our file of that name stands for."""
    name = str((config.get("method") or {}).get("name"))
    return name if name in ("sft", "magpie", "sdft", "orthogonal") else ""


def _position(config: dict[str, Any]) -> str | None:
    """The position, if the rest is as in the paper's rows: the input's rows, nothing sampled, the code's direction."""
    terms = (config.get("method") or {}).get("terms") or {}
    for term in terms.values() if isinstance(terms, dict) else ():
        usual = {"tokens": "input", "divergence": "kl_base_tuned", "share": 1.0, "layers": None, "mask_target": False}
        if not isinstance(term, dict) or not constant(term):
            return None
        if any(term.get(key, value) != value for key, value in usual.items()):
            return None
    return position_of(config)


def _data(config: dict[str, Any]) -> str:
    name = str((config.get("data") or {}).get("name", ""))
    return "rag_instruct" if name.startswith("rag_instruct") else "crag"


def _thousands(config: dict[str, Any]) -> int | None:
    """The context length in thousands of tokens, 4000 and 4096 alike; a negative number for lengths that the paper
    has not, None where the data has none."""
    tokens = (config.get("data") or {}).get("context_tokens")
    if not isinstance(tokens, int) or isinstance(tokens, bool):
        return None
    return next((k for k in (2, 4, 6, 8) if tokens in (1000 * k, 1024 * k)), -tokens)


def _size(config: dict[str, Any]) -> str | None:
    """3B to 72B of Qwen2.5, else the model's label."""
    label = str((config.get("model") or {}).get("label", ""))
    return next((size for size in TABLE_4 if label == f"qwen2_5_{size.lower()}"), label or None)
