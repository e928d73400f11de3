"""Inverse problems: operators, the posterior's denoiser, and RED-diff, against closed forms."""

import pytest
import torch
from systems_golden import Function, arrays, assert_relative, cases

from models import create_model
from models.inputs import draw_inputs
from models.posterior import Average, Blur, Operator, Posterior, conjugate_gradients, make_operator, red_diff
from solvers import sample
from torch_utils.errors import UserError
from torch_utils.images import save_image

OPERATORS = ["inpaint:0.5", "sr:2", "sr:4", "blur:1.5", "gray"]
SETTINGS = {"solver": "dpmpp", "thresholding": False, "num_steps": 11, "afs": "data"}  # of digits


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("text", OPERATORS)
def test_adjoint_and_solve(text):
    operator, x = make_operator(text), random(2, 3, 8, 12)
    r = random(*operator.forward(x).shape, seed=1)
    assert torch.allclose((operator.forward(x) * r).sum(), (x * operator.adjoint(r)).sum())
    for c in (0.3, torch.tensor([0.1, 2.0], dtype=torch.float64).reshape(2, 1, 1, 1)):
        v = operator.solve(r, c)
        image = operator.forward(operator.adjoint(v)) + c * v
        inpainted = operator.forward(torch.ones_like(r)) if text.startswith("inpaint") else 1
        torch.testing.assert_close(image * inpainted, r * inpainted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("text", OPERATORS[1:])
def test_conjugate_gradients_solve_the_same(text):
    operator, x = make_operator(text), random(2, 3, 8, 8)
    r = random(*operator.forward(x).shape, seed=1)
    torch.testing.assert_close(Operator.solve(operator, r, 0.2), operator.solve(r, 0.2), rtol=0, atol=1e-5)


def test_conjugate_gradients_of_a_dense_matrix():
    a = random(6, 6)
    matrix = a @ a.T + torch.eye(6, dtype=torch.float64)
    r = random(3, 6, seed=2)
    v = conjugate_gradients(lambda v: v @ matrix, r)
    torch.testing.assert_close(v, torch.linalg.solve(matrix, r.T).T, rtol=0, atol=1e-5)


def test_operators_do_what_they_say():
    x = random(1, 3, 8, 8)
    torch.testing.assert_close(Average(4).forward(x)[0, 0, 1, 0], x[0, 0, 4:, :4].mean())
    torch.testing.assert_close(make_operator("gray").forward(x), x.mean(1, keepdim=True))
    assert (make_operator("inpaint:0.25").forward(x)[0, 0] == 0).sum() == 16
    impulse = torch.zeros(1, 1, 64, 64, dtype=torch.float64)
    impulse[0, 0, 32, 32] = 1
    spread = Blur(2.0).forward(impulse)
    place = torch.arange(64, dtype=torch.float64) - 32
    assert spread.sum() == pytest.approx(1)
    assert float((spread[0, 0].sum(0) * place**2).sum()) == pytest.approx(4.0, rel=1e-3)


def gaussian_problem():
    """Data N(m, I) of 12 pixels: (net, A, y, noise, mean, covariance of the posterior)."""
    a, m, noise = random(5, 12) / 12**0.5, 0.3 * random(12, seed=1), 0.1
    y = (m + random(1, 12, seed=2)) @ a.T + noise * random(1, 5, seed=3)
    net = Function(lambda x, sigma: (x + sigma**2 * m.reshape(3, 2, 2)) / (1 + sigma**2))
    net.img_channels, net.img_resolution, net.sigma_min, net.sigma_max, net.data_std = 3, 2, 0.002, 80.0, 1.0
    identity = torch.eye(5, dtype=torch.float64)
    gain = a.T @ torch.linalg.inv(a @ a.T + noise**2 * identity)
    return net, a, y, noise, m + (y - m @ a.T)[0] @ gain.T, torch.eye(12, dtype=torch.float64) - gain @ a


class Dense(Operator):
    def __init__(self, a):
        self.a = a

    def forward(self, x):
        return x.flatten(1) @ self.a.T

    def adjoint(self, r):
        return (r @ self.a).reshape(-1, 3, 2, 2)

    def solve(self, r, c):
        return torch.linalg.solve(self.a @ self.a.T + c * torch.eye(len(self.a), dtype=r.dtype), r.T).T


@pytest.mark.parametrize("jacobian", [False, True])
@pytest.mark.parametrize(
    "settings", [{"solver": "heun", "num_steps": 41}, {"solver": "ipndm", "num_steps": 60}], ids=str
)
def test_samples_follow_the_posterior_of_a_gaussian(jacobian, settings):
    net, a, y, noise, mean, covariance = gaussian_problem()
    posterior = Posterior(net, Dense(a), y.expand(2000, -1), noise, jacobian)
    x = sample(posterior, random(2000, 3, 2, 2, seed=5), **settings).flatten(1)
    assert (x.mean(0) - mean).abs().max() < 0.08
    assert (x.T.cov() - covariance).abs().max() < 0.12


def test_red_diff_equals_the_published_code():
    data = arrays("inverse/reddiff_dps_pgdm")
    checked = 0
    for case in cases("inverse/reddiff_dps_pgdm"):
        if case["algo"] != "reddiff":
            continue
        i = case["case"]
        m, covariance, a, y = (data[f"{name}__{i}"] for name in ("mean", "cov", "A", "y"))
        values, vectors = torch.linalg.eigh(covariance)

        def denoised(x, sigma, m=m, values=values, vectors=vectors):
            shrunk = (x.flatten(1) - m) @ vectors * (values / (values + sigma**2))
            return (m + shrunk @ vectors.T).reshape(x.shape)

        noise = data[f"noise__{i}"]
        draws = iter(noise[1::2])  # the published code draws two per step and uses the second
        operator = Dense(a)
        sigmas = (1 / data[f"alpha_bar__{i}"] - 1).sqrt().flip(0)
        mu = red_diff(
            Function(denoised),
            operator,
            y,
            sigmas,
            lambda draws=draws: next(draws),
            start=(y @ torch.linalg.pinv(a).T).reshape(noise[0].shape),
            lr=case["lr"],
            regularisation=case["grad_term_weight"],
            weight=case["denoise_term_weight"],
            observation=case["obs_weight"],
        )
        assert_relative(mu, data[f"result__{i}"], 1e-8)
        checked += 1
    assert checked


def test_the_observation_is_kept_on_a_real_network():
    """Half of the pixels of digits are given: they stay, and the rest is closer than without."""
    net = create_model("digits")
    truth = sample(net, draw_inputs(net, range(4))[0], **SETTINGS)
    operator = make_operator("inpaint:0.5", channels=1)
    y = operator.forward(truth)
    posterior = Posterior(net, operator, y, 0.02)
    latents = draw_inputs(net, range(10, 14))[0]
    found, without = (sample(denoiser, latents, **SETTINGS) for denoiser in (posterior, net))
    kept = operator.forward(torch.ones_like(truth)) > 0
    assert (found - truth)[kept].square().mean().sqrt() < 0.05
    assert (found - truth)[~kept].square().mean() < 0.5 * (without - truth)[~kept].square().mean()
    rows = posterior.make_cond()
    assert rows == {} and posterior.bottleneck is net.bottleneck


def test_a_learned_solver_works_on_a_posterior():
    from training.predictor import AMEDPredictor

    net = create_model("digits")
    latents, _ = draw_inputs(net, range(2))
    operator = make_operator("sr:2", channels=1)
    posterior = Posterior(net, operator, operator.forward(torch.zeros(2, 1, 32, 32)), 0.05)
    x = sample(posterior, latents, solver="amed", num_steps=3, predictor=AMEDPredictor())
    assert x.isfinite().all()


def own_operator():
    class Half:
        def forward(self, x):
            return x[..., ::2]

        def adjoint(self, r):
            return torch.stack([r, torch.zeros_like(r)], -1).flatten(-2)

    return Half()


def test_an_operator_of_ones_own():
    operator, r = make_operator(f"{__name__}:own_operator"), random(1, 1, 4, 2)
    torch.testing.assert_close(operator.solve(r, 0.5), r / 1.5, rtol=0, atol=1e-6)


def test_a_mask_from_a_picture(tmp_path):
    mask = torch.zeros(8, 8, 1, dtype=torch.uint8)
    mask[:4] = 255
    save_image(mask.numpy(), tmp_path / "mask.png")
    operator = make_operator(f"inpaint:{tmp_path / 'mask.png'}")
    kept = operator.forward(torch.ones(1, 1, 8, 8))
    assert kept[0, 0, :4].all() and not kept[0, 0, 4:].any()
    with pytest.raises(UserError, match="has 8x8 pixels, the images have 4x4"):
        operator.forward(torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize("text", ["sr:1.5", "sr", "inpaint:2", "zoom:2", "blur:-1", "no_such_module:f", "math:no", ""])
def test_unknown_operators_are_refused(text):
    with pytest.raises(UserError, match="use inpaint:SHARE"):
        make_operator(text)


def test_what_does_not_go_together_is_said():
    net = Function(lambda x, sigma: x)
    with pytest.raises(UserError, match="must be above 0"):
        Posterior(net, Blur(2.0), torch.zeros(1, 1, 8, 8), 0.0)
    with pytest.raises(UserError, match="sigma_y=-1"):
        Posterior(net, Average(2), torch.zeros(1, 1, 4, 4), -1)
    posterior = Posterior(net, Average(2), torch.zeros(1, 1, 4, 4), 0.1)
    with pytest.raises(UserError, match=r"observations \[1, 1, 8, 8\] of the images, y has \[1, 1, 4, 4\]"):
        posterior(torch.zeros(1, 1, 16, 16), 1.0)
    net.latent = True
    with pytest.raises(UserError, match="samples latents"):
        Posterior(net, Average(2), torch.zeros(1, 1, 4, 4), 0.1)
