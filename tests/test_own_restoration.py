"""Restoration networks of one's own: train_denoiser --condition, sample.py, and distillation."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import sample as sample_command
import train
from models.edm import EDMRestorer, load_edm_network, make_edm, save_edm_safetensors
from models.inputs import draw_inputs
from solvers import sample
from solvers.span_table import SpanSolver
from tools import train_denoiser
from torch_utils.images import from_uint8, load_array
from training.amed_trainer import Distiller
from training.options import AMEDOptions

TINY = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": []}


def restorer(size=8, channels=1, sigma_data=0.3, zero=True):
    """A small network; zero: F = 0, so D is exact for a Gaussian residual with sigma_data."""
    torch.manual_seed(0)
    net = make_edm(restores=True, img_resolution=size, img_channels=channels, sigma_data=sigma_data, **TINY)
    if zero:
        for parameter in net.parameters():
            torch.nn.init.zeros_(parameter)
    return net.eval().requires_grad_(False)


def write_folder(path, images, suffix="png"):
    path.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(path / f"{number:02d}.{suffix}")
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Folders with 16 grey images of 8x8 pixels, bright squares, and with noisy versions."""
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.RandomState(0)
    clean = np.zeros((16, 8, 8), dtype=np.uint8)
    for image in clean:
        top, left = rng.randint(0, 5, 2)
        image[top : top + 4, left : left + 4] = rng.randint(120, 256)
    noisy = np.clip(clean + 60 * rng.randn(*clean.shape), 0, 255).astype(np.uint8)
    return write_folder(folder / "clean", clean), write_folder(folder / "noisy", noisy, "bmp")


def train_network(data, condition, outdir, **more):
    given = {"data": data, "condition": condition, "outdir": outdir, "total_kimg": 0.032, "batch": 8, "attn": ""}
    given |= {"model_channels": 8, "channel_mult": "1,2", "device": "cpu", **more}
    given = {name: value for name, value in given.items() if value is not None}
    return CliRunner().invoke(train_denoiser.main, [f"--{name}={value}" for name, value in given.items()])


@pytest.fixture(scope="module")
def trained(pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    done = train_network(*pairs, out)
    assert done.exit_code == 0, done.output
    assert "--images=FOLDER_OF_DEGRADED_IMAGES" in done.output
    (path,) = out.glob("network-snapshot-*.safetensors")
    return path


def test_the_trained_network_restores_images_of_any_size(pairs, trained, tmp_path):
    clean, noisy = (from_uint8(load_array(folder)) for folder in pairs)
    net = load_edm_network(trained)
    assert isinstance(net, EDMRestorer) and net.takes_images
    residual = (clean - noisy).double()
    assert net.sigma_data == pytest.approx(float((residual - residual.mean()).square().mean().sqrt()), rel=1e-6)
    assert float(net.data_mean) == pytest.approx(float(residual.mean()), abs=1e-6)
    assert net.data_std == pytest.approx(net.sigma_data, rel=1e-6)
    assert net.sigma_max == pytest.approx(160 * net.sigma_data)
    with Image.open(next(trained.parent.glob("grid-*.png"))) as grid:  # rows: degraded, restored, original
        assert grid.size == (10 * 10 - 2, 3 * 10 - 2)
    images = write_folder(tmp_path / "images", [np.full((8, 8), 90, np.uint8), np.full((19, 13), 90, np.uint8)])
    flags = ["--dataset_name=custom", f"--model_path={trained}", f"--images={images}", "--nfe=3", "--device=cpu"]
    done = CliRunner().invoke(sample_command.main, [*flags, f"--outdir={tmp_path / 'out'}"])
    assert done.exit_code == 0, done.output
    sizes = [Image.open(tmp_path / "out" / f"{number:02d}.png").size for number in range(2)]
    assert sizes == [(8, 8), (13, 19)]


def test_the_denoiser_is_exact_for_a_gaussian_residual():
    net = restorer()
    generator = torch.Generator().manual_seed(0)
    mu, noise = (torch.randn(3, 1, 8, 8, generator=generator) for _ in range(2))
    sigma = torch.tensor([0.1, 1.0, 10.0]).reshape(-1, 1, 1, 1)
    slope = 0.09 / (0.09 + sigma**2)
    torch.testing.assert_close(net(mu + noise, sigma, mu=mu), mu + slope * noise)
    cond, states = net.make_cond(images=mu), {}
    for afs in (False, "data"):
        net.data_mean, net.data_std = torch.zeros(1, 1, 1), 0.3
        states[afs] = sample(net, noise, solver="euler", num_steps=3, afs=afs, cond=cond, return_trajectory=True)[1]
    torch.testing.assert_close(states["data"], states[False], rtol=1e-4, atol=1e-4)


def test_the_network_sees_the_degraded_image():
    net, x = restorer(zero=False), torch.zeros(1, 1, 8, 8)
    torch.manual_seed(0)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    first, second = (net(x + mu, 1.0, mu=x + mu) - mu for mu in (0.0, 0.5))
    assert (first - second).abs().max() > 1e-3


def test_pairs_are_flipped_together(pairs):
    images, degraded, *_ = train_denoiser.load_pairs(*pairs)
    batches = train_denoiser.Batches(images, None, 16, 0, True, np.stack([images[:, 0], images[:, 0]], 1))
    clean, labels, mu = batches.get(0, torch.Generator().manual_seed(0), "cpu")
    assert labels is None and torch.equal(mu, clean.expand(-1, 2, -1, -1))
    assert (np.abs(images.astype(int) - degraded).mean(axis=(1, 2, 3)) < 60).all()  # each with its own partner


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("missing", "have no partner of the same name"),
        ("size", "its images are 9x9, those of --data 8x8"),
        ("same", "give degraded versions of them"),
        ("classes", "without classes; leave --cond out"),
        ("init", "its network does not restore images; leave out --condition"),
    ],
)
def test_what_is_wrong_is_said(pairs, tmp_path, change, text):
    clean, noisy, more = *pairs, {}
    if change == "missing":
        noisy = write_folder(tmp_path / "noisy", load_array(noisy)[:15, 0])
    elif change == "size":
        noisy = write_folder(tmp_path / "noisy", np.zeros((16, 9, 9), np.uint8))
    elif change == "same":
        noisy = clean
    elif change == "classes":
        more = {"cond": True}
    else:
        plain = make_edm(img_resolution=8, img_channels=1, **TINY)
        save_edm_safetensors(plain, tmp_path / "plain.safetensors")
        more = {"init": tmp_path / "plain.safetensors", "model_channels": None, "channel_mult": None, "attn": None}
    done = train_network(clean, noisy, tmp_path / "run", **more)
    assert done.exit_code and text in done.output and "Traceback" not in done.output
    assert not (tmp_path / "run").exists()


