"""EDM's stochastic sampler: Heun without noise, Algorithm 2, the distribution, noise per seed."""

import math

import pytest
import torch
from click.testing import CliRunner
from test_solvers_properties import Constant, Gaussian, grid, noise, order_of
from toy import ToyNet, common

import sample as cli
from sampling.generate import generate_images
from solvers import SOLVERS, get_schedule, sample

CHURN = {"S_churn": 3.0, "S_min": 0.05, "S_max": 50.0, "S_noise": 1.007}


class Wide(Gaussian):
    """Gaussian data for any noise level."""

    sigma_min, sigma_max = 0.002, 80.0


def draws(seed=7, batch=2, shape=(1, 2, 2)):
    """A callable that draws standard normal noise in float64."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(batch, *shape, generator=generator, dtype=torch.float64)


def algorithm_2(net, x, sigmas, draw, S_churn, S_min=0.0, S_max=math.inf, S_noise=1.0):
    """Karras et al. 2022, Algorithm 2, no noise before the last step; (result, noise levels)."""
    t, sigma_cond = [*sigmas.tolist(), 0.0], []

    def slope(x, t):
        sigma_cond.append(t)
        return (x - net.denoised(x, torch.tensor(t, dtype=x.dtype))) / t

    for i in range(len(sigmas)):
        gamma = min(S_churn / len(sigmas), math.sqrt(2) - 1) if S_min <= t[i] <= S_max and t[i + 1] else 0
        t_hat = t[i] + gamma * t[i]
        x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * S_noise * draw() if gamma else x
        d = slope(x_hat, t_hat)
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1]:
            x = x_hat + (t[i + 1] - t_hat) * (d + slope(x, t[i + 1])) / 2
    return x, sigma_cond


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("options", [{}, {"S_noise": 2.0}, {"S_churn": 9.0, "S_min": 100.0}])
def test_without_noise_it_is_heun(options, afs):
    settings = {"num_steps": 6, "afs": afs, "return_trajectory": True, "return_info": True, "denoise_to_zero": True}
    expected, expected_info = sample(ToyNet(), common("latents2"), solver="heun", **settings)
    found, info = sample(ToyNet(), common("latents2"), solver="edm", **options, **settings)
    assert torch.equal(found, expected) and info.nfe == expected_info.nfe == 11 - afs


@pytest.mark.parametrize(
    "options",
    [CHURN, {"S_churn": 1.5}, {"S_churn": 100.0}, {"S_churn": 2.0, "S_max": 1.0, "S_noise": 0.0}],
)
def test_algorithm_2(options):
    """N noise levels take 2 N - 1 evaluations, the last of them for the step to zero."""
    net, sigmas = Wide(), get_schedule(8, 0.002, 80.0)
    expected, sigma_cond = algorithm_2(net, noise() * 80.0, sigmas, draws(), **options)
    found, info = sample(
        net, noise(), solver="edm", num_steps=8, noise=draws(), denoise_to_zero=True, return_info=True, **options
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    assert [float(c[0]) for c in net.calls] == pytest.approx(sigma_cond, rel=1e-13)
    assert info.nfe == len(sigma_cond) == 15
    assert any(level > 1.01 * float(sigma) for level, sigma in zip(sigma_cond[::2], sigmas, strict=True))


def response(stamps, **options):
    """Exact (mean, variance) of each pixel of the result for data N(mean, std^2).

    The result is affine in the start and in every noise that is drawn, so one run with unit
    impulses is enough.
    """
    net, sigmas = Wide(), get_schedule(stamps, 0.05, 10.0)
    batch, drawn = stamps + 2, [1]

    def impulse():
        eps = torch.zeros(batch, 1, 2, 2, dtype=torch.float64)
        eps[drawn[0]] = 1.0
        drawn[0] += 1
        return eps

    start = net.data_mean.repeat(batch, 1, 1, 1) / sigmas[0]
    start[0] += (net.data_std**2 + sigmas[0] ** 2).sqrt() / sigmas[0]
    x = sample(net, start, solver="edm", sigmas=sigmas, noise=impulse, **options)
    return x[-1], ((x - x[-1]) ** 2).sum(0)


@pytest.mark.parametrize("churn", [0.05, 0.2, math.sqrt(2) - 1])  # gamma at 40 noise levels
def test_distribution_of_samples_is_that_of_the_data(churn):
    """The mean is exact, the variance up to Heun's second-order error.

    S_churn is the same for all numbers of steps, so that gamma shrinks with them.
    """
    counts, right = (40, 80, 160), Gaussian().data_std ** 2 + 0.05**2
    errors = []
    for stamps in counts:
        mean, variance = response(stamps, S_churn=churn * counts[0])
        torch.testing.assert_close(mean, Gaussian().data_mean, rtol=0, atol=1e-12)
        errors.append(float((variance / right - 1).abs().max()))
    assert order_of(errors, counts) == pytest.approx(2, abs=0.25)
    assert errors[-1] < 0.004
    assert float((response(160, S_churn=churn * 40, S_noise=1.2)[1] / right).min()) > 1.02


def test_statistics_of_many_samples():
    """80,000 pixels: mean and variance within five standard errors.

    These are std / sqrt(n) for the mean and variance sqrt(2 / n) for the variance, which gets
    1.5 % more for Heun's steps.
    """
    net, sigmas, batch = Wide(), get_schedule(60, 0.05, 10.0), 20000
    draw = draws(batch=batch)
    start = (net.data_mean + (net.data_std**2 + 100.0) ** 0.5 * draw()) / 10.0
    x = sample(net, start, solver="edm", sigmas=sigmas, noise=draw, S_churn=12.0) - net.data_mean
    variance = net.data_std**2 + 0.05**2
    assert abs(float(x.mean())) < 5 * (variance / x.numel()) ** 0.5
    assert abs(float((x**2).mean()) / variance - 1) < 5 * (2 / x.numel()) ** 0.5 + 0.015


def test_afs_applies_at_the_raised_noise_level():
    """The direction from the data's statistics is exact for Gaussian data at any noise level."""
    settings = {"solver": "edm", "sigmas": grid(5, "polynomial"), "S_churn": 2.0, "return_info": True}
    paid, info = sample(Gaussian(), noise(), noise=draws(), **settings)
    free, free_info = sample(Gaussian(), noise(), noise=draws(), afs="data", **settings)
    torch.testing.assert_close(free, paid, rtol=0, atol=1e-12)
    assert (info.nfe, free_info.nfe) == (10, 9)
    net, (start, target) = Gaussian(), (1.2, 0.5)
    plain = sample(net, noise(), solver="edm", sigmas=[start, target], S_churn=0.5, noise=draws(), afs=True)
    hat = 1.25 * start
    x = noise() * start + math.sqrt(hat**2 - start**2) * draws()()
    d = x / math.sqrt(1 + hat**2)
    y = x + (target - hat) * d
    expected = x + (target - hat) * (d + (y - net.denoised(y, torch.tensor(target, dtype=y.dtype))) / target) / 2
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("ends", "noisy"), [((0.5, 2.0), 3), ((0.5001, 2.0), 2), ((0.5, 1.999), 2), ((1.0, 1.0), 1)])
def test_both_ends_of_the_noisy_range_belong_to_it(ends, noisy):
    """Algorithm 2 has S_min <= t <= S_max."""
    drawn = []

    def draw():
        drawn.append(1)
        return torch.zeros_like(noise())

    options = {"S_churn": 1.0, "S_min": ends[0], "S_max": ends[1]}
    sample(Wide(), noise(), solver="edm", sigmas=[4.0, 2.0, 1.0, 0.5, 0.1], noise=draw, **options)
    assert len(drawn) == noisy


