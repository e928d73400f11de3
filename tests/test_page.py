"""The page of results: what it holds, and how it behaves in a headless Chromium."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, find_programs
from test_compare import NOISE, Page, make_row

from tools import page, report
from tools.compare_run import add_differences
from tools.page import Cell, Row, Strip

HOSTILE = '<script>alert("1")</script>\'&$x$ </script>'
METHODS = ["euler", "ipndm", "dpmpp:max_order=2:thresholding=False", HOSTILE]
SEEDS, SIZE = range(10, 16), 8
SIZES = [(width, style) for width in (1366, 390) for style in ("light", "dark")]


def make_rows(methods, nfes=(3, 5), seed=0):
    """Rows of compare.py with random scores of 5 groups."""
    rng = np.random.default_rng(seed)
    rows = [make_row(name, nfe, 20 / nfe + NOISE + rng.normal(size=5)) for name in methods for nfe in nfes]
    return [
        row | {"command": f"python sample.py --solver='{row['method']}' --seeds=0-9", "settings": "rho 7"}
        for row in rows
    ]


def images_of(number, channels=1):
    return np.random.default_rng(number).integers(256, size=[len(SEEDS), SIZE, SIZE, channels], dtype=np.uint8)


def write(folder, rows, baseline=None, pictures=True):
    """index.html of these rows. The plots are those of one method, whose drawing is quick."""
    strips = ""
    if pictures:
        for nfe in (3, 5):
            found = [Strip(name, "FID 1.00", images_of(number), name) for number, name in enumerate(METHODS)]
            strips += page.strips(nfe, [Strip("reference solution", "", images_of(9), None), *found], SEEDS)
    facts = {"command": "python compare.py", "dataset_name": "<b>digits", "network": "ab12" * 16}
    facts |= {"baseline": baseline} if baseline else {}
    drawn = report.plots_html(rows[:2]) if pictures else ""
    path = folder / "index.html"
    path.write_text(report.page_html(rows, facts, ["a note <b>"], drawn, strips), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def rows():
    """Of the last method, a stochastic one, the distances are missing."""
    rows = make_rows(METHODS)
    return [row | {"pixel": None, "pixel_left_out": []} if row["method"] == HOSTILE else row for row in rows]


@pytest.fixture(scope="module")
def path(rows, tmp_path_factory):
    return write(tmp_path_factory.mktemp("page"), rows)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if find_programs() is None:
        if os.environ.get("BROWSER_TESTS") == "required":
            pytest.fail("no Chromium, or no chromedriver")
        pytest.skip("needs Chromium and chromedriver")
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def opened(browser, path):
    """The page in a window of a desktop."""
    browser.show(1366)
    browser.open(path)
    return browser


# --------------------------------------------------------------------------------------------------
# What is written


def test_text_is_escaped(path):
    text = path.read_text(encoding="utf-8")
    found = Page(text)
    tags = [tag for tag, _ in found.tags]
    assert not found.open and tags.count("script") == 2 and "alert" not in "".join(re.findall("<script>.*", text))
    assert found.text.count(HOSTILE) == 2 + 1 + 2 + 2  # in the table, the choice, the commands, the strips
    assert "Samplers on <b>digits" in found.text and "a note <b>" in found.text and report.CHOSEN in found.text
    scores = json.loads(re.search('<script type="application/json">(.*?)</script>', text)[1])
    assert list(scores) == ["fid", "pixel", "feature"]


def test_names_in_the_json_cannot_end_it():
    columns = {"method": "Method", "</script>": "Score"}
    rows = [Row(name, 1, {"</script>": Cell("1", 1.0)}) for name in "ab"]
    text = page.table(columns, rows, page.Differences({"</script>": 2}, lambda i, j, score: None))
    assert text.count("</script>") == 1 and "\\u003c/script>" in text


def test_what_is_missing_has_no_place():
    only_distances = [row | {"fid": None, "fid_left_out": []} for row in make_rows(["euler", "ipndm"])]
    text = report.table_html(only_distances)
    assert "FID" not in text and "Distance (pixels) minus baseline" in text
    text = report.table_html(make_rows(["euler"], nfes=[5]))
    assert "<form" not in text  # nothing to choose
    text = report.page_html(make_rows(["euler"]), {"dataset_name": "digits"}, [], "", "")
    assert "Minus baseline" not in text and "<h2>Plots" not in text and "<section" not in text
    text = report.table_html(make_rows(["euler"]))
    assert 'name="nfe"' in text and 'name="baseline"' not in text and 'name="method"' not in text
    nothing = [{**row, **{score: None for score in report.SCORES}} for row in make_rows(["euler", "ipndm"])]
    assert "baseline" not in report.table_html(nothing) and "json" not in report.table_html(nothing)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_strips_of_all_kinds_of_images(channels):
    text = page.strips(5, [Strip("a", "", images_of(0, channels), "a")], SEEDS)
    assert text.count("<button") == len(SEEDS) and 'width="58" height="8"' in text


def test_the_example_of_the_docs(tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "docs" / "comparing.md").read_text(encoding="utf-8")
    (code,) = re.findall("```python\n(from tools import page.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {"images": np.zeros([8, 4, 4, 3], dtype=np.uint8)})
    found = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert "1.34" in found.text and [tag for tag, _ in found.tags].count("img") == 1


# --------------------------------------------------------------------------------------------------
# In a browser

CONTRASTS = """
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const ground = e => { for (; e; e = e.parentElement) {
  const colour = rgb(getComputedStyle(e).backgroundColor);
  if (colour.length === 3 || colour[3] === 1) return colour; } };
