"""Distances between samples and between distributions of samples."""

import math
import sys
import types

import pytest
import torch
from toy import ToyNet

from torch_utils.errors import MissingExtra, UserError
from training.sample_loss import DistributionTerm, PairLoss, energy_distance, huber, l2, own_code, parse_loss


def images(batch, seed=0):
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_l2_and_huber_by_hand():
    x, y = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    x[0, 0, 0, 0], x[1] = 2.0, 0.5
    torch.testing.assert_close(l2(x, y), torch.tensor([1.0, 0.25]))
    c = 0.00054
    expected = [(sum((x[i] - y[i]).flatten() ** 2) + 4 * c**2).sqrt() - 2 * c for i in range(2)]
    torch.testing.assert_close(huber(x, y), torch.stack(expected) / 2)  # the published form, over sqrt(d)
    y.requires_grad_()
    huber(y, torch.zeros_like(y)).sum().backward()  # at distance 0
    assert torch.equal(y.grad, torch.zeros_like(y))


def test_sum_of_terms():
    net, x, y = ToyNet(torch.float32), images(3), images(3, 1)
    total = PairLoss("huber+ 0.5*l2", net, 0.2)(x, y, {})
    torch.testing.assert_close(total, huber(x, y) + 0.5 * l2(x, y))
    features = PairLoss("2*features", net, 0.2)(x, y, {})
    assert features.shape == (3,) and (features > 0).all() and (features < 8).all()
    assert float(PairLoss("features", net, 0.2)(x, x, {}).abs().max()) == 0


@pytest.mark.parametrize("text", ["", "l3", "huber+", "-1*l2", "0*l2", "x*l2", "nan*l2", "l2+l2", "os.path", "a:b:c"])
def test_losses_that_cannot_be_read(text):
    with pytest.raises(UserError, match="--loss="):
        parse_loss(text)


def test_features_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "features_of_ones_own.py").write_text(
        "def halves(net):\n"
        "    return lambda images: [images[:, :, :8].flatten(1), images.mean(1, keepdim=True)]\n"
        "def wrong(net):\n    return lambda images: images.sum()\n"
        "def nothing(net):\n    return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    net, x, y = ToyNet(torch.float32), images(2).requires_grad_(), images(2, 1)
    loss = PairLoss("features_of_ones_own:halves+0.1*l2", net, 0.2)(x, y, {})
    first, second = x[:, :, :8].flatten(1), y[:, :, :8].flatten(1)
    cosine = torch.nn.functional.cosine_similarity(first, second)
    same = torch.sign(x.mean(1)) == torch.sign(y.mean(1))  # a single channel: 0 or 4 at each place
    expected = ((2 - 2 * cosine) + 4 * (~same).flatten(1).float().mean(1)) / 2 + 0.1 * l2(x, y)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
    assert own_code("features_of_ones_own:halves+l2") == ["features_of_ones_own:halves"] and own_code("l2") == []
    with pytest.raises(UserError, match=r"must be tensors \[B,C\]"):
        PairLoss("features_of_ones_own:wrong", net, 0.2)(x, y, {})
    for text, message in (
        ("features_of_ones_own:nothing", "returned NoneType"),
        ("features_of_ones_own:none", "has no function 'none'"),
        ("no_such_module_here:f", "cannot import the module 'no_such_module_here'"),
    ):
        with pytest.raises(UserError, match=message):
            PairLoss(text, net, 0.2)


def test_lpips_is_an_extra(monkeypatch):
    net = ToyNet(torch.float32)
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(MissingExtra, match=r"--loss=lpips needs the package 'lpips': install it with  ?pip install"):
        PairLoss("lpips", net, 0.2)
    seen = []

    class Network(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            assert net == "vgg" and not verbose
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, y):
            seen.append((x.shape, y.requires_grad))
            return self.weight * (x - y).abs().mean(dim=(1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Network))
    x = images(2)[:, :1].requires_grad_()
    loss = PairLoss("3*lpips", net, 0.2)(x, images(2, 1)[:, :1], {})
    loss.sum().backward()
    assert loss.shape == (2,) and x.grad.abs().sum() > 0
    assert seen == [((2, 3, 64, 64), False)]  # grey becomes RGB, small images are enlarged

    def offline(**_):
        raise OSError("no route")

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=offline))
    with pytest.raises(UserError, match="cannot get the weights of VGG"):
        PairLoss("lpips", net, 0.2)


def test_energy_distance_against_loops():
    x, y = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).double(), torch.randn(4, 3).double() + 1

    def mean(pairs):
        distances = [math.dist(a.tolist(), b.tolist()) for a, b in pairs]
        return sum(distances) / len(distances)

    within = [mean([(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in (x, y)]
    expected = 2 * mean([(a, b) for a in x for b in y]) - sum(within)
    assert float(energy_distance(x, y)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0])
def test_energy_distance_of_gaussians(shift):
    """|X - Y| of N(0,1) and N(m,1) is a folded normal, scale sqrt(2). Samples: quantiles."""
    x = torch.special.ndtri((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)[:, None]

    def folded(m):
        return 2 / math.sqrt(math.pi) * math.exp(-(m**2) / 4) + m * math.erf(m / 2)

    assert float(energy_distance(x, x + shift)) == pytest.approx(2 * folded(shift) - 2 * folded(0), abs=0.005)


def test_gradient_of_the_distribution_term():
    """With the batch as the queue: the gradient of the energy distance in its all-pairs form."""
    net = ToyNet(torch.float32)
    term = DistributionTerm(net, 0.2, queue=64)
    term.set_reference([(images(6, 1), {}), (images(6, 2), {})])
    count = term.reference_features.shape[1]
    torch.testing.assert_close(term.reference_features.mean(0), torch.zeros(count), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        term.reference_features.var(0), torch.full([count], 1 / count), rtol=1e-3, atol=0
    )  # 1 in all
    with pytest.raises(RuntimeError, match="queue"):
        term(term.reference_features)
    vectors = term.vectors(images(5, 3) * 1.2, {}).detach().double().requires_grad_()
    reference = term.reference_features = term.reference_features.double()
    term.push(vectors)
    (found,) = torch.autograd.grad(term(vectors).mean(), vectors)
    all_pairs = 2 * torch.cdist(vectors, reference).mean() - torch.cdist(vectors, vectors).mean()
    (expected,) = torch.autograd.grad(all_pairs, vectors)
    torch.testing.assert_close(found, expected)
    assert float(found.norm()) > 0


def test_queue_keeps_the_newest():
    term = DistributionTerm(ToyNet(torch.float32), 0.2, queue=4)
    for start in (0, 3, 6):
        term.push(torch.arange(start, start + 3.0)[:, None])
    assert term.queue.flatten().tolist() == [5, 6, 7, 8]
