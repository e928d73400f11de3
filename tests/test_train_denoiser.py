"""tools/train_denoiser.py on a few made-up images: files, resuming, processes, mistakes."""

import io
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from two_processes import on_two

from models.edm import EDMDenoiser, load_edm_network
from solvers.schedule_file import Schedule, save_schedule
from tools import train_denoiser
from torch_utils import distributed
from torch_utils.errors import UserError
from torch_utils.files import sha256_of
from torch_utils.tensor_file import read_safetensors

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"model_channels": 8, "channel_mult": "1,2", "attn": "", "batch": 16, "device": "cpu"}


def write_images(path, labels=False, shape=(16, 16), count=64):
    """A zip of grey images, black with one bright block each; returns float64 in [-1, 1]."""
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


def invoke(**options):
    return CliRunner().invoke(train_denoiser.main, arguments(**options))


def only(folder, pattern):
    (path,) = folder.glob(pattern)
    return path


def test_command_line_trains_saves_and_resumes(tmp_path):
    images = write_images(tmp_path / "data.zip", labels=True)
    out = tmp_path / "run"
    common = {"data": tmp_path / "data.zip", "outdir": out, "cond": True}
    done = invoke(**common, total_kimg=0.08, grid=True)
    assert done.exit_code == 0, done.output
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

    wider = invoke(**common, total_kimg=0.16, resume=True, model_channels=16)
    assert wider.exit_code == 2 and "has another architecture; repeat its flags" in wider.output

    for name, before, value in (("batch", 16, 8), ("seed", 0, 3), ("xflip", False, True), ("cond", True, False)):
        other = invoke(**{**common, name: value}, total_kimg=0.16, resume=True)
        assert other.exit_code == 2 and f"has {name}={before}, not {value}; repeat its flags" in other.output

    before = {name: value.clone() for name, value in net.state_dict().items()}
    more = invoke(**common, total_kimg=0.16, grid=False, resume=True)
    assert more.exit_code == 0, more.output
    assert torch.load(out / "training-state.pt", weights_only=True)["it"] == 10
    after = load_edm_network(snapshot).state_dict()
    assert any(not torch.equal(value, after[name]) for name, value in before.items())


def settings(tmp_path, out, dropout=0.0, **more):
    config = {**train_denoiser.ARCHITECTURES["ddpmpp"], "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1}
    return {
        **{
            "data": tmp_path / "data.zip",
            "outdir": out,
            "net_config": {**config, "attn_resolutions": [], "dropout": dropout},
        },
        **{"total_kimg": 0.064, "minutes": 0, "batch": 16, "lr": 2e-3, "warmup_kimg": 0.01, "ema_kimg": 0.05},
        **{"p_mean": -1.2, "p_std": 1.2, "amp": "none", "channels_last": False, "xflip": True, "cond": False},
        **{"seed": 3, "snap": 0.01, "grid": False, "resume": False, "device": torch.device("cpu"), **more},
    }


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_broken_run_continues_as_if_unbroken(tmp_path, monkeypatch, dropout):
    write_images(tmp_path / "data.zip")
    train_denoiser.train(**settings(tmp_path, tmp_path / "whole", dropout))
    original, calls = train_denoiser.edm_loss, []

    def failing(*args):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(train_denoiser, "edm_loss", failing)
    with pytest.raises(KeyboardInterrupt):
        train_denoiser.train(**settings(tmp_path, tmp_path / "broken", dropout))
    monkeypatch.setattr(train_denoiser, "edm_loss", original)
    assert torch.load(tmp_path / "broken" / "training-state.pt", weights_only=True)["it"] == 2
    train_denoiser.train(**settings(tmp_path, tmp_path / "broken", dropout, resume=True))
    whole, broken = (
        torch.load(tmp_path / name / "training-state.pt", weights_only=True) for name in ("whole", "broken")
    )
    assert whole["it"] == broken["it"] == 4
    for part in ("net", "ema"):
        assert all(torch.equal(value, broken[part][name]) for name, value in whole[part].items())


def test_dropout_differs_between_iterations(tmp_path, monkeypatch):
    write_images(tmp_path / "data.zip")
    original, masks = train_denoiser.edm_loss, []

    def watched(*args):
        masks.append(torch.nn.functional.dropout(torch.ones(64)))
        return original(*args)

    monkeypatch.setattr(train_denoiser, "edm_loss", watched)
    train_denoiser.train(**settings(tmp_path, tmp_path / "run", 0.1, total_kimg=0.032))
    assert len(masks) == 2 and not torch.equal(*masks)


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


def test_two_processes(tmp_path, monkeypatch):
    """Trains, then goes on; a loss is once infinite on rank 1, where its gradient is finite."""
    write_images(tmp_path / "data.zip")
    flags = arguments(data=tmp_path / "data.zip", outdir=tmp_path / "run", total_kimg=0.064, grid=False)
    original, calls = train_denoiser.edm_loss, []

    def poisoned(*given):
        calls.append(1)
        return original(*given) + (math.inf if distributed.rank() == 1 and len(calls) == 2 else 0.0)

    def work(rank):
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "shutdown", lambda: None)  # one process group for both runs
            train_denoiser.main(flags, standalone_mode=False)
            patch.setattr(train_denoiser, "edm_loss", poisoned)
            with pytest.raises(UserError) as stopped:
                train_denoiser.main([*flags, "--resume=True", "--total_kimg=0.128"], standalone_mode=False)
        (tmp_path / f"rank{rank}.txt").write_text(f"{len(calls)} {stopped.value}")

    assert on_two(work)[0] == {0: "fine", 1: "fine"}
    state = torch.load(tmp_path / "run" / "training-state.pt", weights_only=True)
    assert state["it"] == 4  # and not what followed the infinite loss
    assert all(torch.isfinite(value).all() for value in state["net"].values())
    assert load_edm_network(only(tmp_path / "run", "network-snapshot-*.safetensors")).label_dim == 0
    texts = [(tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 1)]
    assert texts[0] == texts[1]  # both stopped, in the same iteration
    assert texts[0].startswith("2 the loss is not finite at 0.08 kimg (iteration 6, rank 1); the state at 0.064 kimg ")
    assert texts[0].endswith("training-state.pt: continue with --resume=True and a smaller --lr (now 0.002)")


def test_loss_that_explodes_ends_the_run_in_one_line(tmp_path):
    write_images(tmp_path / "data.zip", count=16)
    common = {"data": tmp_path / "data.zip", "outdir": tmp_path / "run", "grid": False}
    result = invoke(**common, total_kimg=1, lr=1e30, warmup_kimg=0)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert "rank 0); nothing is saved yet: start again with a smaller --lr (now 1e+30)" in result.output
    assert not (tmp_path / "run" / "training-state.pt").exists()
    assert invoke(**common, total_kimg=0.016).exit_code == 0  # as told


@pytest.mark.parametrize(("model_type", "multiple"), [("SongUNet", 32), ("DhariwalUNet", 64)])
def test_networks_that_are_built_also_run(model_type, multiple):
    refused = []
    for width in range(8, 2 * multiple + 9, 4):
        config = {"img_resolution": 4, "img_channels": 1, "model_type": model_type, "num_blocks": 1, "dropout": 0.0}
        config.update(model_channels=width, channel_mult=[1, 3], attn_resolutions=[4])
        with torch.device("meta"):
            try:
                net = train_denoiser.build_network(config)
            except UserError as error:
                assert f"--model_channels={width} with --channel_mult=1,3 " in str(error)
                refused.append(width)
            else:
                assert net.model(torch.zeros(1, 1, 4, 4), torch.ones(1)).shape == (1, 1, 4, 4)
    assert refused and not any(width % multiple == 0 for width in refused)


WRONG = {  # flag -> (value, what the error says)
    "data": [("no-such.zip", "no-such.zip"), (__file__, "expected a folder or a .zip")],
    "outdir": [(__file__, "is a file"), (f"{__file__}/run", "cannot write")],
    "arch": [("vit", "'vit' is not one of")],
    "model_channels": [(4, "4 is not in the range"), (24, "cannot split 144 channels into 32 groups")],
    "channel_mult": [("1,x", "--channel_mult=1,x"), ("", "is empty"), ("1,0", "at least 1"), ("1,1,1,1,1,1", "halved")],
    "num_blocks": [(0, "0 is not in the range")],
    "attn": [("8;16", "--attn=8;16"), ("-8", "at least 1")],
    "dropout": [(1, "--dropout"), (-0.1, "--dropout"), ("nan", "finite")],
    "total_kimg": [(0, "--total_kimg"), ("nan", "finite"), ("inf", "finite")],
    "minutes": [(-1, "--minutes"), ("nan", "finite")],
    "batch": [(0, "--batch"), (1.5, "--batch")],
    "lr": [(0, "--lr"), ("nan", "finite"), ("fast", "not a valid float")],
    "warmup_kimg": [(-1, "--warmup_kimg"), ("nan", "finite")],
    "ema_kimg": [(-1, "--ema_kimg"), ("inf", "finite")],
    "p_mean": [("nan", "finite"), ("-inf", "finite")],
    "p_std": [(0, "--p_std"), ("nan", "finite")],
    "amp": [("fp8", "'fp8' is not one of")],
    "compile": [("maybe", "not a valid boolean")],
    "channels_last": [("maybe", "not a valid boolean")],
    "xflip": [("maybe", "not a valid boolean")],
    "cond": [("maybe", "not a valid boolean"), (True, "has no labels")],
    "extra_dims": [(-1, "--extra_dims"), (1.5, "--extra_dims")],
    "condition": [("missing", "no such folder or zip file")],
    "seed": [(-1, "--seed"), (1 << 63, "--seed")],
    "snap": [(-1, "--snap"), ("nan", "finite")],
    "grid": [("maybe", "not a valid boolean")],
    "tensorboard": [("maybe", "not a valid boolean")],
    "resume": [("maybe", "not a valid boolean"), (True, "--resume: no such file")],
    "device": [("tpu9", "--device=tpu9")],
    "init": [("a.pkl", "--init: its network sets the architecture; leave out --model_channels")],
    "schedule": [("no-such.json", "cannot read the schedule no-such.json"), (__file__, "not a schedule file")],
}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "data.zip"
    write_images(path, count=8)
    return path


def complaint(result):
    """The error line of a command that a person called wrongly."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)  # no traceback
    line = result.output.strip().splitlines()[-1]
    assert line.startswith("Error: ")
    return line


def test_every_flag_has_wrong_values():
    assert set(WRONG) == {option.name for option in train_denoiser.main.params}


@pytest.mark.parametrize(("flag", "value", "text"), [(flag, *case) for flag, cases in WRONG.items() for case in cases])
def test_wrong_values_are_explained_before_anything_is_written(tmp_path, few, flag, value, text):
    options = {"data": few, "outdir": tmp_path / "run", "channel_mult": "1,2,4", "total_kimg": 0.016, flag: value}
    assert text in complaint(invoke(**options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"model_channels": 224, "channel_mult": "1"}, "attention cannot split 224 channels into 3 heads"),
        ({"model_channels": 15, "channel_mult": "4"}, "an embedding of 15 channels"),
    ],
)
def test_widths_of_adm(tmp_path, few, options, text):
    line = complaint(invoke(data=few, outdir=tmp_path / "run", arch="adm", total_kimg=0.016, **options))
    assert text in line and line.endswith("--model_channels can be any multiple of 64")
    assert not list(tmp_path.iterdir())


def test_images_that_are_not_square(tmp_path):
    write_images(tmp_path / "data.zip", count=2, shape=(16, 24))
    assert "square" in complaint(invoke(data=tmp_path / "data.zip", outdir=tmp_path / "run", total_kimg=0.016))


def test_damaged_state(tmp_path, few):
    state = tmp_path / "training-state.pt"
    for content in (b"", b"not a state", b"PK\x03\x04"):
        state.write_bytes(content)
        line = complaint(invoke(data=few, outdir=tmp_path, total_kimg=0.016, resume=True))
        assert f"--resume: cannot read {state}" in line


# Fine-tuning at the noise levels of a schedule


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder with images and a network that has seen them for a moment."""
    folder = tmp_path_factory.mktemp("pretrained")
    write_images(folder / "data.zip", count=32)
    done = invoke(data=folder / "data.zip", outdir=folder / "first", total_kimg=0.32, grid=False)
    assert done.exit_code == 0, done.output
    return folder, only(folder / "first", "network-snapshot-*.safetensors")


def write_schedule(path, sigmas=(80.0, 5.0, 0.7, 0.002), solver="euler", **more):
    save_schedule(path, Schedule(list(sigmas), solver, "by hand", 0.002, 80.0, **more))
    return path


def fine_tune(pretrained, tmp_path, **options):
    """Without the flags of the architecture."""
    folder, network = pretrained
    given = {"data": folder / "data.zip", "outdir": tmp_path / "run", "init": network, "batch": 16, "device": "cpu"}
    given |= {"grid": False, "total_kimg": 0.16, **options}
    return CliRunner().invoke(train_denoiser.main, [f"--{name}={value}" for name, value in given.items()])


def loss_at(network, levels, images):
    """EDM's loss at these noise levels, for fixed noise."""
    net = load_edm_network(network)
    images = torch.from_numpy(images).float()[:, None]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        losses = [train_denoiser.edm_loss(net, images, None, generator, 0, 1, net.sigma_data, levels) for _ in range(4)]
    return float(torch.stack(losses).mean())


def test_fine_tuning_at_a_schedule(pretrained, tmp_path, monkeypatch):
    schedule = write_schedule(tmp_path / "s.json")
    seen, forward = [], EDMDenoiser.forward
    monkeypatch.setattr(
        EDMDenoiser,
        "forward",
        lambda self, x, sigma, **cond: (
            seen.append((self.training, torch.as_tensor(sigma))) or forward(self, x, sigma, **cond)
        ),
    )
    done = fine_tune(pretrained, tmp_path, schedule=schedule, total_kimg=0.64, lr=2e-3, warmup_kimg=0.05)
    assert done.exit_code == 0, done.output
    monkeypatch.undo()
    trained = torch.cat([sigma.flatten() for training, sigma in seen if training])
    levels, counts = trained.unique(return_counts=True)
    np.testing.assert_allclose(levels, [0.7, 5.0, 80.0], rtol=1e-6)  # the last one of the schedule is never asked for
    assert counts.sum() == 640 and counts.min() > 640 / 3 - 5 * np.sqrt(640 * 2 / 9)

    network = only(tmp_path / "run", "network-snapshot-*.safetensors")
    _, metadata = read_safetensors(network.read_bytes(), "file")
    record = json.loads(metadata["training"])
    assert record["schedule"]["sigmas"] == [80.0, 5.0, 0.7, 0.002] and record["schedule"]["solver"] == "euler"
    assert record["init"] == {"file": pretrained[1].name, "sha256": sha256_of(pretrained[1])}
    images = write_images(tmp_path / "again.zip", count=32)
    before, after = (loss_at(path, (80.0, 5.0, 0.7), images) for path in (pretrained[1], network))
    assert after < 0.98 * before

    other = write_schedule(tmp_path / "t.json", sigmas=(80.0, 4.0, 0.002))
    wrong = fine_tune(pretrained, tmp_path, schedule=other, total_kimg=0.8, resume=True)
    assert "has levels=(80.0, 5.0, 0.7), not (80.0, 4.0); repeat its flags" in complaint(wrong)
    more = fine_tune(pretrained, tmp_path, schedule=schedule, total_kimg=0.8, resume=True)
    assert more.exit_code == 0, more.output


def test_starts_from_the_given_weights(pretrained, tmp_path):
    """Also of the embedded network, which is built differently; the learning rate is small."""
    done = fine_tune(pretrained, tmp_path, total_kimg=0.016, lr=1e-9, dropout=0.1)
    assert done.exit_code == 0, done.output
    before, after = (load_edm_network(path) for path in (pretrained[1], only(tmp_path / "run", "*.safetensors")))
    assert after.config["dropout"] == 0.1 and before.config["dropout"] == 0
    for name, value in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], value, rtol=0, atol=1e-7)
    write_images(tmp_path / "digits.zip", shape=(32, 32), count=4)
    digits = ROOT / "models" / "pretrained" / "digits-edm.safetensors"
    own = {"data": tmp_path / "digits.zip", "outdir": tmp_path / "digits", "init": digits, "batch": 4}
    done = fine_tune(pretrained, tmp_path, **own, total_kimg=0.004)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "digits" / "training_options.json").read_text())["lr"] == train_denoiser.LR_OF_INIT
    assert load_edm_network(only(tmp_path / "digits", "*.safetensors")).config == load_edm_network(digits).config


