"""compare.py on a tiny network: measurements, cache, several processes, page, mistakes."""

import base64
import csv
import io
import json
import os
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import scipy.stats
import torch
from click.testing import CliRunner
from PIL import Image
from two_processes import call_on_two

import compare
import sample as sample_cli
from evaluation.detectors import ConvClassifier, load_detector, save_classifier
from evaluation.fid import calculate_fid
from evaluation.frechet import Reference
from models.edm import EDMDenoiser, load_edm_network, save_edm_safetensors
from sampling.generate import generate_images
from solvers import SOLVERS, Solver, sample
from solvers.dpm_solver_v3 import Statistics, save_statistics
from solvers.schedule_file import Schedule, save_schedule
from tools import compare_run as comparison
from tools import page
from tools import report as comparison_report
from tools.compare_methods import choose_steps, parse_method
from tools.compare_run import SCORES, Comparison, Settings, add_differences, pool_moments, share_out
from tools.report import plot, plots_html
from torch_utils.errors import MissingExtra, UserError
from torch_utils.images import to_uint8
from torch_utils.seeds import SeededGenerators
from training.checkpoint import load_predictor, save_predictor
from training.predictor import AMEDPredictor

NUM, GROUPS, NEAR = 22, 2, 6


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A network of 8x8 images, a detector for them, reference statistics and two predictors."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    sizes = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    net = EDMDenoiser(img_resolution=8, img_channels=1, model_type="SongUNet", **sizes)
    for name, parameter in net.named_parameters():
        if name.endswith("weight"):  # no layer may start at zero, or the network would do nothing
            torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 1.0)
    save_edm_safetensors(net, folder / "net.safetensors")
    save_classifier(ConvClassifier(1, 8, 10, feature_dim=6, width=4).eval(), folder / "detector.safetensors")
    features = load_detector(folder / "detector.safetensors")(torch.randint(256, [50, 1, 8, 8], dtype=torch.uint8))
    Reference(features.numpy().mean(0), np.cov(features.numpy(), rowvar=False)).save(folder / "ref.npz")
    config = {"dataset_name": "custom", "img_resolution": 8, "num_steps": 3, "scale_dir": 0.1}
    save_predictor(AMEDPredictor(**config, sampler_stu="amed", afs=True), folder / "a" / "predictor-000001.safetensors")
    plugin = AMEDPredictor(**config, sampler_stu="ipndm", max_order=2)
    save_predictor(plugin, folder / "b" / "predictor-000001.safetensors")
    return folder


def flags(files, outdir, *more) -> list[str]:
    shared = {"dataset_name": "custom", "model_path": files / "net.safetensors", "device": "cpu"}
    shared |= {"detector": files / "detector.safetensors", "ref": files / "ref.npz", "outdir": outdir, "nfe": "2,3"}
    shared |= {"num": NUM, "groups": GROUPS, "num_reference": NEAR, "reference_steps": 3, "batch": 4}
    return [*(f"--{name}={value}" for name, value in shared.items()), *map(str, more)]


def run(files, outdir, *more):
    """(rows by method and NFE, output)"""
    done = CliRunner().invoke(compare.main, flags(files, outdir, *more))
    assert done.exit_code == 0, done.output + repr(done.exception)
    rows = json.loads((outdir / "results.json").read_text())["rows"]
    return {(row["method"], row["nfe"]): row for row in rows}, done.output


def measured(rows) -> list[dict]:
    """Everything but the clock."""
    return [{k: v for k, v in row.items() if k not in ("images_per_second", "timed_on")} for row in rows.values()]


@pytest.fixture(scope="module")
def baseline(files, tmp_path_factory):
    """(folder, rows, output) of a comparison of solvers and predictors."""
    folder = tmp_path_factory.mktemp("baseline") / "out"
    solvers = "--solvers=euler,heun,dpmpp:max_order=2:thresholding=False"
    rows, output = run(files, folder, solvers, f"--predictor_path={files / 'a'},{files / 'b'}")
    return folder, rows, output


@pytest.fixture(autouse=True)
def plain_page(baseline, monkeypatch):
    """Drawing takes longer than sampling here: the plots are drawn in the baseline's page only."""
    monkeypatch.setattr(comparison_report, "plots_html", lambda rows: "")


@pytest.fixture
def calls(monkeypatch):
    """Samples that the network was called with, one entry per call."""
    made, forward = [], EDMDenoiser.forward
    monkeypatch.setattr(EDMDenoiser, "forward", lambda *a, **k: made.append(len(a[1])) or forward(*a, **k))
    return made


# --------------------------------------------------------------------------------------------------
# What is measured


def test_rows_say_what_was_really_spent(baseline):
    _, rows, _ = baseline
    dpmpp = "dpmpp:max_order=2:thresholding=False"
    asked = {key: row["nfe_requested"] for key, row in rows.items()}
    assert asked == {
        **{("euler", 2): [2], ("euler", 3): [3], (dpmpp, 2): [2], (dpmpp, 3): [3]},
        **{("heun", 2): [2], ("heun", 3): [3]},  # two evaluations per interval; 3 with a free first one
        ("AMED-Solver", 3): [],  # two intervals of two, the first free
        ("AMED-Plugin(ipndm)", 4): [],
    }
    assert rows[dpmpp, 3]["settings"] == "logsnr, 3 intervals, max_order=2, thresholding=False"
    assert rows["euler", 3]["settings"] == "polynomial rho 7, 3 intervals"


def test_equal_to_sample_and_fid(files, baseline, tmp_path):
    """The row's own command, through sample.py into PNG files, and fid.py on them."""
    _, rows, _ = baseline
    for key in (("heun", 2), ("AMED-Solver", 3)):
        command = rows[key]["command"].removeprefix("python sample.py ").split()
        folder = tmp_path / key[0]
        done = CliRunner().invoke(sample_cli.main, [*command, f"--outdir={folder}", "--device=cpu"])
        assert done.exit_code == 0 and f"NFE={key[1]} " in done.output, done.output
        result = calculate_fid(folder, str(files / "ref.npz"), detector=str(files / "detector.safetensors"))
        assert result.images == rows[key]["images"] == NUM
        assert rows[key]["fid"] == pytest.approx(result.fid, rel=1e-3)  # a grey level may round the other way


