"""The predictor network: sizes, initial distribution, ranges, and what it answers to."""

import math

import pytest
import torch
from scipy import stats

from torch_utils.errors import UserError
from training.predictor import DEFAULTS, AMEDPredictor

torch.set_num_threads(1)


def bottlenecks(batch=6, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 8, 8, generator=generator, dtype=torch.float64) * spread


def make(seed=0, **config):
    torch.manual_seed(seed)
    return AMEDPredictor(**config).double()


@pytest.mark.parametrize(("scale_dir", "scale_time"), [(0, 0), (0.01, 0), (0, 0.2), (0.01, 0.2)])
def test_number_of_parameters(scale_dir, scale_time):
    def linear(cin, cout):
        return cin * cout + cout

    heads = 1 + bool(scale_dir) + bool(scale_time)
    expected = linear(8, 8) + linear(64, 128) + linear(128, 4) + heads * linear(4 + 2 * 8, 1)
    predictor = AMEDPredictor(scale_dir=scale_dir, scale_time=scale_time)
    assert sum(p.numel() for p in predictor.parameters()) == expected
    assert 8900 < expected < 9000  # "about nine thousand" (Section 3.3 of the paper)
    names = {name.split(".")[0] for name in predictor.state_dict()}
    assert ("fc_scale_dir" in names, "fc_scale_time" in names) == (bool(scale_dir), bool(scale_time))


def test_widths_are_settings():
    predictor = AMEDPredictor(hidden_dim=16, bottleneck_output_dim=3, noise_channels=4)
    shapes = {name: tuple(value.shape) for name, value in predictor.named_parameters()}
    assert shapes["enc_layer0.weight"] == (16, 64)
    assert shapes["enc_layer1.weight"] == (3, 16)
    assert shapes["map_layer0.weight"] == (4, 4)
    assert shapes["fc_r.weight"] == (1, 3 + 2 * 4)


def test_initial_distribution():
    drawn = [make(seed, scale_dir=0.1, scale_time=0.1) for seed in range(20)]
    for name, parameter in drawn[0].named_parameters():
        if name.endswith(".bias"):
            assert not parameter.any(), name
            continue
        values = torch.cat([dict(p.named_parameters())[name].detach().flatten() for p in drawn]).numpy()
        fan_out, fan_in = parameter.shape
        if name == "map_layer0.weight":  # Xavier-uniform
            bound = math.sqrt(6 / (fan_in + fan_out))
            assert abs(values).max() <= bound
            law = stats.uniform(-bound, 2 * bound)
        else:
            law = stats.norm(0, math.sqrt(1 / fan_in))
        assert stats.kstest(values, law.cdf).pvalue > 1e-3, name
        assert values.std() == pytest.approx(law.std(), rel=5 / math.sqrt(2 * len(values))), name


def test_seed_decides_the_initial_weights():
    first, again, other = make(3).state_dict(), make(3).state_dict(), make(4).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["enc_layer0.weight"], other["enc_layer0.weight"])


@pytest.mark.parametrize("spread", [0.0, 1.0, 1000.0])
def test_ranges(spread):
    bounds = {"scale_dir": 0.05, "scale_time": 0.3}
    predictor = make(**bounds)
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.add_(0.05)  # not where training starts
        for t_cur, t_next in [(80.0, 20.0), (1.0, 0.1), (0.01, 0.002)]:
            r, scale_dir, scale_time = predictor(bottlenecks(64, spread), t_cur, t_next)
            assert r.shape == scale_dir.shape == scale_time.shape == (64, 1, 1, 1)
            if spread <= 1:
                assert ((r > 0) & (r < 1)).all()
            else:
                assert ((r >= 0) & (r <= 1)).all()  # the sigmoid may saturate
            for value, bound in ((scale_dir, 0.05), (scale_time, 0.3)):
                assert (value >= 1 - bound).all() and (value <= 1 + bound).all()
                assert value.std() > 0 or spread == 0


