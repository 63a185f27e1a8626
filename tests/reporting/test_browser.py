"""The page in a real browser: it renders, sorts, filters, says nothing on the console, asks the network for nothing,
and shows hostile text as text."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import made_up
from selfaug.reporting.compare import Comparison
from selfaug.reporting.places import FailedJob, Found
from selfaug.reporting.write import write_report
from tests.reporting.hostile import ALL, LATEX, hostile_runs

VARIABLE = "SELFAUG_TEST_BROWSER"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chromium-headless-shell")
RUNS = [made_up(plain=True, seed=s) for s in (1, 2, 3)]
POSITIONS = (("input_logits", 0.5), ("output_logits", 0.5), ("attention_q", 2.0))
RUNS += [made_up(position, alpha, s) for position, alpha in POSITIONS for s in (1, 2, 3)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = os.environ.get(VARIABLE) or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no Chromium on this machine: install one (Debian: apt-get install chromium), or set {VARIABLE}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # Chromium's own sandbox needs rights that a container and root have not; the page is one of ours.
        yield driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])


class Opened:
    """A page of a report, with all that it said and asked for while it was open."""

    def __init__(self, browser: Any, path: Path, **settings: Any):
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **settings})
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def labels(self) -> list[str]:
        """Of the rows that show, from the top."""
        heads = self.page.locator("tbody.rows tr:visible th").all()
        return [head.get_attribute("data-v") for head in heads]

    def close(self) -> None:
        self.page.close()
        assert self.said == []
        assert [url for url in self.asked if not url.startswith(("file://", "data:"))] == []
        assert len([url for url in self.asked if url.startswith("file://")]) == 1


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    failed = [FailedJob("selfaug-bad-s1", "data.path=x does not exist.")]
    return write_report(Found(RUNS, failed), tmp_path_factory.mktemp("report"), "Ours").page


@pytest.fixture
def opened(browser, report) -> Iterator[Opened]:
    page = Opened(browser, report)
    yield page
    page.close()


def test_renders(opened):
    page = opened.page
    assert page.title() == "Ours"
    assert page.locator("h2:visible").all_inner_texts()[:2] == ["Results", "Plots"]
    assert page.locator("figure svg").count() == 4
    assert all(box and box["width"] > 300 for box in (svg.bounding_box() for svg in page.locator("figure svg").all()))
    assert "selfaug-bad-s1: data.path=x does not exist." in page.locator(".failed").inner_text()
    assert opened.labels()[0] == "plain LoRA"
    assert page.locator("#count-rows").inner_text() == "4 rows"
    # What stands still while the page and the table scroll.
    assert page.locator("thead tr:last-child th").first.evaluate("e => getComputedStyle(e).position") == "sticky"


def test_sorts_by_click_and_by_keyboard(opened):
    found = Comparison(RUNS)
    values = {row.label: found.value(i, found.task).mean for i, row in enumerate(found.rows)}
    before, best_first = opened.labels(), sorted(values, key=values.__getitem__, reverse=True)
    head = opened.page.get_by_role("columnheader", name="F1 (%)")
    head.get_by_role("button").click()
    assert opened.labels() == best_first
    assert head.get_attribute("aria-sort") == "descending"
    opened.page.keyboard.press("Enter")
    assert opened.labels() == best_first[::-1]
    assert head.get_attribute("aria-sort") == "ascending"
    opened.page.keyboard.press("Space")
    assert opened.labels() == before
    assert head.get_attribute("aria-sort") is None


def test_sorts_by_a_column_where_less_is_better_and_by_name(opened):
    found = Comparison(RUNS)
    drift = {row.label: found.value(i, found.drift).mean for i, row in enumerate(found.rows)}
    opened.page.get_by_role("columnheader", name="KL(base||tuned)").nth(1).get_by_role("button").click()
    assert opened.labels() == sorted(drift, key=drift.__getitem__)
    head = opened.page.get_by_role("columnheader", name="Row")
    head.get_by_role("button").click()
    assert opened.labels() == sorted(drift)
    assert opened.page.locator("[aria-sort]").count() == 1


def test_a_row_without_a_number_is_last(browser, tmp_path):
    runs = [made_up(plain=True, curves={}), made_up("input_logits"), made_up("output_logits", curves={})]
    runs[1].task = runs[1].curves = {}
    opened = Opened(browser, write_report(Found(runs), tmp_path).page)
    for _ in range(2):
        opened.page.get_by_role("columnheader", name="F1 (%)").get_by_role("button").click()
        assert opened.labels()[-1].startswith("position=input_logits")
    opened.close()


def test_filters_rows_and_runs(opened):
    page = opened.page
    page.get_by_label("Filter").first.fill("LOGITS out")
    assert opened.labels() == ["alpha=0.5, position=output_logits"]
    assert page.locator("#count-rows").inner_text() == "1 of 4 rows"
    page.get_by_label("Filter").first.fill("")
    assert len(opened.labels()) == 4
    page.locator("#filter-runs").fill("attention seed 3")
    assert page.locator(".runs > details:visible").count() == 1
    page.locator(".runs > details:visible > summary").click()
    page.locator(".runs > details:visible").get_by_text("Configuration", exact=True).click()
    assert "position: attention_q" in page.locator(".runs pre:visible").inner_text()


def test_hides_columns_and_differences(opened):
    page = opened.page
    shown = page.locator("tbody.rows tr:first-child td:visible").count()
    page.get_by_label("Drift: wikipedia").uncheck()
    assert page.locator("tbody.rows tr:first-child td:visible").count() == shown - 3
    assert page.locator(".gap:visible").count() > 0
    page.get_by_label("differences to plain LoRA").uncheck()
    assert page.locator(".gap:visible").count() == 0


def test_answers_and_tokens_of_a_chosen_run(opened):
    page = opened.page
    page.locator("#sample-run").select_option(label="alpha=0.5, position=output_logits, seed 3")
    wanted = next(run for run in RUNS if run.name == "selfaug-output_logits-0.5-s3")
    assert page.locator(".sample h3").all_inner_texts() == [one["question"] for one in wanted.samples]
    assert page.locator(".sample .pair p").all_inner_texts()[1] == wanted.samples[0]["tuned"]
    panes = page.locator(".pane")
    assert panes.count() == 2
    panes.nth(1).get_by_label("Run").select_option(label="alpha=0.5, position=output_logits, seed 3")
    tokens = panes.nth(1).locator(".text i")
    assert tokens.count() == len(wanted.token_kl["tokens"])
    assert tokens.all_text_contents() == wanted.token_kl["tokens"]
    assert panes.nth(1).locator(".boundary").count() == 1
    text = panes.nth(1).locator(".text")
    text.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert f"{wanted.token_kl['kl'][1]} nats" in panes.nth(1).locator(".readout").inner_text()
    mean = [kl for kl, role in zip(wanted.token_kl["kl"], wanted.token_kl["roles"], strict=True) if role == "question"]
    row = panes.nth(1).locator(".byrole tbody tr", has_text="question")
    assert row.locator("td").all_inner_texts() == [str(len(mean)), f"{sum(mean) / len(mean):.3g}"]


@pytest.mark.parametrize("width", [380, 800, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_every_width_and_both_schemes(browser, report, width, scheme):
    opened = Opened(browser, report, viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    colours = opened.page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    ink, ground = (sum(map(int, colour[4:-1].split(","))) for colour in colours)
    assert (ink < ground) == (scheme == "light")
    opened.close()


def test_hostile_text_is_shown_and_never_run(browser, tmp_path):
    opened = Opened(browser, write_report(hostile_runs(tmp_path / "runs"), tmp_path / "out", f"<b>{LATEX}").page)
    page = opened.page
    shown = ALL.replace("\ud800", "?")
    assert page.locator("h1").inner_text() == f"<b>{LATEX}"
    last = page.locator("#sample-run option").last.get_attribute("value")
    page.locator("#sample-run").select_option(last)
    assert page.locator(".sample .pair p").nth(1).text_content() == shown
    page.locator(".pane select").last.select_option(last)
    assert "window.hacked" in page.locator(".pane .text").last.text_content()
    for summary in page.locator(".runs summary").all():
        summary.click()
    page.locator("tbody.rows tr").last.hover()
    assert page.evaluate("window.hacked") is None
    assert page.locator("main img, main script, main iframe").count() == 0
    opened.close()


def test_the_policy_stops_what_escaping_might_miss(browser, report):
    opened = Opened(browser, report)
    answered: list[str] = []
    opened.page.on("requestfinished", lambda request: answered.append(request.url))
    opened.page.evaluate(
        """() => {
          const script = document.createElement("script");
          script.textContent = "window.hacked = 1";
          document.body.append(script);
          const image = document.createElement("img");
          image.src = "http://127.0.0.1:9/x.png";
          document.body.append(image);
        }"""
    )
    assert opened.page.evaluate("window.hacked") is None
    assert len(opened.said) == 2
    assert all("Content Security Policy" in text for text in opened.said)
    opened.page.close()
    assert answered == []
