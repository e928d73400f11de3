"""Encoder features of the denoiser: which maps, an unchanged network, and their distance."""

from types import SimpleNamespace

import pytest
import torch
from latent_nets import tiny_case
from test_training_loop import write_tiny
from toy import ToyNet

from models import build_denoiser, create_model
from torch_utils.errors import UserError
from training.sample_loss import DenoiserFeatures, feature_distance


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return create_model("custom", write_tiny("edm_song_cond", tmp_path_factory.mktemp("net") / "tiny.safetensors"))


def images(net, batch=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, net.img_channels, net.img_resolution, net.img_resolution, generator=generator)


def test_last_block_of_each_resolution(tiny):
    """The same maps as hooks of our own on the blocks, in a whole forward pass."""
    x, cond = images(tiny), {"class_labels": torch.eye(tiny.label_dim)[:3]}
    found = DenoiserFeatures(tiny, 0.1)(x, cond)
    seen = {}
    handles = [
        block.register_forward_hook(lambda m, i, o: seen.__setitem__(o.shape[-1], o))
        for block in tiny.model.enc.values()
    ]
    tiny(x, torch.tensor(0.1), **cond)
    for handle in handles:
        handle.remove()
    assert [f.shape[-1] for f in found] == sorted(seen, reverse=True) and len(found) > 1
    for feature in found:
        assert torch.equal(feature, seen[feature.shape[-1]])


def test_gradients_reach_the_images_and_only_them(tiny):
    before = [(p.requires_grad, p.grad) for p in tiny.parameters()]
    features, x = DenoiserFeatures(tiny, 0.1), images(tiny)
    target = [f.detach() for f in features(x)]
    moved = (x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))).requires_grad_()
    distance = feature_distance(features(moved), target)
    (gradient,) = torch.autograd.grad(distance.sum(), moved)
    assert distance.shape == (3,) and (distance > 0).all() and gradient.abs().amax(dim=(1, 2, 3)).min() > 0
    with torch.no_grad():
        closer = feature_distance(features(moved - 1e-2 * gradient / gradient.norm()), target).sum()
    assert closer < distance.sum()
    assert [(p.requires_grad, p.grad) for p in tiny.parameters()] == before
    assert not any(module._forward_hooks for module in tiny.modules())
    calls = []
    handle = tiny.register_forward_hook(lambda *_: calls.append(1))
    tiny(x, torch.tensor(1.0))  # an ordinary call goes through to the end
    handle.remove()
    assert calls == [1]


def test_a_sample_does_not_depend_on_the_others(tiny):
    x = images(tiny)
    features = DenoiserFeatures(tiny, 0.1)
    for whole, alone in zip(features(x), features(x[1:2]), strict=True):
        torch.testing.assert_close(whole[1:2], alone, rtol=1e-4, atol=1e-5)


def test_distance_by_hand():
    a, b = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[6.0, 8.0], [-2.0, 0.0]])
    torch.testing.assert_close(feature_distance([a], [b]), torch.tensor([0.0, 4.0]), atol=1e-6, rtol=1e-6)
    one, other = torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2)
    one[0, :, 0, 0], other[0, :, 0, 0] = (
        torch.tensor([1.0, 0.0]),
        torch.tensor([0.0, 1.0]),
    )  # distance 2 at one of 2 places
    both = feature_distance([one, a[:1]], [other, -b[:1]])
    torch.testing.assert_close(both, torch.tensor([(1.0 + 4.0) / 2]), atol=1e-5, rtol=1e-5)
    zero = torch.zeros(1, 3, requires_grad=True)
    feature_distance([zero], [torch.ones(1, 3)]).sum().backward()
    assert zero.grad.isfinite().all()


def test_under_guidance_the_features_are_those_of_the_condition():
    """The guided network computes both sides in one batch; without guidance there is only one."""
    facts, weights, io = tiny_case("sd_cfg_kl")
    guided, plain = (
        build_denoiser("sd", facts["init_kwargs"], weights, *guidance) for guidance in (("cfg", 7.5), ("none", None))
    )
    x, both = io["x__2"], {"condition": io["context"], "unconditional_condition": io["context_uncond"]}
    with torch.no_grad():
        found = DenoiserFeatures(guided, 0.5)(x, both)
        expected = DenoiserFeatures(plain, 0.5)(x, {"condition": io["context"]})
        other = DenoiserFeatures(plain, 0.5)(x, {"condition": io["context_uncond"]})
    assert len(found) > 1
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert float(feature_distance(expected, other).min()) > 1e-4


def test_the_usual_noise_level_is_moved_into_the_range_of_the_network():
    ranges = {(0.002, 80.0): 0.1, (0.3, 80.0): 0.3, (0.001, 0.05): 0.05}
    for (least, most), sigma in ranges.items():
        assert DenoiserFeatures(SimpleNamespace(sigma_min=least, sigma_max=most)).sigma == sigma


def test_networks_that_cannot(tiny):
    class Blind(ToyNet):
        def forward(self, x, sigma):
            return x * 0.5

    x = images(ToyNet(torch.float32))
    with pytest.raises(UserError, match="no encoder"):
        DenoiserFeatures(Blind(torch.float32), 0.1)(x)
    with pytest.raises(UserError, match=r"range, 0.002..80"):
        DenoiserFeatures(tiny, 0.0)
    assert [f.shape[-1] for f in DenoiserFeatures(ToyNet(torch.float32), 0.1)(x)] == [8]
