"""The page of an answer: one whole file, drawn in a real browser, readable by all, and safe whatever is named how."""

from __future__ import annotations

import copy
import itertools
import json
import re
from html import unescape
from typing import TYPE_CHECKING, Any

import pytest
from browser import DESK, PHONE, browser

import apex_opt
from apex_opt.errors import InputError, UsageError
from apex_opt.report.html import html_page
from apex_opt.report.layout import Grid, Words

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from apex_opt.commands import Result

pytest.importorskip("vl_convert", reason="the extra `report` is not installed")

MEGABYTE = 1 << 20
SMALL: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "cluster": "2xh100-sxm",
    "trace": "poisson:rate=4,n=40,prompt=256,output=16",
}
HOSTILE = "</script><script>window.broken=1</script><img src=x onerror='window.broken=1'>\u2028&lt;"


@pytest.fixture(scope="module")
def answers(short_rates: None) -> dict[str, Result]:
    return {
        "plan": apex_opt.plan(**SMALL, slo="ttft_p95<=1s", top=3),
        "pareto": apex_opt.pareto(**SMALL, objective="e2e_mean,energy"),
        "simulate": apex_opt.simulate(**SMALL, plan=("tp1", "dp2 tp1")),
        "capacity": apex_opt.capacity(**SMALL, plan="tp1", slo="ttft_p95<=1s", resolution=0.5),
        "place": apex_opt.place(plan="dp2 tp2", model="llama-3.1-8b", cluster="server-8xl40s", busy="node0:7"),
        "infeasible": apex_opt.plan(**SMALL | {"model": "llama-3.1-70b", "cluster": "1xh100-sxm"}),
        "clusters": apex_opt.clusters(),
    }


@pytest.fixture(scope="module")
def pages(answers: dict[str, Result], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    found = {name: folder / f"{name}.html" for name in answers}
    for name, answer in answers.items():
        answer.report(found[name])
    return found


@pytest.fixture(scope="module")
def chrome() -> Iterator[Any]:
    with browser() as opened:
        yield opened


def opened(chrome: Any, path: Path, size: dict[str, int], faults: list[str]) -> Any:
    """A page with its charts drawn; what its console and its network say is kept."""
    page = chrome.new_page(viewport=size)
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda fault: faults.append(str(fault)))
    page.on("request", lambda asked: faults.append(asked.url) if not asked.url.startswith(("file:", "blob:")) else None)
    page.goto(path.as_uri())
    page.evaluate("window.drawn ? window.drawn.then(() => 1) : 0")
    return page


def test_a_page_is_one_small_file_that_tells_what_the_text_tells(
    answers: dict[str, Result], pages: dict[str, Path]
) -> None:
    for name, path in pages.items():
        text = path.read_text()
        assert len(text.encode()) < 5 * MEGABYTE
        outside = re.sub(r"(<script[^>]*>).*?</script>", r"\1", text, flags=re.DOTALL)
        assert not re.search(r"<(?:link|img|iframe|script)\b[^>]*(?:src|href)=", outside), name
        assert "default-src 'none'" in text
    said = unescape(re.sub(r"<[^>]+>", " ", pages["plan"].read_text()))
    best = answers["plan"].best
    assert f"The plan found is {best.plan}, on {best.gpus} GPU" in said
    assert "It is proved that no other plan of the space is better" in said
    assert "Certificate: " in said
    assert all(candidate.plan in said for candidate in answers["plan"].document.candidates)  # type: ignore[union-attr]
    assert all(source in said for source in ("gemm", "measured", "vllm serve"))
    beginnings = {
        "plan": "The plan found is ",
        "pareto": f"{len(answers['pareto'].document.candidates)} plans on the front of e2e_mean against energy, and ",
        "simulate": "Of 2 plans the best is ",
        "capacity": "The plan found is attn(tp1) ffn(tp1) bf16, on 1 GPU. It sustains ",
        "place": "dp2 attn(tp2) ffn(tp2) bf16 is placed on 4 GPUs of server-8xl40s; no placement is better. The ",
        "infeasible": "There is no answer (infeasible): ",
        "clusters": f"{len(apex_opt.clusters().document.clusters)} clusters can be named as --cluster.",
    }
    for name, beginning in beginnings.items():
        found = re.search('<p class="lead">(.*?)</p>', pages[name].read_text())
        assert found is not None
        assert unescape(found[1]).startswith(beginning)
    assert "Feasible would be, fewest GPUs first: --" in unescape(pages["infeasible"].read_text())


def test_all_charts_are_drawn_without_a_word_on_the_console_or_to_the_network(
    chrome: Any, answers: dict[str, Result], pages: dict[str, Path]
) -> None:
    for name, path in pages.items():
        faults: list[str] = []
        page = opened(chrome, path, DESK, faults)
        charts = [chart.title for _, chart in answers[name].charts()]
        assert page.eval_on_selector_all("figure h3", "all => all.map(one => one.textContent)") == charts
        marks = (
            "all => all.map(one => one.querySelectorAll('.mark-group path, .mark-group line, .mark-group text').length)"
        )
        drawn = page.eval_on_selector_all(".drawn", marks)
        assert len(drawn) == len(charts)
        assert all(count > 0 for count in drawn), (name, drawn)
        assert faults == [], name
        page.close()
    names = {name: {chart.name for _, chart in answer.charts()} for name, answer in answers.items()}
    assert {"placement", "memory", "ttft", "tpot", "e2e", "load", "kv", "candidates", "certificate"} <= names["plan"]
    assert "front" in names["pareto"]
    assert {"curve TTFT p95", "ttft", "load"} <= names["capacity"]
    assert {"topology", "placement"} <= names["place"]


