"""The embedded digit classifier, and which files are accepted as detectors."""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from evaluation import detectors
from evaluation.detectors import (
    ARCHITECTURES,
    ConvClassifier,
    load_classifier,
    load_detector,
    save_classifier,
)
from torch_utils.errors import UserError
from torch_utils.images import ImageSource, load_array
from torch_utils.remote import cache_dir

DIGITS = Path(__file__).parent / "golden" / "digits" / "test-256.zip"


@pytest.fixture(scope="module")
def digits():
    return torch.from_numpy(load_array(DIGITS))


class Brightness(torch.nn.Module):
    """Stands in for Inception: the channel means, halved unless features are asked for."""

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        means = img.float().mean(dim=[2, 3])
        return means if return_features else means / 2


@pytest.fixture()
def script(tmp_path):
    path = tmp_path / "brightness.pt"
    torch.jit.script(Brightness()).save(str(path))
    return path


def test_embedded_classifier_reads_digits(digits):
    model, metadata = load_classifier(
        Path(__file__).parents[1] / "models" / "pretrained" / "digits-features.safetensors"
    )
    labels = torch.tensor(ImageSource(DIGITS).labels)
    with torch.inference_mode():
        hits = (model(digits.float() / 255).argmax(1) == labels).float().mean()
    assert hits >= 0.98
    assert float(metadata["test_accuracy"]) >= 0.99


def test_digit_features_do_not_depend_on_the_batch(digits):
    detector = load_detector("digits")
    whole = detector(digits[:64])
    assert whole.shape == (64, detector.feature_dim) and detector.feature_dim == 64
    parts = torch.cat([detector(part) for part in digits[:64].split(7)])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    head = detector._model.head(whole)  # the features are those before the last layer
    torch.testing.assert_close(head, detector._model(digits[:64].float() / 255))


def test_images_that_do_not_suit_are_errors():
    detector = load_detector("digits")
    with pytest.raises(UserError, match="28x28 pixels.*32x32"):
        detector(torch.zeros([1, 1, 28, 28], dtype=torch.uint8))
    with pytest.raises(UserError, match="a.png: RGB.*grey-scale"):
        detector.check((3, 32, 32), "a.png")
    with pytest.raises(ValueError, match="uint8"):
        detector(torch.zeros([1, 1, 32, 32]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_classifier_file_round_trip(architecture, tmp_path):
    torch.manual_seed(0)
    model = ARCHITECTURES[architecture](3, 16, 5, feature_dim=12, width=4).eval()
    save_classifier(model, tmp_path / "own.safetensors", seed=7)
    detector = load_detector(tmp_path / "own.safetensors")
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16), dtype=np.uint8))
    torch.testing.assert_close(detector(images), model.features(images.float() / 255).detach())
    assert detector.name.startswith("own-") and len(detector.digest) == 64
    assert load_classifier(tmp_path / "own.safetensors")[1]["seed"] == "7"
    assert list(tmp_path.iterdir()) == [tmp_path / "own.safetensors"]


def test_a_classifier_of_unknown_architecture_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    config = json.dumps(ConvClassifier(1, 8, 2, 2, 4).config)
    save_file({"x": torch.zeros(1)}, path, {"format": "amed-classifier-1", "architecture": "mystery", "config": config})
    with pytest.raises(UserError, match="unknown architecture 'mystery'; known: conv, residual"):
        load_classifier(path)


def test_unknown_torchscript_needs_trust(script):
    with pytest.raises(UserError, match="--trust"):
        load_detector(script)
    detector = load_detector(script, trust=True)
    grey = torch.tensor([10, 200], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 1, 8, 8)
    assert detector.feature_dim == 3
    assert detector(grey).tolist() == [[10, 10, 10], [200, 200, 200]]  # 0..255, grey repeated, features asked for
    colour = torch.tensor([1, 2, 3], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert detector(colour).tolist() == [[1, 2, 3]]


def test_a_wrong_inception_file_in_the_cache_is_never_run(script, tmp_path, monkeypatch):
    monkeypatch.setenv("AMED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AMED_OFFLINE", "1")
    with pytest.raises(UserError, match="inception-2015-12-05.pt.*--detector"):
        load_detector("inception")
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / "inception-2015-12-05.pt").write_bytes(script.read_bytes())
    with pytest.raises(UserError, match="inception-2015-12-05.pt"):
        load_detector("inception")