def test_amed_starts_from_the_degraded_images(pairs):
    """The first evaluations of teacher and student are at mu + sigma_max * noise."""
    net, images = restorer(), torch.from_numpy(load_array(pairs[1]))
    config = AMEDOptions(dataset_name="custom", sampler_stu="euler", num_steps=3, afs=False).predictor_config(8)
    seen = []
    net.register_forward_pre_hook(lambda module, args, kwargs: seen.append((*args, kwargs["mu"])), with_kwargs=True)
    for cache in (None, 4):
        trainer = Distiller(net, config, batch=4, prompts=images, teacher_cache=cache)
        ((latents, cond),) = trainer.draw()
        seen.clear()
        trainer.iterate()
        x, sigma, mu = seen[0]
        assert float(sigma) == pytest.approx(net.sigma_max) and torch.equal(mu, cond["mu"])
        torch.testing.assert_close(x, (mu + latents * net.sigma_max).to(x))
    inputs = draw_inputs(net, range(200), images)[1]["mu"]
    assert len(torch.unique(inputs.flatten(1), dim=0)) == 16  # all images are drawn


def test_the_gaussian_step_of_the_span_solver_is_around_the_degraded_image(pairs):
    net, images = restorer(sigma_data=0.3), torch.from_numpy(load_array(pairs[1]))
    student = SpanSolver(num_steps=4, sigma_min=0.002, sigma_max=3.0, first_step="gaussian", base="deis")

    def make_cond(generators):
        return net.make_cond(images=from_uint8(images[generators.randint(len(images))]))

    student.measure_gaussian(net, make_cond=make_cond)
    assert student.mean.abs().max() < 0.02
    assert float(student.variance) == pytest.approx(0.09, rel=0.05)


def test_train_takes_degraded_images(pairs, trained, tmp_path):
    flags = ["--dataset_name=custom", f"--model_path={trained}", "--total_kimg=0.008", "--batch=4", "--device=cpu"]

    def run(*more):
        return CliRunner().invoke(train.main, [*flags, f"--outdir={tmp_path}", *map(str, more)])

    span = [
        "--sampler_stu=span",
        "--num_steps=3",
        "--pairs=4",
        "--val_pairs=4",
        "--init=preset",
        "--heads=none",
        "--loss=huber",
    ]
    done = run(*span, f"--images={pairs[1]}")
    assert done.exit_code == 0, done.output
    (predictor,) = tmp_path.glob("*/predictor-*.safetensors")
    record = json.loads((predictor.parent / "training_options.json").read_text(encoding="utf-8"))
    assert len(record["provenance"]["images_sha256"]) == 64 and record["images"] == str(pairs[1])
    given = [f"--predictor_path={predictor}", f"--images={pairs[1]}", f"--outdir={tmp_path / 'out'}", "--device=cpu"]
    restored = CliRunner().invoke(sample_command.main, given)
    assert restored.exit_code == 0, restored.output
    assert len(list((tmp_path / "out").glob("*.png"))) == 16
    write_folder(tmp_path / "large", np.zeros((2, 9, 9), np.uint8))
    digits = [
        "--dataset_name=digits",
        "--total_kimg=0.008",
        "--batch=4",
        f"--images={pairs[1]}",
        f"--outdir={tmp_path}",
    ]
    for done, text in (
        (run(*span), "restores images: give --images"),
        (run(*span, f"--images={tmp_path / 'large'}"), "images of 9x9 pixels, but this network is distilled at 8x8"),
        (CliRunner().invoke(train.main, digits), "--images: digits does not restore images; leave it out"),
    ):
        assert done.exit_code and text in done.output, done.output
