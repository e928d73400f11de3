"""sample.py as a script: images per seed, reruns, predictors, several processes, mistakes."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from two_processes import call_on_two

import sample as cli
from evaluation.fid import METRICS, calculate_fid
from models import create_model
from sampling import settings as settings_module
from sampling.folder import Folder, format_seeds
from sampling.generate import generate_images
from sampling.options import OutputOptions
from sampling.run import write_images
from sampling.settings import Settings
from solvers import SOLVERS, sample
from torch_utils.errors import UserError
from torch_utils.images import to_uint8
from torch_utils.progress import progress_bar
from torch_utils.seeds import SeededGenerators, parse_seeds
from training.checkpoint import load_predictor, save_predictor
from training.predictor import AMEDPredictor

ROOT = Path(__file__).resolve().parents[1]
EULER = ("--dataset_name=digits", "--solver=euler", "--num_steps=3")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def call(*arguments, launcher=(), cwd=ROOT, check=True):
    command = [sys.executable, *launcher, str(ROOT / "sample.py"), "--device=cpu", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=240, env=ENV)
    assert not check or done.returncode == 0, done.stderr
    return done


def call_here(*arguments):
    """The same command in this process: for what needs no process of its own."""
    done = CliRunner().invoke(cli.main, ["--device=cpu", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done


def read(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def numbered(folder) -> dict[int, np.ndarray]:
    return {int(path.stem): read(path) for path in Path(folder).glob("000000/*.png")}


def assert_same_pictures(found: dict, expected: dict):
    """Equal up to the rounding of network calls with other batch sizes."""
    assert found.keys() == expected.keys()
    difference = np.abs(np.stack([found[seed] - expected[seed] for seed in sorted(expected)]))
    assert difference.max() <= 1 and (difference == 0).mean() > 0.999


@pytest.fixture(scope="module")
def net():
    return create_model("digits")


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """(folder, output) of a run that other tests compare with."""
    folder = tmp_path_factory.mktemp("baseline") / "out"
    done = call(*EULER, "--seeds=0-8", "--outdir", folder, "--grid=True", "--return_inters=True")
    return folder, done.stdout


@pytest.fixture(scope="module")
def predictor_file(tmp_path_factory, net):
    config = dict(dataset_name="digits", img_resolution=32, num_steps=3, sampler_stu="amed", afs=True)
    config |= dict(schedule_type="time_uniform", schedule_rho=1, scale_dir=0.01)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("exps") / "00007-digits" / "predictor-000001.safetensors"
    save_predictor(AMEDPredictor(**config), path, {"network_hash": net.weights_hash})
    return path


# --------------------------------------------------------------------------------------------------
# What is written


def test_images_are_those_of_the_library(baseline, net):
    """Independent of the command line: noise per seed, Euler steps written out, EDM's rounding."""
    folder, stdout = baseline
    found = numbered(folder)
    assert list(sorted(found)) == list(range(9))
    x = torch.stack([torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(9)])
    u = torch.linspace(0, 1, 3, dtype=torch.float64)
    sigmas = ((80 ** (1 / 7) + u * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7).tolist()
    x, denoised = x * sigmas[0], []
    for sigma, target in zip(sigmas[:-1], sigmas[1:], strict=True):
        with torch.no_grad():
            denoised.append(net(x, sigma))
        x = x + (target - sigma) * (x - denoised[-1]) / sigma
    assert_same_pictures(found, dict(enumerate(to_uint8(x)[..., 0].astype(int))))
    assert np.stack(list(found.values())).std() > 20  # pictures, not a constant

    strip = read(folder / "inters" / "000004.png")
    assert strip.shape == (32, 3 * 32 + 2 * 2)  # two denoised images and the result
    assert np.abs(strip[:, :32] - to_uint8(denoised[0])[4, :, :, 0]).max() <= 1
    assert np.array_equal(strip[:, -32:], found[4])

    grid = read(folder / "grid.png")
    assert grid.shape == (3 * 34 - 2, 3 * 34 - 2)
    assert all(np.array_equal(grid[i // 3 * 34 :, i % 3 * 34 :][:32, :32], image) for i, image in sorted(found.items()))
    assert re.fullmatch(rf"sampled 9 images \(0 skipped\) NFE=2 in .* s \(.* img/s\) -> {folder}\n", stdout)
    assert not list(folder.rglob("*.part"))


def test_record_says_how_to_repeat_the_run(baseline, net):
    record = json.loads((baseline[0] / "sampling.json").read_text())
    settings = record["settings"]
    assert record["seeds"] == "0-8" and record["nfe"] == 2
    assert settings["solver"] == "euler" and settings["network_sha256"] == net.weights_hash
    assert settings["sigmas"][0] == pytest.approx(80) and settings["sigmas"][-1] == pytest.approx(0.002)
    assert record["versions"]["torch"] == torch.__version__ and settings["predictor_sha256"] is None


@pytest.mark.parametrize("options", [("--batch=1",), ("--batch=7", "--channels_last=False")])
def test_batch_size_does_not_change_an_image(baseline, tmp_path, options):
    call_here(*EULER, "--seeds=0-8", "--outdir", tmp_path, *options)
    assert_same_pictures(numbered(tmp_path), numbered(baseline[0]))


def test_two_processes_give_the_images_of_one(baseline, tmp_path):
    """Under torchrun too: a continued folder, one grid of all images, one summary."""
    call_here(*EULER, "--seeds=2-3", "--outdir", tmp_path)
    done = call(
        *(*EULER, "--seeds=0-8", "--batch=2", "--grid=True", "--outdir", tmp_path),
        launcher=TORCHRUN,
    )
    assert_same_pictures(numbered(tmp_path), numbered(baseline[0]))
    assert done.stdout.count("sampled") == 1 and "sampled 7 images (2 skipped)" in done.stdout
    assert np.abs(read(tmp_path / "grid.png") - read(baseline[0] / "grid.png")).max() <= 1


def test_default_folder_and_seed_subfolders(tmp_path):
    call("--dataset_name=digits", "--solver=dpm", "--num_steps=2", "--seeds=3,1002", "--solver_r=0.4", cwd=tmp_path)
    folder = tmp_path / "samples" / "digits" / "dpm_nfe2"
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
    assert names == ["000000/000003.png", "001000/001002.png", "sampling.json"]
    assert json.loads((folder / "sampling.json").read_text())["settings"]["r"] == 0.4


def test_every_plain_solver_and_its_nfe(tmp_path):
    """NFE: intervals, doubled for two-stage solvers, -1 with AFS, +1 for denoise_to_zero."""
    expected = {"euler": 3, "heun": 6, "dpm": 6, "dpmpp": 3, "ipndm": 3}
    for solver, nfe in expected.items():
        flags = ["--dataset_name=digits", "--solver", solver, "--num_steps=4", "--seeds=0", "--subdirs=False"]
        done = call_here(*flags, "--afs=True", "--denoise_to_zero=True", "--outdir", tmp_path / solver)
        assert f"NFE={nfe} " in done.output
        assert (tmp_path / solver / "000000.png").exists()
    assert set(expected) <= set(SOLVERS)


def test_solver_options_and_precision_reach_the_sampler(tmp_path, net):
    flags = ["--dataset_name=digits", "--solver=dpmpp", "--seeds=0-3", "--sigmas=60,10,2,0.5,0.01"]
    options = ["--max_order=2", "--thresholding=False", "--lower_order_final=False", "--afs=True"]
    call_here(*flags, *options, "--outdir", tmp_path / "a")
    expected = sample(
        net,
        SeededGenerators(range(4)).randn([1, 32, 32]),
        solver="dpmpp",
        sigmas=[60, 10, 2, 0.5, 0.01],
        max_order=2,
        thresholding=False,
        lower_order_final=False,
        afs=True,
    )
    assert_same_pictures(numbered(tmp_path / "a"), dict(enumerate(to_uint8(expected)[..., 0].astype(int))))
    call_here(*flags, *options, "--outdir", tmp_path / "b", "--amp=bf16")
    exact, mixed = numbered(tmp_path / "a"), numbered(tmp_path / "b")
    difference = np.abs(np.stack([exact[seed] - mixed[seed] for seed in exact]))
    assert 0 < difference.mean() < 5


# --------------------------------------------------------------------------------------------------
# Reruns


def test_rerun_makes_only_what_is_missing(tmp_path):
    flags = (*EULER, "--outdir", tmp_path)
    call_here(*flags, "--seeds=0-3")
    first = numbered(tmp_path)
    (tmp_path / "000000" / "000002.png").unlink()
    Image.fromarray(np.zeros([32, 32], np.uint8)).save(tmp_path / "000000" / "000001.png")  # recognisable if kept
    assert "sampled 3 images (3 skipped)" in call_here(*flags, "--seeds=0-5").output
    second = numbered(tmp_path)
    assert_same_pictures({2: second[2]}, {2: first[2]})
    assert not second[1].any() and set(second) == set(range(6))
    assert json.loads((tmp_path / "sampling.json").read_text())["seeds"] == "0-5"
    assert "sampled 0 images (6 skipped)" in call_here(*flags, "--seeds=0-5").output
    assert "sampled 6 images (0 skipped)" in call_here(*flags, "--seeds=0-5", "--overwrite=True").output
    assert_same_pictures({seed: numbered(tmp_path)[seed] for seed in first}, first)
    call_here(*flags, "--seeds=1", "--return_inters=True")  # strips are made for images that exist already
    assert (tmp_path / "inters" / "000001.png").exists()


def test_images_of_other_settings_are_never_mixed(tmp_path):
    call_here(*EULER, "--outdir", tmp_path, "--seeds=0-3")
    before = numbered(tmp_path)
    other = ("--dataset_name=digits", "--solver=euler", "--num_steps=2", "--outdir", tmp_path)
    for seeds, overwrite, message in (
        ("0-5", False, "num_steps: 3 there, 2 now"),
        ("0-1", True, "also holds seeds 2-3"),
    ):
        done = CliRunner().invoke(cli.main, [*map(str, other), f"--seeds={seeds}", f"--overwrite={overwrite}"])
        assert done.exit_code == 2 and message in done.output
        assert all(np.array_equal(image, before[seed]) for seed, image in numbered(tmp_path).items())
    call_here(*other, "--seeds=0-4", "--overwrite=True")
    after = numbered(tmp_path)
    assert set(after) == set(range(5)) and not np.array_equal(after[0], before[0])


def test_a_failed_run_does_not_block_its_folder(tmp_path):
    """A record without images is no obstacle for other settings."""
    call_here(*EULER, "--outdir", tmp_path, "--seeds=0")
    (tmp_path / "000000" / "000000.png").unlink()
    call_here("--dataset_name=digits", "--solver=ipndm", "--num_steps=2", "--outdir", tmp_path, "--seeds=1")
    assert json.loads((tmp_path / "sampling.json").read_text())["seeds"] == "1"


def test_images_of_unknown_origin_are_respected(tmp_path):
    (tmp_path / "000000").mkdir()
    (tmp_path / "000000" / "000001.png").write_bytes(b"mine")
    done = CliRunner().invoke(cli.main, [*EULER, "--outdir", str(tmp_path), "--seeds=0-3", "--device=cpu"])
    assert done.exit_code == 2 and "so their settings are unknown" in done.output
    assert [path.name for path in tmp_path.rglob("*.*")] == ["000001.png"]
    assert (tmp_path / "000000" / "000001.png").read_bytes() == b"mine"


# --------------------------------------------------------------------------------------------------
# Predictors


def test_predictor_brings_its_settings(predictor_file, tmp_path, net):
    folder = tmp_path / "exps"
    folder.mkdir()
    (folder / "00007-digits").symlink_to(predictor_file.parent)
    done = call("--predictor_path=7", "--seeds=0-3", cwd=tmp_path)
    assert "NFE=3 " in done.stdout and "Warning" not in done.stderr
    found = numbered(tmp_path / "samples" / "digits" / "amed_nfe3")
    predictor = load_predictor(predictor_file)
    expected = sample(
        net,
        SeededGenerators(range(4)).randn([1, 32, 32]),
        solver="amed",
        num_steps=3,
        schedule_type="time_uniform",
        schedule_rho=1,
        afs=True,
        predictor=predictor,
    )
    assert_same_pictures(found, dict(enumerate(to_uint8(expected)[..., 0].astype(int))))
    record = json.loads((tmp_path / "samples" / "digits" / "amed_nfe3" / "sampling.json").read_text())
    assert record["settings"]["afs"] is True and record["settings"]["predictor_sha256"]


def test_flags_that_repeat_the_predictor_are_fine_and_others_are_not(predictor_file, tmp_path):
    flags = ["--predictor_path", str(predictor_file), "--seeds=0", "--outdir", str(tmp_path), "--device=cpu"]
    call_here(*flags, "--num_steps=3", "--solver=amed", "--schedule_rho=1", "--afs=True", "--dataset_name=digits")
    for flag in ("--num_steps=4", "--afs=False", "--solver=euler", "--sigma_min=0.01", "--sigmas=80,1", "--r=0.5"):
        done = CliRunner().invoke(cli.main, [*flags, flag])
        assert done.exit_code == 2 and "the predictor" in done.output and flag.split("=")[0] in done.output, flag


def test_warns_about_another_network(predictor_file, tmp_path):
    predictor = load_predictor(predictor_file)
    save_predictor(predictor, tmp_path / "p.safetensors", {"network_hash": "0" * 64})
    done = CliRunner().invoke(
        cli.main, ["--predictor_path", str(tmp_path / "p.safetensors"), "--seeds=0", "--outdir", str(tmp_path / "o")]
    )
    assert done.exit_code == 0 and "trained on other weights" in done.output


# --------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "give --dataset_name or --predictor_path"),
        (("--dataset_name=digits", "--solver=magic"), "unknown solver 'magic'; choose from"),
        (("--dataset_name=digits", "--solver=amed"), "needs a trained predictor"),
        (("--dataset_name=nothing", "--solver=euler"), "nothing"),
        ((*EULER, "--seeds=5-1"), "is reversed"),
        ((*EULER, "--seeds=1,1"), "names a seed twice"),
        ((*EULER, "--max_order=2"), "euler has no option 'max_order'"),
        (("--dataset_name=digits", "--solver=ipndm", "--max_order=9"), "supports 1..4"),
        ((*EULER, "--afs=maybe"), "choose True, False or data"),
        ((*EULER, "--sigmas=3,2,1"), "leave out --num_steps"),
        (("--dataset_name=digits", "--solver=euler", "--sigmas=1,2"), "strictly decreasing"),
        (("--dataset_name=digits", "--solver=euler", "--sigmas=a"), "write decreasing noise levels"),
        ((*EULER, "--class=3"), "unconditional"),
        ((*EULER, "--sigma_min=90"), "0 < sigma_min < sigma_max"),
        ((*EULER, "--schedule_type=discrete"), "discrete noise table"),
        ((*EULER, "--guidance_rate=7.5"), "guidance_rate"),
        ((*EULER, "--model_path=/nowhere.pkl"), "/nowhere.pkl"),
        ((*EULER, "--use_fp16=True", "--amp=bf16"), "choose one"),
        (("--predictor_path=/nowhere",), "there is no predictor at"),
        ((*EULER, "--device=tpu9"), "is not a device"),
    ],
)
def test_mistakes_take_one_line_and_leave_nothing(tmp_path, flags, message):
    done = CliRunner().invoke(cli.main, ["--device=cpu", "--outdir", str(tmp_path / "out"), *flags])
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit)
    lines = done.output.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error") and message in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "idle"),
    [
        (("--solver=euler", "--num_steps=6"), "'euler' with polynomial schedule"),
        (("--solver=euler", "--sigmas=80,1"), "'euler' with this schedule"),
        (("--solver=deis",), None),
        (("--solver=euler", "--original_code=False"), None),
    ],
)
def test_original_code_without_effect_is_said(tmp_path, flags, idle):
    shared = ("--dataset_name=digits", "--seeds=0", "--outdir", tmp_path, "--original_code=True")
    done = call_here(*shared, *flags)
    line = f"Warning: original_code has no effect on {idle}\n"
    assert (line in done.stderr) if idle else ("Warning" not in done.stderr)


