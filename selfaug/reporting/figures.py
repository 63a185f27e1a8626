"""The plots of a report, drawn with matplotlib: each only where its data exists.

Every number has its interval. Colours are told apart by colour-blind readers too (Okabe and Ito 2008), and lines are
labelled where they end. The files are the same for the same results: no date, no random ids.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from selfaug.evaluation.statistics import Interval
from selfaug.reporting.cells import clean
from selfaug.reporting.compare import Comparison, Row
from selfaug.reporting.correlation import rank_correlation, within_runs
from selfaug.reporting.labels import alpha_of, setting_labels, without_alpha
from selfaug.reporting.measures import Measure

# The page replaces these by its own colours for light and dark, so nothing else may use them.
INK, MUTED, GRID, PAPER = "#1b1f25", "#6b7380", "#dfe2e7", "#fefefe"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1")
_STYLE: Any = {
    "font.family": "sans-serif", "font.size": 9.5, "axes.titlesize": 10, "axes.titlelocation": "left",
    "axes.labelsize": 9.5, "axes.edgecolor": MUTED, "axes.labelcolor": INK, "axes.titlecolor": INK,
    "axes.facecolor": PAPER, "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.7, "text.color": INK,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "figure.facecolor": PAPER, "savefig.facecolor": PAPER, "svg.fonttype": "none", "svg.hashsalt": "selfaug",
    "lines.linewidth": 1.6, "text.parse_math": False, "legend.frameon": False, "figure.dpi": 100,
}  # fmt: skip

_SETTING = re.compile(r"(^|, )[\w.]+=")


@dataclass(frozen=True, slots=True)
class Plot:
    """name: of its files. caption: what it shows and how, for a reader who cannot see it too."""

    name: str
    title: str
    caption: str
    figure: Figure


@contextmanager
def style() -> Iterator[None]:
    """Inside, figures are drawn and written in the report's style."""
    with rc_context(_STYLE):
        yield


def plots(found: Comparison) -> list[Plot]:
    """All plots that the results have data for. Draw and write them inside `style()`."""
    drawn: Sequence[Callable[[Comparison], Plot | None]] = (
        pareto, pareto_drift, drift_forgetting, alpha_curves, forgetting_curves
    )  # fmt: skip
    return [plot for draw in drawn if (plot := draw(found)) is not None]


# ---- task against retention -----------------------------------------------------------------------------------------


def pareto(found: Comparison) -> Plot | None:
    """What was learned against what was kept, a point for each row."""
    return _front(found, found.retention, "task-retention", "What was learned, and what was kept")


def pareto_drift(found: Comparison) -> Plot | None:
    """The same by drift, where benchmarks stand for what was kept: small models may have nothing to lose at those."""
    if found.drift is found.retention:
        return None
    return _front(found, found.drift, "task-drift", "What was learned, and how far the model drifted")