def test_scores_and_intervals_by_hand(files, baseline):
    """Sampled and scored here, group by group, without the code under test."""
    _, rows, _ = baseline
    net, detector = load_edm_network(files / "net.safetensors").eval(), load_detector(files / "detector.safetensors")
    target = Reference.load(files / "ref.npz")

    def solve(**settings):
        x = sample(net, SeededGenerators(range(NUM)).randn([1, 8, 8]), **settings)
        features = detector(torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2).contiguous()).double().numpy()
        return x.clamp(-1, 1).double().numpy(), features

    def fid(features):
        sigma = np.cov(features, rowvar=False)
        root = np.sqrt(np.maximum(np.linalg.eigvals(sigma @ target.sigma).real, 0)).sum()
        return np.sum((features.mean(0) - target.mu) ** 2) + np.trace(sigma) + np.trace(target.sigma) - 2 * root

    x, features = solve(solver="euler", num_steps=4)
    best, best_features = solve(solver="heun", num_steps=4)
    row, quantile = rows["euler", 3], scipy.stats.t.ppf(0.975, GROUPS - 1)
    assert row["fid"] == pytest.approx(fid(features), rel=1e-3)
    for name, one, other in (("pixel", x, best), ("feature", features, best_features)):
        apart = np.sqrt(((one - other).reshape(NUM, -1)[:NEAR] ** 2).mean(1))
        assert row[name] == pytest.approx(apart.mean(), rel=1e-3) and row[name] > 1e-4
        error = np.std([apart[g::GROUPS].mean() for g in range(GROUPS)], ddof=1) / np.sqrt(GROUPS)
        assert row[f"{name}_se"] == pytest.approx(error, rel=1e-2)
        assert row[f"{name}_ci95"] == pytest.approx(quantile * row[f"{name}_se"], rel=1e-9)
    left_out = [fid(features[np.arange(NUM) % GROUPS != g]) for g in range(GROUPS)]
    assert row["fid_left_out"] == pytest.approx(left_out, rel=1e-3)
    error = abs(left_out[0] - left_out[1]) / 2  # the jackknife of two groups
    assert row["fid_se"] == pytest.approx(error, rel=2e-2)
    assert row["fid_ci95"] == pytest.approx(quantile * row["fid_se"], rel=1e-9)
    assert row["reference_images"] == NEAR and row["images_per_second"] > 0


def test_reference_is_at_no_distance_to_itself(files, tmp_path):
    rows, _ = run(files, tmp_path, "--solvers=heun", "--nfe=6")
    assert rows["heun", 6]["pixel"] == rows["heun", 6]["feature"] == 0


def test_statistics():
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=[n, 3]) + n for n in (2, 5, 9)]
    mu, sigma = pool_moments([(len(part), part.mean(0), np.cov(part, rowvar=False)) for part in parts])
    np.testing.assert_allclose(mu, np.concatenate(parts).mean(0))
    np.testing.assert_allclose(sigma, np.cov(np.concatenate(parts), rowvar=False))


def test_a_new_stochastic_solver_is_compared_without_a_distance(files, tmp_path, monkeypatch):
    class Noisy(SOLVERS["euler"]):
        name, stochastic = "noisy", True

        def update(self, x, history, sigma_next, index, total, scale=1.0):
            return super().update(x, history, sigma_next, index, total, scale)

        def step(self, sampler, state, i):
            state = yield from super().step(sampler, state, i)
            return comparison.replace(state, x=state.x + 0.1 * sampler.noise(state.x))

    monkeypatch.setitem(SOLVERS, "noisy", Noisy)
    rows, output = run(files, tmp_path, "--solvers=noisy,euler", "--nfe=2")
    noisy = rows["noisy", 2]
    assert noisy["pixel"] is None and noisy["feature_ci95"] is None and noisy["reference_images"] == 0
    assert noisy["fid"] != rows["euler", 2]["fid"]
    assert "| noisy |" in output.split("distance")[0] and "| noisy |" not in output.split("distance")[1]


def test_all_solvers_but_those_that_are_not_prepared(files, tmp_path, monkeypatch):
    def refuse(self, net, sigmas, predictor=None):
        raise UserError("a file is missing")

    class Unprepared(SOLVERS["euler"]):
        name, setup = "unprepared", refuse

    for name in [name for name in SOLVERS if name not in ("euler", "heun", "amed")]:
        monkeypatch.delitem(SOLVERS, name)
    monkeypatch.setitem(SOLVERS, "unprepared", Unprepared)
    arguments = flags(files, tmp_path / "out", "--nfe=1", "--num_reference=0")
    done = CliRunner().invoke(compare.main, arguments)
    assert done.exit_code == 0 and "left out unprepared: a file is missing" in done.output, done.output
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["euler", "heun"] and rows[0]["pixel"] is None
    assert not list((tmp_path / "out" / "cache").glob("reference*"))
    for solvers in ("unprepared", "unprepared,euler"):  # asked for by name
        done = CliRunner().invoke(compare.main, [*flags(files, tmp_path / "no"), f"--solvers={solvers}"])
        assert done.exit_code == 2 and done.output == "Error: a file is missing\n"
    for name in ("euler", "heun"):
        monkeypatch.setattr(SOLVERS[name], "setup", refuse)
    done = CliRunner().invoke(compare.main, flags(files, tmp_path / "no"))
    assert done.exit_code == 2 and done.output.endswith("Error: a file is missing\n")
    assert not (tmp_path / "no").exists()


# --------------------------------------------------------------------------------------------------
# Methods and numbers of evaluations


class Net:
    sigma_min, sigma_max = 0.002, 80.0


class TwoIntervals(Solver):
    """Two intervals per evaluation, and an odd number of them is refused."""

    def evaluations(self, intervals, afs=False, learned=False):
        if intervals % 2:
            raise UserError("an even number of intervals is needed")
        return intervals // 2 - bool(afs)


