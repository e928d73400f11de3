"""Pages of results: tables, paired differences, commands, and pictures of the same seeds.

A page is one HTML file. It loads nothing, follows the light or dark style of the system, and fits
a phone. Its look is in page.css. page.js sorts, filters, shows the differences to the baseline that
the reader chooses, copies commands, and enlarges the images of one seed.
"""

import base64
import html
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from evaluation.jackknife import Estimate
from torch_utils.images import image_grid

_GAP = 2  # pixels between the images of a strip
_ON_A_PHONE = 8  # images of a strip that a phone shows; all can be enlarged
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


class Cell(NamedTuple):
    """A cell of a table.

    text: what it shows.
    value: what it is sorted by; None, always last. Default: the text.
    best: whether to mark it. Default False.
    """

    text: str
    value: float | str | None = None
    best: bool = False


@dataclass(frozen=True)
class Row:
    """A line of a table.

    method: name of the line.
    nfe: network evaluations per image. Default None.
    cells: the cells of the other columns, by their keys.
    facts: what unfolds under the name, by headings. Default: nothing.
    commands: what unfolds there with buttons to copy it. Default: none.
    """

    method: str
    nfe: int | None = None
    cells: dict[str, Cell] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    commands: Sequence[str] = ()


@dataclass(frozen=True)
class Differences:
    """Paired differences between the lines of a table. Smaller is better.

    digits: decimals of every score, by the keys of its column.
    estimate: (index of a line, index of another, score) -> the first minus the second, or None.
        It is asked for pairs with the same number of evaluations.
    baseline: method that the reader finds chosen. Default None.
    """

    digits: dict[str, int]
    estimate: Callable[[int, int, str], Estimate | None]
    baseline: str | None = None


@dataclass(frozen=True)
class Strip:
    """The images of some seeds by one method.

    name: the method, or what else made them.
    note: what to write under the name; "" for nothing.
    images: uint8 [N,H,W,C], one per seed.
    method: the method that the filter looks for. None: the strip is always shown.
    """

    name: str
    note: str
    images: np.ndarray
    method: str | None


