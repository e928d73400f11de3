"""tools/train_classifier.py: one epoch on random labelled images, and mistakes."""

import io
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from evaluation.detectors import load_classifier, load_detector
from tools.train_classifier import augment, load_labelled, main

ROOT = Path(__file__).parents[1]


def write_zip(path: Path, count: int, size=(8, 8), classes: int = 3, labelled: bool = True, seed: int = 0) -> Path:
    """Random grey images whose brightness tells the class."""
    rng = np.random.default_rng(seed)
    labels = [index % classes for index in range(count)]
    with zipfile.ZipFile(path, "w") as file:
        for index, label in enumerate(labels):
            pixels = rng.integers(0, 40, size) + 200 * label // max(classes - 1, 1)
            data = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(data, format="PNG")
            file.writestr(f"{index:05d}.png", data.getvalue())
        if labelled:
            pairs = [[f"{index:05d}.png", label] for index, label in enumerate(labels)]
            file.writestr("dataset.json", json.dumps({"labels": pairs}))
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return write_zip(folder / "train.zip", 330), write_zip(folder / "test.zip", 60, seed=1)


def test_one_epoch(sets, tmp_path):
    train, test = sets
    dest = tmp_path / "net.safetensors"
    options = ["--epochs=1", "--batch=10", "--lr=0.02", "--width=4", "--feature_dim=6", "--shift=1", "--device=cpu"]
    command = [sys.executable, "tools/train_classifier.py", f"--data={train}", f"--test={test}", f"--dest={dest}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=ROOT, env=env, timeout=600)
    assert done.returncode == 0, done.stderr
    stated = float(re.search(r"test accuracy (\d+\.\d+)% after 1 epochs", done.stdout)[1]) / 100
    model, metadata = load_classifier(dest)
    images, labels = load_labelled(str(test))
    found = (model(images.float() / 255).argmax(1) == labels).float().mean().item()
    assert found == pytest.approx(stated, abs=1e-4) == float(metadata["test_accuracy"])
    assert found > 0.6  # three classes that differ in brightness
    assert (metadata["train_images"], metadata["data"], metadata["epochs"]) == ("330", "train.zip", "1")
    assert load_detector(dest)(images).shape == (60, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]


def test_augment_moves_and_mirrors():
    image = torch.zeros(64, 1, 5, 5, dtype=torch.uint8)
    image[:, 0, 2, 1] = 9
    assert torch.equal(augment(image, 0, False), image)
    torch.manual_seed(0)
    places = {tuple(place[1:].tolist()) for place in augment(image, 1, False)[:, 0].nonzero()}
    assert places == {(row, column) for row in (1, 2, 3) for column in (0, 1, 2)}
    mirrored = {tuple(place[1:].tolist()) for place in augment(image, 0, True)[:, 0].nonzero()}
    assert mirrored == {(2, 1), (2, 3)}


def test_mistakes_are_one_line(sets, tmp_path):
    train, test = sets
    (tmp_path / "text.zip").write_text("hello")
    good = {"data": train, "test": test, "dest": tmp_path / "net.safetensors", "device": "cpu", "epochs": 1}
    cases = [
        ({"dest": tmp_path / "net.pt"}, "must end in .safetensors"),
        ({"data": tmp_path / "missing.zip"}, "no such folder or zip"),
        ({"data": tmp_path / "text.zip"}, "not a readable zip"),
        ({"data": write_zip(tmp_path / "plain.zip", 6, labelled=False)}, "has no labels"),
        ({"data": write_zip(tmp_path / "oblong.zip", 6, size=(8, 6))}, "must be square"),
        ({"test": write_zip(tmp_path / "large.zip", 6, size=(9, 9))}, "differ from those of --data"),
        ({"test": write_zip(tmp_path / "more.zip", 8, classes=4)}, "differ from those of --data"),
        ({"batch": 331}, "must not exceed the 330 images"),
        ({"epochs": 0}, "--epochs"),
        ({"lr": 0}, "--lr"),
        ({"device": "toaster"}, "--device=toaster"),
    ]
    for change, message in cases:
        arguments = [f"--{name}={value}" for name, value in {**good, **change}.items()]
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 2 and "Traceback" not in done.output, (change, done.output)
        assert message in done.output.strip().splitlines()[-1]
        assert not (tmp_path / "net.safetensors").exists()
