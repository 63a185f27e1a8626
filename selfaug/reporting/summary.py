"""What the numbers say in words, and how they were got: the sentences of the report."""

from collections.abc import Sequence

from selfaug.evaluation.statistics import Interval
from selfaug.reporting.compare import SIGNIFICANT, Comparison, Difference, adjusted_p, difference
from selfaug.reporting.measures import KEPT, Measure

_NAMED = 4  # rows that a sentence names before it counts the rest


def headline(found: Comparison) -> str:
    """The result in one sentence. A row is called better than plain LoRA only where the test says so, corrected for the
    number of rows."""
    if not found.rows:
        return "No run has finished."
    task, kept = found.task, found.retention
    drift = None if found.drift is kept else found.drift
    if len(found.rows) == 1:
        (row,) = found.rows
        parts = [f"scores {_number(found, 0, task)} at the task"] if task and found.value(0, task) else []
        parts += [_kept(found, 0, one) for one in (kept, drift) if one and found.value(0, one)]
        return f"{row.label} {' and '.join(parts)}." if parts else f"{row.label} finished; nothing was measured."
    kinds = (
        (task, "answers best", "answers demonstrably better than"),
        (kept, "forgets least", "forgets demonstrably less than"),
        (drift, "drifts least", "drifts demonstrably less than"),
    )
    parts = []
    compared = any(row.baseline is not None for row in found.rows)
    for measure, best_is, better_than in kinds:
        best = _best(found, measure)
        if measure is None or best is None:
            continue
        shown = _beating(found, measure)
        at = best if best in shown or not shown or found.rows[best].baseline is None else shown[0]
        value = _kept(found, at, measure) if measure is kept else _number(found, at, measure)
        gain, label = _gain(found, at, measure), found.rows[at].label
        over = "" if gain is None else f", {measure.quantity.number(gain.interval.mean, sign=True)} against plain LoRA"
        if at in shown:
            parts.append(f"{label} {best_is if at == best else f'{better_than} plain LoRA'} ({value}{over})")
        elif gain is None and not (found.rows[at].plain and compared):
            parts.append(f"{label} {best_is} ({value})")
        else:
            named = "" if found.rows[at].plain else f"best: {label}, "
            parts.append(f"no row {better_than} plain LoRA ({named}{value})")
    if not parts:
        return f"{len(found.rows)} settings were run; nothing was measured that could be compared."
    text = "; ".join(parts)
    # Names of settings stay as they are written.
    return f"{text[0].upper() if text.startswith('no row') else text[0]}{text[1:]}."


def findings(found: Comparison) -> list[str]:
    """What follows the headline: the best against plain LoRA, and what cannot be told apart from it."""
    sentences = []
    kinds = [(found.task, "At the task"), (found.retention, _what_is_kept(found))]
    kinds += [] if found.drift is found.retention else [(found.drift, "In drift")]
    for measure, name in kinds:
        best = _best(found, measure)
        if measure is None or best is None:
            continue
        label, gain = found.rows[best].label, _gain(found, best, measure)
        if gain is not None:
            verb = "beats" if best in _beating(found, measure) else "is not told apart from"
            sentences.append(f"{name}, {label} {verb} plain LoRA: {said(measure, gain)}.")
        others = [row for row in found.rows if row is not found.rows[best]]
        gaps = [difference(found.rows[best], row, measure) for row in others]
        # The best was chosen by the same numbers, so that any two rows might have been these.
        apart = _apart(gaps, _one_seed(found), tests=len(found.rows) * len(others) // 2)
        # What has been said of plain LoRA already is not said twice.
        alike = [row.label for row, told in zip(others, apart, strict=True) if not told and not (gain and row.plain)]
        if alike:
            sentences.append(f"{name}, {label} cannot be told apart from {_listed(alike)}.")
        elif len(others) > 1 or gain is None:
            sentences.append(f"{name}, {label} is told apart from every other row.")
    if len(found.rows) > 1 and _one_seed(found):
        sentences.append("Every row is one seed, so nothing here speaks about other seeds: train with three or more.")
    if odd := _not_in_every_mean(found):
        sentences.append(
            f"What is kept is a mean over different benchmarks in different runs (only some have {_listed(odd)}, where "
            "the base model is at the floor in the others): compare the benchmarks one by one."
        )
    precisions = {run.environment.get("precision") for run in found.results} - {None}  # older results do not say
    if len(precisions) > 1:
        sentences.append(
            f"Runs were computed in different precisions ({', '.join(sorted(map(str, precisions)))}), whose roundings "
            "are in the differences: set trainer.precision to one of them."
        )
    return sentences


def said(measure: Measure, gap: Difference) -> str:
    """`F1 +3.4 [+1.0,+5.8] points, 4.1 standard errors, p = 0.014`"""
    text = _with_unit(measure, measure.quantity.cell(gap.interval, sign=True), "points")
    if gap.standard_errors is not None:
        text += f", {abs(gap.standard_errors):.1f} standard errors"
    if gap.p is not None:
        text += f", p {p_value(gap.p)}"
    return text


def p_value(p: float) -> str:
    """`= 0.014` or `< 0.001`"""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}" if p < 0.1 else f"= {p:.2f}"


