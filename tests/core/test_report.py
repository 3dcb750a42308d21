from __future__ import annotations

import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from soup_xb.core.base.coverage_text import CoverageRow
from soup_xb.core.errors import Problem
from soup_xb.core.run.events import EvalEvent, Event, Notice, RestartEvent, StepEvent
from soup_xb.core.run.folder import RunRecord, open_run_folder
from soup_xb.core.run.report import (
    MAX_POINTS,
    ModuleRow,
    ReportFacts,
    Sample,
    curves_svg,
    figures,
    report_html,
    smoothed,
    thinned,
    write_report,
)

EVIL = '</pre><script>alert("1")</script><img src=x onerror=alert(1)>{{ 7 * 7 }}'
VOID = {"meta", "use", "path", "rect"}


def events(count: int = 30) -> list[Event]:
    steps: list[Event] = [StepEvent(n, 3 / n, 1e-4, 1.0, 9, 10, 0.1) for n in range(1, count + 1)]
    return [
        *steps,
        EvalEvent(10, 1.25, 3.49, 77, 0.5),
        EvalEvent(20, 1.5, 4.48, 77, 0.5),
        RestartEvent(15, 1000, 900, 0.5, 0.75),
        Notice(Problem("a-code", "look at `that`", "soup.yaml:3"), warning=True),
    ]


def record(status: str = "finished", base: str = "org/base", error: str | None = None) -> RunRecord:
    return RunRecord(
        status=status,
        backend="torch",
        base=base,
        config={},
        versions={"torch": "2.13.0"},
        seed=42,
        total_steps=40,
        steps=30,
        started="2026-03-04T10:22:33+00:00",
        version="0.1.0",
        train_seconds=130.0,
        tokens_per_second=1432.7,
        peak_memory_bytes=2**31,
        error=error,
    )


ROWS = [ModuleRow("self_attn.q_proj", 30, 8, 16, 2.0, 276_480), ModuleRow("mlp", 2, 4, 8.5, 2.125, 100)]


def facts(**changes: object) -> ReportFacts:
    values = {"record": record(), "events": events(), "modules": ROWS, "settings": "base: org/base\n"}
    return ReportFacts(**{**values, **changes})


