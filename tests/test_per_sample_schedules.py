"""A schedule for each sample: ``sigmas`` of shape [N,B,1,1,1]."""

import pytest
import torch
from systems_golden import Function

from solvers import SOLVERS, sample
from torch_utils.errors import UserError

LEVELS = [[8.0, 3.0, 1.0, 0.4, 0.05], [9.0, 2.0, 0.8, 0.3, 0.02], [5.0, 4.0, 2.0, 0.3, 0.1]]
SIGMAS = torch.tensor(LEVELS, dtype=torch.float64).T.reshape(5, 3, 1, 1, 1)
OPTIONS = {"sde": {"noise": lambda: torch.zeros((), dtype=torch.float64)}}


def problem():
    net = Function(lambda x, sigma: torch.tanh(2 * x / (0.4 + sigma**2)))
    net.data_mean, net.data_std = torch.zeros(1, 1, 1), 0.5
    return net, torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("afs", [False, True, "data"])
@pytest.mark.parametrize("solver", [n for n, s in SOLVERS.items() if s.per_sample and not s.needs_predictor])
def test_each_sample_is_what_it_is_alone(solver, afs):
    net, latents = problem()
    settings = {"solver": solver, "afs": afs, **OPTIONS.get(solver, {})}
    together = sample(net, latents, sigmas=SIGMAS, **settings)
    alone = [sample(net, latents[k : k + 1], sigmas=levels, **settings) for k, levels in enumerate(LEVELS)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", ["edm", "unipc"])
def test_solvers_that_need_one_schedule_say_so(solver):
    net, latents = problem()
    with pytest.raises(UserError, match=f"'{solver}' needs one schedule for all samples"):
        sample(net, latents, sigmas=SIGMAS, solver=solver)


def test_a_wrong_level_of_one_sample_is_found():
    net, latents = problem()
    wrong = SIGMAS.clone()
    wrong[2, 1] = 5.0
    with pytest.raises(UserError, match="strictly decreasing"):
        sample(net, latents, sigmas=wrong, solver="euler")