def test_scales_reach_their_bounds_and_start_from_one():
    predictor = make(scale_dir=0.05, scale_time=0.3)
    with torch.no_grad():
        for head, bound in ((predictor.fc_scale_dir, 0.05), (predictor.fc_scale_time, 0.3)):
            head.weight.zero_()
            for bias, expected in ((0.0, 1.0), (50.0, 1 + bound), (-50.0, 1 - bound)):
                head.bias.fill_(bias)
                scales = dict(zip(("scale_dir", "scale_time"), predictor(bottlenecks(), 2.0, 1.0)[1:], strict=True))
                name = "scale_dir" if head is predictor.fc_scale_dir else "scale_time"
                torch.testing.assert_close(scales[name], torch.full_like(scales[name], expected), rtol=0, atol=1e-12)


def test_missing_heads_answer_one():
    r, scale_dir, scale_time = make()(bottlenecks(3), 2.0, 1.0)
    assert torch.equal(scale_dir, torch.ones(3, 1, 1, 1, dtype=torch.float64))
    assert torch.equal(scale_time, scale_dir)
    assert r.requires_grad


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_every_sample_has_its_own_answer(batch):
    """Also at 2 and 3 samples, which a bare [B] result unpacked along the batch would get wrong."""
    predictor, feature = make(), bottlenecks(batch)
    together = predictor(feature, 5.0, 1.0)[0]
    alone = torch.cat([predictor(feature[k : k + 1], 5.0, 1.0)[0] for k in range(batch)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-14)
    assert len(set(together.flatten().tolist())) == batch


def test_times_per_sample_equal_scalar_calls():
    predictor, feature = make(scale_dir=0.1, scale_time=0.2), bottlenecks(4)
    t_cur = torch.tensor([80.0, 10.0, 1.0, 0.05], dtype=torch.float64)
    t_next = torch.tensor([10.0, 1.0, 0.05, 0.002], dtype=torch.float64)
    together = predictor(feature, t_cur, t_next)
    for k in range(4):
        alone = predictor(feature[k : k + 1], t_cur[k], float(t_next[k]))
        for whole, part in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[k : k + 1], part, rtol=0, atol=1e-14)
    same = predictor(feature, t_cur[:1].expand(4), t_next[:1].expand(4))
    for whole, part in zip(predictor(feature, 80.0, 10.0), same, strict=True):
        torch.testing.assert_close(whole, part, rtol=0, atol=1e-14)


def test_every_input_matters():
    predictor, feature = make().requires_grad_(False), bottlenecks(1)
    base = predictor(feature, 5.0, 1.0)[0]
    for other in ((bottlenecks(1, seed=1), 5.0, 1.0), (feature, 6.0, 1.0), (feature, 5.0, 2.0), (feature, 1.0, 5.0)):
        assert float((predictor(*other)[0] - base).abs()) > 1e-6


def test_half_precision_features_are_accepted():
    predictor = AMEDPredictor()
    r = predictor(bottlenecks(2).to(torch.bfloat16), torch.tensor(5.0, dtype=torch.float64), 1.0)[0]
    assert r.dtype == torch.float32


def test_configuration_is_complete_and_plain():
    predictor = AMEDPredictor(num_steps=5, afs=True)
    assert set(predictor.config) == set(DEFAULTS)
    assert predictor.config["num_steps"] == 5
    assert predictor.evaluations() == 7
    assert AMEDPredictor(sigmas=[3.0, 2.0, 1.0]).evaluations() == 4
    assert DEFAULTS["num_steps"] == 4  # the table itself is not written to


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"num_step": 5}, "unknown predictor setting 'num_step'"),
        ({"scale_dir": -0.1}, "scale_dir"),
        ({"scale_dir": 1.0}, "scale_dir"),
        ({"scale_time": 2}, "scale_time"),
        ({"scale_time": float("nan")}, "scale_time"),
    ],
)
def test_mistakes_are_explained(config, text):
    with pytest.raises(ValueError, match=text):
        AMEDPredictor(**config)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), 10**400, True, "1"], ids=lambda value: str(value)[:5]
)
def test_a_setting_has_to_be_a_finite_number(value):
    for name in ("guidance_rate", "schedule_rho"):
        with pytest.raises(UserError, match=f"^{name}=.*wrong kind"):
            AMEDPredictor(**{name: value})
