"""Every golden case of the solvers: numbers of the public reference (see tests/golden)."""

import numpy as np
import pytest
import torch
from toy import GOLDEN, ToyNet, common, load_golden

from solvers import get_schedule, sample
from solvers.solver import dynamic_threshold, exponential_multistep
from training.loss import DistillationLoss
from training.predictor import AMEDPredictor

PLAIN, PLAIN_JSON = load_golden("amed_plain")
PRED, PRED_JSON = load_golden("amed_pred")
TRAIN, TRAIN_JSON = load_golden("train")
SCHED, SCHED_JSON = load_golden("schedules")
UNITS, UNITS_JSON = load_golden("units")
FORWARD, FORWARD_JSON = load_golden("predictor_forward")
OPTIONS = ("max_order", "predict_x0", "lower_order_final", "r")


def close(actual, expected, tolerance=1e-9):
    expected = np.asarray(expected, dtype=np.float64)
    actual = np.asarray(actual, dtype=np.float64)
    assert actual.shape == expected.shape
    np.testing.assert_array_less(np.abs(actual - expected), tolerance * max(1.0, np.abs(expected).max()) + 1e-300)


def make_predictor(name, dtype=torch.float64, **config):
    bank = load_golden_bank(name)
    predictor = AMEDPredictor(scale_dir=int(name[1]) * 0.01, scale_time=int(name[2]) * 0.2, **config).to(dtype)
    predictor.load_state_dict({k: torch.from_numpy(v).to(dtype) for k, v in bank.items()}, strict=True)
    return predictor


def load_golden_bank(name):
    archive = np.load(GOLDEN / "common.npz")
    return {key.split(".", 1)[1]: archive[key] for key in archive.files if key.startswith(name + ".")}


def settings(case):
    chosen = {k: case[k] for k in ("num_steps", "schedule_type", "schedule_rho", "afs")}
    chosen.update({k: case[k] for k in OPTIONS if k in case})
    return chosen


def run_case(archive, case, dtype, **extra):
    net = ToyNet(dtype, discrete=case["schedule_type"] == "discrete")
    latents = common(extra.pop("latents"), dtype)
    chosen = settings(case)
    trajectory, info = sample(
        net,
        latents,
        solver=case["solver"],
        denoise_to_zero=True,
        return_trajectory=True,
        return_info=True,
        **chosen,
        **extra,
    )
    return net, trajectory, info


@pytest.mark.parametrize("case", PLAIN_JSON["cases"], ids=lambda c: f"{c['id']}-{c['solver']}")
def test_plain_solvers(case):
    key = case["id"]
    net, trajectory, info = run_case(PLAIN, case, torch.float64, latents=PLAIN_JSON["latents"])
    close(info.sigmas, PLAIN[f"{key}.t_steps"])
    assert info.nfe == case["nfe"] + 1 == len(net.calls)  # one more for denoise_to_zero
    close([float(c[0]) for c in net.calls[:-1]], PLAIN[f"{key}.net_sigmas"])
    close(trajectory[-2], PLAIN[f"{key}.final"])
    probes = trajectory.flatten(2)[:, :, common("probe_idx", torch.int64)]
    for row, expected in zip(probes, PLAIN[f"{key}.traj_probe"], strict=True):
        close(row, expected)
    if f"{key}.traj" in PLAIN.files:
        close(trajectory, PLAIN[f"{key}.traj"])


@pytest.mark.parametrize("case", PLAIN_JSON["cases"], ids=lambda c: f"{c['id']}-{c['solver']}")
def test_plain_solvers_float32(case):
    key = case["id"]
    sigmas = torch.from_numpy(PLAIN[f"{key}.t_steps_f32"])
    _, trajectory, _ = run_case(PLAIN, case, torch.float32, latents=PLAIN_JSON["latents"], sigmas=sigmas)
    assert trajectory.dtype == torch.float32
    probes = trajectory.flatten(2)[:, :, common("probe_idx", torch.int64)]
    for row, expected in zip(probes, PLAIN[f"{key}.traj_probe_f32"], strict=True):
        close(row, expected, 2e-3)