@pytest.mark.parametrize(
    ("solver", "afs", "guided", "nfe", "intervals", "spent"),
    [
        ("euler", False, 1, 1, 1, 1),
        ("euler", True, 1, 1, 2, 1),  # one interval would be free
        ("heun", False, 1, 5, 2, 4),
        ("heun", False, 1, 1, 1, 2),  # the least it can spend
        ("heun", True, 1, 5, 3, 5),
        ("euler", False, 2, 5, 2, 4),  # under guidance a call is two evaluations
        ("two", False, 1, 3, 6, 3),
        ("two", True, 1, 3, 8, 3),
    ],
)
def test_steps_for_a_number_of_evaluations(monkeypatch, solver, afs, guided, nfe, intervals, spent):
    monkeypatch.setitem(SOLVERS, "two", TwoIntervals)
    net = Net()
    net.evals_per_call = guided
    settings, cost = choose_steps(Settings(dataset_name="custom", solver=solver, afs=afs), net, nfe)
    assert (settings.num_steps - 1, cost) == (intervals, spent)


def test_presets_fit_the_rules():
    common = {"dataset_name": "custom", "sigmas": None}
    for name, solver in SOLVERS.items():
        if not solver.needs_predictor:
            parse_method(name, common, {})
    assert parse_method("deis", common, {}).settings.options["max_order"] == 4


def test_what_is_said_for_one_goes_before_what_is_said_for_all():
    common = {"dataset_name": "custom", "sigmas": None}
    settings = parse_method("dpmpp", common, {}).settings
    assert (settings.schedule_type, settings.options) == ("logsnr", {"max_order": 3, "thresholding": False})
    everywhere = {"schedule_type": "time_uniform", "schedule_rho": 2.0, "afs": True}
    settings = parse_method("dpmpp:max_order=1", common, everywhere).settings
    assert (settings.schedule_type, settings.schedule_rho, settings.afs) == ("time_uniform", 2, True)
    assert settings.options == {"max_order": 1, "thresholding": False}
    settings = parse_method("dpmpp:schedule_type=polynomial:afs=data:predict_x0=no", common, everywhere).settings
    assert (settings.schedule_type, settings.schedule_rho, settings.afs) == ("polynomial", 7, "data")
    assert settings.options == {"max_order": 3, "thresholding": False, "predict_x0": False}


def test_original_code_is_that_of_sample(files, tmp_path):
    """Of the rule and of the schedule: one setting, in the row, its command and the images."""
    options = "unipc:thresholding=False:schedule_type=polynomial"
    rows, _ = run(files, tmp_path, f"--solvers={options}:original_code=True,{options}", "--num_reference=0")
    row, other = rows[f"{options}:original_code=True", 2], rows[options, 2]
    # One interval, fewer than the order: the published code has an evaluation more.
    assert "1 intervals" in row["settings"] and "original_code" in row["settings"]
    assert "2 intervals" in other["settings"] and "original_code" not in other["settings"]
    command = row["command"].removeprefix("python sample.py ").split()
    assert "--original_code=True" in command and "original_code" not in other["command"]
    given = CliRunner().invoke(sample_cli.main, [*command, f"--outdir={tmp_path / 'images'}", "--device=cpu"])
    assert given.exit_code == 0 and "NFE=2 " in given.output, given.output


def test_explicit_sigmas_pass_through(files, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(
        comparison, "generate_images", lambda *a, **k: used.append(k["sigmas"]) or generate_images(*a, **k)
    )
    arguments = [flag for flag in flags(files, tmp_path) if not flag.startswith("--nfe")]
    done = CliRunner().invoke(compare.main, [*arguments, "--solvers=euler,heun", "--sigmas=70,3.9,0.01"])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["method"], row["nfe"]) for row in rows] == [("euler", 2), ("heun", 4)]
    assert all(sigmas in (None, [70.0, 3.9, 0.01]) for sigmas in used) and used.count([70.0, 3.9, 0.01]) == 6
    facts = json.loads((tmp_path / "results.json").read_text())["facts"]
    assert facts["sigma"] == "70 to 0.01"  # the reference solution as well
    assert "--sigmas=70,3.9,0.01" in rows[0]["command"]


def write_schedule(path, sigmas, **changes):
    network = {"sigma_min": 0.002, "sigma_max": 80.0}
    save_schedule(path, Schedule(**({"sigmas": sigmas, "solver": "euler", "method": "gits"} | network | changes)))


def test_schedule_files_stand_at_their_own_evaluations(files, tmp_path, calls):
    """One file per NFE. The row's command is sample.py --schedule and makes the same images."""
    write_schedule(tmp_path / "s" / "mine-2.json", [80, 1.7, 0.002])
    told = {"sigmas_cond": [80, 8, 1.5, 0.25, 0.002], "solver_options": {"direction_sigma": "network"}}
    write_schedule(tmp_path / "s" / "mine-4.json", [80, 9, 1.7, 0.3, 0.002], **told)
    pattern = f"{tmp_path / 's' / 'mine-{nfe}.json'}"
    arguments = ["--nfe=2,3,4", "--num_reference=0"]
    rows, output = run(files, tmp_path / "out", f"--solvers=euler:schedule={pattern},heun", *arguments)
    label = "euler:mine-{nfe}"
    assert [key for key in rows if key[0] == label] == [(label, 2), (label, 4)]
    assert f"{label}: no schedule file for NFE 3, skipped" in output and "Warning" not in output
    assert [rows[label, nfe]["nfe_requested"] for nfe in (2, 4)] == [[2], [4]]
    levels = "sigmas 80,9,1.7,0.3,0.002, sigmas_cond 80,8,1.5,0.25,0.002"
    assert rows[label, 4]["settings"] == f"{levels}, direction_sigma=network"
    head, line = (
        next(line.split("|")[2:-1] for line in output.splitlines() if line.startswith(f"| {name} |"))
        for name in ("method", label)
    )
    assert [nfe.strip() for nfe, cell in zip(head, line, strict=True) if cell.strip()] == ["2", "4"]
    for nfe in (2, 4):
        command = rows[label, nfe]["command"].removeprefix("python sample.py ")
        assert f"--schedule={tmp_path / 's' / f'mine-{nfe}.json'}" in command and "--sigmas" not in command
        folder = tmp_path / f"images{nfe}"
        call = [*shlex.split(command), f"--outdir={folder}", "--device=cpu"]
        done = CliRunner().invoke(sample_cli.main, call)
        assert done.exit_code == 0 and f"NFE={nfe} " in done.output, done.output
        result = calculate_fid(folder, str(files / "ref.npz"), detector=str(files / "detector.safetensors"))
        assert rows[label, nfe]["fid"] == pytest.approx(result.fid, rel=1e-3)

    os.rename(tmp_path / "s" / "mine-4.json", tmp_path / "s" / "other.json")  # one file, at an NFE not asked for
    calls.clear()
    single = f"--solvers=euler:schedule={tmp_path / 's' / 'other.json'}"
    again, output = run(files, tmp_path / "out", single, "--nfe=2", "--num_reference=0")
    assert not calls and list(again) == [("euler:other", 4)] and again["euler:other", 4]["nfe_requested"] == []
    assert again["euler:other", 4]["fid"] == rows[label, 4]["fid"]
    write_schedule(tmp_path / "s" / "other.json", [80, 9, 1.7, 0.3, 0.002])  # other contents
    changed, _ = run(files, tmp_path / "out", single, "--nfe=2", "--num_reference=0")
    assert calls and changed["euler:other", 4]["fid"] != again["euler:other", 4]["fid"]