const found = [];
for (const e of document.body.querySelectorAll('*')) {
  const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || ['INPUT', 'SELECT'].includes(e.tagName);
  if (!own || !e.checkVisibility() || e.closest('script, svg')) continue;
  const pair = [light(rgb(getComputedStyle(e).color)), light(ground(e))].sort((a, b) => b - a);
  found.push([(pair[0] + 0.05) / (pair[1] + 0.05), e.outerHTML.slice(0, 80)]);
}
return found.sort((a, b) => a[0] - b[0]);
"""
WIDTHS = "return [document.documentElement.scrollWidth, innerWidth]"
CHOOSE = """const select = document.querySelector('[name=baseline]'); select.value = arguments[0];
select.dispatchEvent(new Event('input', { bubbles: true }));"""


@pytest.mark.parametrize(("width", "style"), SIZES)
def test_it_fits_and_is_legible(browser, path, width, style):
    browser.show(width, style=style)
    browser.open(path)
    whole, window = browser.run(WIDTHS)
    assert whole <= window == width
    browser.run(CHOOSE, "ipndm")
    browser.run("document.querySelectorAll('details').forEach(place => { place.open = true; })")
    whole, _ = browser.run(WIDTHS)
    assert whole <= width
    contrasts = browser.run(CONTRASTS)
    assert len(contrasts) > 50 and contrasts[0][0] >= 4.5, contrasts[:5]
    ground = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(17, 21, 26)"}[style]
    lines = browser.run("const s = document.querySelector('svg.plot'); return s && getComputedStyle(s).fill")
    assert lines is None or lines == browser.run("return getComputedStyle(document.body).color")
    assert browser.messages() == []


def test_forty_methods_fit(browser, tmp_path):
    path = write(tmp_path, make_rows([f"solver{i:02d}:option=value" for i in range(40)]), pictures=False)
    assert "The same seeds" not in path.read_text(encoding="utf-8")
    for width in (1366, 390):
        browser.show(width)
        browser.open(path)
        browser.run(CHOOSE, "solver07:option=value")
        whole, _ = browser.run(WIDTHS)
        assert whole <= width and len(browser.texts("tbody tr")) == 80
    assert browser.messages() == []


def test_a_wide_table_fits(browser, tmp_path):
    columns = {"method": "Method"} | {f"score {i}": f"Score number {i}" for i in range(10)}
    cells = {key: Cell("1234.5678 ± 0.1234", 1.0) for key in columns}
    path = tmp_path / "wide.html"
    path.write_text(page.page("Wide", page.results(page.table(columns, [Row("one", 5, cells)]))), encoding="utf-8")
    browser.show(1366)
    browser.open(path)
    whole, _ = browser.run(WIDTHS)
    assert whole <= 1366 and browser.run("return document.querySelector('table').className") == "sortable tight"


def order(browser):
    """Indices of the lines in the present order, by their first texts."""
    return browser.run("return [...document.querySelectorAll('tbody tr')].map(r => [r.dataset.method, +r.dataset.nfe])")


def test_headings_sort_by_keyboard(opened, rows):
    browser, first = opened, order(opened)
    assert first == [[row["method"], row["nfe"]] for row in rows]
    sorts = "return [...document.querySelectorAll('thead th')].map(head => head.ariaSort)"
    assert browser.run(sorts) == [None] * 9
    browser.run("document.querySelector('thead button').focus()")
    browser.press("Tab", "Tab")  # over NFE to FID
    browser.press("Enter")
    found = sorted(rows, key=lambda row: row["fid"])
    assert order(browser) == [[row["method"], row["nfe"]] for row in found]
    assert browser.run(sorts) == [None, None, "ascending"] + [None] * 6
    assert browser.texts(".status") == ["8 of 8 rows; sorted by FID, ascending"]
    browser.press("Space")
    assert order(browser) == [[row["method"], row["nfe"]] for row in reversed(found)]
    assert browser.run("return document.activeElement.innerText").startswith("FID")
    browser.press("Tab", "Enter", "Enter")  # the hidden differences are skipped
    assert browser.run(sorts)[4] == "descending" and browser.run(sorts)[2] is None
    found = sorted((row for row in rows if row["pixel"] is not None), key=lambda row: -row["pixel"])
    missing = [[HOSTILE, 3], [HOSTILE, 5]]  # always last
    assert order(browser) == [*([row["method"], row["nfe"]] for row in found), *missing]
    browser.click("thead button")
    assert [name for name, _ in order(browser)[::2]] == [HOSTILE, METHODS[2], "euler", "ipndm"]


def test_filters(opened):
    browser = opened
    browser.click("[name=method]")
    browser.press(*"NDM, eul")
    assert [name for name, _ in visible(browser)] == 2 * ["euler"] + 2 * ["ipndm"]
    browser.click("[name=nfe]", 1)
    assert visible(browser) == [["euler", 5], ["ipndm", 5]]
    assert browser.texts(".status") == ["2 of 8 rows"]
    assert [text.split("\n")[0] for text in browser.texts(".strips h3, .strips figcaption")] == [
        *("5 evaluations", "reference solution", "euler", "ipndm")
    ]
    browser.click(".controls button")
    browser.run("return new Promise(done => setTimeout(done))")
    assert len(visible(browser)) == 8 and len(browser.texts(".strips h3")) == 2


def visible(browser):
    shown = "[...document.querySelectorAll('tbody tr')].filter(row => row.checkVisibility())"
    return browser.run(f"return {shown}.map(row => [row.dataset.method, +row.dataset.nfe])")


def test_differences_to_every_baseline_are_those_of_python(opened, rows):
    browser = opened
    assert browser.texts("tbody [data-score]") == []
    for baseline in METHODS:
        browser.run(CHOOSE, baseline)
        expected = []
        for row in add_differences(rows, baseline):
            for score, digits in report.DIGITS.items():
                text = report.with_interval(row, f"{score}_difference", digits, "+")
                own = row["method"] == baseline
                expected.append(("baseline", "quiet") if own and text else (shown(text), mark(row, score)))
        cells = "return [...document.querySelectorAll('tbody [data-score]')].map(c => [c.textContent, c.className])"
        assert browser.run(cells) == [list(cell) for cell in expected]
    assert browser.texts(".status") == [f"8 of 8 rows; row minus {HOSTILE} at the same evaluations"]
    browser.run(CHOOSE, "")
    assert browser.texts("tbody [data-score]") == []


def shown(text):
    """A number as the page writes it."""
    return text.replace("-", "−").replace("± ", "±\u00a0")


def mark(row, score):
    value, half = row[f"{score}_difference"], row[f"{score}_difference_ci95"]
    return "" if value is None else "better" if value + half < 0 else "worse" if value - half > 0 else ""


def test_the_baseline_of_the_command_is_chosen_and_equal_methods_are_not_marked(browser, tmp_path):
    rows = [make_row(name, 5, 10 + NOISE) for name in ("one", "two")]
    browser.show(1366)
    browser.open(write(tmp_path, rows, baseline="one", pictures=False))
    assert browser.texts("tbody [data-score=fid]") == ["baseline", shown("+0.00 ± 0.00")]
    assert browser.run("return document.querySelectorAll('.better, .worse').length") == 0
    browser.run("document.querySelectorAll('thead button')[3].click()")
    words = "2 of 2 rows; sorted by FID minus baseline, ascending; row minus one at the same evaluations"
    assert browser.texts(".status") == [words]
    browser.run(CHOOSE, "")
    assert browser.run("return document.querySelectorAll('[aria-sort]').length") == 0


def test_the_images_of_a_seed_are_enlarged(opened):
    browser = opened
    browser.run("document.querySelectorAll('.seeds button')[2].focus()")
    browser.press("Enter")
    assert browser.texts("dialog h2") == ["Seed 12, 3 evaluations"]
    shown = browser.texts("dialog figcaption")
    assert [text.split("\n")[0] for text in shown] == ["reference solution", *METHODS]
    assert [seed_shown(browser, number) for number in range(5)] == [2] * 5
    browser.press("Right", "Right", "Right", "Right", "Left")
    assert browser.texts("dialog h2") == ["Seed 15, 3 evaluations"] and seed_shown(browser, 4) == 5
    assert browser.run("return document.querySelector('dialog').contains(document.activeElement)")
    browser.press("Right")  # from the last to the first
    browser.click("dialog [data-step='1']")
    assert browser.texts("dialog h2") == ["Seed 11, 3 evaluations"] and seed_shown(browser, 0) == 1
    assert browser.run("return document.activeElement.innerText").startswith("Next")
    browser.press("Escape")
    assert browser.texts("dialog") == []
    where = "const e = document.activeElement; return [e.closest('section').dataset.nfe, e.innerText]"
    assert browser.run(where) == ["3", "11"]
    browser.click(".strips[data-nfe='5'] img", 1)  # in its middle: to the right of three images and a half of a gap
    assert browser.texts("dialog h2") in (["Seed 12, 5 evaluations"], ["Seed 13, 5 evaluations"])
    browser.click("dialog [data-step='0']")
    assert browser.texts("dialog") == [] and browser.run(where)[0] == "5"
    assert browser.messages() == []


def seed_shown(browser, number):
    """Which of the seeds a canvas shows."""
    pixels = browser.run(
        "const canvas = document.querySelectorAll('dialog canvas')[arguments[0]];"
        "return [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]",
        number,
    )
    found = np.array(pixels).reshape(SIZE, SIZE, 4)
    expected = images_of([9, 0, 1, 2, 3][number])
    return next(seed for seed in range(len(SEEDS)) if (found[..., :3] == expected[seed]).all())


def test_a_command_is_copied(opened, rows):
    browser = opened
    browser.click("summary")
    assert browser.texts("tbody code") == [rows[0]["command"]]
    browser.click("tbody .copy")
    wait = "return new Promise(done => { const ask = () => document.querySelector('.copy').innerText === 'Copy' ?"
    browser.run(wait + " setTimeout(ask, 20) : done(); ask(); })")
    assert browser.texts("tbody .copy") == ["Copied"]
    browser.click("[name=method]")
    browser.press("Control+v")
    assert browser.run("return document.querySelector('[name=method]').value") == rows[0]["command"]
