"""The commands and snippets of the pages about other people's programs run."""

import json
import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_k_sampler import span
from toy import ToyNet

import fid as fid_command
import sample as sample_command
import train as train_command
from evaluation.fid import METRICS
from tools import export, share
from training import checkpoint
from training.checkpoint import find_predictor, save_predictor

DOCS = Path(__file__).parents[1] / "docs"


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL)


def run(command, line, script):
    arguments = shlex.split(line.removeprefix(script))
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, f"{line}: {result.output}"
    return result.output


def test_comfyui(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_predictor(span(), "predictor.safetensors")
    (code,) = blocks("comfyui.md", "python")
    exec(code, {"model": ToyNet(), "noise": torch.randn(1, 3, 16, 16, dtype=torch.float64)})
    (lines,) = blocks("comfyui.md", "sh")
    for line in lines.strip().splitlines():
        run(export.main, line, "python -m tools.export")
    assert "def sample_learned" in Path("sampler.py").read_text()


def test_sharing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student = span("full", dataset_name="digits", sigma_min=0.002, sigma_max=80.0)
    save_predictor(student, "exps/00000-digits/predictor-000001.safetensors")
    Path("comparison").mkdir()
    rows = [{"method": "span", "nfe": 4, "fid": 1.5, "images": 5000}]
    Path("comparison/results.json").write_text(json.dumps({"rows": rows, "facts": {}}))
    pack, use = blocks("sharing.md", "sh")
    run(share.main, pack.strip() + " --images=1", "python -m tools.share")
    local, *remote = use.strip().splitlines()
    run(sample_command.main, local.replace("0-15", "0-1") + " --device=cpu", "python sample.py")
    assert len(list(Path("samples").rglob("000001.png"))) == 1
    monkeypatch.setattr(checkpoint, "fetch", lambda address, names: Path("fast-digits/predictor.safetensors"))
    for line in remote:
        address = re.search(r"--predictor_path=(\S+)", line)[1]
        assert find_predictor(address).is_file()


def test_diffusers(tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from diffusers_pipelines import pipeline_folder
    from test_amed_scheduler import make_predictor

    monkeypatch.chdir(tmp_path)
    save_predictor(make_predictor(), "exps/00007-sd/predictor-000001.safetensors")
    text = (DOCS / "diffusers.md").read_text(encoding="utf-8")
    text = text[text.index("## A predictor in a pipeline") :]
    first, loop, saving = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for before, after in (
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", str(pipeline_folder("sd"))),
        ('.to("cuda")', ""),
        ("exps/00007-...", "exps/00007-sd"),
        ("a red fox in the snow", "a b"),
    ):
        assert before in first
        first = first.replace(before, after)
    scope = {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(first, scope)
        assert len(scope["images"]) == 4
        unet = scope["pipe"].unet
        latents = torch.randn(2, 4, 8, 8)
        scope |= {"unet": unet, "text": torch.zeros(2, 8, 8), "latents": latents, "noise": latents.flip(0)}
        exec(loop, scope)
        assert scope["latents"].isfinite().all()
        scope["DiffusionPipeline"] = diffusers.DiffusionPipeline
        scope["pipe"].register_to_config(requires_safety_checker=False)
        exec(saving, scope)
    assert len(scope["scheduler"]) == len(scope["pipe"].scheduler) == 6


def test_measuring(tmp_path, monkeypatch):
    """Thirty images instead of a thousand; measured while sampling and from the folder."""
    monkeypatch.chdir(tmp_path)
    (lines,) = blocks("measuring.md", "sh")
    alone, real, while_sampling, calc, inspect = lines.replace("999", "029").replace("=18", "=3").strip().splitlines()
    assert "ref=digits" in run(sample_command.main, alone + " --device=cpu", "python sample.py")
    run(sample_command.main, real + " --device=cpu", "python sample.py")
    found = [
        [
            line
            for line in run(command, f"{line} --device=cpu", f"python {script}").splitlines()
            if "sampled" not in line
        ]
        for command, line, script in (
            (sample_command.main, while_sampling, "sample.py"),
            (fid_command.main, calc, "fid.py"),
        )
    ]
    measures = [[line for line in lines if line.split()[0] in ("FID", *METRICS)] for lines in found]
    assert measures[0] == measures[1] and len(measures[0]) == len(METRICS)
    assert "30 images" in run(fid_command.main, inspect, "python fid.py")


def test_watching(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (lines,) = blocks("watching.md", "sh")
    command, tensorboard = lines.replace("--total_kimg=1", "--total_kimg=0.008").replace("=16", "=4").splitlines()
    run(train_command.main, command + " --device=cpu", "python train.py")
    assert tensorboard.removeprefix("tensorboard --logdir=") == "exps"
    assert len([*Path("exps").glob("00000-*/events.out.tfevents.*")]) == 1
