"""Perceptual distances: the denoiser's own features, and LPIPS from a file of weights."""

import pytest
import torch
import torch.nn.functional as F
from latent_nets import tiny_case
from toy import ToyNet

from models import build_denoiser, create_model
from models.lpips import load_lpips
from solvers.feature_loss import DenoiserFeatures, feature_distance
from solvers.ld3 import make_distance
from torch_utils.errors import UserError


def images(batch=3, channels=1, size=32, seed=0):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def test_features_of_the_digits():
    """The last block of every resolution of the encoder; those are the activations of the network itself."""
    net, x = create_model("digits"), images()
    features = DenoiserFeatures(net, sigma=0.2)
    maps = features(x)
    assert [tuple(m.shape[-2:]) for m in maps] == [(32, 32), (16, 16), (8, 8)]
    blocks = [net.model.enc[f"{size}x{size}_block0"] for size in (32, 16, 8)]
    assert features.modules == blocks and blocks[-1] is net.bottleneck
    seen = []
    handles = [block.register_forward_hook(lambda module, inputs, output: seen.append(output)) for block in blocks]
    net(x, torch.tensor(0.2))
    for handle in handles:
        handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(maps, seen, strict=True))
    assert not any(module._forward_hooks for module in net.modules())  # nothing stays attached


@pytest.mark.parametrize(
    "family, case", [("ldm", "ldm_uncond_vq"), ("cm", "cm_classcond"), ("edm", "edm_dhariwal_cond")]
)
def test_other_families(family, case):
    facts, weights, _ = tiny_case(case)
    net = build_denoiser(family, facts["init_kwargs"], weights)
    x = images(2, net.img_channels, net.img_resolution).requires_grad_(True)
    features = DenoiserFeatures(net, cond=net.make_cond(labels=[1, 2]) if net.label_dim else None)
    maps = features(x)
    assert features.modules[-1] is net.bottleneck and len(maps) >= 2 and all(len(m) == 2 for m in maps)
    assert maps[0].shape[-1] == net.img_resolution
    (gradient,) = torch.autograd.grad(maps[-1].sum(), x)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_distance():
    features = DenoiserFeatures(create_model("digits"))
    x, y = images(), images(seed=1)
    a, b = features(x), features(y)
    distance = feature_distance(a, b)
    assert distance.shape == (3,) and (feature_distance(a, a) == 0).all()
    assert torch.equal(distance, feature_distance(b, a)) and (distance > 0).all() and (distance < 4).all()
    torch.testing.assert_close(feature_distance([m[1:2] for m in a], [m[1:2] for m in b]), distance[1:2])
    near = feature_distance(a, features(x + 0.01 * y))
    assert (near < 0.1 * distance).all()
    ones, other = torch.ones(1, 2, 1, 1), torch.tensor([3.0, -3.0]).reshape(1, 2, 1, 1)
    assert feature_distance([ones, ones], [other, 5 * ones]).item() == pytest.approx(1)  # the mean of 2 and 0


def test_networks_without_features():
    class Plain(torch.nn.Module):
        sigma_min, sigma_max = 0.002, 80.0

        def forward(self, x, sigma):
            return x

    net = Plain()
    with pytest.raises(UserError, match="has no bottleneck"):
        DenoiserFeatures(net)(images())
    net.bottleneck = torch.nn.Identity()  # which is never run
    with pytest.raises(UserError, match="gives no map"):
        DenoiserFeatures(net)(images())
    with pytest.raises(UserError, match="positive noise level"):
        DenoiserFeatures(ToyNet(), sigma=0)


# ---- LPIPS -----------------------------------------------------------------------------------------------------------

LAYERS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # VGG-16, 0: pooling
STAGE_ENDS = (3, 8, 15, 22, 29)  # in torchvision's numbering, the activations that LPIPS compares


def reference_vgg():
    torch.manual_seed(0)
    layers, channels = [], 3
    for width in LAYERS:
        if width:
            layers += [torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.ReLU()]
            channels = width
        else:
            layers.append(torch.nn.MaxPool2d(2, 2))
    return torch.nn.Sequential(*layers)


@pytest.fixture(scope="module")
def lpips_file(tmp_path_factory):
    """(file in the layout of the package lpips, VGG-16, weights of the stages) with random numbers."""
    vgg = reference_vgg()
    weights = [torch.rand(1, width, 1, 1) for width in (64, 128, 256, 512, 512)]
    state = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
    for name, value in vgg.state_dict().items():
        layer = int(name.split(".")[0])
        stage = next(k for k, end in enumerate(STAGE_ENDS) if layer <= end)
        state[f"net.slice{stage + 1}.{name}"] = value
    for k, weight in enumerate(weights):
        state[f"lin{k}.model.1.weight"] = state[f"lins.{k}.model.1.weight"] = weight
    path = tmp_path_factory.mktemp("lpips") / "lpips-vgg.pth"
    torch.save(state, path)
    return path, vgg, weights


def test_lpips_is_the_formula_of_the_paper(lpips_file):
    path, vgg, weights = lpips_file
    a, b = images(2), images(2, seed=1)
    shift, scale = (torch.tensor(v).reshape(1, 3, 1, 1) for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    expected = torch.zeros(2)
    with torch.no_grad():
        x, y = (((v.repeat(1, 3, 1, 1) - shift) / scale) for v in (a, b))
        for k, layer in enumerate(vgg):
            x, y = layer(x), layer(y)
            if k in STAGE_ENDS:
                difference = (F.normalize(x, dim=1) - F.normalize(y, dim=1)) ** 2
                expected += (difference * weights[STAGE_ENDS.index(k)]).sum(1).mean((1, 2))
    net = load_lpips(path)
    torch.testing.assert_close(net(a, b), expected, rtol=1e-4, atol=1e-6)
    assert (net(a, a) == 0).all() and not any(p.requires_grad for p in net.parameters())
    distance = make_distance(create_model("digits"), "lpips", str(path))
    a = a.double().requires_grad_(True)
    loss = distance(a, b.double(), {})
    torch.testing.assert_close(loss.detach().float(), expected, rtol=1e-4, atol=1e-6)
    assert torch.autograd.grad(loss.sum(), a)[0].abs().max() > 0


def test_wrong_files(lpips_file, tmp_path):
    state = torch.load(lpips_file[0], weights_only=True)
    state.pop("lin2.model.1.weight")
    torch.save(state, tmp_path / "part.pth")
    (tmp_path / "torn.pth").write_bytes(b"torn")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, message in (
        ("part.pth", "does not have the weights of LPIPS"),
        ("list.pth", "does not have the weights of LPIPS"),
        ("torn.pth", "cannot read"),
        ("none.pth", "there is no file"),
    ):
        with pytest.raises(UserError, match=message):
            load_lpips(tmp_path / name)
