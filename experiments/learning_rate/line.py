"""How much more F1 than a slower plain LoRA of the same drift: each method of ../methods against the straight line
between plain LoRA at two learning rates.

Run as: python experiments/learning_rate/line.py

For a method with mean drift d the line's F1 is (1 - w) F1(slower) + w F1(usual), w = (d - d(slower)) / (d(usual) -
d(slower)), all by seed and by question, so that the difference is paired like every other one of ours. w is taken as
known; outside 0 to 1 the line is continued.
"""

from collections import defaultdict
from pathlib import Path

import numpy as np

from selfaug.evaluation.statistics import over_seeds_and_items
from selfaug.reporting.cells import clean
from selfaug.reporting.places import read_places
from selfaug.reporting.results import Results

HERE = Path(__file__).parent
SLOWER, USUAL = 2.5e-4, 5e-4


def drift(run: Results) -> float:
    """KL(base || tuned) on dialogues, nats per token."""
    return run.drift["dialogues"]["kl_base_tuned"]["tuned"]["mean"]


def f1(run: Results) -> np.ndarray:
    """[questions] in percent."""
    return 100 * np.array(run.task["f1"]["items"], dtype=float)


def main() -> None:
    plain: dict[float, dict[int, Results]] = defaultdict(dict)
    methods: dict[str, dict[int, Results]] = defaultdict(dict)
    for run in read_places([HERE / "results", HERE.parent / "methods" / "results"]).results:
        name = run.config["method"]["name"]
        if name == "lora":
            plain[run.config["optimizer"]["lr"]][run.seed] = run
        else:
            alpha = run.config["alignment"]["alpha"] if name == "selfaug" else None
            methods[f"{name}, alpha {alpha:g}" if alpha is not None else name][run.seed] = run
    slower, usual = plain[SLOWER], plain[USUAL]
    print("| method | drift on dialogues | w | F1 minus the line's | standard errors | p |")
    print("|---|---:|---:|---:|---:|---:|")
    lines = []
    for name, runs in methods.items():
        seeds = sorted(runs)
        own, low, high = (np.mean([drift(found[seed]) for seed in seeds]) for found in (runs, slower, usual))
        w = (own - low) / (high - low)
        gap = over_seeds_and_items([f1(runs[s]) - (1 - w) * f1(slower[s]) - w * f1(usual[s]) for s in seeds])
        found = gap.interval()
        lines.append(
            (own, f"| {clean(name, 32)} | {own:.4f} | {w:.2f} | {gap.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}] "
                  f"| {gap.standard_errors:.1f} | {gap.p:.2f} |")
        )  # fmt: skip
    print("\n".join(line for _, line in sorted(lines)))


if __name__ == "__main__":
    main()
