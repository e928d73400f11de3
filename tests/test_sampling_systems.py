"""sample.py: search along the path, and 8-bit networks."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import sample
from torch_utils.images import ImageSource


def run(*arguments):
    return CliRunner().invoke(sample.main, [*map(str, arguments)], catch_exceptions=False)


DIGITS = ["--dataset_name=digits", "--device=cpu", "--solver=euler", "--num_steps=5", "--afs=False"]
SEARCH = ["--search=rollover", "--budget=16", "--candidates=3", "--verifier=classifier"]


def test_search_along_the_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*DIGITS, *SEARCH, "--seeds=0-2")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "samples" / "digits" / "euler_nfe16_rollover"
    record = json.loads((folder / "sampling.json").read_text(encoding="utf-8"))
    assert record["nfe"] == 16 and record["settings"]["search"] == "rollover"
    alone = run(*DIGITS, *SEARCH, "--seeds=2", f"--outdir={tmp_path / 'alone'}")
    assert alone.exit_code == 0, alone.output
    assert (ImageSource(folder).read(2) == ImageSource(tmp_path / "alone").read(0)).all()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--search=rollover", "--candidates=3", "--verifier=classifier"], "--budget goes with --search="),
        (["--budget=20"], "--budget goes with --search="),
        (["--search=quota", "--budget=20"], "needs --candidates=N starting noises and a score"),
        ([*SEARCH[:1], "--budget=4", *SEARCH[2:]], "is too small for 3 starting noises and 4 steps"),
        ([*SEARCH, "--return_inters=True"], "without predictor and --return_inters"),
        (["--quantize=int8", "--amp=bf16"], "--quantize replaces --amp"),
    ],
)
def test_what_is_wrong_is_said(flags, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*DIGITS, "--seeds=0", *flags)
    assert result.exit_code and text in result.output


@pytest.mark.slow
def test_a_network_in_8_bits_is_compiled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, flags in (("eager", []), ("compiled", ["--compile"])):
        result = run(*DIGITS, "--quantize=int8", *flags, "--num_steps=3", "--seeds=0-3", f"--outdir={tmp_path / name}")
        assert result.exit_code == 0, result.output
    both = [[ImageSource(tmp_path / name).read(k).astype(float) for k in range(4)] for name in ("eager", "compiled")]
    assert np.abs(np.subtract(*both)).mean() < 1


def test_quantized_sampling_keeps_its_calibration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, flags in (("float", []), ("first", ["--quantize=int8"]), ("second", ["--quantize=int8"])):
        result = run(*DIGITS, *flags, "--num_steps=3", "--seeds=0-3", f"--outdir={tmp_path / name}")
        assert result.exit_code == 0, result.output
        assert ("calibrating 8-bit layers" in result.output) == (name == "first")
    images = [
        torch.stack([torch.tensor(ImageSource(tmp_path / n).read(k)) for k in range(4)])
        for n in ("float", "first", "second")
    ]
    assert torch.equal(images[1], images[2])
    assert 0 < (images[0].float() - images[1].float()).square().mean().sqrt() / 127.5 < 0.06
    (kept,) = (tmp_path / "src" / "digits").glob("int8-*.json")
    kept.write_text("{}", encoding="utf-8")
    result = run(*DIGITS, "--quantize=int8", "--num_steps=3", "--seeds=9", f"--outdir={tmp_path / 'first'}")
    assert result.exit_code and "is not a calibration of sample.py: delete it" in result.output