def seeds_of(found: Comparison) -> str:
    """`3 seeds`, `1 to 3 seeds`"""
    counts = sorted({len(row.runs) for row in found.rows})
    if not counts:
        return "no seeds"
    many = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{many} seed{'' if counts[-1] == 1 else 's'}"


NOTES: Sequence[str] = (
    "A row is one setting; runs that differ only by the seed are its seeds. ± is half of a 95% interval for other "
    "seeds and other items (questions, documents, prompts): Student's half widths over the means by seed and over the "
    "means by item, added in squares. A row of one seed has the bootstrap interval over its items.",
    "Plain LoRA is NLL alone: method=lora, alignment=none, or alpha 0, which trains the same weights bit for bit. Each "
    "row is compared with the plain LoRA row whose other settings are the same; full fine-tuning, which has none, with "
    "the only one there is.",
    "The difference to plain LoRA is taken seed by seed and item by item, with its interval for other seeds and items. "
    "* p < 0.05 (two-sided) in the same test; ** still below 0.05 after Holm's correction for the rows of the column. "
    "Three seeds leave two degrees of freedom: the test finds large effects only, and no star is no proof of none. "
    "Runs without the same items are tested over the seeds alone.",
    "With one seed the difference has its interval over the items, carries no star and says nothing about other seeds.",
    "kept: tuned / base, averaged over the benchmarks on which the base model is above chance. KL in nats per token, "
    "on held-out text that no run trained on; on own answers, on what the tuned model itself has just said, another "
    "text in every row. Words and one-line answers are of answers cut at the evaluation's max_new_tokens.",
    "Pareto front: the rows that no other row beats at both task and retention, by their means.",
)  # fmt: skip


def _not_in_every_mean(found: Comparison) -> list[str]:
    """The benchmarks that count for the mean of what is kept in some of the runs that have one and not in others."""
    averaged = [
        {
            name
            for name, metrics in run.retention.items()
            if any(one.get("main") and not one.get("at_floor") for one in metrics.values())
        }
        for row in found.rows
        for run in row.runs.values()
        if run.retention_mean
    ]
    every = set(averaged[0]).intersection(*averaged) if averaged else set()
    return sorted({name for names in averaged for name in names} - every)


def _best(found: Comparison, measure: Measure | None) -> int | None:
    return None if measure is None else found.best[found.measures.index(measure)]


def _beating(found: Comparison, measure: Measure) -> list[int]:
    """The rows that are better than their plain LoRA, the best first."""
    column = found.measures.index(measure)
    gaps = [gaps[column] for gaps in found.differences]
    better: list[tuple[float, int]] = []
    for row, (gap, apart) in enumerate(zip(gaps, _apart(gaps, _one_seed(found)), strict=True)):
        value = found.values[row][column]
        if apart and gap is not None and value is not None and gap.interval.mean * measure.better > 0:
            better.append((-measure.better * value.mean, row))
    return [row for _, row in sorted(better)]


def _apart(gaps: Sequence[Difference | None], one_seed: bool, tests: int = 0) -> list[bool]:
    """Which differences are none by chance, by the test with Holm's correction for their number, or for that of `tests`
    of which they are some. Where every row is one seed, which is then said, for other items."""
    return [p is not None and p < SIGNIFICANT for p in adjusted_p(gaps, one_seed, tests)]


def _one_seed(found: Comparison) -> bool:
    return max(len(row.runs) for row in found.rows) == 1


def _gain(found: Comparison, row: int, measure: Measure) -> Difference | None:
    return found.differences[row][found.measures.index(measure)]


def _number(found: Comparison, row: int, measure: Measure | None) -> str:
    assert measure is not None
    return _with_unit(measure, measure.quantity.short(found.value(row, measure)))


def _with_unit(measure: Measure, text: str, unit: str = "%") -> str:
    """`F1 (%)` and `41.2 ±2.1` as `F1 41.2 ±2.1 %`."""
    name = measure.header.removesuffix(" (%)")
    return f"{name} {text} {unit}" if name != measure.header else f"{name} {text}"


def _kept(found: Comparison, row: int, measure: Measure) -> str:
    """`kept 97.1 ±0.8 % of ...`, or how far it drifted."""
    value: Interval | None = found.value(row, measure)
    if measure.key == KEPT:
        return f"kept {measure.quantity.short(value)} % of the base model's benchmark scores"
    return f"drifted by {_with_unit(measure, measure.quantity.short(value))}"


def _what_is_kept(found: Comparison) -> str:
    return "At retention" if found.retention is not None and found.retention.key == KEPT else "In drift"


def _listed(names: Sequence[str]) -> str:
    comma = "; " if any(", " in name for name in names) else ", "
    if len(names) > _NAMED + 1:
        return comma.join(names[:_NAMED]) + f" and {len(names) - _NAMED} more"
    return names[0] if len(names) == 1 else comma.join(names[:-1]) + f" and {names[-1]}"
