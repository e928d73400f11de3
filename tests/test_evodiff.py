"""EVODiff: limits and properties. test_methods_golden.py has the published code's numbers."""

import math

import pytest
import torch

from solvers import get_schedule, make_solver, sample
from solvers.evodiff import projection

torch.set_num_threads(1)


class Net(torch.nn.Module):
    """A denoiser given by a function of (x, sigma); counts its calls."""

    sigma_min, sigma_max, img_channels, img_resolution, label_dim = 0.002, 80.0, 2, 3, 0

    def __init__(self, function):
        super().__init__()
        self.function, self.calls = function, []

    def forward(self, x, sigma):
        sigma = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1)
        self.calls.append(float(sigma.max()))
        return self.function(x, sigma)


def two_gaussians(x, sigma, std=0.6):
    """Data (N(-1, std^2) + N(1, std^2)) / 2 in every pixel."""
    variance = std**2 + sigma**2
    return (std**2 * x + sigma**2 * torch.tanh(x / variance)) / variance


def latents(batch=3, shape=(2, 3, 3), dtype=torch.float64):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def run(function, x, sigmas, **options):
    return sample(Net(function), x, solver="evodiff", sigmas=sigmas, **options)


GRID = get_schedule(7, 0.02, 10.0)  # polynomial: unequal steps in ln sigma
EVEN = get_schedule(7, 0.02, 10.0, "logsnr")
LONG = get_schedule(23, 0.02, 10.0)  # long enough for the second form of zeta


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("intervals", [1, 2, 3, 7])
def test_one_evaluation_per_interval_at_the_points_of_the_schedule(intervals, afs, lower):
    """And one at the last point where the last step is an ordinary one."""
    net = Net(two_gaussians)
    options = {"solver": "evodiff", "sigmas": get_schedule(intervals + 1, 0.02, 10.0), "afs": afs}
    options["lower_order_final"] = lower
    _, info = sample(net, latents(), **options, return_info=True)
    expected = options["sigmas"][int(afs) : -1 if lower or intervals == 1 else None].tolist()
    assert net.calls == expected
    assert info.nfe == len(expected) == make_solver("evodiff", {"lower_order_final": lower}).evaluations(intervals, afs)
    net.calls.clear()
    sample(net, latents(), **options, denoise_to_zero=True)
    assert net.calls == [*expected, float(options["sigmas"][-1])]


def test_samples_and_channels_do_not_mix():
    """For a denoiser that works pixel by pixel, every channel of every sample is as if alone."""
    x = latents()
    together = run(two_gaussians, x, GRID)
    for k in range(len(x)):
        for c in range(x.shape[1]):
            alone = run(two_gaussians, x[k : k + 1, c : c + 1], GRID)
            torch.testing.assert_close(together[k : k + 1, c : c + 1], alone, rtol=0, atol=1e-13)
    pixel = run(two_gaussians, x[:1, :1, :1, :1], GRID)
    assert not torch.allclose(pixel, together[:1, :1, :1, :1])  # the weights do look at the whole channel


def constant(x, sigma):
    return torch.linspace(-1, 0.8, 18, dtype=x.dtype).reshape(1, 2, 3, 3).expand_as(x)


def test_constant_denoiser_on_equal_steps_is_exact_but_for_the_last_step():
    """D = mu: beta = 1 and both differences vanish; Euler's step remains, which is exact."""
    x = latents()
    mean = constant(x, None)
    exact = torch.stack([mean + (10.0 * x - mean) * s / 10.0 for s in EVEN])
    found = run(constant, x, EVEN, return_trajectory=True)
    torch.testing.assert_close(found[:-1], exact[:-1], rtol=0, atol=1e-13)
    assert not torch.allclose(found[-1], exact[-1])
    plain = run(constant, x, EVEN, lower_order_final=False)
    torch.testing.assert_close(plain, exact[-1], rtol=0, atol=1e-13)


def test_the_place_of_the_probe_looks_at_the_size_of_beta_only():
    """At low noise w = 1/2. From v to -2 v in equal steps of ln sigma, beta = 1/2 - 2/2 = -1/2. So
    probe - euler = (1 - t/s) / 2 (-2 v - beta v) / sigmoid(|beta| / 4), which
    is -0.75 / sigmoid(0.125) = -1.4118 times (1 - t/s) v."""
    image, levels, probes = latents(1), EVEN.tolist(), {}

    def denoise(x, sigma):
        return image * (-2.0 if levels.index(float(sigma)) == 4 else 1.0)

    def callback(i, sigma, x, denoised):
        probes[i] = x

    states = run(denoise, latents(1), EVEN, return_trajectory=True, callback=callback)
    ratio = EVEN[5] / EVEN[4]
    euler = ratio * states[4] - (1 - ratio) * 2 * image
    torch.testing.assert_close(probes[5] - euler, -1.4118 * (1 - ratio) * image, rtol=1e-3, atol=0)


def test_zero_denoiser_is_exact_on_every_grid():
    x = latents()
    found = run(lambda x, sigma: torch.zeros_like(x), x, GRID, lower_order_final=False)
    torch.testing.assert_close(found, x * GRID[-1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_images_stay_finite(dtype):
    x = latents(dtype=dtype)
    x[0], x[1, 0] = 0, 0
    functions = [
        two_gaussians,  # 0 stays 0
        constant,
        lambda x, sigma: torch.where(sigma > 1, torch.zeros_like(x), constant(x, sigma)),  # 0 first, then not
        lambda x, sigma: 1e-30 * x,  # squares underflow in float32
        lambda x, sigma: torch.sign(torch.cos(7 * sigma)) * constant(x, sigma),  # opposite images
    ]
    for function in functions:
        for grid in (GRID, EVEN, LONG):
            found = run(function, x, grid, return_trajectory=True)
            assert found.dtype == dtype and found.isfinite().all()


def test_projection():
    a, b = latents(), latents().flip(0) + 1
    found = projection(a, b)
    assert found.shape == (3, 2, 1, 1)
    torch.testing.assert_close(((a - found * b) * b).sum((-2, -1)), torch.zeros(3, 2).double(), rtol=0, atol=1e-13)
    assert not projection(a, torch.zeros_like(a)).any()


def distances(counts, **options):
    low, high = 0.4, 1.2
    x = latents(2)

    def solve(solver, n, **more):
        sigmas = get_schedule(n + 1, low, high, "logsnr")
        return sample(Net(two_gaussians), x, solver=solver, sigmas=sigmas, **more)

    exact = solve("heun", 500)
    return exact, [solve("evodiff", n, **options) for n in counts]


def test_converges_with_order_one():
    """The correction is of second order per step, but not the one of a method of order two."""
    exact, found = distances((50, 100, 200), lower_order_final=False)
    errors = [float((x - exact).abs().max()) for x in found]
    orders = [math.log2(a / b) for a, b in zip(errors[:-1], errors[1:], strict=True)]
    assert errors[-1] < 2e-3
    assert min(orders) > 0.85 and max(orders) < 1.3, orders


def test_published_last_step_leaves_a_distance():
    """Its factor 1 - sqrt(s t) tends to 1 - sigma_min: many steps lead to (1 - sigma_min) x."""
    exact, (found,) = distances((400,))
    torch.testing.assert_close(found, (1 - 0.4) * exact, rtol=0, atol=5e-3)
