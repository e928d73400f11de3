"""The files that a project is expected to have: they parse, and what they name exists."""

import re
import tomllib
from pathlib import Path

import pytest

from amed import __version__

ROOT = Path(__file__).parents[1]


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_versions_agree():
    assert f"## {__version__}\n" in text("CHANGELOG.md")
    assert f"\nversion: {__version__}\n" in text("CITATION.cff")


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_what_is_named_exists(name):
    content = text(name)
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", content) + re.findall(r"`((?:[\w.]+/)+[\w.]*)`", content):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m ((?:tools|models)\.\w+)", content):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    for constant, path in re.findall(r"`([A-Z]+)` in `([\w/]+\.py)`", content):
        assert f"{constant} = " in text(path), constant


def test_workflows():
    """They parse, and run the commands of CONTRIBUTING."""
    yaml = pytest.importorskip("yaml")
    commands = {}
    for path in (ROOT / ".github" / "workflows").iterdir():
        content = yaml.safe_load(path.read_text())
        steps = [step for job in content["jobs"].values() for step in job["steps"]]
        commands[path.name] = [step["run"] for step in steps if "run" in step]
    assert {"ruff check .", "mypy", "python -m pytest -n auto"} <= set(commands["tests.yml"])
    assert "python -m pytest -n auto -m slow" in commands["slow.yml"]
    hooks = [hook["id"] for repo in yaml.safe_load(text(".pre-commit-config.yaml"))["repos"] for hook in repo["hooks"]]
    assert hooks == ["ruff", "ruff-format", "mypy", "make-docs"]
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["license"] == "Apache-2.0" and citation["preferred-citation"]["year"] == 2024


def test_dockerfile():
    """It installs extras that exist, and runs a tool that exists."""
    content = text("Dockerfile")
    extras = tomllib.loads(text("pyproject.toml"))["project"]["optional-dependencies"]
    assert set(re.search(r"EXTRAS=(\S+)", content)[1].split(",")) <= set(extras)
    assert (ROOT / "tools" / "doctor.py").is_file() and '"tools.doctor"' in content