def test_original_code_has_an_effect_on_the_discrete_schedule():
    idle = Settings(dataset_name="x", solver="euler", schedule_type="discrete", schedule_rho=1, original_code=True)
    assert idle.warnings() and not dataclasses.replace(idle, schedule_rho=2).warnings()


def test_analytic_step_that_the_network_cannot_take_is_said_at_once(tmp_path, monkeypatch, net):
    monkeypatch.setattr(net, "data_mean", None)
    monkeypatch.setattr(settings_module, "create_model", lambda *arguments: net)
    done = CliRunner().invoke(cli.main, [*EULER, "--afs=data", "--outdir", str(tmp_path / "out"), "--device=cpu"])
    assert done.exit_code == 2 and "mean and standard deviation" in done.output and not (tmp_path / "out").exists()


def test_mistake_through_the_shell(tmp_path):
    (tmp_path / "taken").write_text("a file")
    done = call(*EULER, "--outdir", tmp_path / "taken", check=False)
    assert (
        done.returncode == 2
        and len(done.stderr.strip().splitlines()) == 1
        and "is a file; choose a folder" in done.stderr
    )
    assert (tmp_path / "taken").read_text() == "a file"


def test_damaged_record_is_refused(tmp_path):
    (tmp_path / "sampling.json").write_text('{"seeds": "0-')
    done = CliRunner().invoke(cli.main, [*EULER, "--outdir", str(tmp_path), "--device=cpu"])
    assert done.exit_code == 2 and "is not a record of sample.py" in done.output