@pytest.mark.parametrize("case", PRED_JSON["cases"], ids=lambda c: f"{c['id']}-{c['solver']}-{c['predictor']}")
def test_solvers_with_predictor(case):
    key = case["id"]
    predictor = make_predictor(case["predictor"])
    net, trajectory, info = run_case(PRED, case, torch.float64, latents=PRED_JSON["latents"], predictor=predictor)
    assert info.nfe == case["nfe"] + 1 == len(net.calls)
    batch = trajectory.shape[1]
    close(torch.stack([c.expand(batch) for c in net.calls[:-1]]), PRED[f"{key}.net_sigmas"])
    for name in ("r", "scale_dir", "scale_time"):
        close(torch.stack(getattr(info, name)), PRED[f"{key}.{name}"])
    close(trajectory[-2], PRED[f"{key}.final"])
    probes = trajectory.flatten(2)[:, :, common("probe_idx", torch.int64)]
    for row, expected in zip(probes, PRED[f"{key}.traj_probe"], strict=True):
        close(row, expected)


@pytest.mark.parametrize("case", PRED_JSON["cases"], ids=lambda c: f"{c['id']}-{c['solver']}-{c['predictor']}")
def test_solvers_with_predictor_float32(case):
    key = case["id"]
    predictor = make_predictor(case["predictor"], torch.float32)
    sigmas = torch.from_numpy(PRED[f"{key}.t_steps_f32"])
    _, trajectory, info = run_case(
        PRED, case, torch.float32, latents=PRED_JSON["latents"], predictor=predictor, sigmas=sigmas
    )
    close(torch.stack(info.r), PRED[f"{key}.r_f32"], 2e-3)
    probes = trajectory.flatten(2)[:, :, common("probe_idx", torch.int64)]
    for row, expected in zip(probes, PRED[f"{key}.traj_probe_f32"], strict=True):
        close(row, expected, 2e-3)


@pytest.mark.parametrize("case", [c for c in SCHED_JSON["cases"] if "schedule_type" in c], ids=lambda c: c["id"])
def test_schedules(case):
    discrete = case["schedule_type"] == "discrete"
    net = ToyNet(discrete=True) if discrete else None
    for n in case["num_steps"]:
        expected = SCHED[f"{case['id']}.n{n:02d}.f64"]
        lo, hi = case["sigma_min_f64"], case["sigma_max_f64"]
        actual = get_schedule(n, lo, hi, case["schedule_type"], case["schedule_rho"], net=net)
        assert actual.dtype == torch.float64
        np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("case", [c for c in SCHED_JSON["cases"] if "schedule_type" in c], ids=lambda c: c["id"])
def test_two_point_schedules(case):
    """The reference recomputes each training interval as a two-point schedule; its ends stay."""
    key = f"{case['id']}.pairs_n05.f64"
    if key not in SCHED.files:
        return
    net = ToyNet(discrete=True) if case["schedule_type"] == "discrete" else None
    kind, rho = case["schedule_type"], case["schedule_rho"]
    full = get_schedule(5, case["sigma_min_f64"], case["sigma_max_f64"], kind, rho, net=net)
    for hi, lo, expected in zip(full[:-1].tolist(), full[1:].tolist(), SCHED[key], strict=True):
        pair = get_schedule(2, lo, hi, kind, rho, net=net, original_code=True)
        np.testing.assert_allclose(pair.numpy(), expected, rtol=1e-9)


def test_discrete_table():
    net = ToyNet(discrete=True)
    t, sigma = (torch.from_numpy(SCHED[f"disc_fn.{k}.f64"]) for k in ("t", "sig"))
    np.testing.assert_allclose(net.sigma(t), SCHED["disc_fn.sigma_of_t.f64"], rtol=1e-10)
    np.testing.assert_allclose(net.sigma_inv(sigma), SCHED["disc_fn.t_of_sig.f64"], rtol=1e-10)