def page(title: str, *parts: str) -> str:
    """The whole page. parts: HTML, for example of the functions below."""
    style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    body = "\n".join(part for part in parts if part)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>
{style}</style></head><body><main>
<h1>{html.escape(title)}</h1>
{body}
</main>
<dialog aria-labelledby="enlarged"><header><h2 id="enlarged" aria-live="polite"></h2>
<button type="button" data-step="-1">← Previous</button>
<button type="button" data-step="1" autofocus>Next →</button>
<button type="button" data-step="0">Close</button></header><div class="images"></div></dialog>
<script>
{script}</script>
</body></html>
"""


def results(*parts: str) -> str:
    """Puts a table together with what its filter and its baseline act on."""
    return f'<div class="results">{"".join(parts)}</div>'


def table(columns: dict[str, str], rows: Sequence[Row], differences: Differences | None = None) -> str:
    """A table with its controls, for ``results``.

    columns: heading of every column by its key: "method", perhaps "nfe", and those of the cells.
    rows: its lines.
    differences: adds a column for each of its scores. Default None.
    """
    scores = (
        {} if differences is None else {key: digits for key, digits in differences.digits.items() if key in columns}
    )
    heads, plan = "", []
    for key, title in columns.items():
        plan.append((key, title, False))
        heads += _head(html.escape(title), "text" if key == "method" else "")
        if key in scores:
            plan.append((key, f"{title} minus baseline", True))
            heads += _head(f'<span class="unseen">{html.escape(title)}</span> minus baseline', "", " hidden")
    lines = "\n".join(_line(row, plan) for row in rows)
    return (
        f"{_controls(columns, rows, differences if scores else None)}"
        '<p class="status" role="status"></p>'
        f'<table class="sortable" role="table"><thead role="rowgroup"><tr role="row">{heads}</tr></thead>'
        f'<tbody role="rowgroup">\n{lines}\n</tbody></table>'
        + ("" if not scores else _data({key: _pairs(rows, differences, key) for key in scores}))
    )


def _head(content: str, kind: str, more: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<th role="columnheader" scope="col"{kind}{more}><button type="button">{content}</button></th>'


def _line(row: Row, plan: list[tuple[str, str, bool]]) -> str:
    cells = ""
    for key, title, difference in plan:
        label = f' data-label="{html.escape(title)}"'
        if key == "method":
            cells += f'<th role="rowheader" scope="row" data-value="{html.escape(row.method)}">{_name(row)}</th>'
        elif difference:
            cells += f'<td role="cell" data-score="{html.escape(key)}"{label} hidden></td>'
        else:
            cell = Cell(str(row.nfe or ""), row.nfe) if key == "nfe" else row.cells[key]
            value = html.escape(str(cell.value)) if cell.value is not None else html.escape(cell.text)
            text = html.escape(cell.text).replace("± ", "±&nbsp;")
            cells += f'<td role="cell" data-value="{value}"{label}>{f"<b>{text}</b>" if cell.best else text}</td>'
    return f'<tr role="row"{_marks(row.method, row.nfe)}>{cells}</tr>'


def _marks(method: str | None, nfe: int | None) -> str:
    """The attributes that the filter reads."""
    marks = {"method": method, "nfe": nfe}
    return "".join(f' data-{name}="{html.escape(str(value))}"' for name, value in marks.items() if value is not None)


def _breakable(name: str) -> str:
    """A name that may be broken after its colons and commas."""
    return re.sub("([:,])", r"\1<wbr>", html.escape(name))


def _name(row: Row) -> str:
    if not row.facts and not row.commands:
        return _breakable(row.method)
    facts = "".join(f"<p>{html.escape(name)}: {html.escape(text)}</p>" for name, text in row.facts.items() if text)
    commands = "".join(map(command, row.commands))
    more = f'<div class="more"><div>{facts}{commands}</div></div>'
    return f"<details><summary>{_breakable(row.method)}</summary>{more}</details>"


def _controls(columns: dict[str, str], rows: Sequence[Row], differences: Differences | None) -> str:
    methods = list(dict.fromkeys(row.method for row in rows))
    nfes = sorted({row.nfe for row in rows if row.nfe is not None})
    parts = []
    if len(methods) > 1:
        hint = "part of a name, or several: a, b"
        name = html.escape(columns["method"])
        parts.append(f'<label>{name} <input type="search" name="method" placeholder="{hint}" size="28"></label>')
    if len(nfes) > 1 and "nfe" in columns:
        boxes = "".join(f'<label><input type="checkbox" name="nfe" value="{nfe}">{nfe}</label>' for nfe in nfes)
        title = html.escape(columns["nfe"])
        parts.append(f'<span role="group" aria-label="{title}">{title} {boxes}</span>')
    if differences is not None and len(methods) > 1:
        chosen = {differences.baseline: " selected"}
        options = "".join(f"<option{chosen.get(name, '')}>{html.escape(name)}</option>" for name in methods)
        parts.append(
            f'<label>Differences to <select name="baseline"><option value="">none</option>{options}</select></label>'
        )
    if not parts:
        return ""
    return f'<form class="controls" hidden>{"".join(parts)}<button type="reset">Reset</button></form>'


def _pairs(rows: Sequence[Row], differences: Differences, score: str) -> dict:
    """Differences of all pairs of lines: [index, smaller index, value, half the interval]."""
    pairs = []
    for other, index in itertools.combinations(range(len(rows)), 2):
        estimate = differences.estimate(index, other, score) if rows[index].nfe == rows[other].nfe else None
        if estimate is not None:
            numbers = (float(f"{number:.9g}") + 0.0 for number in (estimate.value, estimate.half_width))
            pairs.append([index, other, *numbers])
    return {"digits": differences.digits[score], "pairs": pairs}


def _data(content) -> str:
    text = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json">{text}</script>'


def command(text: str) -> str:
    """A command with a button that copies it."""
    return (
        f'<div class="command"><pre><code>{html.escape(text)}</code></pre>'
        '<button type="button" class="copy">Copy</button></div>'
    )


def facts(entries: dict, commands: Iterable[str] = ("command",)) -> str:
    """A list of names and values. commands: names of the values that are commands."""
    shown = {name: command(str(text)) if name in commands else html.escape(str(text)) for name, text in entries.items()}
    return "<dl>" + "".join(f"<dt>{html.escape(name)}</dt><dd>{text}</dd>" for name, text in shown.items()) + "</dl>"


def picture(png: bytes, alt: str, kind: str = "", more: str = "") -> str:
    """A PNG. kind: class of the <img>. more: further attributes."""
    kind = f' class="{kind}"' if kind else ""
    return f'<img{kind} alt="{html.escape(alt)}"{more} src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def plot(svg: str, title: str) -> str:
    """A drawing of matplotlib, black on a transparent ground, in the colours of the page."""
    needless = (
        r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|\sxmlns(:\w+)?=\"[^\"]*\"|\s(width|height)=\"[\d.]+pt\""
    )
    svg = re.sub(needless, "", svg, flags=re.DOTALL).strip()
    label = f'<svg class="plot" role="img" aria-label="{html.escape(title)}"'
    return svg.replace("<svg", label, 1).replace("#000000", "currentColor")


def strips(nfe: int, found: Sequence[Strip], seeds: Sequence[int]) -> str:
    """The same seeds by several methods, with a button per seed that enlarges its images.

    nfe: network evaluations of these methods.
    found: the methods; their images have one size.
    seeds: [N].
    """
    (_, height, width, _), title = found[0].images.shape, f"{nfe} evaluations"
    enlarged = max(1, 64 // height)
    whole, phone = (count * (width + _GAP) - _GAP for count in (len(seeds), min(len(seeds), _ON_A_PHONE)))
    size = f' width="{whole}" height="{height}"'
    figures = ""
    for strip in found:
        note = f"<small>{html.escape(strip.note)}</small>" if strip.note else ""
        image = picture(_strip(strip.images), strip.name, "small" if height < 128 else "", size)
        caption = f"<figcaption>{_breakable(strip.name)}{note}</figcaption>"
        figures += f"<figure{_marks(strip.method, None)}>{caption}{image}</figure>"
    buttons = "".join(f'<button type="button" aria-label="seed {seed}">{seed}</button>' for seed in seeds)
    look = f"--whole:{whole * enlarged}px;--phone:{phone}/{height};--count:{len(seeds)}"
    return (
        f'<section class="strips" data-nfe="{nfe}" data-size="{width} {height} {_GAP}" style="{look}"><h3>{title}</h3>'
        f'<div class="seeds" role="group" aria-label="Enlarge the images of a seed" hidden><span>Enlarge seed</span>'
        f"<div>{buttons}</div></div>{figures}</section>"
    )


def _strip(images: np.ndarray) -> bytes:
    """PNG of all images side by side; what is between them is transparent."""
    images = images[..., :3] if images.shape[3] > 2 else images[..., :1]
    opaque = np.full_like(images[..., :1], 255)
    parts = [image_grid(part, len(images), _GAP, fill) for part, fill in ((images, 255), (opaque, 0))]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(parts, axis=2)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
