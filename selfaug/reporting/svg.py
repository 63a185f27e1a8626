"""A matplotlib SVG made fit to stand inside a page: its colours follow light and dark, its ids are its own."""

import re

from selfaug.reporting.figures import COLOURS, GRID, INK, MUTED, PAPER

LEAST_WIDTH = "34rem"
_COLOURS = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)", PAPER: "var(--card)"}
_COLOURS |= {colour: f"var(--series-{index})" for index, colour in enumerate(COLOURS)}


def inline(svg: str, name: str, label: str) -> str:
    """The <svg> element alone. name: put before every id, as several plots share a page. label: escaped text."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style\b.*?</style>", "", svg, flags=re.DOTALL)  # its rules would hold for the whole page
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'(xlink:)?href="#', f'href="#{name}-', svg)
    head, _, body = svg.partition(">")
    # As large as it was drawn where there is room; on a phone not so small that its text cannot be read.
    width = 4 / 3 * float(re.search(r'width="([\d.]+)pt"', head)[1])  # type: ignore[index]
    head = re.sub(r'\s(width|height|xmlns:xlink|version)="[^"]*"', "", head)
    for colour, variable in _COLOURS.items():
        body = body.replace(colour, variable)
    body = re.sub(r"font-family: [^;]*; ?", "", body)
    body = re.sub(r"\s*\n\s*", " ", body)
    size = f"max-width:{width:.0f}px;min-width:min({width:.0f}px,{LEAST_WIDTH})"
    return f'{head} style="{size}" role="img" aria-label="{label}">{body}'