class Page(HTMLParser):
    """Collects elements, attributes and text, and checks that every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_tells_the_run_in_words_and_numbers() -> None:
    page = Page(report_html(facts(samples=[Sample("Who?", "Dunno.", "Soup.")])))
    words = re.sub(r"\s+", " ", page.text)
    for expected in (
        "org/base finished",
        "LoRA fine-tuning on torch, started 4 March 2026, 10:22",
        "3.0000 → 0.1035",
        "30 of 40",
        "2m10s",
        "1,433",
        "2.0 GiB",
        "lowest 1.2500 at step 10",
        "self_attn.q_proj",
        "276.5 K",
        "Who?",
        "Dunno.",
        "Soup.",
        "look at that",
        "soup.yaml:3",
        "torch 2.13.0",
        "seed 42",
        "base: org/base",
    ):
        assert expected.replace(" ", "") in words.replace(" ", ""), expected


def test_the_page_needs_no_network_and_runs_no_script() -> None:
    html = report_html(facts(samples=[Sample(EVIL, EVIL, EVIL)]))
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert "http" not in html
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_text_of_files_and_models_is_escaped_everywhere() -> None:
    html = report_html(
        facts(
            record=record("failed", base=EVIL, error=EVIL),
            events=[*events(), Notice(Problem("x", EVIL, EVIL, EVIL), warning=True)],
            modules=[ModuleRow(EVIL, 1, 1, 1.0, 1.0, 1)],
            settings=EVIL,
            samples=[Sample(EVIL, EVIL, EVIL)],
            coverage=[CoverageRow(EVIL, (EVIL,), EVIL)],
        )
    )
    assert "<script" not in html
    assert "<img" not in html
    page = Page(html)
    assert page.text.count("{{ 7 * 7 }}") >= 10


def test_the_curves_hold_text_and_the_pages_own_colours() -> None:
    svg = curves_svg(events())
    page = Page(svg)
    for word in ("loss", "learning rate", "step", "smoothed", "evaluation", "restart"):
        assert word in page.text
    assert "var(--accent)" in svg
    assert "#a000" not in svg
    assert "xmlns" not in svg
    assert svg == curves_svg(events())


def test_a_run_without_steps_or_with_lost_losses_still_has_a_page() -> None:
    assert "<svg" not in report_html(facts(events=[], modules=[]))
    lost = [StepEvent(n, math.nan, 1e-4, math.nan, 9, 10, 0.1) for n in (1, 2)]
    assert "<svg" not in report_html(facts(events=lost))
    half = [*lost, StepEvent(3, 1.0, 0.0, 1.0, 9, 10, 0.1), EvalEvent(3, math.inf, math.inf, 1, 0.1)]
    assert "<svg" in report_html(facts(events=half))


def test_the_module_table_tells_what_is_adapted_and_what_is_not() -> None:
    rows = [
        CoverageRow("auto", ("q_proj in layers 0-3 (4)",)),
        CoverageRow("experts", ("not adapted",), "a `cure`"),
    ]
    page = Page(report_html(facts(coverage=rows)))
    for words in ("auto", "q_proj in layers 0-3 (4)", "experts", "not adapted", "a cure"):
        assert words in page.text
    assert "target or part" not in report_html(facts())


def test_a_repeated_notice_is_shown_once() -> None:
    twice = [*events(), Notice(Problem("a-code", "look at `that`", "soup.yaml:3"), warning=True)]
    assert report_html(facts(events=twice)).count("look at ") == 1


def test_the_strip_has_the_first_and_the_last_losses() -> None:
    strip = {figure.label: figure.value for figure in figures(facts())}
    last = sum(3 / n for n in (28, 29, 30)) / 3
    assert strip["Loss"] == f"3.0000 → {last:.4f}"
    assert strip["Evaluation loss"] == "1.5000"
    assert strip["Adapter"] == "276.6 K"


def test_a_long_run_is_thinned_and_keeps_its_spikes() -> None:
    points = [(n, 1.0) for n in range(50_000)]
    points[31_234] = (31_234, 99.0)
    few = thinned(points, MAX_POINTS)
    assert len(few) <= MAX_POINTS
    assert (31_234, 99.0) in few
    assert few == sorted(few)
    assert len(report_html(facts(events=events(50_000)))) < 600_000


def test_smoothing_keeps_a_level_and_follows_a_slope() -> None:
    assert [value for _, value in smoothed([(n, 2.0) for n in range(200)])] == pytest.approx([2.0] * 200)
    slope = smoothed([(n, float(n)) for n in range(200)])
    assert [value for step, value in slope[:180]] == pytest.approx([float(step) for step, _ in slope[:180]])


@pytest.mark.parametrize(
    ("base", "shown"),
    [("org/base", "org/base"), ("/home/me/models/tiny", "tiny"), ("./tiny", "tiny"), ("tiny", "tiny")],
)
def test_the_title_names_a_hub_id_in_full_and_a_folder_by_its_name(base: str, shown: str) -> None:
    html = report_html(facts(record=record(base=base)))
    assert f"<title>{shown} · finished</title>" in html


def test_the_report_is_written_into_the_run_folder(tmp_path: Path) -> None:
    with open_run_folder(tmp_path / "out") as folder:
        assert write_report(folder, facts()) == folder.report
        assert folder.report.read_text("utf-8") == report_html(facts())
    assert write_report(tmp_path, facts()) == tmp_path / "report.html"


def test_without_matplotlib_the_page_says_that_it_has_no_curves() -> None:
    program = (
        "import sys, runpy; from soup_xb.core.run.report import report_html\n"
        "sys.modules['matplotlib'] = None\n"
        "page = report_html(runpy.run_path(sys.argv[1])['facts']())\n"
        "print('<svg' not in page and 'no curves' in page)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, __file__], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "True", done.stderr


def test_the_display_is_never_touched() -> None:
    program = (
        "import sys, runpy; from soup_xb.core.run.report import report_html\n"
        "report_html(runpy.run_path(sys.argv[1])['facts']())\n"
        "print([name for name in sys.modules if name in ('tkinter', 'matplotlib.pyplot')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, __file__], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr
