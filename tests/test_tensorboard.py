"""--tensorboard: event files agree with stats.jsonl, as TensorBoard's own reader reads them."""

import io
import json
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from test_final_training import USUAL, Toy
from test_train_denoiser import invoke, only, write_images
from test_training_loop import write_tiny

import train as train_command
from tools import train_denoiser
from torch_utils import distributed
from training import run as run_module
from training.amed_trainer import train_predictor
from training.run_folder import RunLog
from training.sfd_trainer import train_sfd
from training.span_run import train_span

AMED = {"dataset_name": "custom", "seed": 3, "batch": 4, "total_kimg": 0.012, "num_steps": 4, "tick": 0.004}


@pytest.fixture(autouse=True)
def toy_model(monkeypatch):
    monkeypatch.setattr(run_module, "create_model", lambda *_, **__: Toy())


def events(folder):
    """{name: {step: value}} of the event files in a folder; pictures as arrays."""
    package = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = package.EventAccumulator(str(folder), size_guidance={package.IMAGES: 0}).Reload()
    values = {tag: {e.step: e.value for e in found.Scalars(tag)} for tag in found.Tags()["scalars"]}
    for tag in found.Tags()["images"]:
        values[tag] = {e.step: np.array(Image.open(io.BytesIO(e.encoded_image_string))) for e in found.Images(tag)}
    return values


def lines(folder):
    """The same from stats.jsonl."""
    values = {}
    for line in (folder / "stats.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = round(record.pop("kimg") * 1000)
        record.pop("iteration", None)
        for name, value in record.items():
            named = {name: value}
            if isinstance(value, list):
                named = {f"{name}/{k}": v for k, v in enumerate(value)} if len(value) > 1 else {name: value[0]}
            for key, number in named.items():
                values.setdefault(key, {})[step] = number
    return values


def same(folder):
    """Checks that all numbers agree; returns the event files' values."""
    found, expected = events(folder), lines(folder)
    assert found.keys() - {"samples"} == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-6, nan_ok=True), name  # float32 in the files
    return found


def test_predictor(tmp_path):
    """Statistics per interval and images; a resumed run continues and drops what is not in it."""
    run = tmp_path / "run"
    plain = train_predictor(AMED, run_dir=tmp_path / "plain")
    first = train_predictor({**AMED, "tensorboard": True, "snap": 1}, run_dir=run)
    assert first.read_bytes()[-3000:] == plain.read_bytes()[-3000:]  # the weights are the same
    found = same(run)
    assert {f"{name}/{k}" for name in ("loss", "r", "scale_dir") for k in range(3)} < found.keys()
    assert [*found["r/0"]] == [*found["samples"]] == [4, 8, 12]
    assert found["samples"][4].shape == (4 * 18 - 2, 4 * 18 - 2, 3)
    assert not np.array_equal(found["samples"][4], found["samples"][12])
    log = RunLog(run)  # a run that went on and was killed before it saved a state
    with log.event_file(True, 0.012):
        log.stats({"kimg": 0.016, "iteration": 4, "loss": [1e9] * 3})
    train_predictor({**AMED, "tensorboard": True, "total_kimg": 0.02}, run_dir=run, resume=True)
    found = same(run)
    assert [*found["loss/0"]] == [4, 8, 12, 16, 20] and max(found["loss/0"].values()) < 1e9


def test_span_solver_that_begins_without(tmp_path):
    """The event file of a resumed run also holds the part that was made without --tensorboard."""
    options = {**USUAL, "total_kimg": 0.02, "tick": 0.004, "outdir": str(tmp_path)}
    run = tmp_path / "run"
    train_span(options, run_dir=run)
    assert not [*run.glob("events*")]
    train_span({**options, "total_kimg": 0.04, "tensorboard": True}, run_dir=run, resume=True)
    found = same(run)
    assert {"loss", "val", "rms", "gradient", *(f"sigma/{k}" for k in range(5))} < found.keys()
    assert [*found["val"]] == [*range(4, 41, 4)] and [*found["samples"]] == [40]


def test_denoiser(tmp_path, monkeypatch):
    monkeypatch.setattr(train_denoiser, "GRID_COLUMNS", 2)
    monkeypatch.setattr(train_denoiser, "LOG_EVERY", 5)
    write_images(tmp_path / "data.zip")
    more = {"data": tmp_path / "data.zip", "outdir": tmp_path / "run", "batch": 1, "tensorboard": True}
    for kimg, resume in ((0.005, False), (0.01, True)):
        done = invoke(**more, total_kimg=kimg, resume=resume)
        assert done.exit_code == 0, done.output
    found = same(tmp_path / "run")
    assert found.keys() == {"loss", "seconds", "lr", "samples"} and [*found["loss"]] == [5, 10]
    with Image.open(only(tmp_path / "run", "grid-*.png")) as grid:
        assert np.array_equal(np.array(grid), found["samples"][10][..., 0])


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    log = RunLog(tmp_path)
    with log.event_file(True, 0):
        log.stats({"kimg": 1})
        log.images(lambda: pytest.fail("drawn"), 1)
    assert not [*tmp_path.iterdir()]


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "data.zip")
    amed = CliRunner().invoke(train_command.main, ["--dataset_name=digits", "--tensorboard", "--device=cpu"])
    denoiser = invoke(data=tmp_path / "data.zip", outdir=tmp_path / "run", tensorboard=True)
    for done in (amed, denoiser):
        assert done.exit_code == 2
        assert "--tensorboard needs the package 'tensorboard': install it with" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["data.zip"]


def test_few_step_network(tmp_path, monkeypatch):
    monkeypatch.undo()  # a network that can be trained
    net = write_tiny("edm_song_uncond", tmp_path / "tiny.safetensors")
    options = {"dataset_name": "custom", "model_path": str(net), "num_steps": 3, "batch": 2, "total_kimg": 0.004}
    train_sfd({**options, "seed": 0, "tick": 0.002, "tensorboard": True}, run_dir=tmp_path / "run")
    found = same(tmp_path / "run")
    assert [*found["loss"]] == [2, 4] and [*found["samples"]] == [4]