class BrokenNet(torch.nn.Module):
    """Not-a-number for one image of the batch."""

    img_channels, img_resolution, evals_per_call, sigma_min, sigma_max = 1, 4, 1, 0.002, 80.0

    def forward(self, x, sigma):
        return torch.where(torch.arange(len(x)).reshape(-1, 1, 1, 1) == 1, torch.nan, 0.0 * x)

    def make_cond(self, generator, labels=None):
        return {}

    def decode(self, x):
        return x


def test_images_that_are_not_finite_are_named_and_not_written(tmp_path):
    folder = Folder(tmp_path, subdirs=False, inters=False)
    batches = generate_images(BrokenNet(), [10, 11, 12], device="cpu", solver="euler", num_steps=3)
    with pytest.raises(UserError, match="for seeds 11: not written"), progress_bar(disable=True) as bar:
        write_images(batches, folder, 2, bar)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000010.png", "000012.png"]


def test_errors_of_the_background_writer_reach_the_user(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "000000").write_text("a file where the folder of the images should be")
    done = CliRunner().invoke(cli.main, [*EULER, "--device=cpu", "--seeds=0-3", f"--outdir={tmp_path / 'out'}"])
    assert done.exit_code == 2 and "cannot write" in done.output and "Traceback" not in done.output


# --------------------------------------------------------------------------------------------------
# Speed: compilation, FID without files