def test_callback_sees_states_and_denoised_images():
    net, seen = Wide(), []
    trajectory = sample(
        net,
        noise(),
        solver="edm",
        num_steps=6,
        noise=draws(),
        return_trajectory=True,
        callback=lambda i, sigma, x, denoised: seen.append((i, float(sigma), x, denoised)),
        **CHURN,
    )
    sigmas, draw = get_schedule(6, 0.002, 80.0), draws()
    assert [entry[0] for entry in seen] == [0, 1, 2, 3, 4]
    for i, sigma, x, denoised in seen:
        assert sigma == float(sigmas[i]) and torch.equal(x, trajectory[i])
        if CHURN["S_min"] <= sigma <= CHURN["S_max"]:
            hat = sigma * (1 + min(CHURN["S_churn"] / 6, math.sqrt(2) - 1))
            x = x + CHURN["S_noise"] * math.sqrt(hat**2 - sigma**2) * draw()
            sigma = hat
        expected = net.denoised(x, torch.tensor(sigma, dtype=torch.float64))
        torch.testing.assert_close(denoised, expected, rtol=0, atol=1e-11)


class Model(ToyNet):
    """The toy with what generating images needs."""

    def make_cond(self, generator=None, labels=None):
        return {}

    def decode(self, x):
        return x


