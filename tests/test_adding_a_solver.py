"""docs/adding_a_solver.md, followed to the letter in a copy of the code."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy import ToyNet, common

from solvers import Point, Sampler, Solver, State, get_schedule, sample
from torch_utils.tensor_file import read_safetensors

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "adding_a_solver.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The code with the page's file and its import added."""
    root = tmp_path_factory.mktemp("copy")
    for name in ("amed", "evaluation", "models", "sampling", "solvers", "training", "torch_utils", "tools", "docs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for script in ROOT.glob("*.py"):
        shutil.copy(script, root)
    path, code = re.search(r"`(solvers/\w+\.py)`:\n\n```python\n(.*?)```", PAGE, re.DOTALL).groups()
    (root / path).write_text(code, encoding="utf-8")
    path, line = re.search(r"`(solvers/__init__\.py)`.*?:\n\n```python\n(.*?)```", PAGE, re.DOTALL).groups()
    docstring, rest = (root / path).read_text(encoding="utf-8").split("\n\n", 1)
    (root / path).write_text(f"{docstring}\n\n{line}{rest}", encoding="utf-8")
    return root


@pytest.mark.slow
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


def test_the_step_of_the_page():
    """The generator on the page is Heun's method."""
    code = re.search(r"```text\n(def step.*?)```", PAGE, re.DOTALL)[1]
    names = {"Point": Point, "State": State}
    exec(code, names)
    solver = type("Page", (Solver,), {"name": "page", "step": names["step"]})()
    net, x = ToyNet(), common("latents2")
    run = Sampler(net, solver, get_schedule(4, 0.002, 80))
    state = State(x * run.sigmas[0])
    for i in range(run.intervals):
        state = run.advance(state, i)
    torch.testing.assert_close(state.x, sample(net, x, solver="heun", num_steps=4), rtol=0, atol=1e-12)
    assert run.nfe == 6


def documentation(copy, name):
    return (copy / "docs" / f"{name}.md").read_text(encoding="utf-8")


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