@pytest.mark.parametrize(
    ("solver", "more", "expected"),
    [
        ("euler", {}, [80, 5, 0.7]),
        ("ipndm", {"afs": True}, [5, 0.7]),
        ("dpmpp", {"afs": "data", "solver_options": {"max_order": 2}}, [5, 0.7]),
        ("heun", {}, [80, 5, 0.7, 0.002]),
        ("dpm", {}, [80, 20, 5, np.sqrt(3.5), 0.7, np.sqrt(0.7 * 0.002)]),
    ],
)
def test_the_levels_that_a_solver_asks_for(solver, more, expected):
    net = EDMDenoiser(img_resolution=4, img_channels=1, model_channels=32, channel_mult=[1], num_blocks=1)
    net.data_mean, net.data_std = torch.zeros(1, 4, 4), 0.5
    found = train_denoiser.evaluated_levels(net, Schedule([80.0, 5.0, 0.7, 0.002], solver, "m", 0.002, 80.0, **more))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("schedule", "options", "text"),
    [
        ({"sigmas": (100.0, 1.0)}, {}, "sigma=100 is outside the network's range"),
        ({"sigmas_cond": [80.0, 4.0, 0.6, 0.002]}, {}, "which training cannot use"),
        ({"solver": "nope"}, {}, "unknown solver 'nope'"),
        ({"solver": "amed"}, {}, "needs a trained predictor"),
        ({}, {"p_mean": -1}, "leave out --p_mean"),
        ({}, {"model_channels": 8}, "--init: its network sets the architecture; leave out --model_channels"),
        ({}, {"init": "no-such.pkl"}, "--init=no-such.pkl: "),
        ({}, {"init": __file__}, f"--init={__file__}: "),
        ({}, {"data": "other.zip"}, "its network has img_resolution=16, the images of --data 8"),
    ],
)
def test_schedules_and_networks_that_do_not_fit(pretrained, tmp_path, schedule, options, text):
    path = write_schedule(tmp_path / "s.json", **schedule)
    if "data" in options:
        write_images(tmp_path / "other.zip", shape=(8, 8), count=2)
        options = {"data": tmp_path / "other.zip"}
    assert text in complaint(fine_tune(pretrained, tmp_path, schedule=path, **options))
    assert not (tmp_path / "run").exists()


def test_a_schedule_of_another_network_is_noted(pretrained, tmp_path):
    path = write_schedule(tmp_path / "s.json", network="digits", network_hash="0" * 64)
    done = fine_tune(pretrained, tmp_path, schedule=path, total_kimg=0.016)
    assert done.exit_code == 0 and "Warning: the schedule was optimised for another network ('digits'" in done.output


def test_minutes_are_kept_with_the_last_grid(tmp_path, monkeypatch, capsys):
    """The end comes early enough for the last iteration, the files and a grid of suitable size."""
    write_images(tmp_path / "data.zip")
    more = {"minutes": 1, "total_kimg": 1000.0, "grid": True, "snap": 0}
    clock, ends = [0.0], []

    class Run(train_denoiser.DenoiserRun):
        elapsed = property(lambda self: clock[0])

        def iterate(self):
            clock[0] += 1.0  # an iteration of 16 images takes a second
            return super().iterate()

        def show(self, bar, statistics, seconds):
            super().show(bar, statistics, 1.0)
            ends.append(clock[0])

    monkeypatch.setattr(train_denoiser, "DenoiserRun", Run)
    shapes = []

    def grid(net, device, columns):
        shapes.append(columns)
        return np.zeros((8, 8, 1), dtype=np.uint8)

    monkeypatch.setattr(train_denoiser, "sample_grid", grid)
    train_denoiser.train(**settings(tmp_path, tmp_path / "run", **more))
    image = 1 / 16 * train_denoiser.GRID_CALLS / 3  # seconds, a third of a training sample for each call
    assert shapes == [int((6 / image) ** 0.5)] == [2]  # a tenth of the minute for the grid
    assert 60 - 1 - 4 * image - 1.5 < ends[-1] <= 60 - 4 * image
    said = capsys.readouterr().out.splitlines()
    network = only(tmp_path / "run", "network-snapshot-*.safetensors")
    assert said[-2].startswith("trained 0.9") and said[-2].endswith(f"-> {network}")
    assert said[-1] == f"next: python sample.py --dataset_name=custom --model_path={network} --nfe=8 --grid"
