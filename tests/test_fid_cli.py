"""fid.py through the real command line, with the embedded detector on small random images."""

import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from two_processes import call_on_two

import fid
from evaluation import detectors
from evaluation import fid as fid_module
from evaluation import reading as reading_module
from evaluation.detectors import load_detector
from evaluation.fid import (
    calculate_fid,
    choose_detector,
    choose_images,
    find_reference,
    image_statistics,
    warn_about_count,
)
from evaluation.frechet import Reference
from evaluation.reading import choose_workers, read_batches
from torch_utils.errors import UserError
from torch_utils.images import ImageSource, load_array

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "tests" / "golden" / "digits" / "test-256.zip"


def write_images(folder: Path, count: int, size: int = 32, channels: int = 1, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        shape = (size, size) if channels == 1 else (size, size, channels)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{index:06d}.png")
    return folder


def run_fid(*arguments, processes: int = 1) -> subprocess.CompletedProcess:
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    )
    command = [sys.executable, *launcher, "fid.py", *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=600)


def value_of(done: subprocess.CompletedProcess) -> float:
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FID ")]
    return float(re.fullmatch(r"FID (\d+\.\d+) images=\d+ detector=\S+ weights=\S+:[0-9a-f]{12} ref=.+", line)[1])


def error_of(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("noise"), 101)


