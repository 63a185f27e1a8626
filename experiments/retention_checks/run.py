"""Does the retention suite say what it must? An adapter of zeros, and one of noise, on the packaged model.

Run as: python experiments/retention_checks/run.py [--evaluation quick] [--only zero,noise-0.1] [--out results.json]

zero: a fresh LoRA adapter, whose B is 0: the base model, so every difference must be 0 and every p 1. noise-S: the same
with a random B of standard deviation S: from a slightly to a badly damaged model.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from selfaug.model.load import load_base
from selfaug.reporting.results import read_results

HERE = Path(__file__).parent
MODEL = "asset:smollm2-135m-instruct"
ADAPTERS = {"zero": 0.0, "noise-0.02": 0.02, "noise-0.1": 0.1, "noise-0.2": 0.2}  # standard deviation of B


def save_adapter(std: float, folder: Path) -> Path:
    """A LoRA of rank 16 on all linear layers with a normal B."""
    torch.manual_seed(0)
    model = get_peft_model(load_base(MODEL), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, std) if std else parameter.zero_()
    model.save_pretrained(folder)
    return folder


def evaluate(target: Path, level: str, runs: Path) -> tuple[Path, float]:
    """As a user would; where the results are, and the seconds of the command."""
    command = [sys.executable, "-m", "selfaug.evaluate", f"target={target}", f"evaluation={level}",
               "evaluation.rag=null", f"paths.runs_dir={runs}"]  # fmt: skip
    began = time.perf_counter()
    subprocess.run(command, check=True)
    (results,) = runs.glob("evaluate-*/results.json")
    return results, time.perf_counter() - began


def summary(path: Path, seconds: float) -> dict[str, Any]:
    """What the README shows of it."""
    found = read_results(path)
    return {
        "seconds": seconds,
        "retention": found.retention,
        "retention_mean": found.retention_mean,
        "style": found.style,
        "drift": found.drift,
        "evaluation": found.evaluation,
        "code": found.code,
        "environment": found.environment,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluation", default="quick")
    parser.add_argument("--only", default=",".join(ADAPTERS))
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    with TemporaryDirectory() as work:
        for name in arguments.only.split(","):
            adapter = save_adapter(ADAPTERS[name], Path(work) / name)
            results[name] = summary(*evaluate(adapter, arguments.evaluation, Path(work) / f"runs-{name}"))
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
