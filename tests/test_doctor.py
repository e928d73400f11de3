"""The installation check: right on a sound installation, and not on a broken one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from models import create_model
from tools import doctor

REPO = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", doctor.EXPECTED)
def test_the_known_images_are_right(name):
    """iPNDM in float64 with the coefficients of Adams-Bashforth (Zhang & Chen 2023, eq. 10)."""
    net = create_model(name)
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(4)])
    u = torch.linspace(0, 1, 6, dtype=torch.float64)
    sigmas = ((80 ** (1 / 7) + u * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7).tolist()
    x, slopes = x * sigmas[0], []
    weights = ([1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])
    with torch.no_grad():
        for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
            slopes.insert(0, (x - net(x, now)) / now)
            step = weights[min(len(slopes), 4) - 1]
            x = x + (then - now) * sum(w * d for w, d in zip(step, slopes, strict=False))
    half = net.img_resolution // 2
    parts = [x[:, :, a : a + half, b : b + half].mean((1, 2, 3)) for a in (0, half) for b in (0, half)]
    assert (torch.stack(parts, 1) - torch.tensor(doctor.EXPECTED[name])).abs().max() < 1e-3


def test_a_sound_installation(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "AMED_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "tools.doctor"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1] == "all checks passed", done.stdout + done.stderr
    assert all(line[:6].strip() in ("ok", "note") for line in lines[:-1])
    for part in (
        "Python 3",
        f"torch {torch.__version__}",
        "CPU: 1 threads",
        "cache",
        "free",
        "digits on cpu",
        "extra 'text'",
    ):
        assert part in done.stdout, part
    assert list(tmp_path.iterdir()) == []


def test_broken_weights_are_noticed(monkeypatch):
    original = create_model

    def broken(*args, **more):
        net = original(*args, **more)
        weight = dict(net.named_parameters())["model.enc.32x32_conv.weight"]
        weight.data *= 1.5
        return net

    monkeypatch.setattr("models.create_model", broken)
    monkeypatch.setattr(doctor, "devices", lambda: ["cpu"])
    result = CliRunner().invoke(doctor.main)
    assert result.exit_code == 1
    wrong = [line for line in result.output.splitlines() if line.startswith("FAIL")]
    assert len(wrong) == 2 and all("images are off by" in line for line in wrong)
    assert "2 broken: please report" in result.output


def test_what_is_missing_or_raises_is_a_line(monkeypatch, tmp_path):
    wanted = {"": ["torch>=99", "nosuchpackage>=1"], "extra": ["another>=2"]}
    monkeypatch.setattr(doctor, "requirements", lambda: wanted)
    findings = dict((text, verdict) for verdict, text in doctor.check_packages())
    assert any(
        v == "FAIL" and "torch" in t and "older than 99" in t and "nosuchpackage" in t for t, v in findings.items()
    )
    assert any(v == "note" and "pip install -e '.[extra]'" in t for t, v in findings.items())

    def fails():
        yield "ok", "first"
        raise RuntimeError("two\nlines")

    assert doctor.examine(fails, "it") == [("ok", "first"), ("FAIL", "it: RuntimeError: two lines")]


def test_downloads_are_listed(monkeypatch, tmp_path):
    from torch_utils.download import known_sha256

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AMED_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "src" / "ffhq" / "edm-ffhq-64x64-uncond-vp.pkl"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"x" * 100)
    assert any("will be recorded" in text for _, text in doctor.check_places())
    known_sha256(place, pinned=True)
    assert any("as recorded" in text for _, text in doctor.check_places())
    os.utime(place, (1, 1))
    assert any(verdict == "note" and "was changed" in text for verdict, text in doctor.check_places())