def test_calc_equals_the_formula(noise, tmp_path):
    done = run_fid("calc", f"--images={noise}", "--ref=digits", f"--json={tmp_path / 'fid.json'}", "--batch=30")
    features = load_detector("digits")(torch.from_numpy(load_array(noise))).double().numpy()
    reference = Reference.load(ROOT / "models" / "pretrained" / "digits-fid.npz")
    sigma = np.cov(features, rowvar=False)
    values = scipy.linalg.eigvals(sigma @ reference.sigma)  # those of the root are their roots
    root = np.sqrt(np.maximum(values.real, 0)).sum()
    expected = np.sum((features.mean(0) - reference.mu) ** 2) + np.trace(sigma) + np.trace(reference.sigma) - 2 * root
    result = json.loads((tmp_path / "fid.json").read_text())
    assert result["fid"] == pytest.approx(expected, rel=1e-6)
    assert value_of(done) == pytest.approx(expected, abs=1e-4)
    assert result["images"] == 101 and result["detector"] == "digits" and result["ref_images"] == 60000
    assert "Note: FID of 101 images" in done.stderr
    weights = ROOT / "models" / "pretrained" / "digits-features.safetensors"
    assert result["detector_file"] == weights.name
    assert result["detector_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert f" weights={weights.name}:{result['detector_sha256'][:12]} ref=digits" in done.stdout


def test_two_processes_give_the_value_of_one(noise, tmp_path):
    cache, out = tmp_path / "features.npz", tmp_path / "fid.json"
    flags = ["--ref=digits", f"--feature-cache={cache}", f"--json={out}"]
    two = call_on_two(fid.main, "calc", f"--images={noise}", *flags, "--device=cpu")
    assert two.codes == [0, 0]
    (line,) = [line for line in "".join(two.outputs).splitlines() if "detector=" in line]
    assert re.fullmatch(r"FID \d+\.\d+ images=101 detector=digits weights=\S+:[0-9a-f]{12} ref=digits", line)
    one = calculate_fid(noise, "digits")
    assert json.loads(out.read_text())["fid"] == pytest.approx(one.fid, rel=1e-7)
    kept = np.load(cache, allow_pickle=False)  # in the order of the names, whichever process made them
    expected = load_detector("digits")(torch.from_numpy(load_array(noise))).numpy()
    np.testing.assert_allclose(kept["features"], expected, rtol=1e-4, atol=1e-5)


def test_real_digits_are_close_to_the_reference_and_noise_is_not(noise):
    real, fake = calculate_fid(DIGITS, "digits"), calculate_fid(noise, "digits")
    assert real.fid < 1.5
    assert fake.fid > 10 * real.fid


def test_ref_then_calc(noise, tmp_path):
    done = run_fid("ref", f"--data={noise}", f"--dest={tmp_path / 'noise.npz'}", "--detector=digits")
    assert done.returncode == 0, done.stderr
    reference = Reference.load(tmp_path / "noise.npz")
    features = load_detector("digits")(torch.from_numpy(load_array(noise))).double().numpy()
    np.testing.assert_allclose(reference.sigma, np.cov(features, rowvar=False), rtol=1e-4, atol=1e-6)
    assert (reference.detector, reference.num) == ("digits", 101)
    result = calculate_fid(noise, str(tmp_path / "noise.npz"))  # the reference names its detector
    assert result.detector == "digits" and result.fid == pytest.approx(0, abs=1e-6)


def write_samples(folder):
    """Seeds 0-19 and 1000-1002, as sample.py places them."""
    write_images(folder / "000000", 20)
    for path in write_images(folder / "001000", 3, seed=1).iterdir():
        path.rename(path.with_name(f"001{path.name[3:]}"))


def test_companions_of_samples_do_not_count(tmp_path):
    """A folder as sample.py writes it: grid and strips have other sizes and are not samples."""
    folder = tmp_path / "samples"
    write_samples(folder)
    write_images(folder / "inters", 4, size=70)
    write_images(folder, 1, size=90)
    os.replace(folder / "000000.png", folder / "grid.png")
    with pytest.raises(UserError, match="same seed number"):  # without the record these are images like others
        calculate_fid(folder, "digits")
    (folder / "sampling.json").write_text("{}")
    done = run_fid("calc", f"--images={folder}", "--ref=digits", f"--json={tmp_path / 'fid.json'}")
    plain = tmp_path / "plain"
    write_samples(plain)
    assert value_of(done) == pytest.approx(calculate_fid(plain, "digits").fid, rel=1e-6)
    assert json.loads((tmp_path / "fid.json").read_text())["images"] == 23
    with pytest.raises(UserError, match="only 23 images"):
        calculate_fid(folder, "digits", num=24)
    with zipfile.ZipFile(tmp_path / "samples.zip", "w") as file:
        for path in sorted(folder.rglob("*.*")):
            file.write(path, path.relative_to(folder).as_posix())
    assert ImageSource(tmp_path / "samples.zip").names == ImageSource(folder).names
    assert len(ImageSource(folder)) == 23


def test_reference_by_name_of_a_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AMED_OFFLINE", "1")
    url = "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/cifar10-32x32.npz"
    with pytest.raises(UserError, match=re.escape(url)):
        find_reference("cifar10")
    Path("src/cifar10").mkdir(parents=True)
    np.savez("src/cifar10/cifar10-32x32.npz", mu=np.arange(2048.0), sigma=np.eye(2048))  # as EDM's: nothing else
    reference = find_reference("cifar10")
    assert reference.mu[7] == 7 and reference.detector is None
    assert find_reference("digits").num == 60000
    with pytest.raises(UserError, match="VIRTUAL_lsun_cat256.npz"):
        find_reference("lsun_cat")
    with pytest.raises(UserError, match="--ref=cifra10: no such file.*cifar10"):
        find_reference("cifra10")


def test_references_of_one_name_from_two_addresses_are_two(tmp_path, monkeypatch):
    """Each is downloaded once and then found in the cache."""
    asked = []

    def download(urls, path, **_):
        asked.append(urls[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        Reference(np.full(2, float(len(asked))), np.eye(2)).save(path)

    monkeypatch.setenv("AMED_CACHE", str(tmp_path))
    monkeypatch.setattr(fid_module, "download_file", download)
    addresses = ["https://one.example/fid/ref.npz", "https://two.example/fid/ref.npz"]
    found = [find_reference(address).mu[0] for address in addresses + addresses]
    assert found == [1, 2, 1, 2] and asked == addresses


def test_published_copies_of_inception_agree(monkeypatch):
    """A reference made with the TorchScript copy accepts features of the state dict, no others."""
    (script,) = detectors.TRUSTED_TORCHSCRIPT
    state = "6726825d" + 56 * "0"
    reference = Reference(np.zeros(2048), np.eye(2048), "inception", script, 10)

    class Stub(detectors.FeatureDetector):
        name, file, digest, feature_dim = "inception", "file.pth", state, 2048

    monkeypatch.setattr(fid_module, "load_detector", lambda *_: Stub())
    assert choose_detector(None, reference, torch.device("cpu")).digest == state
    Stub.digest = 64 * "1"
    with pytest.raises(UserError, match="other weights"):
        choose_detector(None, reference, torch.device("cpu"))


def test_random_choice_of_images(noise):
    source = ImageSource(noise)
    first = choose_images(source, 40, 0)
    assert len(set(first)) == 40 and (first == choose_images(source, 40, 0)).all()
    assert set(first) != set(choose_images(source, 40, 1))
    assert list(choose_images(source, None, 0)) == list(range(101))


def test_few_images_give_a_warning_and_a_number(tmp_path, capsys):
    result = calculate_fid(write_images(tmp_path / "few", 5), "digits", seed=7)
    assert (result.images, result.seed) == (5, None)  # all of them: no choice was made
    chosen = calculate_fid(tmp_path / "few", "digits", num=4, seed=7)
    assert (chosen.images, chosen.seed) == (4, 7) and chosen.fid != result.fid
    assert np.isfinite(result.fid) and result.fid > 0
    assert "Warning: 5 images for 64 features" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "word"),
    [(63, "Warning: .*singular"), (64, "Warning: .*singular"), (65, "Note: "), (9999, "Note: "), (10_000, "")],
)
def test_from_how_many_images_on_nothing_is_said(count, word, capsys):
    """The covariance of N images has rank N - 1 at most: 64 are too few for 64 features."""
    warn_about_count(count, SimpleNamespace(feature_dim=64))
    assert re.match(word or "$", capsys.readouterr().err)


def test_feature_cache_is_used_only_for_the_same_files(noise, tmp_path):
    cache = tmp_path / "features.npz"
    folder = write_images(tmp_path / "in", 80, seed=3)
    first = calculate_fid(folder, "digits", feature_cache=cache)
    data = dict(np.load(cache, allow_pickle=False))
    np.savez(cache, **{**data, "features": data["features"] + 1})
    assert calculate_fid(folder, "digits", feature_cache=cache).fid > first.fid + 10  # it was read
    assert calculate_fid(folder, "digits", num=70, feature_cache=cache).fid > first.fid + 10  # for a part as well
    write_images(folder, 1, seed=4)  # one file replaced
    fresh, plain = calculate_fid(folder, "digits", feature_cache=cache), calculate_fid(folder, "digits")
    assert fresh.fid == pytest.approx(plain.fid, rel=1e-6)
    cache.write_text("hello")
    with pytest.raises(UserError, match="not a feature cache"):
        calculate_fid(folder, "digits", feature_cache=cache)


def test_a_feature_cache_belongs_to_its_detector(tmp_path):
    source, found = ImageSource(write_images(tmp_path / "in", 12, size=8)), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        file = tmp_path / f"{seed}.safetensors"
        detectors.save_classifier(detectors.ConvClassifier(1, 8, 10, feature_dim=6, width=4).eval(), file)
        detector = load_detector(file)
        for cache in (None, tmp_path / "features.npz", tmp_path / "features.npz"):
            statistics = image_statistics(source, range(12), detector, 5, torch.device("cpu"), cache)
            found.append(statistics.moments()[0])
    for one, other in ((0, 1), (0, 2), (3, 4), (3, 5)):
        np.testing.assert_allclose(found[one], found[other], rtol=1e-6)
    assert np.abs(found[0] - found[3]).max() > 1e-3


def test_detector_must_fit_the_reference(noise, tmp_path):
    script = tmp_path / "net.pt"

    class Means(torch.nn.Module):
        def forward(self, img: torch.Tensor) -> torch.Tensor:
            return img.float().mean(dim=[2, 3])

    torch.jit.script(Means()).save(str(script))
    with pytest.raises(UserError, match="made with 'digits'"):
        calculate_fid(noise, "digits", detector=str(script), trust=True)
    np.savez(tmp_path / "edm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(UserError, match="2048 features.*'digits' 64"):
        calculate_fid(noise, str(tmp_path / "edm.npz"), detector="digits")
    np.savez(tmp_path / "small.npz", mu=np.full(3, 127.5), sigma=np.eye(3))
    found = calculate_fid(noise, str(tmp_path / "small.npz"), detector=str(script), trust=True).fid
    means = load_array(noise).mean(axis=(1, 2, 3))  # three equal channels: the covariance is var * ones, of rank one
    var = means.var(ddof=1)
    assert found == pytest.approx(3 * (means.mean() - 127.5) ** 2 + 3 * var + 3 - 2 * np.sqrt(3 * var), rel=1e-4)


def test_wrong_inputs_are_one_line(noise, tmp_path):
    mixed = write_images(tmp_path / "mixed", 4)
    write_images(tmp_path / "large", 1, size=40)
    os.replace(tmp_path / "large" / "000000.png", mixed / "000009.png")
    damaged = write_images(tmp_path / "damaged", 3)
    (damaged / "000001.png").write_bytes((damaged / "000001.png").read_bytes()[:400])
    cases = [
        ((noise, "--num=102"), "has only 101 images"),
        ((tmp_path / "nowhere",), "nowhere: no such folder"),
        ((noise, "--ref=missing.npz"), "--ref=missing.npz: no such file"),
        ((write_images(tmp_path / "small", 3, size=28),), "28x28 pixels"),
        ((write_images(tmp_path / "colour", 3, channels=3),), "000000.png: RGB image"),
        ((mixed,), "000009.png: 40x40 pixels"),
        ((damaged,), "000001.png: damaged image"),
    ]
    for (images, *options), message in cases:
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            keywords = {"num": 102} if "--num=102" in options else {}
            calculate_fid(
                images, options[0][6:] if options and options[0].startswith("--ref") else "digits", **keywords
            )
        assert "\n" not in str(caught.value)
    assert "has only 101" in error_of(run_fid("calc", f"--images={noise}", "--ref=digits", "--num=102"))
    assert "000001.png: damaged" in error_of(run_fid("calc", f"--images={damaged}", "--ref=digits"))
    assert "must end in .npz" in error_of(run_fid("ref", f"--data={noise}", f"--dest={tmp_path / 'ref.txt'}"))


def test_a_damaged_file_stops_all_processes(tmp_path):
    folder = write_images(tmp_path / "in", 6)
    (folder / "000003.png").write_bytes(b"hello")
    done = run_fid("calc", f"--images={folder}", "--ref=digits", processes=2)
    assert done.returncode != 0 and "FID" not in done.stdout
    assert "000003.png: not a readable image" in done.stderr


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_from_threads_and_processes(tmp_path, workers):
    folder = write_images(tmp_path / "in", 23)
    source = ImageSource(folder)
    batches = list(read_batches(source, range(22), 5, workers=workers))
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 2]
    assert np.array_equal(torch.cat(batches).numpy(), load_array(source)[:22])
    (folder / "000013.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="^[^\n]*000013.png: not a readable image; remove or replace it$"):
        list(read_batches(source, range(22), 5, workers=workers))


def test_workers_are_for_gpus_with_room_in_shared_memory(noise, monkeypatch):
    source = ImageSource(noise)
    monkeypatch.setattr(reading_module.os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    monkeypatch.setattr(reading_module.Path, "is_dir", lambda path: True)
    monkeypatch.setattr(reading_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    assert choose_workers("cpu", source, 250) == 0
    assert choose_workers("cuda", source, 250) == 6
    assert choose_workers("cuda", source, 8000) == 0  # 8 MB each, three of each worker: not within 16 MB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert choose_workers("cuda", source, 250) == 2
