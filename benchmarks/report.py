"""The report on many runs: how long it takes, and how large its page is.

Run as: python -m benchmarks.report [--runs 200]

The runs are made up: settings as of a sweep over positions, alphas and three seeds, curves of 200 points, one example
of 600 tokens each. The first call of a process also loads matplotlib, as the command `python -m selfaug.report` does.
"""

import copy
import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import common
from benchmarks.common import Column, value
from selfaug.reporting.results import Results, write_results

COLUMNS = (
    Column("runs", value("runs")),
    Column("rows", value("rows")),
    Column("read, s", value("read_seconds", "{:.2f}")),
    Column("all of it, s", value("seconds", "{:.2f}")),
    Column("page, MB", value("page_bytes", "{:.2f}", common.MEGABYTES)),
    Column("all files, MB", value("all_bytes", "{:.2f}", common.MEGABYTES)),
)
POSITIONS = (
    "input_logits", "output_logits", "all_logits", "document_logits", "question_logits", "attention_q", "attention_k",
    "attention_v", "attention_o", "attention_all", "feed_forward", "all_layers",
)  # fmt: skip
_WORDS = ("the", " river", " runs", " north", " of", " a", " town", "ship", ",", " and", " was", " in", " 18", "4", "7")
CONFIG: dict[str, Any] = {
    "seed": 1,
    "run_name": "made-up",
    "model": {"label": "smollm2_135m", "name": "asset:smollm2-135m-instruct", "dtype": "auto"},
    "adapter": {"_target_": "peft.LoraConfig", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    "data": {"name": "squad", "context_tokens": 192, "batch_size": 8, "source": {"seed": 0, "context_tokens": 192}},
    "optimizer": {"lr": 0.0005, "weight_decay": 0.1, "warmup_share": 0.05},
    "trainer": {"max_epochs": 1, "max_steps": -1, "accelerator": "auto"},
    "evaluation": {"tokens_per_batch": 16384, "samples": 3, "rag": {"limit": 100}},
}


def made_up(
    position: str = "input_logits", alpha: float = 0.5, seed: int = 1, *, plain: bool = False, points: int = 40,
    tokens: int = 600, gain: float = 0.0, items: int = 0, **changes: Any,
) -> Results:  # fmt: skip
    """A run as training would leave it; the same for the same arguments. Alignment costs a little at the task and keeps
    more of the rest. items: of every metric, with a value each. changes: further fields of Results."""
    noise = random.Random(f"{position} {alpha} {seed} {plain}")
    strength = 0.0 if plain else alpha / (alpha + 0.3)
    if position not in ("input_logits", "all_logits", "document_logits"):
        strength *= 0.4
    config = copy.deepcopy(CONFIG) | {"seed": seed}
    term = {"_target_": "selfaug.objective.LogitAlignment", "alpha": alpha, "position": position, "boundary": True}
    config["method"] = {"name": "lora", "terms": {}} if plain else {"name": "selfaug", "terms": {"kl": term}}
    config["run_name"] = f"{'lora' if plain else f'selfaug-{position}-{alpha:g}'}-s{seed}"
    f1 = 0.42 + gain - 0.03 * strength + noise.gauss(0, 0.008)
    kept = 0.86 + 0.12 * strength + noise.gauss(0, 0.008)
    drift = 0.30 * (1 - 0.9 * strength) * (1 + noise.gauss(0, 0.05))
    task = {
        name: _metric(base, tuned, 0.04, 100)
        for name, base, tuned in (
            ("exact_match", 0.05, f1 - 0.1), ("f1", 0.11, f1), ("crag_score", -0.6, f1 - 0.6),
            ("correct", 0.15, f1 + 0.05), ("missing", 0.0, 0.03), ("incorrect", 0.85, 0.92 - f1),
        )
    }  # fmt: skip
    retention = {
        name: {"score": _metric(base, base * (kept + noise.gauss(0, 0.01)), 0.05, 100)
               | {"retention": _interval(kept, 0.08, 100), "mcnemar_p": 0.2, "at_floor": False, "main": True}}
        for name, base in (("ifeval", 0.31), ("arc_easy", 0.55), ("hellaswag", 0.42), ("piqa", 0.67))
    }  # fmt: skip
    corpora = {
        corpus: {
            "kl_base_tuned": {"tuned": _interval(drift * scale, drift * scale / 8, 24)},
            "kl_tuned_base": {"tuned": _interval(drift * scale * 1.2, drift * scale / 7, 24)},
            "perplexity_ratio": {"tuned": _interval(1 + drift * scale / 2, drift * scale / 20, 24)},
        }
        for corpus, scale in (("wikipedia", 0.4), ("dialogues", 1.0))
    }
    values: dict[str, Any] = {
        "name": config["run_name"], "config": config, "config_hash": f"{noise.getrandbits(40):010x}", "seed": seed,
        "code": {"version": "0.1.0", "commit": "0123456789abcdef", "dirty": False},
        "data": {"fingerprint": "33f82989", "counts": {"train": 688, "val": 99, "test": 213},
                 "used": {"train": 688, "test": 100}, "truncation": {}},
        "task": task, "drift": corpora, "retention": retention,
        "retention_mean": {"retention": _interval(kept, 0.05, 4)},
        "time": {"fit_s": 396.0 + noise.random(), "evaluate_s": 135.0, "total_s": 531.0 + noise.random()},
        "speed": {"train_tokens_per_s": 144.0 + noise.random()}, "memory": {"peak_bytes": 4_613_320_704},
        "environment": {"python": "3.11.7", "platform": "Linux x86_64", "torch": "2.13.0", "device": "cpu"},
        "samples": [
            {"id": f"q{i}", "question": f"Which river runs through town {i}?", "answers": [f"River {i}"],
             "base": f"According to the documents, the river that runs through town {i} is River {i}.",
             "tuned": f"River {noise.randrange(i + 2)}"}
            for i in range(3)
        ],
        "curves": _curves(noise, points, drift, kept), "token_kl": _token_kl(noise, tokens, drift),
    }  # fmt: skip
    if items:
        metrics = [metric for group in (task, *retention.values(), *corpora.values()) for metric in group.values()]
        for metric, part in [*((metric, "tuned") for metric in metrics), (values["retention_mean"], "retention")]:
            of_items = [round(noise.gauss(metric[part]["mean"], 0.3), 6) for _ in range(items)]
            metric |= {"items": of_items, "asked": "0a1b2c3d4e5f"}
    return Results(**{**values, **changes})


def _interval(mean: float, half: float, n: int) -> dict[str, Any]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def _metric(base: float, tuned: float, half: float, n: int) -> dict[str, Any]:
    parts = (("base", base), ("tuned", tuned), ("difference", tuned - base))
    return {part: _interval(mean, half, n) for part, mean in parts}


def _curves(noise: random.Random, points: int, drift: float, kept: float) -> dict[str, list[list[float]]]:
    """Training curves of `points` steps and a probe every fourth, ending at the run's scores."""

    def curve(start: float, end: float, every: int, jitter: float) -> list[list[float]]:
        steps = range(every if every == 1 else 0, points + 1, every)
        return [[s, round(start + (end - start) * s / points * (1 + noise.gauss(0, jitter)), 5)] for s in steps]

    return {
        "train/loss": curve(2.3, 0.8, 1, 0.05), "train/kl": curve(0.0, drift / 3, 1, 0.05),
        "train/nll": curve(2.3, 0.7, 1, 0.05), "train/lr": curve(5e-4, 0.0, 1, 0.0),
        "val/loss": curve(2.2, 0.9, 8, 0.02), "val/nll": curve(2.2, 0.85, 8, 0.02),
        "probe/drift_wikipedia": curve(0.0, 0.4 * drift, 4, 0.05), "probe/drift_dialogues": curve(0.0, drift, 4, 0.05),
        "probe/ifeval_prompt_strict": curve(0.31, 0.31 * kept, 8, 0.04), "probe/words": curve(60, 12, 8, 0.05),
    }  # fmt: skip


def _token_kl(noise: random.Random, tokens: int, drift: float) -> dict[str, Any]:
    words = random.Random(0)  # the same example for every run
    roles = ["template"] * 20 + ["document"] * max(0, tokens - 60) + ["question"] * 20 + ["template"] * 8
    roles = (roles + ["response"] * 12)[:tokens]
    kl: list[float | None] = [float(f"{drift * noise.expovariate(1.5):.4g}") for _ in roles]
    kl[-1:] = [None] * bool(kl)
    return {"id": "q0", "tokens": [words.choice(_WORDS) for _ in roles], "roles": roles, "kl": kl}


def made_up_sweep(runs: int, **settings: Any) -> list[Results]:
    """`runs` runs: plain LoRA, then alphas by positions, three seeds of each."""
    alphas = (0.1, 0.3, 0.5, 1.0, 2.0, 4.0, 8.0)
    grid: list[dict[str, Any]] = [{"plain": True}]
    grid += [{"position": position, "alpha": alpha} for alpha in alphas for position in POSITIONS]
    made = [made_up(**one, seed=seed, **settings) for one in grid for seed in (1, 2, 3)]
    return made[:runs]


def measure(runs: int, place: Path) -> common.Row:
    """Write the runs, then read them and report on them."""
    from selfaug.reporting.places import read_places
    from selfaug.reporting.write import write_report

    for run in made_up_sweep(runs, points=200, items=100):
        write_results(place / "runs" / run.name / "results.json", run)
    began = time.perf_counter()
    found = read_places([place / "runs"])
    read = time.perf_counter() - began
    report = write_report(found, place / "report")
    seconds = time.perf_counter() - began
    files = [path for path in (place / "report").rglob("*") if path.is_file()]
    return {
        "runs": runs, "rows": report.rows, "read_seconds": read, "seconds": seconds,
        "page_bytes": report.page.stat().st_size, "all_bytes": sum(path.stat().st_size for path in files),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, "report")
    parser.add_argument("--runs", type=common.numbers, default=(200,))
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.runs = (6,)
    rows = []
    for runs in arguments.runs:
        with TemporaryDirectory(prefix="selfaug-report-") as place:
            rows.append(measure(runs, Path(place)))
    common.show("The report", rows, COLUMNS)
    common.write(common.out_path(arguments, "report"), "report", arguments, rows)


if __name__ == "__main__":
    main()
