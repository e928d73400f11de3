"""tools/train_denoiser.py on a handful of made-up images: what it writes, resuming, several processes, mistakes."""

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from models.edm import load_edm_network
from tools import train_denoiser
from torch_utils import distributed

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"model_channels": 8, "channel_mult": "1,2", "attn": "", "batch": 16, "device": "cpu"}


def write_images(path, labels=False, shape=(16, 16), count=64):
    """A zip of grey images, black with one bright block each; returns them as float64 in [-1, 1]."""
    rng = np.random.RandomState(0)
    images = np.zeros((count, *shape), dtype=np.uint8)
    with zipfile.ZipFile(path, "w") as archive:
        names = [f"img{k:03d}.png" for k in range(count)]
        for k, name in enumerate(names):
            top, left = rng.randint(0, shape[0] - 4), rng.randint(0, shape[1] - 4)
            images[k, top : top + 4, left : left + 4] = rng.randint(100, 256)
            buffer = io.BytesIO()
            Image.fromarray(images[k]).save(buffer, format="PNG")
            archive.writestr(name, buffer.getvalue())
        if labels:
            archive.writestr("dataset.json", json.dumps({"labels": [[name, k % 3] for k, name in enumerate(names)]}))
    return images / 127.5 - 1


def arguments(**options):
    return [f"--{name}={value}" for name, value in {**SMALL, **options}.items()]


def run(launcher, **options):
    command = [sys.executable, "-m", *launcher, *arguments(**options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def invoke(**options):
    return CliRunner().invoke(train_denoiser.main, arguments(**options))


def only(folder, pattern):
    (path,) = folder.glob(pattern)
    return path


def test_command_line_trains_saves_and_resumes(tmp_path):
    images = write_images(tmp_path / "data.zip", labels=True)
    out = tmp_path / "run"
    common = {"data": tmp_path / "data.zip", "outdir": out, "cond": True}
    done = run(["tools.train_denoiser"], **common, total_kimg=0.08, grid=True)
    assert done.returncode == 0, done.stderr
    snapshot = only(out, "network-snapshot-*.safetensors")
    net = load_edm_network(snapshot)
    assert (net.img_resolution, net.img_channels, net.label_dim) == (16, 1, 3)
    assert net.data_mean.shape == (1, 16, 16)
    np.testing.assert_allclose(net.data_mean[0], images.mean(axis=0), atol=1e-6)
    assert float(net.data_std) == pytest.approx(np.sqrt(images.var(axis=0).mean()), rel=1e-6)
    with Image.open(only(out, "grid-*.png")) as grid:
        assert grid.mode == "L" and grid.size == (10 * 18 - 2, 10 * 18 - 2)
    assert json.loads((out / "training_options.json").read_text())["model_channels"] == 8
    assert torch.load(out / "training-state.pt", weights_only=True)["it"] == 5
    assert not list(out.glob("*.tmp"))

    again = invoke(**common, total_kimg=0.16, grid=False)  # without --resume nothing is overwritten
    assert again.exit_code == 2
    assert "already holds a run" in again.output and again.output.count("\n") == 1
    assert torch.load(out / "training-state.pt", weights_only=True)["it"] == 5

    before = {name: value.clone() for name, value in net.state_dict().items()}
    more = invoke(**common, total_kimg=0.16, grid=False, resume=True)
    assert more.exit_code == 0, more.output
    assert torch.load(out / "training-state.pt", weights_only=True)["it"] == 10
    after = load_edm_network(snapshot).state_dict()
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


def settings(tmp_path, out, **more):
    config = {**train_denoiser.ARCHITECTURES["ddpmpp"], "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1}
    return {
        **{
            "data": tmp_path / "data.zip",
            "outdir": out,
            "net_config": {**config, "attn_resolutions": [], "dropout": 0.0},
        },
        **{"total_kimg": 0.128, "minutes": 0, "batch": 16, "lr": 2e-3, "warmup_kimg": 0.01, "ema_kimg": 0.05},
        **{"p_mean": -1.2, "p_std": 1.2, "amp": "none", "channels_last": False, "xflip": True, "cond": False},
        **{"seed": 3, "snap": 0.01, "grid": False, "resume": False, "device": torch.device("cpu"), **more},
    }


def test_broken_run_continues_as_if_unbroken(tmp_path, monkeypatch):
    write_images(tmp_path / "data.zip")
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    train_denoiser.train(**settings(tmp_path, tmp_path / "whole"))
    original, calls = train_denoiser.edm_loss, []

    def failing(*args):
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(train_denoiser, "edm_loss", failing)
    with pytest.raises(KeyboardInterrupt):
        train_denoiser.train(**settings(tmp_path, tmp_path / "broken"))
    monkeypatch.setattr(train_denoiser, "edm_loss", original)
    train_denoiser.train(**settings(tmp_path, tmp_path / "broken", resume=True))
    whole, broken = (
        torch.load(tmp_path / name / "training-state.pt", weights_only=True) for name in ("whole", "broken")
    )
    assert whole["it"] == broken["it"] == 8
    for part in ("net", "ema"):
        assert all(torch.equal(value, broken[part][name]) for name, value in whole[part].items())


def test_processes_share_the_batches_of_one(monkeypatch):
    images = np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1)
    batches = train_denoiser.Batches(images, None, batch=6, seed=0, xflip=False)

    def drawn(it, rank, world):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: world)
        return ((batches.get(it, None, "cpu")[0].flatten() + 1) * 127.5).round().int().tolist()

    whole = [drawn(it, 0, 1) for it in range(10)]
    for it in range(10):
        assert sorted(drawn(it, 0, 2) + drawn(it, 1, 2)) == sorted(whole[it])
    stream = sum(whole, [])
    assert all(sorted(stream[start : start + 20]) == list(range(20)) for start in (0, 20, 40))  # whole epochs
    assert stream[:20] != stream[20:40]


def test_two_processes(tmp_path):
    write_images(tmp_path / "data.zip")
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tools.train_denoiser"]
    done = run(launcher, data=tmp_path / "data.zip", outdir=tmp_path / "run", total_kimg=0.064, grid=False)
    assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "run" / "training-state.pt", weights_only=True)
    assert state["it"] == 4
    assert all(torch.isfinite(value).all() for value in state["net"].values())
    assert load_edm_network(only(tmp_path / "run", "network-snapshot-*.safetensors")).label_dim == 0


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        ({}, {"cond": True}, "has no labels"),
        ({"shape": (16, 24)}, {}, "square"),
        ({}, {"resume": True}, "--resume: there is no"),
        ({}, {"channel_mult": "1,x"}, "--channel_mult=1,x"),
        ({}, {"device": "tpu9"}, "--device=tpu9"),
        ({}, {"lr": 0}, "--lr"),
        ({}, {"data": "no-such.zip"}, "no-such.zip"),
    ],
)
def test_mistakes_are_explained(tmp_path, make, options, text):
    write_images(tmp_path / "data.zip", count=8, **make)
    result = invoke(**{"data": tmp_path / "data.zip", "outdir": tmp_path / "run", "total_kimg": 0.016, **options})
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)  # no traceback
    assert text in result.output
    assert "Error: " in result.output.strip().splitlines()[-1]
    assert not list((tmp_path / "run").glob("network-*"))