class Pixel(torch.nn.Module):
    """Stands in for our Inception: the first pixel of each channel, 2048 of them."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :, 0, 0].float().repeat(1, 683)[:, :2048]


def test_inception_sources_in_order(script, tmp_path, monkeypatch):
    """TorchScript in the cache, state dict in the cache, TorchScript online, state dict online."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("AMED_CACHE", str(cache))
    good = tmp_path / "good.pth"
    good.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    script_digest = hashlib.sha256(script.read_bytes()).hexdigest()
    monkeypatch.setattr(detectors, "_STATE_SHA256_PREFIX", digest[:8])
    monkeypatch.setattr(detectors, "_INCEPTION_SHA256", script_digest)
    monkeypatch.setattr(detectors, "load_inception", lambda path: Pixel())
    web, asked = {}, []

    def download(urls, dest, sha256=None, **_):
        if Path(dest).exists():
            assert sha256 in (None, hashlib.sha256(Path(dest).read_bytes()).hexdigest())
            return dest
        asked.append(urls[0])
        if urls[0] not in web:
            raise UserError(f"could not download {urls[0]}: put the file at {dest}")
        Path(dest).write_bytes(web[urls[0]])
        return dest

    monkeypatch.setattr(detectors, "download_file", download)
    script_url, (first, second) = detectors._INCEPTION_URLS[0], detectors._STATE_URLS
    with pytest.raises(UserError) as caught:
        load_detector("inception")
    assert asked == [script_url, first, second] and all(url in str(caught.value) for url in asked)
    assert ".unchecked" not in str(caught.value)

    web.update({first: b"something else", second: b"weights"})  # a mirror with a wrong file is passed over
    detector = load_detector("inception")
    assert (detector.name, detector.file, detector.digest) == ("inception", detectors._STATE_FILE, digest)
    assert [path.name for path in cache.iterdir()] == [detectors._STATE_FILE]
    grey = torch.tensor([10, 200], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 1, 8, 8)
    assert detector(grey)[:, :3].tolist() == [[10, 10, 10], [200, 200, 200]] and detector.feature_dim == 2048

    web[script_url] = script.read_bytes()  # could be had, but the cache goes first
    asked.clear()
    assert load_detector("inception").file == detectors._STATE_FILE and not asked
    (cache / detectors._STATE_FILE).write_bytes(b"damaged")
    with pytest.raises(UserError, match="does not begin with"):
        load_detector("inception")
    (cache / detectors._STATE_FILE).unlink()
    assert load_detector("inception").file == "inception-2015-12-05.pt" and asked == [script_url]
    (cache / detectors._STATE_FILE).write_bytes(b"weights")
    assert load_detector("inception").digest == script_digest


def test_state_dict_by_path_is_named_after_its_contents(tmp_path, monkeypatch):
    monkeypatch.setattr(detectors, "load_inception", lambda path: Pixel())
    (tmp_path / "own.pth").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    assert load_detector(tmp_path / "own.pth").name == f"own-{digest[:8]}"
    monkeypatch.setattr(detectors, "_STATE_SHA256_PREFIX", digest[:8])
    assert load_detector(tmp_path / "own.pth").name == "inception"


def test_cache_folder(monkeypatch):
    monkeypatch.delenv("AMED_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert cache_dir() == Path("/some/cache/amed-solver")
    monkeypatch.setenv("AMED_CACHE", "/other")
    assert cache_dir() == Path("/other")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "network.pkl").write_bytes(pickle.dumps({}))
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "text.pth").write_text("hello")
    for name, message in {
        "network.pkl": "pickled networks contain code",
        "broken.safetensors": "not a usable classifier",
        "other.safetensors": "not a classifier",
        "text.pt": "not a TorchScript file",
        "text.pth": "not a readable pickle",
        "missing.pt": "neither a known detector",
    }.items():
        with pytest.raises(UserError, match=message):
            load_detector(tmp_path / name, trust=True)