def _front(found: Comparison, kept: Measure | None, name: str, title: str) -> Plot | None:
    task = found.task
    points = [i for i in range(len(found.rows)) if _has(found, i, task) and _has(found, i, kept)]
    if task is None or kept is None or len(points) < 2:
        return None
    figure, axes = _axes(7.2, 4.6)
    names, best = _short_names(found), found.front_at(kept)
    for plain, front in product((False, True), (False, True)):
        members = [i for i in points if found.rows[i].plain == plain and (i in best) == front]
        colour = INK if plain else COLOURS[0] if front else MUTED
        _draw_points(axes, found, members, (kept, task), colour, filled=front)
    labels = []
    for index in points:
        x, y = _scaled(found.value(index, kept), kept), _scaled(found.value(index, task), task)
        labels.append((index in best or found.rows[index].plain, x.mean, y.mean, names[index]))
    front_points = sorted((_scaled(found.value(i, kept), kept).mean, _scaled(found.value(i, task), task).mean)
                          for i in best)  # fmt: skip
    axes.plot(*zip(*front_points, strict=True), color=COLOURS[0], linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    _name_axes(axes, kept, task)
    _place_labels(figure, axes, sorted(labels, key=lambda label: not label[0]))
    caption = (
        "Each point is a row, with 95% intervals; filled and joined by the dashed line: the Pareto front, the rows "
        "that no other row beats at both. Diamond: plain LoRA. Up and to the right is better."
    )
    return Plot(name, title, caption, figure)


# ---- alpha ----------------------------------------------------------------------------------------------------------


def alpha_curves(found: Comparison) -> Plot | None:
    """Task, retention and drift over alpha, where rows differ in alpha."""
    lines = _alpha_lines(found)
    panels = [one for one in (found.task, found.retention) if one is not None]
    panels += [found.drift] if found.drift is not None and found.drift is not found.retention else []
    if not lines or not panels:
        return None
    figure = Figure(figsize=(3.5 * len(panels) + 0.6, 3.5), layout="constrained")
    positive = sorted({alpha for line in lines.values() for alpha, _ in line if alpha > 0})
    zero = positive[0] / 2.5  # stands apart at the left: a log axis has no 0
    for panel, measure in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), panel + 1)
        axes.set_xscale("log")
        for colour, (label, line) in zip(_colours(len(lines)), lines.items(), strict=True):
            values = [(alpha, _scaled(found.value(row, measure), measure)) for alpha, row in line
                      if found.value(row, measure)]  # fmt: skip
            for above, joined in ((True, "-"), (False, "")):
                part = [(alpha or zero, value) for alpha, value in values if (alpha > 0) == above]
                if part:
                    x, y = [alpha for alpha, _ in part], [value.mean for _, value in part]
                    axes.errorbar(
                        x, y, yerr=np.hstack([_half(value) for _, value in part]), fmt=f"o{joined}", color=colour,
                        markersize=4.5, elinewidth=0.8, label=label if above else None,
                        markerfacecolor=colour if above else PAPER,
                    )  # fmt: skip
        has_zero = any(alpha == 0 for line in lines.values() for alpha, _ in line)
        _alpha_ticks(axes, positive, zero if has_zero else None)
        axes.set_xlabel("alpha")
        axes.set_title(_axis_name(measure))
    if len(lines) > 1:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(3, len(lines)))
    caption = "Means with 95% intervals, alpha on a log scale. Hollow, apart at the left: alpha 0, which is plain LoRA."
    return Plot("alpha", "How strongly to align", caption, figure)


def _alpha_lines(found: Comparison) -> dict[str, list[tuple[float, int]]]:
    """label -> [(alpha, row), ...] of rows that differ in alpha alone; plain LoRA is the alpha 0 of each."""
    groups: dict[str, list[tuple[float, int]]] = {}
    shared: dict[str, dict[str, Any]] = {}
    for index, row in enumerate(found.rows):
        config = next(iter(row.runs.values())).config
        alpha = alpha_of(config)
        if alpha is not None and not row.plain:
            rest = without_alpha(config)
            key = repr(sorted(rest.items(), key=lambda item: item[0]))
            shared[key] = rest
            groups.setdefault(key, []).append((alpha, index))
    groups = {key: sorted(line) for key, line in groups.items() if len(line) > 1}
    for line in groups.values():
        baseline = found.rows[line[0][1]].baseline
        if baseline is not None:
            line.insert(0, (0.0, found.rows.index(baseline)))
    labels = setting_labels([shared[key] for key in groups])
    return {label or "SelfAug": line for label, line in zip(labels, groups.values(), strict=True)}


def _alpha_ticks(axes: Axes, positive: list[float], zero: float | None) -> None:
    ticks = positive if len(positive) <= 8 else positive[:: math.ceil(len(positive) / 8)]
    places, names = list(ticks), [f"{tick:g}" for tick in ticks]
    if zero is not None:
        places, names = [zero, *places], ["0", *names]
        middle = math.sqrt(zero * positive[0])
        axes.axvline(middle, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
    axes.set_xticks(places, names)
    axes.minorticks_off()


# ---- curves over steps ----------------------------------------------------------------------------------------------


def forgetting_curves(found: Comparison) -> Plot | None:
    """probe/* and val/* over steps: a line for each row, the range of its seeds as a band."""
    names = sorted(
        {name for row in found.rows for run in row.runs.values() for name in run.curves
         if name.startswith(("probe/", "val/"))},
        key=lambda name: (name.startswith("val/"), name),
    )[:8]  # fmt: skip
    names = [name for name in names if any(len(_seeds_curve(row, name)[0]) > 1 for row in found.rows)]
    if not names:
        return None
    chosen, short = coloured_rows(found), _short_names(found)
    columns = min(2 if len(names) < 5 else 3, len(names))
    height = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3.5 * columns + 0.3, 2.4 * height + 0.7), layout="constrained")
    for panel, name in enumerate(names):
        axes = figure.add_subplot(height, columns, panel + 1)
        grey: list[np.ndarray] = []
        for index, row in enumerate(found.rows):
            steps, mean, low, high = _seeds_curve(row, name)
            if not len(steps):
                continue
            if index not in chosen:
                grey.append(np.column_stack([steps, mean]))
                continue
            colour, dashes = chosen[index], (0, (5, 2)) if row.plain else "-"
            axes.plot(steps, mean, color=colour, linewidth=1.6, zorder=3, linestyle=dashes, label=short[index])
            axes.fill_between(steps, low, high, color=colour, alpha=0.16, linewidth=0)
        if grey:
            axes.add_collection(LineCollection(grey, colors=[(MUTED, 0.4)], linewidths=0.9, zorder=1))
            axes.autoscale_view()
        axes.set_title(name)
        axes.set_xlabel("optimiser step" if panel >= len(names) - columns else "")
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)
    others = " The other rows are grey." if len(chosen) < len(found.rows) else ""
    caption = f"Means over the seeds; the band is the range of the seeds, no interval. Dashed: plain LoRA.{others}"
    return Plot("curves", "How it forgets while it learns", caption, figure)


