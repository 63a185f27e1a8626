"""What a run logged while it trained, short enough to be kept in results.json.

Run by the training itself; the report has only results.json to read.
"""

import csv
import math
from pathlib import Path

Curve = list[list[float]]

KEPT = ("train/", "val/", "probe/")
MOST_POINTS = 200


def read_curves(path: Path, most: int = MOST_POINTS) -> dict[str, Curve]:
    """metric -> [[step, value], ...] from a metrics.csv; {} where there is none.

    Of each metric at most `most` points, spread evenly, the first and the last among them; values to six digits. What
    is not finite is left out: a gap in a curve says that the run diverged there, and its scores say the rest.
    """
    if not path.is_file():
        return {}
    curves: dict[str, dict[int, float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            step = _number(line.get("step"))
            if step is None:
                continue
            for name, text in line.items():
                value = _number(text) if name and name.startswith(KEPT) else None
                if value is not None:
                    # A resumed run may have logged a step twice: what was logged last counts.
                    curves.setdefault(name, {})[int(step)] = value
    return {name: thinned(sorted([step, value] for step, value in points.items()), most)
            for name, points in sorted(curves.items())}  # fmt: skip


def thinned(points: Curve, most: int) -> Curve:
    """At most `most` (2 or more) of the points, evenly spaced by their place, the first and the last kept."""
    if len(points) <= most:
        return points
    return [points[round(place * (len(points) - 1) / (most - 1))] for place in range(most)]


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except (TypeError, ValueError):
        return None
    return float(f"{value:.6g}") if math.isfinite(value) else None