def test_dynamic_threshold():
    close(dynamic_threshold(torch.from_numpy(UNITS["thr.x"])), UNITS["thr.y"], 1e-12)


@pytest.mark.parametrize("group", ["dpmpp_update_scalar", "dpmpp_update_persample"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("form", ["x0", "eps"])
def test_dpmpp_update(group, order, form):
    x, models, times, t, scale = (
        torch.from_numpy(UNITS[f"{group}.{k}"]) for k in ("x", "models", "t_prev", "t", "scale")
    )
    spread = [s.reshape(-1, 1, 1, 1) for s in times]
    out = exponential_multistep(
        x,
        list(zip(models, spread, strict=True)),
        t.reshape(-1, 1, 1, 1),
        order,
        form == "x0",
        scale.reshape(-1, 1, 1, 1),
    )
    close(out, UNITS[f"{group}.out_o{order}_{form}"], 1e-11)


@pytest.mark.parametrize("name", ["p00", "p10", "p01", "p11", "wide"])
def test_predictor_forward(name):
    case = next(c for c in FORWARD_JSON["cases"] if c["id"] == name)
    pairs = torch.from_numpy(FORWARD["in.t_pairs"]).double()
    bottleneck = torch.from_numpy(FORWARD["in.bottleneck"]).double()
    if name == "wide":
        sizes = {
            k: case[k] for k in ("scale_dir", "scale_time", "hidden_dim", "noise_channels", "bottleneck_output_dim")
        }
        predictor = AMEDPredictor(**sizes).double()
        weights = {k[5:]: FORWARD[k] for k in FORWARD.files if k.startswith("wide.") and ".out" not in k}
        predictor.load_state_dict({k: torch.from_numpy(v).double() for k, v in weights.items()}, strict=True)
    else:
        predictor = make_predictor(name)
    suffixes = [k for k in FORWARD.files if k.startswith(name + ".out")]
    assert suffixes
    for suffix in [s for s in suffixes if s.endswith("f64")]:
        feature = torch.zeros_like(bottleneck) if "zero" in suffix else bottleneck
        for (cur, nxt), expected in zip(pairs, FORWARD[suffix], strict=True):
            with torch.no_grad():
                out = dict(zip(("r", "scale_dir", "scale_time"), predictor(feature, cur, nxt), strict=True))
            close(torch.stack([out[row].flatten() for row in case["output_rows"]]), expected)


@pytest.mark.parametrize("case", TRAIN_JSON["cases"], ids=lambda c: f"{c['id']}-{c['stu']}")
def test_two_training_iterations(case):
    key = case["id"]
    net = ToyNet(discrete=case["schedule_type"] == "discrete")
    predictor = make_predictor(case["predictor"])
    config = {
        **{k: case[k] for k in ("M", "num_steps", "schedule_type", "schedule_rho", "afs")},
        **{k: case[k] for k in ("max_order", "predict_x0", "lower_order_final") if k in case},
        "sampler_stu": case["stu"],
        "sampler_tea": case["tea"],
    }
    predictor.config.update(config)
    loss = DistillationLoss(net, predictor.config)
    close(loss.sigmas, TRAIN[f"{key}.t_steps"])
    optimizer = torch.optim.Adam(predictor.parameters(), lr=5e-3)
    probe, w0 = common("probe_idx", torch.int64), common("w0_probe_idx", torch.int64)
    for it, name in enumerate(TRAIN_JSON["latents"]):
        x = common(name) * loss.sigma_max
        net.calls.clear()
        targets = loss.teacher_trajectory(x)
        if it == 0:
            close(targets, TRAIN[f"{key}.teacher_it0"])
            close([float(c[0]) for c in net.calls], TRAIN[f"{key}.teacher_net_sigmas"])
        for k in range(case["num_steps"] - 1):
            tag = f"{key}.s{k}"
            if it == 0:
                close(x.flatten(1)[:, probe], TRAIN[f"{tag}.x_in_probe"])
            net.calls.clear()
            error, x_next = loss.student_step(predictor, x, k, targets[k])
            assert not x_next.requires_grad
            scalar = error.sum() / len(x)
            np.testing.assert_allclose(float(scalar), TRAIN[f"{key}.loss_scalar"][it, k], rtol=1e-8)
            for which, value in zip(("r", "scale_dir", "scale_time"), loss.predicted, strict=True):
                close(value.flatten(), TRAIN[f"{key}.{which}"][it, k])
            optimizer.zero_grad()
            scalar.backward()
            if it == 0:
                close(error.detach(), TRAIN[f"{tag}.loss"])
                for pname, parameter in predictor.named_parameters():
                    if f"{tag}.grad.{pname}" in TRAIN.files:
                        expected = TRAIN[f"{tag}.grad.{pname}"]
                        np.testing.assert_allclose(
                            parameter.grad, expected, atol=1e-6 * max(np.abs(expected).max(), 1e-12)
                        )
                    if f"{tag}.grad.{pname}.probe" in TRAIN.files:
                        expected = TRAIN[f"{tag}.grad.{pname}.probe"]
                        scale = max(np.abs(expected).max(), 1e-12)
                        np.testing.assert_allclose(parameter.grad.flatten()[w0], expected, atol=1e-6 * scale)
            optimizer.step()
            if it == 0:
                compare_parameters(predictor, f"{tag}.param.", w0)
            x = x_next
    compare_parameters(predictor, f"{key}.end_it1.param.", w0)


@pytest.mark.parametrize("solver", ["ipndm", "euler"])
@pytest.mark.parametrize("case", ["0", "1"])
def test_ld3_with_other_levels_for_the_network(case, solver):
    """Samples of vinhsuhi/LD3 9e4a66f, which divides by the level that the network gets."""
    data, golden = np.load(GOLDEN / "dyweight.npz"), np.load(GOLDEN / "ld3.npz")
    net, latents = ToyNet(means=torch.from_numpy(data["means"]).double()), torch.from_numpy(data["latents"]).double()
    levels = {"sigmas": golden[f"{case}.sigmas"], "sigmas_cond": golden[f"{case}.told"]}
    published = {"solver": solver, "direction_sigma": "network", **levels}
    denoised = []
    x = sample(net, latents, callback=lambda i, sigma, x, d: denoised.append((x, d)), **published)
    close(x, golden[f"{case}.{solver}"])
    assert (sample(net, latents, solver=solver, **levels) - x).abs().max() > 0.01 * x.abs().max()
    for i, (state, image) in enumerate(denoised):  # the callback gets the network's answer itself
        close(image, net(state, torch.tensor(levels["sigmas_cond"][i])))


def test_direction_sigma_changes_calls_at_points_of_the_schedule_only():
    """Not AMED's calls inside an interval, nor the analytical first step."""
    latents, images = common("latents2"), []
    for level in ("point", "network"):
        predictor = make_predictor("p11")  # its calls are at other noise levels than their points
        settings = {"solver": "ipndm", "direction_sigma": level}
        images.append(sample(ToyNet(), latents, predictor=predictor, num_steps=4, **settings))
        seen = {}
        levels = {"sigmas": [80.0, 5.0, 0.1], "sigmas_cond": [60.0, 4.0, 0.1], "afs": True}
        sample(ToyNet(), latents, callback=lambda i, *values, s=seen: s.setdefault(i, values), **levels, **settings)
        sigma, x, denoised = seen[0]
        close(denoised, x - sigma * x / (1 + sigma**2).sqrt())
    assert torch.equal(*images)


def compare_parameters(predictor, prefix, w0):
    compared = 0
    for name, parameter in predictor.named_parameters():
        if prefix + name in TRAIN.files:
            close(parameter.detach(), TRAIN[prefix + name], 1e-7)
            compared += 1
        if prefix + name + ".probe" in TRAIN.files:
            close(parameter.detach().flatten()[w0], TRAIN[prefix + name + ".probe"], 1e-7)
            compared += 1
    assert compared == len(list(predictor.parameters()))
