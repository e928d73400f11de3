"""PFGM++ (Xu et al. 2023): Student-t noise, against numbers of the published code."""

import json

import pytest
import torch
from click.testing import CliRunner
from systems_golden import GOLDEN, Function, arrays, assert_relative, cases

from models import create_model, zoo
from models.denoiser import rms_of_extra
from models.edm import EDMDenoiser, load_edm_network, load_edm_safetensors, save_edm_safetensors
from models.inputs import draw_inputs, draw_noise
from solvers import sample
from solvers.sampler import afs_direction
from tools import train_denoiser
from torch_utils.errors import UserError
from torch_utils.seeds import SeededGenerators

TINY = {"img_resolution": 8, "img_channels": 3, "model_type": "SongUNet", "model_channels": 8}
TINY |= {"channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
FILES = ["training-state-ncsnpp_D128.pt", "training-state-ddpmpp_D2048_cond.pkl"]


@pytest.mark.parametrize("file", FILES)
def test_published_files_load(file, tmp_path):
    path = GOLDEN / "pfgmpp" / file
    expected = arrays(f"pfgmpp/{path.stem}.expected")
    cond = {"class_labels": expected["class_labels"]} if "class_labels" in expected else {}
    net = load_edm_network(path)
    assert_relative(net(expected["x"], expected["sigma"], **cond), expected["D"], 3e-5)
    assert cases(f"pfgmpp/{path.stem}")["init_kwargs"]["D"] == net.D
    save_edm_safetensors(net, tmp_path / "own.safetensors")
    again = load_edm_safetensors(tmp_path / "own.safetensors")
    assert again.D == net.D
    assert torch.equal(again(expected["x"], expected["sigma"], **cond), net(expected["x"], expected["sigma"], **cond))


def test_D_counts_only_for_pfgmpp():
    assert EDMDenoiser(**TINY, D=64).D is None
    assert "D" not in EDMDenoiser(**TINY).config
    with pytest.raises(UserError, match="D=0"):
        EDMDenoiser(**TINY, pfgmpp=True, D=0)


def test_latents_have_the_published_radii_and_the_gaussian_of_the_seed():
    seeds = range(1500)
    plain, heavy = EDMDenoiser(**TINY), EDMDenoiser(**TINY, pfgmpp=True, D=128)
    z, x = (draw_noise(net, SeededGenerators(seeds)) for net in (plain, heavy))
    assert torch.equal(z, SeededGenerators(seeds).randn((3, 8, 8)))
    ratio = (x / z).flatten(1)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4, atol=0)
    prior = arrays("pfgmpp/prior")
    (case,) = (c["case"] for c in cases("pfgmpp/prior") if c["D"] == 128 and c["shape"] == [3, 8, 8])
    levels, radii = prior["quantile_levels"][2:7], prior[f"radius_quantiles__{case}"][2:7]
    ours = torch.quantile(x.flatten(1).norm(dim=1).double(), levels)
    torch.testing.assert_close(ours, radii, rtol=0.03, atol=0)


def test_a_seed_has_its_noise_in_any_batch():
    net = EDMDenoiser(**TINY, pfgmpp=True, D=4)
    together, _ = draw_inputs(net, [3, 9, 4])
    alone, _ = draw_inputs(net, [9])
    assert torch.equal(together[1:2], alone)


def poisson(points, D):
    """Denoiser of points [K,C,H,W] under the kernel (|x - y|^2 + D sigma^2)^(-(N + D) / 2)."""
    pixels = points[0].numel()

    def denoised(x, sigma):
        squared = (x.flatten(1)[:, None] - points.flatten(1)[None]).square().sum(-1)
        logits = -(pixels + D) / 2 * torch.log(squared + sigma.reshape(-1, 1) ** 2 * D)
        return torch.einsum("bk,kchw->bchw", logits.softmax(1), points)

    return Function(denoised)