def test_compilation_is_part_of_the_record(tmp_path, monkeypatch):
    """No code is generated here (see test_execution.py); the folder's record counts."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    call_here(*EULER, "--seeds=0-1", "--outdir", tmp_path, "--compile")
    assert json.loads((tmp_path / "sampling.json").read_text())["settings"]["compile"] == "default"
    done = CliRunner().invoke(cli.main, [*EULER, "--device=cpu", "--seeds=0-2", f"--outdir={tmp_path}"])
    assert done.exit_code == 2 and 'compile: "default" there, null now' in done.output
    done = CliRunner().invoke(cli.main, [*EULER, "--device=cpu", "--compile=fast"])
    assert done.exit_code == 2 and "'fast' is not one of" in done.output


def measured(found):
    """The numbers of a result by name."""
    return {"fid": found["fid"]} | {name: entry["value"] for name, entry in found["measures"].items()}


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """(folder of images, its measures as --fid_json has them, flags of the measures)"""
    folder = tmp_path_factory.mktemp("streamed")
    call_here(*EULER, "--seeds=100-159", f"--outdir={folder / 'real'}")
    measures = (f"--ref={folder / 'real'}", f"--metrics={','.join(METRICS)}", "--fid_detector=digits")
    flags = ("--save_images=True", f"--fid_json={folder / 'fid.json'}", f"--outdir={folder / 'out'}")
    done = call_here(*EULER, "--seeds=0-79", "--batch=30", *measures, *flags)
    found = json.loads((folder / "fid.json").read_text())
    assert f"FID {found['fid']:.4f} images=80 detector=digits" in done.output
    assert f"\nkid {found['measures']['kid']['value']:.6g} ± " in done.output
    return folder / "out", found, measures


def test_streamed_measures_are_those_of_the_files(streamed):
    folder, found, _ = streamed
    expected = asdict(calculate_fid(folder, found["ref"], metrics=METRICS, detector="digits"))
    assert set(measured(found)) == set(METRICS) and found["fid"] > 1
    assert measured(found) == pytest.approx(measured(expected), rel=1e-6)
    assert found["measures"]["kid"]["spread"] == pytest.approx(expected["measures"]["kid"]["spread"], rel=1e-6)
    same = ("images", "detector", "detector_sha256", "ref", "ref_images", "seed")
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}
    assert found["sampling"]["seeds"] == "0-79" and found["sampling"]["settings"]["solver"] == "euler"
    record = json.loads((folder / "sampling.json").read_text())["measured"]
    assert measured(record) == measured(found) and record["seeds"] == "0-79"


def test_streamed_measures_need_no_files(streamed, tmp_path, monkeypatch):
    """Nor do they depend on batches and processes."""
    monkeypatch.chdir(tmp_path)
    flags = (*streamed[2], "--batch=17", "--fid_json=fid.json", "--device=cpu")
    done = call_on_two(cli.main, *EULER, "--seeds=0-79", *flags)
    assert done.codes == [0, 0], done.outputs
    found = json.loads((tmp_path / "fid.json").read_text())
    assert measured(found) == pytest.approx(measured(streamed[1]), rel=1e-4) and found["images"] == 80
    assert [path.name for path in tmp_path.iterdir()] == ["fid.json"]
    assert "".join(done.outputs).count("\nFID ") == 1 and "not written" in found["source"]


def test_measures_against_the_reference_of_the_network(streamed):
    done = call_here(*EULER, "--seeds=0-79", "--metrics=fid")
    assert f"FID {calculate_fid(streamed[0], 'digits').fid:.3f}" in done.output and "ref=digits" in done.output
    with pytest.raises(UserError, match="'custom' has no reference of its own; give --fid_ref"):
        OutputOptions(metrics="fid").stream("custom", 80, torch.device("cpu"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--fid_ref=digits", "--grid=True"), "--grid: with --fid_ref no images are written"),
        (("--fid_ref=digits", "--seeds=4"), "covariance needs at least 2"),
        (("--fid_ref=nowhere.npz",), "no such file"),
        (("--metrics=fid", "--overwrite=True"), "--overwrite: with --metrics no images are written"),
        (("--metrics=kid",), "--metrics=kid needs images as --ref"),
        (("--save_images=False",), "--save_images has no effect without --fid_ref"),
        (("--fid_json=x.json",), "--fid_json has no effect without --fid_ref"),
    ],
)
def test_refused_with_streamed_fid(flags, message):
    done = CliRunner().invoke(cli.main, ["--device=cpu", *EULER, *flags])
    assert done.exit_code == 2 and message in done.output


# --------------------------------------------------------------------------------------------------
# The library function


class ClassNet(BrokenNet):
    """D = the class index everywhere, so that the image shows which class was asked for."""

    def forward(self, x, sigma, classes):
        return torch.zeros_like(x) + classes.reshape(-1, 1, 1, 1)

    def make_cond(self, generator, labels=None):
        drawn = generator.randint(10) if labels is None else torch.as_tensor(labels)
        return {"classes": drawn.expand(len(generator.seeds)).float()}


def classes_shown(seeds, **options) -> list[int]:
    batches = generate_images(ClassNet(), seeds, device="cpu", solver="euler", sigmas=[1.0, 0.002], **options)
    return [round(image.mean().item()) for result in batches for image in result.images]


def test_classes_come_from_the_seed_or_from_the_caller():
    drawn = classes_shown(range(20), batch=20)
    expected = []
    for seed in range(20):  # the noise of an image first, then its class
        generator = torch.Generator().manual_seed(seed)
        torch.randn(1, 4, 4, generator=generator)
        expected.append(torch.randint(10, (), generator=generator).item())
    assert drawn == expected and len(set(drawn)) > 4
    assert classes_shown(range(20), batch=3) == drawn
    assert classes_shown([19, 4], batch=1) == [drawn[19], drawn[4]]
    assert classes_shown(range(5), batch=2, labels=7) == [7] * 5
    assert classes_shown(range(5), batch=2, labels=[3, 1, 4, 1, 5]) == [3, 1, 4, 1, 5]


def test_format_seeds_is_the_inverse_of_parse_seeds():
    assert format_seeds([7, 0, 2, 1, 11, 10, 2]) == "0-2,7,10-11"
    assert parse_seeds(format_seeds(range(50_000))) == list(range(50_000))