def test_an_option_that_was_written_comes_before_that_of_the_schedule(files, tmp_path):
    told = {"sigmas_cond": [80, 1.5, 0.002], "solver_options": {"direction_sigma": "network"}}
    write_schedule(tmp_path / "s.json", [80, 1.7, 0.002], **told)
    file = f"schedule={tmp_path / 's.json'}"
    solvers = f"--solvers=euler:{file},euler:direction_sigma=point:{file}"
    rows, _ = run(files, tmp_path / "out", solvers, "--nfe=2", "--num_reference=0")
    assert [row["settings"].split("direction_sigma=")[1] for row in rows.values()] == ["network", "point"]
    assert len({row["fid"] for row in rows.values()}) == 2


def test_schedules_found_for_something_else_are_pointed_out(files, tmp_path):
    write_schedule(tmp_path / "a" / "s.json", [80, 1.7, 0.002], network_hash="0" * 64, network="other")
    write_schedule(tmp_path / "b" / "s.json", [80, 2.7, 0.002], afs=True)
    names = [f"heun:schedule={tmp_path / 'a' / 's.json'}", f"euler:schedule={tmp_path / 'b' / 's.json'}"]
    names += [f"euler:afs=True:schedule={tmp_path / 'a' / 's.json'}"]
    rows, output = run(files, tmp_path / "out", f"--solvers={','.join(names)}", "--nfe=4", "--num_reference=0")
    assert list(rows) == [("heun:s", 4), ("euler:s", 2), ("euler:afs=True:s", 1)]
    warnings = [line for line in output.splitlines() if line.startswith("Warning")]
    assert warnings == [
        "Warning: heun:s: the schedule was optimised for another network ('other', another SHA-256)",
        "Warning: heun:s: the schedule was optimised for the solver 'euler', not for 'heun'",
        "Warning: euler:s: the schedule was optimised for afs=True, not for afs=False",
        "Warning: euler:afs=True:s: the schedule was optimised for another network ('other', another SHA-256)",
        "Warning: euler:afs=True:s: the schedule was optimised for afs=False, not for afs=True",
    ]
    names = [f"euler:schedule={tmp_path / folder / 's.json'}" for folder in "ab"]  # the same name twice: with folders
    rows, _ = run(files, tmp_path / "out", f"--solvers={','.join(names)}", "--num_reference=0")
    assert [label for label, _ in rows] == names


# --------------------------------------------------------------------------------------------------
# The cache


def test_the_second_run_asks_no_network_and_a_further_method_only_its_own(files, baseline, tmp_path, calls):
    common = "--solvers=euler", "--nfe=2"
    first, output = run(files, tmp_path, *common)
    assert "1 of 1 rows computed" in output and calls
    calls.clear()
    again, output = run(files, tmp_path, *common)
    assert not calls and again == first and "0 of 1 rows computed" in output
    more, output = run(files, tmp_path, "--solvers=ipndm,euler", "--nfe=2")
    assert "1 of 2 rows computed" in output
    # Two evaluations: one image tried out, then batches of four of both groups of eleven.
    assert calls == [1, 1] + 2 * [4, 4, 4, 4, 3, 3]
    assert more["euler", 2] == first["euler", 2]
    assert measured({0: first["euler", 2]})[0]["fid"] == pytest.approx(baseline[1]["euler", 2]["fid"], rel=1e-9)


def test_other_settings_are_other_results(files, tmp_path, calls):
    run(files, tmp_path, "--solvers=euler", "--nfe=2")
    for change in ("--seed=5", "--schedule_rho=5", "--reference_steps=2", "--num_reference=4", "--afs=True"):
        calls.clear()
        _, output = run(files, tmp_path, "--solvers=euler", "--nfe=2", change)
        assert calls and "1 of 1 rows computed" in output, change


def test_another_detector_is_another_result_and_another_reference(files, tmp_path):
    """Features of the reference solution belong to the detector that made them."""
    torch.manual_seed(5)
    save_classifier(ConvClassifier(1, 8, 10, feature_dim=6, width=4).eval(), tmp_path / "other.safetensors")
    common = "--solvers=euler", "--nfe=2"
    run(files, tmp_path / "out", *common)
    other = f"--detector={tmp_path / 'other.safetensors'}"
    rows, output = run(files, tmp_path / "out", *common, other)
    fresh, _ = run(files, tmp_path / "fresh", *common, other)
    assert "1 of 1 rows computed" in output and measured(rows) == measured(fresh)


def test_another_covariance_of_the_reference_is_another_result(files, tmp_path):
    target = Reference.load(files / "ref.npz")
    Reference(target.mu, 2 * target.sigma).save(tmp_path / "wide.npz")
    common = "--solvers=euler", "--nfe=2", "--num_reference=0"
    first, _ = run(files, tmp_path / "out", *common)
    second, output = run(files, tmp_path / "out", *common, f"--ref={tmp_path / 'wide.npz'}")
    assert "1 of 1 rows computed" in output and second["euler", 2]["fid"] != first["euler", 2]["fid"]