def images(seeds, batch, **options):
    settings = {"solver": "edm", "num_steps": 6, "batch": batch, "device": "cpu", **options}
    return torch.cat([done.images for done in generate_images(Model(torch.float32), seeds, **settings)])


def test_an_image_depends_on_its_seed_alone():
    seeds, options, state = [5, 0, 3, 11, 2], {"S_churn": 4.0}, torch.get_rng_state()
    whole = images(seeds, 5, **options)
    assert torch.equal(whole, images(seeds, 5, **options))
    for batch in (1, 2):  # up to the rounding of other batch sizes
        torch.testing.assert_close(images(seeds, batch, **options), whole, rtol=0, atol=1e-4)
    torch.testing.assert_close(images([3], 1, **options)[0], whole[2], rtol=0, atol=1e-4)
    assert float((whole - images(seeds, 5)).abs().max()) > 0.01  # noise was added
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("options", [{"S_churn": 1e6}, {"S_churn": 40.0, "S_noise": 1.007, "S_max": 50.0}])
def test_strong_noise_gives_finite_images(options):
    x = images([0, 1], 2, denoise_to_zero=True, **options)
    assert x.dtype == torch.float32 and bool(x.isfinite().all()) and float(x.abs().max()) < 10


def test_roles():
    assert SOLVERS["edm"].stochastic and not SOLVERS["edm"].can_learn and not SOLVERS["edm"].can_teach


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"S_churn": -1}, "S_churn=-1.0 must be a finite number >= 0"),
        ({"S_churn": math.inf}, "S_churn=inf must be a finite number >= 0"),
        ({"S_min": math.nan}, "S_min=nan must be a number"),
        ({"S_min": 2, "S_max": 1}, "S_max=1.0 must be a number >= S_min=2.0"),
        ({"S_max": math.nan}, "S_max=nan must be a number"),
        ({"S_noise": -0.1}, "S_noise=-0.1 must be a finite number >= 0"),
        ({"S_noise": "much"}, "S_noise=much must be a number"),
        ({"predictor": Constant(0.5)}, "no predictor can be inserted into the solver 'edm'"),
    ],
)
def test_mistakes_are_explained(options, text):
    net = Gaussian()
    with pytest.raises(ValueError) as caught:
        sample(net, noise(), solver="edm", num_steps=4, **options)
    assert str(caught.value) == text and net.calls == []


def test_flags_keep_the_published_spelling(tmp_path):
    flags = ["--dataset_name=digits", "--solver=edm", f"--outdir={tmp_path}", "--S_churn=2", "--S_min=3", "--S_max=1"]
    done = CliRunner().invoke(cli.main, flags)
    assert done.exit_code == 2 and "S_max=1.0 must be a number >= S_min=3.0" in done.output
