"""sample.py with images: restoration by a network, and inverse problems."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from systems_golden import arrays, cases

import sample
from models import create_model
from models.inputs import draw_inputs
from models.posterior import make_operator
from torch_utils.images import ImageSource, save_image, to_uint8

SETTINGS = ["--solver=dpmpp", "--thresholding=False", "--num_steps=5", "--device=cpu"]


def run(*arguments):
    return CliRunner().invoke(sample.main, [*map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def nafnet(tmp_path_factory) -> Path:
    """A checkpoint of a tiny restoration network with its description."""
    data, case = arrays("mrs/net_nafnet"), cases("mrs/net_nafnet")
    path = tmp_path_factory.mktemp("network") / "naf.safetensors"
    save_file({key.removeprefix("weights/"): v for key, v in data.items() if key.startswith("weights/")}, path)
    config = {"network": case["cls"], **case["kwargs"], "max_sigma": 50}
    path.with_name(path.name + ".json").write_text(json.dumps({"family": "mr", "config": config}), encoding="utf-8")
    return path


@pytest.fixture
def degraded(tmp_path) -> Path:
    """Images of two sizes, in a folder with a subfolder."""
    folder, generator = tmp_path / "degraded", np.random.default_rng(0)
    for name, size in (("a", (12, 10)), ("b/c", (9, 14)), ("d", (12, 10)), ("e", (9, 14)), ("f", (12, 10))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_image(generator.integers(0, 256, (*size, 3), dtype=np.uint8), folder / f"{name}.png")
    return folder


def test_one_result_per_file_under_its_name(nafnet, degraded, tmp_path):
    network = ["--dataset_name=custom", f"--model_path={nafnet}", *SETTINGS]
    for batch in (4, 1):
        result = run(*network, f"--images={degraded}", f"--outdir={tmp_path / str(batch)}", f"--batch={batch}")
        assert result.exit_code == 0, result.output
    inputs, together, alone = (ImageSource(p, uniform=False) for p in (degraded, tmp_path / "4", tmp_path / "1"))
    assert inputs.names == together.names == alone.names
    for index in range(len(inputs)):
        assert together.read(index).shape == inputs.read(index).shape
        difference = together.read(index).astype(int) - alone.read(index)
        assert abs(difference).max() <= 1
    again = run(*network, f"--images={degraded}", f"--outdir={tmp_path / '4'}")
    assert "sampled 0 images (5 skipped)" in again.output
    save_image(np.zeros((12, 10, 3), np.uint8), degraded / "a.png")
    other = run(*network, f"--images={degraded}", f"--outdir={tmp_path / '4'}")
    assert other.exit_code and "inputs_sha256" in other.output


def test_a_part_of_the_files(nafnet, degraded, tmp_path):
    network = ["--dataset_name=custom", f"--model_path={nafnet}", *SETTINGS, f"--images={degraded}"]
    assert run(*network, f"--outdir={tmp_path / 'part'}", "--seeds=1,3").exit_code == 0
    assert ImageSource(tmp_path / "part", uniform=False).names == ["b/c.png", "e.png"]
    result = run(*network, f"--outdir={tmp_path / 'no'}", "--seeds=4-5")
    assert result.exit_code and "file number 5 does not exist" in result.output


def test_inverse_problem_from_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = create_model("digits")
    from solvers import sample as integrate

    truth = integrate(net, draw_inputs(net, range(3))[0], solver="dpmpp", thresholding=False, num_steps=9, afs="data")
    for k, image in enumerate(to_uint8(make_operator("sr:2", 1).forward(truth))):
        (tmp_path / "small").mkdir(exist_ok=True)
        save_image(image, tmp_path / "small" / f"digit{k}.png")
    flags = ["--dataset_name=digits", *SETTINGS, "--afs=data", "--num_steps=9"]
    observed = ["--observe=sr:2", "--observations=small", "--noise_level=0.05"]
    result = run(*flags, *observed, "--outdir=large", "--grid=True")
    assert result.exit_code == 0, result.output
    found = ImageSource(tmp_path / "large")
    assert found.names == ["digit0.png", "digit1.png", "digit2.png"]
    made = torch.from_numpy(np.stack([found.read(k) for k in range(3)])).float() / 127.5 - 1
    assert (make_operator("sr:2", 1).forward(made - truth)).square().mean().sqrt() < 0.08
    assert (tmp_path / "large" / "grid.png").is_file()
    record = json.loads((tmp_path / "large" / "sampling.json").read_text(encoding="utf-8"))
    assert record["settings"]["observe"] == "sr:2" and record["settings"]["noise_level"] == 0.05


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--images=degraded"], "does not restore images; use --observe"),
        (["--observe=sr:2"], "give both --observe, the operator"),
        (["--noise_level=0.1"], "--noise_level has no effect without --observe"),
        (["--images=degraded", "--observe=sr:2", "--observations=degraded"], "give one of them"),
        (["--observe=zoom", "--observations=degraded"], "is not an operator"),
        (["--observe=sr:2", "--observations=degraded", "--predictor_path=1", "--compile"], "leave --compile out"),
    ],
)
def test_what_is_wrong_is_said(flags, text, degraded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("--dataset_name=digits", *SETTINGS, *flags)
    assert result.exit_code and text in result.output
    assert not (tmp_path / "samples").exists()


def test_a_restoration_network_needs_images(nafnet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("--dataset_name=custom", f"--model_path={nafnet}", *SETTINGS)
    assert result.exit_code and "give --images" in result.output