def test_a_new_file_of_statistics_is_another_result(files, tmp_path):
    path, fids = tmp_path / "statistics.safetensors", []
    arguments = f"--solvers=dpm_v3:statistics={path}", "--nfe=2", "--num_reference=0"
    for number, share in enumerate((1.0, 0.5, 1.0)):
        sigmas, ones = torch.tensor([80.0, 1.0, 0.002], dtype=torch.float64), torch.ones(3, 1, 8, 8)
        save_statistics(Statistics(sigmas, share * ones, 0 * ones, 0 * ones), path)
        os.utime(path, ns=(number, number))
        rows, output = run(files, tmp_path / "out", *arguments)
        assert f"{int(number < 2)} of 1 rows computed" in output  # the third is the first once more
        fids += [row["fid"] for row in rows.values()]
    assert fids[0] == fids[2] != fids[1]


def test_a_killed_run_goes_on_where_it_stopped(files, tmp_path, calls, monkeypatch):
    whole, _ = run(files, tmp_path / "whole", "--solvers=euler,ipndm", "--nfe=2")
    measure = Comparison.measure

    def killed(self, job, group):
        if job.settings.solver == "ipndm" and group == 1:
            raise KeyboardInterrupt
        measure(self, job, group)

    monkeypatch.setattr(Comparison, "measure", killed)
    done = CliRunner().invoke(compare.main, flags(files, tmp_path / "cut", "--solvers=euler,ipndm", "--nfe=2"))
    assert done.exit_code == 130 and not (tmp_path / "cut" / "results.json").exists()
    monkeypatch.setattr(Comparison, "measure", measure)
    calls.clear()
    rows, output = run(files, tmp_path / "cut", "--solvers=euler,ipndm", "--nfe=2")
    assert calls == [4, 4, 4, 4, 3, 3]  # the second group of ipndm and nothing else
    assert measured(rows) == measured(whole) and "1 of 2 rows computed" in output
    left = sorted(path.name.split("-")[0] for path in (tmp_path / "cut" / "cache").iterdir())
    assert left == ["euler", "ipndm", "reference", "reference"]  # the groups' own files are gone, nothing half written


def test_rows_of_older_code_are_pointed_out(files, tmp_path, monkeypatch):
    arguments = "--solvers=euler", "--nfe=2", "--num_reference=0"
    monkeypatch.setattr(comparison, "code_version", lambda: "git-old")
    _, output = run(files, tmp_path, *arguments)
    assert "other versions of the code" not in output
    monkeypatch.setattr(comparison, "code_version", lambda: "git-new")
    rows, output = run(files, tmp_path, *arguments)
    assert "other versions of the code (git-old; now git-new)" in output and rows["euler", 2]["code"] == "git-old"


def test_a_damaged_file_is_named(files, tmp_path):
    run(files, tmp_path, "--solvers=euler", "--nfe=2")
    (path,) = (tmp_path / "cache").glob("euler-*")
    path.write_bytes(path.read_bytes()[:100])
    done = CliRunner().invoke(compare.main, flags(files, tmp_path, "--solvers=euler", "--nfe=2"))
    assert done.exit_code == 2 and f"{path}: damaged cache file" in done.output


def test_two_processes_give_the_table_of_one(files, baseline, tmp_path):
    _, rows, _ = baseline
    more = ["--solvers=euler,heun,dpmpp:max_order=2:thresholding=False"]
    more += [f"--predictor_path={files / 'a'},{files / 'b'}"]
    assert call_on_two(compare.main, *flags(files, tmp_path, *more)).codes == [0, 0]
    found = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert measured(dict(enumerate(found))) == measured(rows)
    assert all("processes 2" in row["timed_on"] for row in found)
    assert not list((tmp_path / "cache").glob("*-nfe*-group*"))


def test_a_mistake_ends_both_processes(files, tmp_path):
    assert call_on_two(compare.main, *flags(files, tmp_path / "out", "--solvers=euler:magic=1")).codes == [2, 2]
    assert not (tmp_path / "out").exists()


def test_predictors_of_one_kind_have_labels_of_their_own(files, tmp_path):
    """Other folders, snapshots in one folder, and folders of one name."""
    config = {"dataset_name": "custom", "img_resolution": 8, "num_steps": 3, "sampler_stu": "ipndm"}
    paths = [
        tmp_path / name
        for name in ("x/one/a.safetensors", "x/one/b c.safetensors", "x/two/a.safetensors", "y/two/a.safetensors")
    ]
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        save_predictor(AMEDPredictor(**config), path)
    given = ",".join(map(str, paths))
    rows, _ = run(files, tmp_path / "out", "--solvers=none", f"--predictor_path={given}", "--num_reference=0")
    labels = {"one/a.safetensors", "one/b c.safetensors", str(paths[2]), str(paths[3])}
    assert {label for label, _ in rows} == {f"AMED-Plugin(ipndm) {label}" for label in labels}
    command = rows["AMED-Plugin(ipndm) one/b c.safetensors", 4]["command"]
    assert f"--predictor_path={paths[1]}" in shlex.split(command)


def test_work_is_shared_evenly():
    costs = [10, 1, 1, 8, 5, 5, 2, 3, 3, 2]
    shares = share_out(costs, 4)
    assert sorted(index for share in shares for index in share) == list(range(10))
    assert max(sum(costs[index] for index in share) for share in shares) == 10  # the best possible


# --------------------------------------------------------------------------------------------------
# What is written


