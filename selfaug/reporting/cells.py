"""How one number, one interval and one piece of foreign text are printed in a table."""

import math
from dataclasses import dataclass
from typing import Any

from selfaug.evaluation.statistics import Interval
from selfaug.reporting.results import Metric

NOTHING = "–"


@dataclass(frozen=True, slots=True)
class Quantity:
    """How a metric is called and printed."""

    label: str
    scale: float = 1.0
    digits: int | None = None  # decimals; None: three significant digits, for what spans orders of magnitude

    def number(self, value: float, sign: bool = False) -> str:
        value *= self.scale
        plus = "+" if sign else ""
        if self.digits is not None:
            return f"{value:{plus}z,.{self.digits}f}"
        small = value != 0 and abs(value) < 0.001
        return f"{value:{plus}.1e}" if small else f"{value:{plus}z.{decimals(value)}f}"

    def cell(self, interval: Interval | None, sign: bool = False, comma: str = ",") -> str:
        """`45.3 [42.1,48.5]`: no space inside the brackets, so that a narrow column breaks before them."""
        if interval is None or math.isnan(interval.mean):
            return NOTHING
        text = self.number(interval.mean, sign)
        if math.isnan(interval.low) or math.isnan(interval.high):
            return text
        return f"{text} [{self.number(interval.low, sign)}{comma}{self.number(interval.high, sign)}]"

    def short(self, interval: Interval | None) -> str:
        """`45.3 ±3.2`: three decimals, or as many more, up to three significant digits, as half the interval's width
        needs to be seen; that to the same decimals."""
        if interval is None or math.isnan(interval.mean):
            return NOTHING
        value, half = interval.mean * self.scale, (interval.high - interval.low) / 2 * self.scale
        if value and abs(value) < 0.001 and self.digits is None:
            text, spread = f"{value:.1e}", f"{half:.0e}"
        else:
            digits = self.digits
            if digits is None:
                seen = decimals(half) - 2 if half > 0 else 0
                digits = min(decimals(value), max(3, seen))
            text, spread = f"{value:z,.{digits}f}", f"{half:,.{digits}f}"
        return text if math.isnan(half) else f"{text} ±{spread}"


def decimals(value: float) -> int:
    """Decimals that show three significant digits of a number from 0.001 on."""
    if value == 0 or not math.isfinite(value):
        return 0
    return max(0, 2 - math.floor(math.log10(abs(value))))


def interval_of(metric: Metric | None, part: str) -> Interval | None:
    """One part of a metric, whether it was just computed (Interval) or read from a file (dictionary, nulls)."""
    value = (metric or {}).get(part)
    if value is None or isinstance(value, Interval):
        return value
    mean, low, high = (math.nan if value.get(key) is None else float(value[key]) for key in ("mean", "low", "high"))
    return Interval(mean, low, high, n=int(value.get("n") or 0))


def clean(text: Any, length: int) -> str:
    """On one line and not longer than `length`. Escape sequences and the like would reach the terminal."""
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in str(text)).split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"
