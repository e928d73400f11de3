"""EVODiff, PFDiff, DPM-Solver-v3 against their authors' code (tests/golden/methods)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import ToyNet

from solvers import make_solver, sample
from solvers.dpm_solver_v3 import Statistics, save_statistics
from tools.model_statistics import estimate_statistics

torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden" / "methods"
COMMON = np.load(GOLDEN / "common.npz")
NO_NOISE = 1e-10  # stands for a schedule's last sigma of 0, which is not supported


def cases(group):
    found = json.loads((GOLDEN / f"{group}.json").read_text())["cases"]
    return [pytest.param(case, id=f"{case['id']}-{case['class']}") for case in found]


def toy(size=4):
    return ToyNet(means=torch.from_numpy(COMMON["means"][:, :, :size, :size]).double())


def deviation(found, expected):
    """max |difference| / max(1, max |expected|), of the worst state."""
    assert found.shape == expected.shape
    rows = zip(found.double().numpy(), expected, strict=True)
    return max(np.abs(a - b).max() / max(1.0, np.abs(b).max()) for a, b in rows)


def check(group, case, **options):
    arrays = {
        name.partition(".")[2]: value
        for name, value in np.load(GOLDEN / f"{group}.npz").items()
        if name.startswith(case["id"])
    }
    sigmas = torch.from_numpy(arrays["sigmas"]).clone()
    sigmas[-1] = max(float(sigmas[-1]), NO_NOISE)
    latents = torch.from_numpy(COMMON[case["latents"]]).double()
    net = toy(latents.shape[-1])
    net.sigma_min, net.sigma_max = float(sigmas[-1]), float(sigmas[0])
    denoise = case.get("denoise_to_zero", False)
    states, info = sample(
        net, latents, solver=group, sigmas=sigmas, denoise_to_zero=denoise, return_trajectory=True, return_info=True,
        **options,
    )  # fmt: skip
    np.testing.assert_allclose([float(level) for level in net.calls], arrays["net_sigmas"], rtol=1e-9)
    solver = make_solver(group, {name: value for name, value in options.items() if name != "corrector"})
    assert info.nfe == case["nfe"] == solver.evaluations(len(sigmas) - 1) + denoise
    if denoise:
        assert deviation(states[-1:], arrays["denoised"][None]) <= case["tol"]
        states = states[:-1]
    if "final" in arrays:
        assert deviation(states[-1:], arrays["final"][None]) <= case["tol"]
    else:
        assert deviation(states, arrays["states"]) <= case["tol"]


@pytest.mark.parametrize("case", cases("evodiff"))
def test_evodiff(case):
    check("evodiff", case, lower_order_final=case["lower_order_final"])


@pytest.mark.parametrize("case", cases("pfdiff"))
def test_pfdiff(case):
    check("pfdiff", case, pfdiff_k=case["k"], pfdiff_h=case["h"])


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    """Name of golden statistics -> what the option takes."""
    folder, golden = tmp_path_factory.mktemp("statistics"), np.load(GOLDEN / "dpm_v3.npz")
    found = {"data": "data", "noise": "noise"}
    for name in ("poly0", "poly1", "ems1200"):
        arrays, prefix = (np.load(GOLDEN / f"{name}.npz"), "") if name == "ems1200" else (golden, f"stat.{name}.")
        values = (torch.from_numpy(arrays[prefix + part]).double() for part in ("sigmas", "l", "s", "b"))
        found[name] = str(folder / f"{name}.safetensors")
        save_statistics(Statistics(*values), found[name])
    return found


def v3_options(case, statistics):
    names = ("max_order", "pseudo", "corrector", "lower_order_final")
    return {"statistics": statistics[case["statistics"]]} | {name: case[name] for name in names}


@pytest.mark.parametrize("case", cases("dpm_v3"))
def test_dpm_v3(case, statistics):
    check("dpm_v3", case, **v3_options(case, statistics))


@pytest.mark.parametrize("family", ["EDM CIFAR-10 settings", "latent-space settings", "guided settings"])
def test_dpm_v3_chooses_the_published_settings(family):
    """corrector and pseudo on auto, against the authors' settings in the cases above."""
    net = toy()
    net.latent, net.guided = family.startswith("latent"), family.startswith("guided")
    chosen = [case.values[0] for case in cases("dpm_v3") if case.values[0].get("why") == family]
    assert len(chosen) == 5
    latents = torch.from_numpy(COMMON["latents"]).double()
    for case in chosen:
        options = {"solver": "dpm_v3", "statistics": "data", "num_steps": case["num_steps"]}
        published = {name: case[name] for name in ("corrector", "pseudo")}
        assert torch.equal(sample(net, latents, **options), sample(net, latents, **options, **published))


def test_estimated_statistics_tend_to_plain_least_squares():
    """The tolerances are meant for 8192 samples; these are fewer."""
    golden = np.load(GOLDEN / "ems120.npz")
    found = estimate_statistics(toy(2), nodes=121, samples=2048, batch=2048, dtype=torch.float64)
    np.testing.assert_allclose(found.sigmas, golden["sigmas"], rtol=1e-8)
    for name, tolerance in (("l", 0.01), ("s", 0.15), ("b", 0.05)):
        error = getattr(found, name).numpy() - golden[name]
        assert np.sqrt((error**2).mean()) < tolerance, name
