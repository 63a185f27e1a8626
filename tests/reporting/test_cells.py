"""Numbers as they are printed."""

import math

import pytest

from selfaug.evaluation.statistics import Interval
from selfaug.reporting.cells import Quantity

PERCENT, KL = Quantity("F1 (%)", 100, 1), Quantity("KL")


@pytest.mark.parametrize(
    ("mean", "half", "shown"),
    [
        (0.0165, 0.0031, "0.017 ±0.003"),
        (0.38, 0.02, "0.380 ±0.020"),
        (0.0012, 0.0003, "0.0012 ±0.0003"),  # not 0.001 ±0.000
        (0.38, 0.00004, "0.380 ±0.000"),  # no more than three significant digits
        (0.0009, 0.0001, "9.0e-04 ±1e-04"),
        (12.3, 4.5, "12.3 ±4.5"),
        (0.2, math.nan, "0.200"),
        (0.0, 0.0, "0 ±0"),
    ],
)
def test_short(mean: float, half: float, shown: str):
    assert KL.short(Interval(mean, mean - half, mean + half, 8)) == shown


def test_nothing_is_below_zero():
    assert PERCENT.number(-0.0004) == "0.0"
    assert PERCENT.number(-0.0004, sign=True) == "+0.0"
    assert PERCENT.cell(Interval(-0.0001, -0.2, 0.1, 9), sign=True) == "+0.0 [-20.0,+10.0]"


def test_thousands_keep_their_comma():
    seconds = Quantity("training", 1, 0)
    assert seconds.cell(Interval(1379.0, 1200.0, 1558.0, 3), sign=True, comma=", ") == "+1,379 [+1,200, +1,558]"