def test_pages_fit_a_phone_and_can_be_printed(chrome: Any, pages: dict[str, Path]) -> None:
    for name, path in pages.items():
        page = opened(chrome, path, PHONE, [])
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], name
        beyond = (
            "all => all.filter(one => !one.hasAttribute('tabindex') && one.scrollWidth > one.clientWidth + 1)"
            ".map(one => one.id)"
        )
        assert page.eval_on_selector_all(".drawn", beyond) == [], name
        assert page.pdf()[:5] == b"%PDF-"
        page.emulate_media(media="print")
        assert not page.locator("nav").is_visible()
        page.close()


def test_a_page_is_usable_without_mouse_and_without_sight(chrome: Any, pages: dict[str, Path]) -> None:
    page = opened(chrome, pages["pareto"], DESK, [])
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.title() == "pareto: llama-3.1-8b on 2xh100-sxm-80gb"
    levels = page.eval_on_selector_all("h1,h2,h3", "all => all.map(one => Number(one.tagName[1]))")
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    # A chart has a name, a sentence, and its figures as a table.
    described = page.eval_on_selector_all(
        ".drawn svg.marks", "all => all.map(one => one.querySelector('[aria-label]') !== null)"
    )
    assert all(described)
    assert page.locator("figure").count() == page.locator("figure details table").count()
    unnamed = "all => all.filter(one => !one.closest('label') && !one.labels.length).length"
    assert page.eval_on_selector_all(".vega-bindings input, .vega-bindings select", unnamed) == 0
    ids = page.eval_on_selector_all("[id]", "all => all.map(one => one.id)")
    assert len(ids) == len(set(ids))
    # Keys lead to the answer first, and everywhere it is seen where they are.
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert page.locator("figure summary").first.evaluate("one => {one.focus(); return document.activeElement === one}")
    assert _contrast(page) >= 4.5
    page.close()


def _contrast(page: Any) -> float:
    """The least contrast of any text with the white that it stands on, by WCAG 2.2."""
    colours = page.eval_on_selector_all(
        "h1,h2,h3,p,figcaption,td,th,summary,a:not(.skip),footer,.vega-bindings,.drawn text",
        "all => all.map(one => one.tagName === 'text' ? getComputedStyle(one).fill : getComputedStyle(one).color)",
    )

    def luminance(colour: str) -> float:
        parts = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    return min(1.05 / (luminance(colour) + 0.05) for colour in set(colours) if colour.startswith("rgb("))


def test_choosing_fewer_gpus_leaves_fewer_points_and_a_point_tells_of_itself(
    chrome: Any, pages: dict[str, Path]
) -> None:
    page = opened(chrome, pages["pareto"], DESK, [])
    figure = page.locator("figure", has=page.locator("h3", has_text="e2e_mean against energy"))
    points = figure.locator(".mark-symbol.role-mark path")
    before = points.count()
    chosen = figure.locator(".vega-bindings input")
    chosen.focus()
    page.keyboard.press("ArrowLeft")
    assert 0 < points.count() < before
    points.first.hover()
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert "energy, kJ" in page.locator("#vg-tooltip-element").inner_text()
    page.close()


def test_no_name_can_break_out_of_the_page(chrome: Any, answers: dict[str, Result], tmp_path: Path) -> None:
    answer = answers["plan"]
    plain = copy.deepcopy(answer.to_dict())

    def hostile(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: hostile(each) for key, each in value.items()}
        if isinstance(value, list):
            return [hostile(each) for each in value]
        return f"{value}{HOSTILE}" if isinstance(value, str) and value not in ("optimal", "minimise", "s") else value

    plain = hostile(plain)
    blocks = [
        Words(text=HOSTILE, title=True),
        Words(text=HOSTILE),
        Words(text=HOSTILE, copied=True),
        Grid(title=HOSTILE, heads=(HOSTILE,), rows=((HOSTILE,),), left=frozenset({0})),
    ]
    from apex_opt.report.charts.chosen import charts_of

    path = tmp_path / "hostile.html"
    path.write_text(html_page(plain, blocks, list(charts_of(plain, answer.details())), answer.details()))
    faults: list[str] = []
    page = opened(chrome, path, DESK, faults)
    page.locator("[role=graphics-symbol]").first.hover(force=True)
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert page.locator("#vg-tooltip-element img").count() == 0
    assert page.evaluate("window.broken") is None
    assert page.locator("main img").count() == 0
    assert HOSTILE[:9] in page.locator("h1").inner_text()
    assert json.loads(page.locator("#specs").text_content())
    assert faults == []
    page.close()


def test_a_report_that_cannot_be_written_or_drawn_is_told(
    answers: dict[str, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"report .*cannot be written"):
        answers["clusters"].report(tmp_path / "gone" / "a.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(InputError, match=r"report .*folder\.html: cannot be written \(not a regular file\)"):
        answers["clusters"].report(tmp_path / "folder.html")
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    with pytest.raises(UsageError, match=r"--report: needs vl-convert-python; pip install 'apex-opt\[report\]'"):
        answers["plan"].report(tmp_path / "a.html")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.html"]
