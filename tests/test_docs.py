"""docs/solvers.md agrees with the code, and the tool that keeps it so works."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image
from test_layout import FLOORS

from benchmarks import pfgmpp, quantized, report_learned_solvers, report_shipped, restoration, sfd
from solvers import SCHEDULES, SOLVERS
from tools import draw_architecture, make_docs
from torch_utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def test_document_is_up_to_date():
    text = make_docs.DOCUMENT.read_text(encoding="utf-8")
    assert make_docs.render(text) == text, "run  python -m tools.make_docs"


def test_flags_are_up_to_date():
    for document, parts in make_docs.DOCUMENTS.items():
        text = document.read_text(encoding="utf-8")
        assert make_docs.render(text, parts) == text, "run  python -m tools.make_docs"
    flags = make_docs.flag_tables()
    assert "| `--scale_dir` | 0.01 |" in flags and "## fid.py calc" in flags


def test_the_tables_of_learned_solvers_follow_from_their_rows():
    networks = {name: report_learned_solvers.read(name) for name in report_learned_solvers.NETWORKS}
    assert all(len(rows) > 100 for rows in networks.values())
    for document, parts in report_learned_solvers.document_parts(networks).items():
        text = document.read_text(encoding="utf-8")
        assert make_docs.render(text, parts) == text, "run  python -m benchmarks.report_learned_solvers"
    text = (ROOT / "benchmarks" / "learned_solvers.md").read_text(encoding="utf-8")
    assert report_learned_solvers.page(networks) == text, "run  python -m benchmarks.report_learned_solvers"


def test_table_has_every_solver_and_option():
    rows = {row.split("|")[1].strip(" `"): row for row in make_docs.solver_table().splitlines()[2:]}
    assert list(rows) == list(SOLVERS)
    for name, solver in SOLVERS.items():
        assert all(f"`{option}=" in rows[name] for option in solver.options)
        assert ("teacher" in rows[name]) == solver.can_teach
        assert ("student" in rows[name]) == solver.can_learn
        assert len(re.findall(r"(?<!\\)\|", rows[name])) == 8
    assert "`max_order=4`" in rows["ipndm"] and "`r=0.5`" in rows["dpm"] and "`thresholding=True`" in rows["dpmpp"]
    assert [rows[name].split("|")[3].strip() for name in ("euler", "heun", "dpmpp")] == ["1", "2", "1-3"]
    assert all(f"`{name}`" in make_docs.schedule_table() for name in SCHEDULES)


def test_stale_document_is_found_and_renewed(tmp_path):
    path = tmp_path / "solvers.md"
    shutil.copy(make_docs.DOCUMENT, path)
    good = path.read_text(encoding="utf-8")
    stale = good.replace("`max_order=4`", "`max_order=9`")
    path.write_text(stale, encoding="utf-8")
    command = [sys.executable, "-m", "tools.make_docs", "--check", "--file", str(path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr.count("\n") == 1 and "stale" in found.stderr
    assert path.read_text(encoding="utf-8") == stale  # --check writes nothing
    renewed = CliRunner().invoke(make_docs.main, ["--file", str(path)])
    assert renewed.exit_code == 0, renewed.output
    assert path.read_text(encoding="utf-8") == good
    assert [entry.name for entry in tmp_path.iterdir()] == ["solvers.md"]


@pytest.mark.parametrize("damage", ["<!-- end: solvers -->", "<!-- generated: schedules -->"])
def test_missing_marker_is_explained(damage):
    text = make_docs.DOCUMENT.read_text(encoding="utf-8")
    with pytest.raises(UserError, match="the document needs one"):
        make_docs.render(text.replace(damage, ""))


def test_missing_document_is_explained(tmp_path):
    found = CliRunner().invoke(make_docs.main, ["--check", "--file", str(tmp_path / "none.md")])
    assert found.exit_code == 2
    assert isinstance(found.exception, SystemExit)  # no traceback
    assert "none.md" in found.output and found.output.count("\n") == 1


def test_the_architecture_is_that_of_the_code(tmp_path):
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    paths = re.findall(r"`([\w/]+(?:\.py|/))`", text)
    assert len(paths) > 30 and [path for path in paths if not (ROOT / path).exists()] == []
    rooms = [tuple(floor) for floor in draw_architecture.ROOMS]
    assert rooms[0] == ("command lines", *FLOORS[-1])
    assert [set(floor) for floor in rooms[:0:-1]] == [set(floor) for floor in FLOORS[:-1]]
    for steps in draw_architecture.JOURNEYS.values():
        for room, file, _ in steps:
            for name in re.findall(r"(?<![\w/])\w+\.py", file):
                assert (ROOT / ("" if room == "command lines" else room) / name).is_file(), (room, name)
    pytest.importorskip("matplotlib")
    draw_architecture.draw(tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as new, Image.open(ROOT / "docs" / "architecture.png") as old:
        assert new.size == old.size


@pytest.mark.parametrize("name", ["README.md", "docs/digits.md", "docs/solvers.md", "docs/flags.md"])
def test_no_placeholder_is_left(name):
    assert "@@" not in (ROOT / name).read_text(encoding="utf-8")


def test_the_tables_of_results_follow_from_their_files():
    own = [(bench.PAGE, bench.document_parts()) for bench in (pfgmpp, quantized, restoration, sfd)]
    for document, parts in [*report_shipped.document_parts().items(), *own]:
        text = document.read_text(encoding="utf-8")
        assert make_docs.render(text, parts) == text, f"{document}: run  python -m benchmarks...., which makes it"


def test_links_between_documents_lead_somewhere():
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
        for link in links:
            if not re.match(r"https?://|#", link):
                assert (path.parent / link.partition("#")[0]).exists(), (path.name, link)


def test_the_index_names_every_page():
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= set(re.findall(r"\(([\w.-]+\.md)\)", text))


def test_readme_is_one_page():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert 100 <= len(lines) <= 150
    assert next(i for i, line in enumerate(lines) if line.startswith("python sample.py")) < 40
