"""GITS: costs and schedules of the public implementation, and that these are the cheapest."""

import itertools

import numpy as np
import pytest
import torch
from toy import ToyNet, common, load_golden

from solvers import SOLVERS, sample
from solvers.search.gits import METRICS, chord_distance, gits_cost, gits_indices, insert_afs_point
from solvers.solver import Euler
from torch_utils.errors import UserError

GOLDEN, JSON = load_golden("gits")
CASES = [case for case in JSON["cases"] if "solver_tea" in case]
TABLES = [case for case in JSON["cases"] if case["id"].startswith("dp")]
TEACHER = ("schedule_type", "schedule_rho", "max_order", "predict_x0", "lower_order_final")
by_id = pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])


def golden_cost(case, metric, dtype=torch.float64, **extra):
    net = ToyNet(dtype, discrete=case["schedule_type"] == "discrete")
    latents = torch.from_numpy(GOLDEN[f"{case['id']}.latents"]).to(dtype)
    teacher = {name: case[name] for name in TEACHER}
    return gits_cost(net, latents, case["solver_tea"], case["num_steps_tea"], metric, **teacher, **extra)


def close(cost, expected, tolerance):
    assert cost.dtype == torch.float64
    np.testing.assert_allclose(cost.numpy(), expected, rtol=0, atol=tolerance * np.abs(expected).max())


@by_id
def test_cost_and_schedules(case):
    for metric in case["metrics"]:
        cost = golden_cost(case, metric)
        close(cost, GOLDEN[f"{case['id']}.cost_{metric}.f64"], 1e-11)
        for num_steps, expected in case["schedules"][metric]["dp_list_f64"].items():
            assert gits_indices(cost, int(num_steps), case["coeff"]) == expected
        others = case["schedules"]["dp_only"]
        if metric == others["metric"]:
            for coeff, lists in others["by_coeff"].items():
                for num_steps, expected in lists.items():
                    assert gits_indices(cost, int(num_steps), float(coeff)) == expected


@by_id
def test_cost_and_schedules_float32(case):
    metric = case["metrics"][-1]
    cost = golden_cost(case, metric, torch.float32)
    close(cost, GOLDEN[f"{case['id']}.cost_{metric}.f32"], 1e-4)
    for num_steps, expected in case["schedules"][metric]["dp_list_f32"].items():
        assert gits_indices(cost, int(num_steps), case["coeff"]) == expected


@by_id
def test_published_afs_also_changes_the_teacher(case):
    """Ours does not: the cost matrix is the same with and without AFS."""
    metric = case["metrics"][0]
    cost = golden_cost(case, metric, afs=True, original_code=True)
    close(cost, GOLDEN[f"{case['id']}.cost_{metric}_afs.f64"], 1e-11)
    for num_steps, expected in case["schedules"][metric]["dp_list_afs_f64"].items():
        chain = gits_indices(cost, int(num_steps), case["coeff"])
        assert chain == expected
        assert insert_afs_point(None, None, None, None, chain, solver=case["solver"]) == expected  # there is no room
    assert torch.equal(golden_cost(case, metric, afs=True), golden_cost(case, metric))


@pytest.mark.parametrize("case", TABLES, ids=lambda case: case["id"])
def test_dynamic_programme_on_tables(case):
    for coeff, lists in case["by_coeff"].items():
        for num_steps, expected in lists.items():
            assert gits_indices(GOLDEN[f"{case['id']}.cost"], int(num_steps), float(coeff)) == expected


def test_deviation():
    points = torch.from_numpy(GOLDEN["dev.traj"]).flatten(2)
    deviation = chord_distance(points, points[0], points[-1])
    np.testing.assert_allclose(deviation[1:-1].T, GOLDEN["dev.deviation"], rtol=1e-12)
    np.testing.assert_allclose(deviation[[0, -1]], 0, atol=1e-12)


@pytest.mark.parametrize("coeff", [0.7, 1.0, 1.15])
@pytest.mark.parametrize("second", [1, 3])
def test_cheapest_of_all_chains(coeff, second):
    size = 8
    cost = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).numpy()
    for num_steps in range(2, size + 2 - second):
        chains = [(0, *inner, size - 1) for inner in itertools.combinations(range(second, size - 1), num_steps - 2)]

        def price(chain):
            return sum(coeff**m * cost[jump] for m, jump in enumerate(itertools.pairwise(chain)))

        assert tuple(gits_indices(cost, num_steps, coeff, second)) == min(chains, key=price)


