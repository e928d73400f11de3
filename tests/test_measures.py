"""KID, precision, recall, density and coverage: fixed numbers, and fid.py on two folders."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from test_fid_cli import write_images

import fid as fid_command
from evaluation.precision_recall import kid, kid_of_subsets, manifold


@pytest.fixture(scope="module")
def sets():
    random = np.random.RandomState(0)
    real = random.randn(400, 16).astype("f4")
    return torch.from_numpy(real), torch.from_numpy((random.randn(300, 16) * 0.9 + 0.2).astype("f4"))


def test_numbers_of_other_code(sets):
    """torchmetrics and torch-fidelity give these numbers; its kernel is in float32."""
    real, generated = sets
    assert kid(real, generated) == pytest.approx(0.1319622, abs=1e-6)
    assert kid(real[:300], generated) == pytest.approx(0.1421984, abs=1e-6)
    assert kid_of_subsets(real, generated, 10, 200) == pytest.approx((0.1464339, 0.0259714), abs=1e-6)
    three, five = manifold(real, generated, 3, 3), manifold(real, generated, 5, 5)
    names = ("precision", "recall", "density", "coverage")
    assert [three[name] for name in names] == pytest.approx([0.893333, 0.5875, 1.571111, 0.855], abs=1e-6)
    assert [five[name] for name in names] == pytest.approx([0.936667, 0.695, 1.542, 0.9475], abs=1e-6)


def test_against_torchmetrics(sets):
    """The unbiased MMD^2 of its kernel distance, on the same features."""
    image = pytest.importorskip("torchmetrics.image.kid")
    real, generated = (points[:300].double() for points in sets)
    found = image.poly_mmd(real, generated, degree=3, gamma=None, coef=1.0)
    assert kid(real, generated) == pytest.approx(float(found), abs=1e-6)


def test_a_set_and_itself(sets):
    """All shares are one; density too, because its balls are open."""
    real = sets[0]
    assert manifold(real, real) == {"precision": 1, "recall": 1, "density": 1, "coverage": 1}
    far = manifold(real, real + 100)
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def run(*arguments, code=0):
    result = CliRunner().invoke(fid_command.main, [str(value) for value in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_two_folders(tmp_path):
    """Every measure, with features that are extracted once and kept for both folders."""
    images, real = write_images(tmp_path / "a", 40), write_images(tmp_path / "b", 50, seed=1)
    options = [f"--images={images}", f"--ref={real}", "--detector=digits", "--device=cpu"]
    more = [f"--feature-cache={tmp_path / 'f.npz'}", f"--json={tmp_path / 'r.json'}"]
    output = run("calc", *options, *more, "--metrics=fid,kid,precision,recall,density,coverage")
    lines = [line for line in output.splitlines() if line.split()[0] in ("FID", "kid", "coverage")]
    assert [line.split()[0] for line in lines] == ["FID", "kid", "coverage"] and "subsets of 40" in lines[1]
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["images"] == 40 and result["ref_images"] == 50
    assert set(result["measures"]) == {"kid", "precision", "recall", "density", "coverage"}
    assert (tmp_path / "f.npz").is_file() and (tmp_path / "f-ref.npz").is_file()
    again = run("calc", *options, *more, "--metrics=kid")
    assert [line for line in again.splitlines() if line.startswith("kid")] == [lines[1]]
    statistics = tmp_path / "ref.npz"
    run("ref", f"--data={real}", f"--dest={statistics}", "--detector=digits", "--device=cpu")
    alone = run("calc", f"--images={images}", f"--ref={statistics}", "--device=cpu")
    assert alone.split("FID ")[1].split()[0] == output.split("FID ")[1].split()[0]
    assert "needs images as --ref" in run("calc", *options[:1], f"--ref={statistics}", "--metrics=kid", code=2)
    assert "unknown 'is'" in run("calc", *options, "--metrics=is", code=2)
    few = write_images(tmp_path / "few", 4)
    assert "need at least 6 images" in run("calc", f"--images={few}", *options[1:], "--metrics=density", code=2)


def test_inspect(tmp_path):
    write_images(tmp_path / "a", 3)
    Image.new("RGB", (8, 4)).save(tmp_path / "a" / "other.jpg")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    output = run("inspect", f"--images={tmp_path / 'a'}")
    assert "4 images" in output and "size: 32x32 (3), 8x4 (1)" in output and "mode: L (3), RGB (1)" in output
    assert "they refuse these" in output and ".txt" in output.split("left out:")[1]
