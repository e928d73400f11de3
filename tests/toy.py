"""The analytic denoiser of the golden data: five Gaussians, exact posterior mean."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

GOLDEN = Path(__file__).parent / "golden" / "solvers"


def load_golden(group):
    return np.load(GOLDEN / f"{group}.npz"), json.loads((GOLDEN / f"{group}.json").read_text())


def common(name, dtype=torch.float64):
    return torch.from_numpy(np.load(GOLDEN / "common.npz")[name]).to(dtype)


class Feature(torch.nn.Module):
    """The map that stands for the bottleneck, [B,4,8,8]."""

    def forward(self, y):
        p = F.avg_pool2d(y, 2)
        return torch.cat([p, p.mean(1, keepdim=True)], dim=1)


class ToyNet(torch.nn.Module):
    """D(x, sigma) for five Gaussians of std 0.25; records the noise levels it is called with.

    means: [5,C,H,W], those of the golden solver data by default.
    """

    img_channels, label_dim = 3, 0

    def __init__(self, dtype=torch.float64, discrete=False, means=None):
        super().__init__()
        self.sigma_min, self.sigma_max = 0.002, 80.0
        self.means = common("means", dtype) if means is None else means
        self.img_resolution = self.means.shape[-1]
        self.bottleneck = Feature()
        self.calls = []
        if discrete:
            key = "alphas_cumprod_f64" if dtype == torch.float64 else "alphas_cumprod_f32"
            self.log_alpha = 0.5 * common(key, dtype).log()
            self.sigma_min = float(self.sigma(torch.tensor(1e-3, dtype=dtype)))
            self.sigma_max = float(self.sigma(torch.tensor(1.0, dtype=dtype)))
            self.has_table = True

    def _interp(self, x, xs, ys):
        order = torch.argsort(xs)
        xs, ys = xs[order], ys[order]
        k = torch.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1)
        return ys[k - 1] + (x - xs[k - 1]) * (ys[k] - ys[k - 1]) / (xs[k] - xs[k - 1])

    @property
    def _grid(self):
        return torch.arange(1, 1001, dtype=torch.float64).to(self.log_alpha.dtype) / 1000

    def sigma(self, t):
        log_alpha = self._interp(t.to(self.log_alpha.dtype), self._grid, self.log_alpha)
        return (-torch.expm1(2 * log_alpha)).sqrt() / log_alpha.exp()

    def sigma_inv(self, sigma):
        log_alpha = -0.5 * torch.log1p(sigma.to(self.log_alpha.dtype) ** 2)
        return self._interp(log_alpha, self.log_alpha, self._grid)

    def forward(self, x, sigma):
        sigma = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1)
        self.calls.append(sigma.detach().flatten())
        self.bottleneck(x / (sigma**2 + 0.25).sqrt())
        v = 0.25**2 + sigma**2
        distance = ((x.unsqueeze(1) - self.means) ** 2).flatten(2).sum(2)
        weight = torch.softmax(-distance / (2 * v.flatten(1)), dim=1)
        mean = torch.einsum("bk,kchw->bchw", weight, self.means)
        return (0.25**2 * x + sigma**2 * mean) / v