class Page(HTMLParser):
    """Collects the tags' attributes and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open += [tag] if tag not in ("meta", "link", "img", "br", "wbr", "input") else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_csv_and_json_hold_the_same(baseline):
    folder, rows, _ = baseline
    with (folder / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows) == 8
    for line, row in zip(lines, rows.values(), strict=True):
        assert list(line) == list(row)
        for name, value in row.items():
            if isinstance(value, list):
                assert [float(part) for part in line[name].split()] == value
            elif isinstance(value, float | int):
                assert float(line[name]) == value
            else:
                assert line[name] == (value or "")


def test_the_page_needs_nothing_else(baseline):
    folder, rows, output = baseline
    text = (folder / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open and [tag for tag, _ in page.tags].count("script") == 2  # the code, and differences as JSON
    sources = [attributes[name] for _, attributes in page.tags for name in ("src", "href") if name in attributes]
    assert sources and all(source == "data:," or source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    for method, nfe in rows:
        assert method in page.text and f"{nfe} evaluations" in page.text
    facts = json.loads((folder / "results.json").read_text())["facts"]
    plots = [a for tag, a in page.tags if tag == "svg"]
    assert len(plots) == 3 or "No plots: a plot needs the package 'matplotlib'" in page.text
    assert facts["command"].startswith("python compare.py --") and facts["command"] in page.text
    assert all(value in page.text for value in facts.values())
    assert "Student's t with 1 degrees of freedom" in page.text  # what the interval is
    strips = [a for tag, a in page.tags if tag == "img"]
    assert [a["alt"] for a in strips].count("reference solution") == 3  # above the methods of 2, 3 and 4 evaluations
    assert len(strips) == len(rows) + 3
    assert (folder / "results.md").read_text() in output


def test_pictures_are_those_of_the_seeds(files, baseline):
    """In the order of the seeds, although the groups were sampled apart."""
    folder, _, _ = baseline
    page = Page((folder / "index.html").read_text(encoding="utf-8"))
    found = [a["src"] for tag, a in page.tags if a.get("alt") == "AMED-Plugin(ipndm)"]
    data = base64.b64decode(found[0].split(",")[1])
    with Image.open(io.BytesIO(data)) as image:
        array, opaque = np.moveaxis(np.asarray(image).astype(int), 2, 0)
    net = load_edm_network(files / "net.safetensors").eval()
    predictor = load_predictor(files / "b" / "predictor-000001.safetensors")
    options = {"solver": "ipndm", "num_steps": 3, "max_order": 2, "predictor": predictor}
    x = sample(net, SeededGenerators(range(16)).randn([1, 8, 8]), **options)
    expected = to_uint8(x)[..., 0].astype(int)
    assert array.shape == (8, 16 * 10 - 2)
    assert (opaque == np.tile([255] * 8 + [0] * 2, 16)[:-2]).all()
    for seed in range(16):
        assert np.abs(array[:, 10 * seed : 10 * seed + 8] - expected[seed]).max() <= 1
    assert expected.std() > 10


def test_markdown_has_methods_down_and_evaluations_across(baseline):
    folder, rows, _ = baseline
    lines = (folder / "results.md").read_text().splitlines()
    assert lines[2] == "| method | 2 | 3 | 4 |"
    for row in rows.values():
        (line,) = [line for line in lines[4:10] if line.startswith(f"| {row['method']} |")]
        fid, width = row["fid"], row["fid_ci95"]
        assert (f"{fid:.2f} ± {width:.2f}" if width <= fid else f"{fid:.2f} (0 to {fid + width:.2f})") in line


def test_no_score_has_an_interval_below_zero():
    row = make_row("few", 4, [0.1, 0.1, 0.4]) | {"fid_ci95": 0.43}
    assert comparison_report.with_interval(row, "fid") == "0.20 (0 to 0.63)"
    worse = make_row("more", 4, [0.4, 0.5, 0.4])
    (changed, _) = add_differences([row, worse], "more")
    assert comparison_report.with_interval(changed, "fid_difference", 2, "+").startswith("-0.23 ± ")


def make_row(method, nfe, groups):
    """A row whose scores are means over groups of equal size. groups [G]: the groups' means."""
    groups = np.asarray(groups, dtype=float)
    left_out = [np.delete(groups, g).mean() for g in range(len(groups))]
    row = {
        "method": method,
        "nfe": nfe,
        "command": "",
        "settings": "",
        "images_per_second": 1.0,
        "nfe_requested": [nfe],
    }
    for name in SCORES:
        values = (groups.mean(), scipy.stats.sem(groups), 0.0, left_out)
        row |= dict(zip((name, f"{name}_se", f"{name}_ci95", f"{name}_left_out"), values, strict=True))
    return row


# Of the seeds: the same for all methods and larger than their differences.
NOISE = np.array([3.0, -1.0, 0.5, -2.0, -0.5])
SMALL = np.array([0.01, -0.02, 0.015, 0.0, -0.005])
ROWS = [
    make_row("base", 3, 10 + NOISE),
    make_row("better", 3, 9.9 + NOISE + SMALL),
    make_row("best", 3, 9.7 + NOISE - SMALL),
    make_row("unclear", 3, 9.999 + NOISE + SMALL),
    make_row("worse", 3, 10.2 + NOISE),
    make_row("base", 5, 5 + NOISE),
    make_row("first", 5, 4.0 + NOISE + SMALL),
    make_row("as good", 5, 4.001 + NOISE - SMALL),
    make_row("alone", 7, 1 + NOISE),
]


def test_differences_are_paired():
    """For means it is scipy's paired t interval, far narrower than that of one method."""
    rows = {(row["method"], row["nfe"]): row for row in add_differences(ROWS, "base")}
    one, other = 9.9 + NOISE + SMALL, 10 + NOISE
    paired = scipy.stats.ttest_rel(one, other).confidence_interval(0.95)
    row = rows["better", 3]
    assert row["fid_difference"] == pytest.approx((paired.low + paired.high) / 2, rel=1e-9)
    assert row["fid_difference_ci95"] == pytest.approx((paired.high - paired.low) / 2, rel=1e-9)
    assert row["fid_difference_se"] == pytest.approx(scipy.stats.sem(one - other), rel=1e-9)
    assert row["fid_se"] > 5 * abs(row["fid_difference"])
    assert rows["base", 5]["pixel_difference"] == 0 and rows["first", 5]["pixel_difference"] == pytest.approx(-1)
    assert rows["alone", 7]["fid_difference"] is None and rows["alone", 7]["feature_difference_ci95"] is None
    without = ROWS[1] | {"pixel": None, "pixel_left_out": []}
    added = add_differences([ROWS[0], without], "base")[1]
    assert added["pixel_difference"] is None and added["fid_difference"] is not None