def test_equal_chains_give_the_smallest_indices():
    assert gits_indices(np.zeros((7, 7)), 4) == [0, 1, 2, 6]


@pytest.mark.parametrize("metric", METRICS)
def test_a_jump_to_the_next_point_is_the_step_of_an_euler_teacher(metric):
    cost = gits_cost(ToyNet(), common("latents4")[None], "euler", 9, metric)
    np.testing.assert_allclose(cost.diagonal(1), 0, atol=1e-10)
    assert not cost.tril().any() and cost.triu(2).count_nonzero() == 28


@pytest.mark.parametrize("solver", ["heun", "unipc"])
def test_rounds_do_not_matter(solver):
    latents = common("latents5")
    whole = gits_cost(ToyNet(), latents[None], solver, 8, "l2")
    parts = gits_cost(ToyNet(), [latents[:2], latents[2:]], solver, 8, "l2")
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    assert whole.triu(1).count_nonzero() == 28


def test_inserted_point_is_the_best_one():
    net, latents = ToyNet(), common("latents4")
    states, info = sample(
        net, latents, solver="ipndm", num_steps=13, schedule_type="logsnr", return_trajectory=True, return_info=True
    )

    def distance(k):
        x = sample(net, latents, solver="euler", sigmas=info.sigmas[[0, k, 8, 10, 12]], afs=True)
        return (x - states[-1]).flatten(1).norm(dim=1).mean()

    chain = insert_afs_point(net, latents, states[-1], info.sigmas, [0, 8, 10, 12], solver="euler")
    distances = [float(distance(k)) for k in range(1, 8)]
    assert chain == [0, 1 + int(np.argmin(distances)), 8, 10, 12]
    assert len({round(value, 6) for value in distances}) == 7


def test_the_condition_reaches_the_network():
    """The costs of a conditional network are those of the network with the condition built in."""

    class Shifted(ToyNet):
        def forward(self, x, sigma, shift=None):
            return super().forward(x, sigma) + (self.own if shift is None else shift)

    net, latents = Shifted(), common("latents2")[None]
    net.own, shift = 0.0, 0.5
    found, plain = gits_cost(net, latents, "euler", 5, cond={"shift": shift}), gits_cost(net, latents, "euler", 5)
    net.own = shift
    torch.testing.assert_close(found, gits_cost(net, latents, "euler", 5), rtol=1e-12, atol=0)
    assert float((found - plain).abs().max()) > 1e-3


def test_the_second_point_may_always_be_the_last():
    """Whatever ``second`` says, one jump to the end needs no point between."""
    cost = np.ones((5, 5))
    assert [gits_indices(cost, 2, second=second) for second in (1, 4, 5, 99)] == 4 * [[0, 4]]
    assert gits_indices(cost, 3, second=3) == [0, 3, 4]


def test_mistakes(monkeypatch):
    net, latents, cost = ToyNet(), common("latents2")[None], np.zeros((5, 5))
    cases = {
        "num_steps=6: GITS chooses 2 to 5": lambda: gits_indices(cost, 6),
        "num_steps=1: GITS chooses": lambda: gits_indices(cost, 1),
        "too small for a second point": lambda: gits_indices(cost, 5, second=2),
        "coeff=0 must be": lambda: gits_indices(cost, 3, 0),
        r"must be \[T,T\]": lambda: gits_indices(cost[:4], 3),
        "not finite": lambda: gits_indices(cost + np.nan, 3),
        "unknown metric 'l3'": lambda: gits_cost(net, latents, "euler", 4, "l3"),
        "'amed' cannot be the teacher": lambda: gits_cost(net, latents, "amed", 4),
        "'nope' cannot be the teacher": lambda: gits_cost(net, latents, "nope", 4),
        "skips points": lambda: gits_cost(net, latents, "skip", 5),
        "latents must be": lambda: gits_cost(net, latents[0], "euler", 4),
        "at least one batch": lambda: gits_cost(net, [], "euler", 4),
        "num_steps=1": lambda: gits_cost(net, latents, "euler", 1),
    }

    class Skip(Euler):
        def stride(self, i, intervals):
            return 2

    monkeypatch.setitem(SOLVERS, "skip", Skip)
    for message, call in cases.items():
        with pytest.raises(UserError, match=message):
            call()
