"""The public interface has types that mypy accepts, also in a user's own code."""

import tomllib
from pathlib import Path

import pytest

import amed

ROOT = Path(__file__).resolve().parents[1]

USER = """
from typing import Any

import torch

import amed
from sampling.diffusers_scheduler import AMEDScheduler
from solvers import get_schedule

net = amed.create_model("digits")
latents = torch.randn(4, net.img_channels, net.img_resolution, net.img_resolution)
sigmas: torch.Tensor = get_schedule(5, net.sigma_min, net.sigma_max)
images: torch.Tensor = amed.sample(net, latents, solver="heun", sigmas=sigmas)
predictor = amed.load_predictor(amed.find_predictor("digits-span-4"))
rows: list[dict[str, Any]] = amed.compare(net, solvers=["euler"], nfe=4, predictors=[predictor])
count: int = len(AMEDScheduler(predictor))
"""
WRONG = {
    "net.img_channels + ''": "operator",
    "get_schedule('5', 0.002, 80.0)": "arg-type",
    "amed.create_model(5)": "arg-type",
}


def test_public_names_are_typed():
    """What ``amed`` exports is imported for type checkers, under the same names."""
    text = (ROOT / "amed" / "__init__.py").read_text(encoding="utf-8")
    for name, module in amed._EXPORTS.items():
        assert f"\n    from {module} import {name} as {name}\n" in text, name


def test_packages_are_marked():
    """Every package of the wheel has py.typed, which the wheel includes."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert "py.typed" in setup["package-data"]["*"]
    for package in (name for name in setup["packages"] if "." not in name):
        assert (ROOT / package / "py.typed").is_file(), package


@pytest.mark.slow
def test_mypy(tmp_path, monkeypatch):
    """The configured modules have no errors; a user's script has those that it should have."""
    api = pytest.importorskip("mypy.api")
    monkeypatch.chdir(ROOT)
    cache = f"--cache-dir={tmp_path / 'cache'}"
    output, errors, code = api.run([cache])
    assert code == 0, output + errors
    script = tmp_path / "user.py"
    lines = [USER, *WRONG]
    script.write_text("\n".join(lines))
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    output, errors, code = api.run([cache, "--strict", str(script)])
    found = [line.split("[")[-1].rstrip("]") for line in output.splitlines() if "user.py" in line]
    assert sorted(found) == sorted(WRONG.values()), output + errors
