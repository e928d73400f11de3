"""docs/first_steps.ipynb: it runs, and the stored outputs are those of a whole run."""

import json
import re
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[1] / "docs" / "first_steps.ipynb"
CELLS = json.loads(PATH.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
# A shorter training and fewer images, for every day.
SHORTER = {'"pairs": 32': '"pairs": 8', '"val_pairs": 16': '"val_pairs": 4', '"init_pairs": 16': '"init_pairs": 2'}
SHORTER |= {'"total_kimg": 0.32': '"total_kimg": 0.016'}
SHORTER |= {"num=16": "num=4", "num_reference=16": "num_reference=4", "reference_steps=30": "reference_steps=4"}
SHORTER |= {"randn(12,": "randn(2,"}


def outputs(cell):
    """Text and number of pictures that a cell shows."""
    text, pictures = "", 0
    for output in cell["outputs"]:
        assert output["output_type"] != "error", output
        text += "".join(output.get("text", ""))
        pictures += "image/png" in output.get("data", {})
    return text, pictures


def test_stored_outputs():
    assert PATH.stat().st_size < 1_000_000
    cells = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    shown = [outputs(cell) for cell in cells]
    assert sum(pictures for _, pictures in shown) == sum("show(" in code.split("\n\n\n")[-1] for code in CODE) == 4
    rows = re.findall(r"^(\d\.\d{4})  4 evaluations  (.+)$", shown[-2][0], re.MULTILINE)
    assert len(rows) == 5 and rows == sorted(rows)


def test_it_runs(monkeypatch, capsys):
    monkeypatch.chdir(PATH.parent)
    monkeypatch.setenv("AMED_OFFLINE", "1")  # as the first cell sets it
    scope, text = {}, "\n".join(CODE)
    for long, short in SHORTER.items():
        assert len(re.findall(rf"(?<!\w){re.escape(long)}", text)) == 1, long
        text = re.sub(rf"(?<!\w){re.escape(long)}", short, text)
    exec(compile(text, str(PATH), "exec"), scope)
    assert [row["method"] for row in scope["rows"]] == ["euler", "dpmpp", "ipndm", "learned above", "digits-span-4"]
    assert "4 evaluations" in capsys.readouterr().out


@pytest.mark.slow
def test_it_runs_in_jupyter():
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(PATH, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(PATH.parent)}}).execute()
    assert all(outputs(cell) is not None for cell in notebook.cells if cell.cell_type == "code")