@pytest.mark.parametrize("case", cases("pfgmpp/sampler"), ids=lambda case: f"D={case['D']}")
def test_sampler(case):
    data, i = arrays("pfgmpp/sampler"), case["case"]
    net, settings = poisson(data[f"points__{i}"], case["D"]), {"sigma_min": 0.002, "sigma_max": 80.0}
    settings |= {"num_steps": case["num_steps"], "denoise_to_zero": True, "return_trajectory": True}
    states = sample(net, data[f"x_start__{i}"] / 80, solver="heun", **settings)
    assert_relative(states[1:-1], data[f"trajectory__{i}"][:-1], 1e-10)
    assert_relative(states[-1], data[f"result__{i}"], 1e-8)


def test_training_noise_has_the_law_of_the_published_code():
    """The radius of the noise, over sigma, against quantiles from a Beta draw."""
    radii = []

    def record(x, sigma, class_labels=None):
        radii.append((x / sigma).flatten(1).norm(dim=1))
        return x

    images, generator = torch.zeros(4000, 3, 8, 8), torch.Generator().manual_seed(0)
    train_denoiser.edm_loss(record, images, None, generator, -1.2, 1.2, 0.5, extra_dims=128)
    prior = arrays("pfgmpp/prior")
    (case,) = (c["case"] for c in cases("pfgmpp/prior") if c["D"] == 128 and c["shape"] == [3, 8, 8])
    ours = torch.quantile(radii[0].double(), prior["quantile_levels"][2:7])
    torch.testing.assert_close(ours, prior[f"radius_quantiles__{case}"][2:7], rtol=0.03, atol=0)


@pytest.mark.parametrize("D", [3, 16])
def test_first_step_from_data_statistics_is_right_to_first_order(D):
    """The true direction of many close points is far nearer to it than to the Gaussian form."""
    generator = torch.Generator().manual_seed(0)
    points = 0.05 * torch.randn(2000, 1, 4, 4, generator=generator, dtype=torch.float64)
    net = poisson(points, D)
    net.D, net.data_mean, net.data_std = D, points.mean(0), float(points.std(0, correction=0).mean())
    extra = torch.randn(50, D, generator=generator, dtype=torch.float64)
    x = torch.randn(50, 1, 4, 4, generator=generator, dtype=torch.float64) / rms_of_extra(extra)
    sigma = torch.tensor(1.0).double()
    true = (x - net(x, sigma)) / sigma
    free = afs_direction(net, x, sigma, "data")
    net.D = None
    gaussian = afs_direction(net, x, sigma, "data")
    assert (free - true).norm() < 0.5 * (gaussian - true).norm()


@pytest.mark.parametrize("options", [{"solver": "edm", "S_churn": 10.0}, {"solver": "sde"}])
def test_gaussian_noise_on_the_way_is_refused(options):
    net = EDMDenoiser(**TINY, pfgmpp=True, D=128).eval()
    latents, _ = draw_inputs(net, [0])
    with pytest.raises(UserError, match=r"Student-t noise \(D=128\)"):
        sample(net, latents, num_steps=3, **options)
    assert sample(net, latents, num_steps=3, solver="edm").isfinite().all()


def test_train_and_sample_by_command(tmp_path):
    data = GOLDEN.parent.parent.parent / "models/pretrained"  # the embedded network is fine-tuned for a moment
    images = tmp_path / "images"
    images.mkdir()
    from PIL import Image

    for k in range(4):
        Image.effect_noise((32, 32), 40 + k).convert("L").save(images / f"{k}.png")
    outdir = tmp_path / "run"
    arguments = [f"--data={images}", f"--outdir={outdir}", f"--init={data / 'digits-edm.safetensors'}"]
    arguments += ["--extra_dims=64", "--total_kimg=0.008", "--batch=4", "--grid=False", "--device=cpu"]
    result = CliRunner().invoke(train_denoiser.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (file,) = outdir.glob("network-snapshot-*.safetensors")
    net = create_model("custom", file)
    assert net.D == 64 and net.config["pfgmpp"] is True
    assert json.loads((outdir / "training_options.json").read_text(encoding="utf-8"))["D"] == 64


def test_cards_without_an_address_say_where_the_file_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not zoo.get_card("cifar10_pfgmpp128").embedded
    with pytest.raises(UserError, match=r"github.com/Newbeeer/pfgmpp .* to src/cifar10_pfgmpp128/training-state.pt"):
        zoo.resolve("cifar10_pfgmpp128")
    assert "pfgmpp/ffhq_ddpm_D_128" in zoo.format_table()
