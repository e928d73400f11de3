"""Installing: the package amed, our packages beside others of the same names, console commands."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import amed
from amed import commands

ROOT = Path(__file__).resolve().parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.fixture
def edm(tmp_path):
    """A folder that has packages of the same names, like a checkout of EDM."""
    for package in ("torch_utils", "training", "models"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "torch_utils" / "persistence.py").write_text("HERE = 'edm'\n")
    (tmp_path / "torch_utils" / "errors.py").write_text("HERE = 'edm'\n")
    return tmp_path


def python(edm: Path, code: str) -> subprocess.CompletedProcess:
    """Runs code in that folder, which is first on the path; ours is behind it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], cwd=edm, env=environment, capture_output=True, text=True)


def test_ours_are_found_beside_those_of_edm(edm):
    code = (
        "import amed; from torch_utils.errors import UserError; import torch_utils.persistence as theirs;"
        "import amed.torch_utils.errors as same, torch_utils.errors as plain;"
        "print(amed.__version__, theirs.HERE, same is plain, UserError is amed.torch_utils.errors.UserError)"
    )
    done = python(edm, code)
    assert done.stdout.split() == [amed.__version__, "edm", "True", "True"], done.stderr


def test_packages_that_came_before_are_named(edm):
    done = python(edm, "import torch_utils.persistence\nimport amed")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: 'torch_utils' was imported from {edm}") and "import amed before it" in last
    assert python(edm, "import torch_utils.persistence as p; print(p.HERE)").stdout.strip() == "edm"


def test_every_package_of_ours_brings_amed():
    for room in set(amed.ROOMS) - {"torch_utils"}:
        assert "\nimport amed" in (ROOT / room / "__init__.py").read_text(encoding="utf-8"), room


def test_names_of_the_package():
    for name in amed.__all__:
        assert getattr(amed, name) is not None
    assert set(amed.__all__) <= set(dir(amed))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        amed.nothing  # noqa: B018


def test_console_commands():
    entries = dict(re.findall(r'^(amed-[\w-]+) = "amed\.commands:(\w+)"', PROJECT, re.MULTILINE))
    assert len(entries) >= 10
    for name, target in entries.items():
        assert callable(getattr(commands, target)) and name == f"amed-{target.replace('_', '-')}"
    done = subprocess.run(
        [sys.executable, "-c", "from amed.commands import sample; sample()", "--help"],
        **{"cwd": ROOT, "capture_output": True, "text": True},
    )
    assert done.returncode == 0 and done.stdout.startswith("Usage: amed-sample"), done.stderr


@pytest.mark.slow
def test_the_wheel(tmp_path, edm):
    """It holds what the commands need, and works beside the checkout of EDM."""
    build = ["wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path / "wheel")]
    subprocess.run([sys.executable, "-m", "pip", *build], cwd=ROOT, check=True)
    (wheel,) = (tmp_path / "wheel").glob("amed_solver-*.whl")
    assert f"-{amed.__version__}-" in wheel.name
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    environment = os.environ | {"PYTHONPATH": str(site)}
    flags = ["--dataset_name=digits", "--solver=euler", "--num_steps=3", "--seeds=0-1", "--device=cpu"]
    for code in (
        "from amed.commands import sample; sample()",
        "from solvers import sample; import torch_utils.persistence",
        "from tools import page; assert 'aria-sort' in page.page('results')",
        "import runpy; runpy.run_module('tools.doctor', run_name='__main__')",
    ):
        arguments = [*flags, f"--outdir={tmp_path / 'out'}"] if "sample()" in code else []
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, cwd=edm, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (code, done.stdout, done.stderr)
    assert len(list((tmp_path / "out").rglob("*.png"))) == 2
