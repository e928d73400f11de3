"""docs/adding_a_solver.md, followed to the letter in a copy of the code."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from torch_utils.tensor_file import read_safetensors

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "adding_a_solver.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The code with the page's file added."""
    root = tmp_path_factory.mktemp("copy")
    for name in ("solvers", "training", "sampling", "evaluation", "models", "torch_utils", "tools", "docs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for script in ROOT.glob("*.py"):
        shutil.copy(script, root)
    path, code = re.search(r"`(solvers/\w+\.py)`:\n\n```python\n(.*?)```", PAGE, re.DOTALL).groups()
    (root / path).write_text(code, encoding="utf-8")
    return root


def test_the_page(copy):
    outputs = {}
    for line in re.search(r"```sh\n(.*?)```", PAGE, re.DOTALL)[1].splitlines():
        command = [sys.executable, *line.split()[1:]]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=environment(), timeout=300)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        outputs[line.split()[1]] = done.stdout
    assert "4 images" in outputs["sample.py"]
    assert len(list((copy / "samples" / "digits" / "ab2_nfe5").rglob("*.png"))) == 4
    assert "ab2" in (copy / "comparison" / "results.csv").read_text()
    (trained,) = (copy / "exps").rglob("predictor-*.safetensors")
    _, metadata = read_safetensors(trained.read_bytes(), trained.name)
    assert json.loads(metadata["config"])["weight"] == 0.9
    assert re.search(r"^\| `ab2` \| Adams-Bashforth on any grid.*`weight=1.0`", documentation(copy, "solvers"), re.M)
    assert re.search(r"^\| `--weight` .*0 is Euler", documentation(copy, "flags"), re.M)
    assert "`ab2`" not in (ROOT / "docs" / "solvers.md").read_text(encoding="utf-8")


def documentation(copy, name):
    return (copy / "docs" / f"{name}.md").read_text(encoding="utf-8")


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
