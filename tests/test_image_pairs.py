"""PSNR, SSIM and LPIPS of two folders: values of scikit-image, and mistakes."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import fid
from evaluation.image_pairs import _lpips_network, compare_pairs, luma, psnr, ssim

# scikit-image 0.26: peak_signal_noise_ratio(data_range=255) and structural_similarity(
# data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1);
# for y of the images of rgb2ycbcr.
EXPECTED = {
    ("rgb", 0): (22.62876270491445, 0.9679528611313492),
    ("rgb", 3): (22.72624426163857, 0.9707797917830554),
    ("y", 0): (27.41191041172496, 0.9689578420058609),
    ("y", 3): (27.547335379885194, 0.9692254367477676),
}


def made(channels=3):
    """Two deterministic images uint8 [H,W,C]."""
    rng = np.random.RandomState(7)
    image = rng.randint(0, 256, (19, 23, channels))
    other = np.clip(image + 20 * rng.randn(*image.shape), 0, 255)
    return image.astype(np.uint8), other.astype(np.uint8)


def folders(tmp_path, first, second):
    for name, images in (("first", first), ("second", second)):
        for file, image in images.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.squeeze(image)).save(path)
    return str(tmp_path / "first"), str(tmp_path / "second")


@pytest.mark.parametrize(("channels", "crop"), EXPECTED)
def test_scores_are_those_of_scikit_image(tmp_path, channels, crop):
    image, other = made()
    both = folders(tmp_path, {"set/a.png": image}, {"a.bmp": other})  # a folder around all images does not count
    found = compare_pairs(*both, channels=channels, crop=crop)
    assert found.names == ["set/a"]
    assert found.means() == pytest.approx(dict(zip(("psnr", "ssim"), EXPECTED[channels, crop], strict=True)), rel=1e-9)


def test_grey_images_are_images_of_equal_channels(tmp_path):
    image, other = made(channels=1)
    as_grey = compare_pairs(*folders(tmp_path / "grey", {"a.png": image}, {"a.png": other}))
    as_rgb = compare_pairs(*folders(tmp_path / "mixed", {"a.png": image}, {"a.png": other.repeat(3, 2)}))
    assert as_grey.means() == pytest.approx(as_rgb.means(), rel=1e-12)
    grey = torch.tensor(image).permute(2, 0, 1).double()
    assert torch.equal(luma(grey), grey)


def test_equal_images():
    image = torch.tensor(made()[0]).permute(2, 0, 1)[None].double()
    assert psnr(image, image) == float("inf") and ssim(image, image) == 1


def test_command(tmp_path):
    image, other = made()
    first, second = folders(tmp_path, {"a.png": image, "b.png": image}, {"b.png": image, "a.png": other})
    given = ["pairs", f"--images={first}", f"--ref={second}", "--metrics=ssim", f"--json={tmp_path / 'x.json'}"]
    done = CliRunner().invoke(fid.main, given)
    assert done.exit_code == 0, done.output
    mean = (EXPECTED["rgb", 0][1] + 1) / 2
    assert done.stdout == f"SSIM {mean:.4f} images=2 channels=rgb crop=0\n"
    record = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert record["names"] == ["a", "b"] and record["scores"]["ssim"][1] == 1


@pytest.mark.parametrize(
    ("first", "second", "more", "text"),
    [
        (["a.png", "b.png"], ["a.png"], [], "first: 1 of 2 images have no partner of the same name in"),
        (["a.png"], ["a.png", "c.png"], [], "second: 1 of 2 images have no partner of the same name in"),
        (["a.png", "a.bmp"], ["a.png"], [], "a.bmp and a.png have the same name without extension"),
        (["a.png"], ["a.png"], ["--metrics=mse"], "metrics=mse: choose from psnr, ssim, lpips"),
        (["a.png"], ["a.png"], ["--metrics=,"], "choose from psnr, ssim, lpips"),
        (["a.png"], ["a.png"], ["--crop=10"], "crop=10 leaves nothing of"),
        (["a.png"], ["a.png"], ["--crop=5"], "SSIM needs images of at least 11x11 pixels"),
        (["a.png"], ["a.png"], ["--metrics=lpips"], "LPIPS needs its package: pip install lpips"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, monkeypatch, first, second, more, text):
    monkeypatch.setitem(sys.modules, "lpips", None)
    both = folders(tmp_path, dict.fromkeys(first, made()[0]), dict.fromkeys(second, made()[1]))
    done = CliRunner().invoke(fid.main, ["pairs", f"--images={both[0]}", f"--ref={both[1]}", *more])
    assert done.exit_code and text in done.output and "Traceback" not in done.output


def test_pairs_of_unequal_sizes(tmp_path):
    image, other = made()
    done = folders(tmp_path, {"a.png": image}, {"a.png": other[:12]})
    text = CliRunner().invoke(fid.main, ["pairs", f"--images={done[0]}", f"--ref={done[1]}"]).output
    assert "a.png has 23x19 pixels" in text and "23x12: pairs need one size" in text


def test_lpips_gets_rgb_images_from_minus_one_to_one(tmp_path, monkeypatch):
    seen = []

    class Network(torch.nn.Module):
        def forward(self, x, y):
            seen.append((x, y))
            return (x - y).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=lambda net, verbose: Network()))
    _lpips_network.cache_clear()
    black, white = np.zeros((12, 12, 1), np.uint8), np.full((12, 12, 1), 255, np.uint8)
    both = folders(tmp_path, {"a.png": black}, {"a.png": white})
    assert compare_pairs(*both, metrics=["lpips"], channels="y").means() == {"lpips": 2.0}
    x, y = seen[0]
    assert x.shape == (1, 3, 12, 12) and float(x.max()) == -1 and float(y.min()) == 1
    _lpips_network.cache_clear()
