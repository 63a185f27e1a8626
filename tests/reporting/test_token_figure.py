"""Tokens drawn as coloured text: each once, in order, in its colour, inside the page."""

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from selfaug.reporting.figures import INK, PAPER
from selfaug.reporting.token_figure import COLUMNS, ROLE_COLOURS, tokens_by_role, tokens_by_value

TOKENS = ["<|im_start|>", "user\n", "Who", " wrote", " $x_1$\n\n", "中文", "Emma", "?"]
ROLES = ["template", "template", "document", "document", "document", "question", "question", "response"]


def written(figure: Figure) -> str:
    return "".join(text.get_text() for text in figure.axes[0].texts)


def boxes(figure: Figure) -> list[Rectangle]:
    return [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
def test_all_text_in_order_in_the_colour_of_its_role():
    figure = tokens_by_role(TOKENS, ROLES)
    assert written(figure) == "".join(TOKENS).replace("\n", "↵")
    colours = [to_hex(box.get_facecolor()) for box in boxes(figure)]
    # " $x_1$\n\n" is drawn in two pieces: a line break breaks the line.
    assert colours == [ROLE_COLOURS[role] for role in [*ROLES[:5], "document", *ROLES[5:]]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(ROLE_COLOURS)
    figure.draw_without_rendering()  # a dollar sign begins no formula that could fail


def test_the_lines_break_where_the_text_does_and_where_the_page_ends():
    figure = tokens_by_role(["a\n", "b", "c" * (COLUMNS + 5), "中" * COLUMNS, "d"], ["document"] * 5)
    assert max(box.get_x() + box.get_width() for box in boxes(figure)) <= COLUMNS
    places = [(box.get_y(), box.get_x()) for box in boxes(figure)]
    assert places == sorted(places), "from left to right and from top to bottom"
    assert len(set(places)) == len(places)
    assert written(figure) == "a↵b" + "c" * (COLUMNS + 5) + "中" * COLUMNS + "d"


def test_what_cannot_be_drawn_is_left_out():
    figure = tokens_by_role(["\x1b[31m", "", "\x00", "a\tb"], ["document"] * 4)
    assert written(figure) == "[31ma b"
    assert len(boxes(tokens_by_role([], []))) == 0


def test_values_are_shades_of_one_scale():
    figure = tokens_by_value(["a", "b", "c", "d", "e"], [0.0, 0.5, 2.0, 9.0, None], most=2.0, title="KL")
    colours = [to_hex(box.get_facecolor()) for box in boxes(figure)]
    brightness = [sum(box.get_facecolor()[:3]) for box in boxes(figure)]
    assert brightness[0] > brightness[1] > brightness[2] == brightness[3], "what exceeds the scale has its last colour"
    assert colours[4] == PAPER, "no row, no colour"
    assert any("0 to 2: KL" in text.get_text() for text in figure.texts)


@pytest.mark.parametrize("values", [[None, None], [0.0, 0.0]])
def test_nothing_to_show(values):
    colours = {to_hex(box.get_facecolor()) for box in boxes(tokens_by_value(["a", "b"], values))}
    assert len(colours) == 1


def test_one_token_is_framed():
    frames = [
        to_hex(box.get_edgecolor()) == INK for box in boxes(tokens_by_role(["a", "b", "c"], ["question"] * 3, framed=1))
    ]
    assert frames == [False, True, False]