def test_only_what_is_better_beyond_the_interval_is_marked():
    rows = add_differences(ROWS, "base")
    text = comparison_report.markdown_text(rows, {"baseline": "base"}, [])
    tables = [part for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 6 and "FID minus that of base, by NFE" in text
    bold = [set(re.findall(r"^\| ([\w ]+) \|.*\*\*", table, re.MULTILINE)) for table in tables]
    assert bold == 3 * [{"best"}, {"better", "best", "first", "as good"}]
    assert "| better | **-0.10 ± 0.02** |  |" in tables[1] and "| worse | +0.20 ± 0.00 |" in tables[1]
    assert "alone" not in tables[1] and "| base " not in tables[1]
    table = comparison_report.table_html(rows, "base")
    marked = {}
    for line in re.findall("<tr .*</tr>", table)[1:]:
        method, nfe = re.search('data-method="(.*?)" data-nfe="(.*?)"', line).groups()
        marked[method, int(nfe)] = line.count("<b>")
    assert marked == {(row["method"], row["nfe"]): 3 * (row["method"] == "best") for row in ROWS}


def test_the_page_has_the_differences_of_all_pairs():
    """Those of compare.py with that baseline, for every method as the baseline."""
    stored = re.search('<script type="application/json">(.*?)</script>', comparison_report.table_html(ROWS, "base"))
    scores = json.loads(stored[1])
    assert list(scores) == list(SCORES) and scores["fid"]["digits"] == 2 and scores["pixel"]["digits"] == 4
    pairs = {(ROWS[i]["method"], ROWS[j]["method"], ROWS[i]["nfe"]): found for i, j, *found in scores["fid"]["pairs"]}
    assert len(pairs) == 10 + 3  # of 5, 3 and 1 rows
    for baseline in {row["method"] for row in ROWS}:
        for row in add_differences(ROWS, baseline):
            if (row["method"], baseline, row["nfe"]) in pairs:
                expected = [row["fid_difference"], row["fid_difference_ci95"]]
                assert pairs.pop((row["method"], baseline, row["nfe"])) == pytest.approx(expected, rel=1e-8, abs=1e-12)
    assert not pairs


def test_differences_to_a_baseline_in_every_file(files, baseline, tmp_path):
    folder, old, _ = baseline
    solvers = "euler,heun,dpmpp:max_order=2:thresholding=False"
    rows, output = run(files, tmp_path, f"--solvers={solvers}", "--baseline=euler")
    row, base = rows["heun", 2], rows["euler", 2]
    left_out = np.subtract(row["fid_left_out"], base["fid_left_out"])
    assert row["fid_left_out"] == pytest.approx(old["heun", 2]["fid_left_out"], rel=1e-9)
    expected = 2 * (row["fid"] - base["fid"]) - left_out.mean()
    assert row["fid_difference"] == pytest.approx(expected, rel=1e-9)
    assert row["fid_difference_ci95"] == pytest.approx(
        scipy.stats.t.ppf(0.975, 1) * abs(np.ptp(left_out)) / 2, rel=1e-9
    )
    assert rows["euler", 3]["fid_difference"] == rows["euler", 3]["pixel_difference_se"] == 0
    cell = f"{row['fid_difference']:+.2f} ± {row['fid_difference_ci95']:.2f}"
    assert cell in output.split("FID minus that of euler, by NFE:")[1]
    assert "<option selected>euler" in (tmp_path / "index.html").read_text(encoding="utf-8")
    with (tmp_path / "results.csv").open(newline="") as file:
        lines = {(line["method"], int(line["nfe"])): line for line in csv.DictReader(file)}
    assert float(lines["heun", 2]["fid_difference"]) == row["fid_difference"]
    assert float(lines["heun", 2]["pixel_difference_ci95"]) == row["pixel_difference_ci95"]
    facts = json.loads((tmp_path / "results.json").read_text())["facts"]
    assert facts["baseline"] == "euler" and "Negative is better" in output
    assert "fid_difference" not in old["heun", 2] and "minus that of" not in (folder / "results.md").read_text()


def test_without_matplotlib_the_page_says_so(baseline, monkeypatch):
    _, rows, _ = baseline
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra):
        plot(list(rows.values()), "fid")
    text = plots_html(list(rows.values()))
    assert text.count("\n") == 0 and "matplotlib" in text and "[plot]" in text


