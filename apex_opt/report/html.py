"""An answer as one page for a browser, which asks nothing of any network and can be read without its charts.

What users named and files say is untrusted: every text is escaped, and the page's own policy keeps scripts from
fetching anything.
"""

from __future__ import annotations

import json
import re
from html import escape
from typing import TYPE_CHECKING, Any, Final

from apex_opt.report.in_words import in_words
from apex_opt.report.layout import Grid, Words
from apex_opt.report.picture import script

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from apex_opt.report.charts import Chart
    from apex_opt.report.detail import Detail
    from apex_opt.schema import Document

_POLICY: Final = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
_STYLE: Final = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0;font:16px/1.5 system-ui,"Segoe UI","DejaVu Sans",sans-serif;color:#111827;background:#fff}
header,main,footer{max-width:76rem;margin:0 auto;padding:0 1rem}
h1{font-size:1.5rem;line-height:1.25;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.2rem 0 .6rem;border-bottom:1px solid #d1d5db}
h3{font-size:1rem;margin:1.2rem 0 .3rem}
p,li{overflow-wrap:anywhere;max-width:70rem}
a{color:#0b5394}
:focus-visible{outline:3px solid #0b5394;outline-offset:2px}
.skip{position:absolute;left:-99rem}.skip:focus{left:1rem;top:.5rem;background:#fff;padding:.3rem}
nav ul{display:flex;flex-wrap:wrap;gap:.2rem 1rem;padding:0;list-style:none}
.lead{font-size:1.1rem}
.note{border-left:4px solid #92610a;padding-left:.6rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:1rem 2rem}
figure{margin:0;min-width:0}
figcaption{font-size:.9rem;color:#374151}
.drawn{width:100%;overflow-x:auto}
.drawn .vega-embed{width:100%}
.drawn svg{max-width:none}
.vega-bindings{font-size:.9rem;margin:.3rem 0}
.vega-bindings select,.vega-bindings input{font:inherit;max-width:100%}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;margin:.3rem 0 1rem;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding:.3rem 0}
th,td{padding:.2rem .7rem .2rem 0;text-align:right;vertical-align:top;border-bottom:1px solid #e5e7eb}
th.l,td.l{text-align:left}
td.l{overflow-wrap:anywhere;min-width:4rem}
pre{background:#f3f4f6;padding:.7rem;overflow-x:auto;font-size:.85rem}
summary{cursor:pointer}
#vg-tooltip-element{max-width:90vw;overflow-wrap:anywhere}
footer{margin-top:3rem;padding-bottom:2rem;font-size:.85rem;color:#374151}
@media print{
nav,.skip,.vega-bindings,.chart-table,.vega-embed details{display:none}
pre{white-space:pre-wrap;overflow-wrap:anywhere}
.scroll,.drawn{overflow:visible}
table{font-size:.7rem}
figure,tr{break-inside:avoid}
h2,h3{break-after:avoid}
.drawn svg{max-width:100%;height:auto}
.charts{grid-template-columns:1fr 1fr}
}
"""
_LONGEST_DATA: Final = 500_000
_MOST_ROWS: Final = 500
"""Characters of the data and rows of a chart's table that a page has room for."""
_DRAW: Final = """
const specs = JSON.parse(document.getElementById("specs").textContent);
const options = {renderer: "svg", ast: true, actions: {export: true, source: false, compiled: false, editor: false}};
window.drawn = Promise.all(specs.map((spec, place) => vegaEmbed(`#chart-${place}`, spec, options)));
window.drawn.catch((fault) => console.error(fault));
"""


def html_page(
    document: Document,
    blocks: Sequence[Grid | Words],
    charts: Sequence[tuple[str, Chart]],
    details: Sequence[Detail] = (),
) -> str:
    """An answer as a page.

    Parameters
    ----------
    document : as plain data
    blocks : of its page as text, which is told in full
    charts : each with the heading of its section
    details : of the deployments whose runs are told

    Raises
    ------
    UsageError    vl-convert is not installed
    """
    title = _title(document)
    sections = [("The answer", "".join(_answer(document, blocks)))]
    headings = list(dict.fromkeys(heading for heading, _ in charts))
    number = 0
    for heading in headings:
        figures = []
        for chart in (chart for of, chart in charts if of == heading):
            figures.append(_figure(number, chart))
            number += 1
        sections.append((heading, f'<div class="charts">{"".join(figures)}</div>'))
    sections.append(("In full", "".join(_blocks(_without_launch(blocks)))))
    if started := "".join(_launch(document, details)):
        sections.append(("Start it", started))
    sections.append(("What was asked", "".join(_asked(document))))
    links = "".join(f'<li><a href="#s{at}">{escape(name)}</a></li>' for at, (name, _) in enumerate(sections))
    body = "".join(
        f'<section aria-labelledby="s{at}"><h2 id="s{at}">{escape(name)}</h2>{content}</section>'
        for at, (name, content) in enumerate(sections)
    )
    specs = [chart.page_spec() for heading in headings for of, chart in charts if of == heading]
    drawing = ""
    if specs:
        # Vega is under the BSD licence; its notice stays with it.
        told = "/* Vega, Vega-Lite and Vega-Embed: (c) University of Washington Interactive Data Lab, BSD 3-clause */"
        drawing = (
            f'<script type="application/json" id="specs">{_json(specs)}</script>'
            f"<script>{told}{_script_safe(script())}</script><script>{_DRAW}</script>"
        )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f'<a class="skip" href="#s0">To the answer</a><header><h1>{escape(title)}</h1>'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header><main>{body}</main>'
        f"<footer>Made by apex_opt {escape(str(document['version']))}. Times, energies and costs are predicted; how "
        f"good they are is told with the sources of the figures.</footer>{drawing}</body></html>\n"
    )


def fragment(blocks: Sequence[Grid | Words]) -> str:
    """What a page says as HTML, to be shown within another page."""
    return f"<div>{''.join(_blocks(blocks))}</div>"


def _json(value: Any) -> str:
    """Data within a script, whose end it cannot contain; Vega's expressions cannot hold line separators."""
    plain = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return plain.replace("<", "\\u003c").replace("\u2028", " ").replace("\u2029", " ")


def _script_safe(code: str) -> str:
    """A script that does not end before its end."""
    return re.sub(r"</(script)", r"<\\/\1", code, flags=re.IGNORECASE).replace("<!--", "<\\!--")


def _title(document: Document) -> str:
    """What is answered, of what."""
    question = document.get("question") or {}
    what = str(document.get("command") or document["schema"].partition(".")[2].partition("/")[0])
    model = question.get("model", {}).get("name") or document.get("model")
    cluster = question.get("cluster", {}).get("name") if question.get("cluster") else document.get("cluster")
    return what + (f": {model}" if model else "") + (f" on {cluster}" if cluster else "")


def _answer(document: Document, blocks: Sequence[Grid | Words]) -> Iterator[str]:
    """What was found, in sentences; of what only lists what its page says first."""
    first = next((block.text for block in blocks if isinstance(block, Words) and block.text.strip()), "")
    told = (
        " ".join(in_words(document)) or (first if "\n" not in first.strip() else "") or f"Status: {document['status']}."
    )
    yield f'<p class="lead">{escape(told.strip())}</p>'
    transient = document.get("transient")
    of_load = transient.get("said", ()) if isinstance(transient, dict) else ()
    for note in (*(document.get("notes") or ()), *of_load):
        yield f'<p class="note">Note: {escape(str(note))}.</p>'


def _figure(number: int, chart: Chart) -> str:
    """A chart, what it shows, and its figures as a table."""
    rows = chart.rows[:_MOST_ROWS]
    table = _table(Grid(title="", heads=chart.heads, rows=rows, left=frozenset({0})), chart.title)
    if more := len(chart.rows) - len(rows):
        table += f"<p>and {more:,} more, which --format=json has</p>"
    focus = ' tabindex="0" role="region"' if chart.wide else ""
    return (
        f'<figure><h3 id="c{number}">{escape(chart.title)}</h3>'
        f'<div class="drawn" id="chart-{number}"{focus} aria-labelledby="c{number}"></div>'
        f"<figcaption>{escape(chart.says)}</figcaption>"
        f'<details class="chart-table"><summary>{escape(chart.title)} as a table</summary>{table}</details></figure>'
    )


def _table(grid: Grid, named: str = "") -> str:
    """A table; one wider than the page is scrolled by itself, also by keys."""

    def cells(tag: str, texts: Iterable[str]) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        return "".join(
            f"<{tag}{scope}{_side(place, grid)}>{escape(str(text).strip())}</{tag}>" for place, text in enumerate(texts)
        )

    caption = f"<caption>{escape(grid.title)}</caption>" if grid.title else ""
    head = f"<thead><tr>{cells('th', grid.heads)}</tr></thead>" if any(grid.heads) else ""
    rows = "".join(f"<tr>{cells('td', row)}</tr>" for row in grid.rows)
    label = escape(grid.title or named or "Table")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>{caption}{head}'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _side(place: int, grid: Grid) -> str:
    return ' class="l"' if place in grid.left else ""


def _blocks(blocks: Iterable[Grid | Words]) -> Iterator[str]:
    """Tables and paragraphs of a page; lines to copy together."""
    copied: list[str] = []
    for block in (*blocks, Words(text="")):
        if isinstance(block, Words) and block.copied:
            copied.append(block.text)
            continue
        if copied:
            yield f'<pre tabindex="0">{escape(chr(10).join(copied))}</pre>'
            copied = []
        if isinstance(block, Grid):
            yield _table(block)
        elif block.title:
            yield f"<h3>{escape(block.text)}</h3>"
        else:
            # Lines that go on with those before them are broken for a console's width alone.
            lines = re.sub(r"\n\s+", " ", block.text).strip().split("\n")
            yield from (f"<p>{escape(line.strip())}</p>" for line in lines if line.strip())


def _without_launch(blocks: Iterable[Grid | Words]) -> Iterator[Grid | Words]:
    """All but the commands that start plans, which have a section of their own."""
    launching = False
    for block in blocks:
        if isinstance(block, Words) and block.title:
            launching = block.text.startswith("Launch (")
        elif isinstance(block, Grid):
            launching = False
        if not launching:
            yield block


def _launch(document: Document, details: Sequence[Detail]) -> Iterator[str]:
    """Commands that start plans."""
    from apex_opt.schema import to_plain

    own = [(document["best"]["plan"], document["launch"])] if document.get("launch") and document.get("best") else []
    own += [(c["plan"], c["launch"]) for c in document.get("candidates") or () if c.get("launch")]
    found = own or [(detail.plan, to_plain(detail.launch)) for detail in details if detail.launch is not None]
    for plan, launch in found:
        yield f"<h3>{escape(plan)}, {escape(launch['engine'])}</h3>"
        yield from (f"<p>{escape(note)}</p>" for note in launch["notes"])
        lines = []
        for command in launch["commands"]:
            replica = "" if command["replica"] is None else f", replica {command['replica']}"
            lines += [f"# node {command['node']}{replica}", command["text"]]
        yield f'<pre tabindex="0">{escape(chr(10).join(lines))}</pre>'
    if not found:
        yield from (f"<p>{escape(d.plan)}: {escape(d.no_launch)}.</p>" for d in details if d.no_launch)


def _asked(document: Document) -> Iterator[str]:
    """The question in the names and numbers that were understood, and everything told as data."""
    rows = []
    for key, value in (document.get("question") or {}).items():
        facts = value.items() if isinstance(value, dict) else [("", value)]
        rows += [(f"{key} {name}".strip(), _plain(each)) for name, each in facts if each not in (None, [], {})]
    if rows:
        yield _table(Grid(title="", heads=("", ""), rows=tuple(rows), left=frozenset({0, 1})), "What was asked")
    data = json.dumps(document, indent=1)
    if len(data) > _LONGEST_DATA:
        yield "<p>Everything as data is too long for this page: --format=json prints it.</p>"
        return
    yield "<details><summary>Everything as data (JSON)</summary>"
    yield f'<pre tabindex="0">{escape(data)}</pre></details>'


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, dict):
        return " ".join(f"{key}={_plain(each)}" for key, each in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
