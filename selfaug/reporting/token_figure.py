"""The text of an example with a colour behind every token: by role, or by a value such as the KL of its row.

A picture and not HTML, so that it looks the same in a notebook, on a page that strips styles, and in a paper.
"""

import math
from collections.abc import Sequence
from unicodedata import combining, east_asian_width

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from selfaug.reporting.figures import INK, MUTED, PAPER

# Light enough to read black text on, and told apart by colour-blind readers (tints of Okabe and Ito 2008).
ROLE_COLOURS = {"template": "#e3e6ea", "document": "#a9d6f0", "question": "#f6d48a", "response": "#8fd9bf"}
COLUMNS = 104
_SIZE = 7.5  # points
_WIDTH = _SIZE * 1233 / 2048 / 72  # inches: what DejaVu Sans Mono, which matplotlib brings along, gives to a character
_HEIGHT = _SIZE * 1.75 / 72  # inches of a line
_TOP = 0.34  # inches for the legend


def tokens_by_role(tokens: Sequence[str], roles: Sequence[str], *, framed: int | None = None) -> Figure:
    """tokens, roles: as evaluation.token_kl gives them, of one length. framed: the token to draw a frame around."""
    figure = _text(tokens, [ROLE_COLOURS.get(role, PAPER) for role in roles], framed)
    there = [role for role in ROLE_COLOURS if role in roles]
    patches = [Patch(facecolor=ROLE_COLOURS[role], label=role) for role in there]
    figure.legend(handles=patches, loc="upper left", ncols=len(patches), fontsize=_SIZE + 1, frameon=False,
                  borderaxespad=0.1)  # fmt: skip
    return figure


def tokens_by_value(
    tokens: Sequence[str], values: Sequence[float | None], *, most: float | None = None, title: str = "KL, nats",
    framed: int | None = None,
) -> Figure:  # fmt: skip
    """values: of each token's row, not negative; None where it has none. most: the value of the full colour, which
    figures that are compared must share; by default the 99th percentile. The scale is that of the root, as most rows of
    a KL are small."""
    known = [value for value in values if value is not None]
    top = most or (float(np.percentile(known, 99)) if known else 0.0) or 1.0
    shade = colormaps["YlOrRd"]
    # Only the lighter two thirds of the map: black text stays readable.
    colours = [PAPER if v is None else shade(0.62 * math.sqrt(min(max(v, 0.0) / top, 1.0))) for v in values]
    figure = _text(tokens, colours, framed)
    height = figure.get_figheight()
    bar = figure.add_axes((0.01, 1 - 0.72 * _TOP / height, 0.16, 0.4 * _TOP / height))
    bar.imshow([shade(0.62 * np.linspace(0, 1, 64))], aspect="auto", extent=(0, 1, 0, 1))
    bar.set_axis_off()
    figure.text(0.18, 1 - 0.52 * _TOP / height, f"0 to {top:.3g}: {title} (root scale)", fontsize=_SIZE + 1,
                va="center", color=INK, parse_math=False)  # fmt: skip
    return figure


def _text(tokens: Sequence[str], colours: Sequence[object], framed: int | None) -> Figure:
    """The tokens in lines of COLUMNS characters. A line break of the text is shown, and breaks the line."""
    pieces, lines = _laid_out(tokens)
    height = lines * _HEIGHT + _TOP
    figure = Figure(figsize=(COLUMNS * _WIDTH + 0.1, height), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1 - _TOP / height), xlim=(-0.7, COLUMNS + 0.7), ylim=(lines, 0))
    axes.set_axis_off()
    for token, line, column, text in pieces:
        colour = INK if token == framed else PAPER
        axes.add_patch(
            Rectangle((column, line + 0.06), _columns(text), 0.88, facecolor=colours[token], edgecolor=colour,
                      linewidth=1.1 if token == framed else 0.5, zorder=2 if token == framed else 1)
        )  # fmt: skip
        axes.text(column, line + 0.52, text, family="DejaVu Sans Mono", fontsize=_SIZE, va="center_baseline", zorder=3,
                  color=MUTED if text == "↵" else INK, parse_math=False)  # fmt: skip
    return figure


def _laid_out(tokens: Sequence[str]) -> tuple[list[tuple[int, int, int, str]], int]:
    """[(token, line, column, text)] and the number of lines."""
    pieces, line, column = [], 0, 0
    for token, whole in enumerate(tokens):
        for part in whole.replace("\t", " ").splitlines(keepends=True):
            breaks = part.splitlines()[0] != part
            text = "".join(filter(str.isprintable, part)) + "↵" * breaks
            while text:
                if column and column + _columns(text) > COLUMNS:
                    line, column = line + 1, 0
                kept = text[: COLUMNS // 2] if _columns(text) > COLUMNS else text
                pieces.append((token, line, column, kept))
                text, column = text[len(kept) :], column + _columns(kept)
            if breaks:
                line, column = line + 1, 0
    return pieces, max(line + bool(column), 1)


def _columns(text: str) -> int:
    return sum(0 if combining(sign) else 2 if east_asian_width(sign) in "WF" else 1 for sign in text)