def coloured_rows(found: Comparison) -> dict[int, str]:
    """row -> colour: all rows where they are few; else plain LoRA, the Pareto front, then the first ones."""
    order = [i for i, row in enumerate(found.rows) if row.plain] + found.front + list(range(len(found.rows)))
    chosen = sorted(list(dict.fromkeys(order))[: len(COLOURS)])
    colours = iter(COLOURS)
    first_plain = next((i for i in chosen if found.rows[i].plain), None)
    return {index: INK if index == first_plain else next(colours) for index in chosen}


def _seeds_curve(row: Row, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps that all seeds have, and over the seeds the mean, the lowest and the highest value at each."""
    curves = [
        {int(step): value for step, value in run.curves[name]} for run in row.runs.values() if run.curves.get(name)
    ]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    values = np.array([[curve[step] for step in steps] for curve in curves]).reshape(len(curves), len(steps))
    if not len(steps):
        empty = np.zeros(0)
        return empty, empty, empty, empty
    return np.array(steps), values.mean(0), values.min(0), values.max(0)


# ---- drift and forgetting -------------------------------------------------------------------------------------------


def drift_forgetting(found: Comparison) -> Plot | None:
    """Does KL to the base model foretell what is lost? A point for each row; small ones for its seeds."""
    drift, kept = found.drift, found.retention
    if drift is None or kept is None or drift == kept:
        return None
    rows = [i for i in range(len(found.rows)) if _has(found, i, drift) and _has(found, i, kept)]
    if len(rows) < 3:
        return None
    figure, axes = _axes(7.2, 4.2)
    for plain in (False, True):
        members = [i for i in rows if found.rows[i].plain == plain]
        colour = INK if plain else COLOURS[0]
        runs = [run for i in members for run in found.rows[i].runs.values() if len(found.rows[i].runs) > 1]
        pairs = [(drift.tuned(run), kept.tuned(run)) for run in runs]
        seeds = [(_scaled(x, drift).mean, _scaled(y, kept).mean) for x, y in pairs if x is not None and y is not None]
        axes.plot([x for x, _ in seeds], [y for _, y in seeds], ".", color=colour, alpha=0.4, markersize=4)
        _draw_points(axes, found, members, (drift, kept), colour, filled=False)
    _name_axes(axes, drift, kept)
    means = [(found.value(i, drift), found.value(i, kept)) for i in rows]
    found_r = rank_correlation([a.mean for a, _ in means if a], [b.mean for _, b in means if b])
    caption = "Each circle is a row (diamond: plain LoRA), with 95% intervals; small dots are its seeds. "
    if found_r is not None:
        caption += f"Spearman's rank correlation over the {found_r.n} rows: {_written(found_r)}. "
        axes.set_title(f"rank correlation {_written(found_r)}, {found_r.n} rows")
    inside = within_runs([run for row in found.rows for run in row.runs.values()])
    if inside is not None:
        caption += f"Within runs, probe by probe: mean correlation {_written(inside)} over {inside.n} runs."
    return Plot("drift-forgetting", "Drift against forgetting", caption.strip(), figure)


def _written(r: Interval) -> str:
    return f"{r.mean:+.2f}" + ("" if math.isnan(r.low) else f" [{r.low:+.2f}, {r.high:+.2f}]")


# ---- shared ---------------------------------------------------------------------------------------------------------


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _draw_points(
    axes: Axes, found: Comparison, rows: list[int], measures: tuple[Measure, Measure], colour: str, filled: bool
) -> None:
    """Rows by two measures, with both intervals; plain LoRA as a diamond. All at once: one by one takes ten times as
    long."""
    if not rows:
        return
    x, y = ([_scaled(found.value(i, one), one) for i in rows] for one in measures)
    axes.errorbar(
        [value.mean for value in x], [value.mean for value in y], xerr=np.hstack([_half(value) for value in x]),
        yerr=np.hstack([_half(value) for value in y]), fmt="D" if found.rows[rows[0]].plain else "o", markersize=6,
        color=colour, elinewidth=0.8, ecolor=(colour, 0.4), markerfacecolor=colour if filled else PAPER, zorder=4,
    )  # fmt: skip


def _has(found: Comparison, row: int, measure: Measure | None) -> bool:
    """Whether a row has a number; one that has diverged has none."""
    value = found.value(row, measure)
    return value is not None and math.isfinite(value.mean)


def _colours(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _short_names(found: Comparison) -> list[str]:
    """The rows' labels; where all but plain LoRA name the same settings, the values alone."""
    heads = {tuple(one[0] for one in _SETTING.finditer(row.label)) for row in found.rows if not row.plain}
    alike = len(heads) == 1 and len(found.rows) > 2
    names = [_SETTING.sub(r"\1", row.label) if alike and not row.plain else row.label for row in found.rows]
    # matplotlib leaves labels out of a legend that begin with an underscore.
    return [clean(name, 44).lstrip("_") or clean(row.label, 44) for name, row in zip(names, found.rows, strict=True)]


def _scaled(value: Interval | None, measure: Measure) -> Interval:
    """In the unit that is printed."""
    assert value is not None
    scale = measure.quantity.scale
    return Interval(value.mean * scale, value.low * scale, value.high * scale, value.n)


def _half(value: Interval) -> np.ndarray:
    """[2, 1]: how far the interval reaches down and up; 0 where there is none."""
    reach = np.nan_to_num(np.array([[value.mean - value.low], [value.high - value.mean]]))
    return np.clip(reach, 0, None)


def _axis_name(measure: Measure) -> str:
    """`F1 (%)`, `KL(base||tuned), dialogues ↓`; the arrow says that less is better."""
    drift = measure.group.removeprefix("Drift: ")
    name = measure.short if drift == measure.group else f"{measure.short}, {drift}"
    name = {"kept (%)": "kept of the benchmarks (%)"}.get(name, name)
    return name if measure.better > 0 else f"{name} ↓"


def _name_axes(axes: Axes, x: Measure, y: Measure) -> None:
    axes.set_xlabel(_axis_name(x))
    axes.set_ylabel(_axis_name(y))
    if x.better < 0 and y.better > 0 and y.group == "Task":
        axes.invert_xaxis()  # so that up and to the right is better


def _place_labels(figure: Figure, axes: Axes, labels: Sequence[tuple[bool, float, float, str]]) -> None:
    """Labels beside their points, or in sight of them at the end of a line, each where no other label or point lies;
    the later ones only if there is room."""
    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    points = [axes.transData.transform((x, y)) for _, x, y, _ in labels]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    for (wanted, x, y, label), (left, bottom) in zip(labels, points, strict=True):
        text = clean(label, 40)
        width, height = 6.3 * len(text), 13.0
        beside = [(8, 4), (8, -14), (-8 - width, 4), (-8 - width, -14)]
        away = [(dx, dy) for dy in range(18, 90, 16) for dy in (dy, -dy - 10) for dx in (-width / 2, 20, -20 - width)]
        for dx, dy in beside + away:
            box = (left + dx, bottom + dy, left + dx + width, bottom + dy + height)
            inside = frame.x0 <= box[0] and box[2] <= frame.x1 and frame.y0 <= box[1] and box[3] <= frame.y1
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
                axes.annotate(text, (x, y), (dx * 0.72, dy * 0.72), textcoords="offset points", fontsize=8.5,
                              color=INK if wanted else MUTED, arrowprops=line if (dx, dy) in away else None,
                              bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.8})  # fmt: skip
                break


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