@pytest.mark.parametrize("failing", [RuntimeError("no\nfont"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_a_plot_that_fails_costs_no_results(files, baseline, tmp_path, monkeypatch, failing):
    """The tables are written first, and the page without plots says why."""
    folder, rows, _ = baseline
    shutil.copytree(folder, tmp_path / "out")
    names = ("results.csv", "results.json", "results.md", "index.html")
    for name in names:
        (tmp_path / "out" / name).unlink()

    def fail(rows, score):
        raise failing

    monkeypatch.setattr(comparison_report, "plots_html", plots_html)
    monkeypatch.setattr(comparison_report, "plot", fail)
    solvers = "--solvers=euler,heun,dpmpp:max_order=2:thresholding=False"
    paths = f"--predictor_path={files / 'a'},{files / 'b'}"
    done = CliRunner().invoke(compare.main, flags(files, tmp_path / "out", solvers, paths))
    found = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert {(row["method"], row["nfe"]): row["fid"] for row in found} == {key: rows[key]["fid"] for key in rows}
    if isinstance(failing, KeyboardInterrupt):
        assert done.exit_code != 0
        assert [name for name in names if (tmp_path / "out" / name).exists()] == list(names[:3])
    else:
        assert done.exit_code == 0
        reason = "matplotlib failed (RuntimeError: no font)"
        assert f"Warning: no plots in the page: {reason}" in done.stderr
        assert f"No plots: {reason}" in Page((tmp_path / "out" / "index.html").read_text()).text


def test_plot(baseline):
    pytest.importorskip("matplotlib")
    rows = [row | {"method": f"${row['method']}$"} for row in baseline[1].values()]  # not a formula
    drawing = ElementTree.fromstring(plot(rows, "fid"))
    assert drawing.tag.endswith("svg") and float(drawing.get("viewBox").split()[2]) == pytest.approx(460.8)
    styles = " ".join(element.get("style", "") for element in drawing.iter())
    assert all(
        f"stroke: {colour}" in styles for colour in comparison_report.COLOURS[: len({r["method"] for r in rows})]
    )
    text = page.plot(plot(rows, "fid"), "a < b")
    assert "http" not in text and "metadata" not in text and "#000000" not in text and 'label="a &lt; b"' in text


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_lines_are_legible_on_both_grounds():
    for colour in comparison_report.COLOURS:
        contrasts = [
            (max(pair) + 0.05) / (min(pair) + 0.05)
            for pair in ((luminance(colour), ground) for ground in (1, luminance("#11151a")))
        ]
        assert min(contrasts) >= 3, (colour, contrasts)


# --------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--solvers=magic"], "unknown solver 'magic'; choose from"),
        (["--solvers=ipndm:max_order=9"], "ipndm supports 1..4"),
        (["--solvers=euler:max_order=2"], "euler has no option 'max_order'"),
        (["--solvers=dpmpp:max_order=two"], "max_order=two"),
        (["--solvers=dpmpp:max_order=2:max_order=3"], "each option once"),
        (["--solvers=dpmpp:max_order"], "solver:option=value"),
        (["--solvers=dpmpp:schedule_type=linear"], "'linear' is not one of"),
        (["--solvers=dpmpp:afs=maybe"], "choose True, False or data"),
        (["--solvers=euler:schedule=/nowhere.json"], "cannot read the schedule /nowhere.json"),
        (["--solvers=euler:schedule=/no-{nfe}.json"], "no schedule file /no-2.json or /no-3.json"),
        (["--solvers=euler:schedule=a.json:schedule_rho=3"], "schedule sets the whole schedule: leave out"),
        (["--solvers=amed"], "'amed' needs a trained predictor"),
        (["--solvers=none"], "nothing to compare"),
        (["--nfe=0"], "--nfe=0: must be 1 or more"),
        (["--nfe=3,x"], "whole numbers"),
        (["--num=3"], "too few images for --groups=2"),
        (["--baseline=heun"], "--baseline=heun: choose from the compared methods, euler"),
        (["--num_reference=23"], "must not exceed --num=22"),
        (["--num_reference=1"], "each of the --groups=2 needs at least one"),
        (["--seed=4294967290"], "below 2^32"),
        (["--sigma_max=100"], "outside the network's range, 0.002..80"),
        (["--sigma_min=0.001"], "outside the network's range"),
        (["--sigma_min=90"], "0 < sigma_min < sigma_max"),
        (["--sigmas=1,2"], "--sigmas sets the whole schedule"),  # beside --nfe
        (["--schedule_rho=-1"], "'--schedule_rho': -1.0 is not in the range x>0"),
        (["--afs=data"], "mean and standard deviation"),
        (["--solvers=euler:schedule_type=discrete"], "discrete noise table"),
        (["--predictor_path=/nowhere"], "there is no predictor at /nowhere"),
        (["--guidance_rate=2"], "guidance_rate"),
        (["--ref=/nowhere.npz"], "/nowhere.npz: no such file"),
        (["--detector=digits"], "6 features and the detector 'digits' 64"),
        (["--dataset_name=nothing"], "'nothing' is unknown"),
        (["--model_path=/nowhere.pkl"], "/nowhere.pkl"),
        (["--device=tpu9"], "is not a device"),
    ],
)
def test_mistakes_take_one_line_and_leave_nothing(files, tmp_path, more, message):
    arguments = flags(files, tmp_path / "out", "--solvers=euler", *more)
    done = CliRunner().invoke(compare.main, arguments)
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit), done.output
    lines = done.output.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error") and message in lines[0], done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sigmas", "message"), [("1,2", "strictly decreasing"), ("90,1", "outside the network's range")]
)
def test_impossible_sigmas(files, tmp_path, sigmas, message):
    arguments = [flag for flag in flags(files, tmp_path / "out") if not flag.startswith("--nfe")]
    done = CliRunner().invoke(compare.main, [*arguments, "--solvers=euler", f"--sigmas={sigmas}"])
    assert done.exit_code == 2 and message in done.output and done.output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_schedule_of_another_range_or_beside_sigmas(files, tmp_path):
    write_schedule(tmp_path / "s.json", [40, 1.7, 0.002])
    for more, message in (
        ([], "set --sigma_max and --sigma_min for all"),
        (["--sigmas=80,1"], "leave out one of the two"),
    ):
        arguments = [flag for flag in flags(files, tmp_path / "out") if not (more and flag.startswith("--nfe"))]
        done = CliRunner().invoke(compare.main, [*arguments, f"--solvers=euler:schedule={tmp_path / 's.json'}", *more])
        assert done.exit_code == 2 and message in done.output and done.output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_predictor_of_another_problem_is_refused(files, tmp_path):
    for change, message in (
        ({"sigma_max": 40.0}, "set --sigma_max and --sigma_min for all"),
        ({"dataset_name": "digits"}, "trained for"),
    ):
        config = {"dataset_name": "custom", "img_resolution": 8, "num_steps": 3, "sampler_stu": "amed", **change}
        save_predictor(AMEDPredictor(**config), tmp_path / "p.safetensors")
        more = ["--solvers=none", f"--predictor_path={tmp_path / 'p.safetensors'}"]
        done = CliRunner().invoke(compare.main, flags(files, tmp_path / "out", *more))
        assert done.exit_code == 2 and message in done.output, done.output
    assert not (tmp_path / "out").exists()


def test_images_that_are_not_finite_stop_it_before_anything_is_written(files, tmp_path, monkeypatch):
    forward = EDMDenoiser.forward
    monkeypatch.setattr(EDMDenoiser, "forward", lambda *a, **k: forward(*a, **k) * torch.nan)
    done = CliRunner().invoke(compare.main, flags(files, tmp_path / "out", "--solvers=euler"))
    assert done.exit_code == 2 and "euler with 2 evaluations: images of seeds 0 are not finite" in done.output
    assert not any((tmp_path / "out").iterdir())


def test_a_file_in_place_of_the_folder(files, tmp_path):
    Path(tmp_path / "out").write_text("mine")
    done = CliRunner().invoke(compare.main, flags(files, tmp_path / "out", "--solvers=euler"))
    assert done.exit_code == 2 and "is a file; choose a folder" in done.output
    assert (tmp_path / "out").read_text() == "mine"
