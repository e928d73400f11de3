"""Recommended settings: exact numbers of evaluations, what wins over what; shipped predictors."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import optimize_schedule
import sample as sample_cli
import train
from benchmarks import recommend as writer
from evaluation.detectors import EMBEDDED
from models import create_model
from models.inputs import draw_noise
from sampling.settings import Settings, settings_of
from solvers import SOLVERS, recommended, sample
from solvers.recommended import FOLDER, PUBLISHED, evidence, recommend, training_recipe
from torch_utils.errors import UserError
from torch_utils.images import image_grid, to_uint8
from torch_utils.seeds import SeededGenerators
from training.checkpoint import find_predictor, load_predictor, shipped_predictors

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("amed", "plugin", "span")


class Gaussian:
    """A denoiser of Gaussian data that is taken for an embedded network."""

    sigma_min, sigma_max = 0.002, 80.0
    img_channels, img_resolution, label_dim = 1, 2, 0

    def __init__(self, name=None, **more):
        self.dataset_name = name
        self.weights_hash = evidence()[name]["network_sha256"] if name in evidence() else None
        self.data_mean, self.data_std = torch.full((1, 2, 2), 0.1), 0.5
        for key, value in more.items():
            setattr(self, key, value)

    def __call__(self, x, sigma):
        sigma = torch.as_tensor(sigma).reshape(-1, 1, 1, 1)
        return 0.1 + (x - 0.1) * 0.25 / (0.25 + sigma**2)


NOISE = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", EMBEDDED)
@pytest.mark.parametrize("nfe", [1, 2, 3, 5, 6, 9, 17])
def test_the_network_is_called_as_often_as_asked(name, nfe):
    net = Gaussian(name)
    _, info = sample(net, NOISE, nfe=nfe, return_info=True)
    assert info.nfe == nfe
    for solver in evidence()[name]["plain"]:
        if nfe > 1 or SOLVERS[solver].stages == 1:
            assert sample(net, NOISE, nfe=nfe, solver=solver, return_info=True)[1].nfe == nfe


@pytest.mark.parametrize("solver", [name for name, solver in SOLVERS.items() if not solver.needs_predictor])
def test_every_solver_has_settings_on_any_network(solver):
    if solver == "dpm_v3":  # needs statistics of the network
        return
    calls = []
    net = SimpleNamespace(sigma_min=0.002, sigma_max=80.0)

    def denoiser(x, sigma):
        calls.append(len(x))
        return Gaussian()(x, sigma)

    denoiser.sigma_min, denoiser.sigma_max = net.sigma_min, net.sigma_max
    settings = recommend(denoiser, 6, solver)
    assert "not tuned for this network" in settings.source
    assert sample(denoiser, NOISE, **settings.settings, return_info=True)[1].nfe == 6 == len(calls)


def test_what_is_given_wins():
    net = Gaussian("digits")
    best = recommended(net, 5)
    assert best["solver"] == evidence()["digits"]["best"]["5"] and best["afs"] == "data"
    given = recommend(net, 5, "ipndm", {"max_order": 4, "afs": False, "schedule_type": "polynomial"})
    assert (given.settings["max_order"], given.settings["afs"], given.settings["num_steps"]) == (4, False, 6)
    assert "schedule_rho" not in given.settings  # an exponent belongs to its schedule
    assert "changed: max_order, afs, schedule_type" in given.source and "FID" not in given.source
    plain = sample(net, NOISE, solver="ipndm", num_steps=6, max_order=4)
    assert torch.equal(sample(net, NOISE, nfe=5, **{**given.settings, "num_steps": None}), plain)
    assert torch.equal(sample(net, NOISE, nfe=5), sample(net, NOISE, **best))


def test_numbers_that_cannot_be_spent():
    with pytest.raises(UserError, match="nfe=5 is impossible for solver=heun with afs=False: it can spend 4 or 6; afs"):
        recommend(Gaussian(), 5, "heun", {"afs": False})
    assert (
        recommend(Gaussian(), 5, "heun").settings | {"afs": "data", "num_steps": 4}
        == recommend(Gaussian(), 5, "heun").settings
    )
    guided = Gaussian(evals_per_call=2, guided=True)
    with pytest.raises(UserError, match="nfe=5 is impossible .* guidance: it can spend 4 or 6$"):
        recommend(guided, 5, "euler")
    assert recommend(guided, 6).settings["solver"] == "dpmpp" and recommend(guided, 6).settings["num_steps"] == 4
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(UserError, match="nfe="):
            recommend(Gaussian(), wrong)
    with pytest.raises(UserError, match="give one of them"):
        sample(Gaussian(), NOISE, nfe=5, num_steps=6)
    with pytest.raises(UserError, match="give a solver, or nfe"):
        sample(Gaussian(), NOISE, num_steps=6)


def test_evidence_belongs_to_the_very_weights():
    other = Gaussian("digits")
    other.weights_hash = "0" * 64
    assert "not tuned for this network" in recommend(other, 5).source
    assert "nearest measured" in recommend(Gaussian("digits"), 30).source
    assert recommend(Gaussian("digits"), 5, tuned=False).settings == recommend(other, 5).settings


def test_kinds_of_networks_have_their_published_schedules():
    timed = {"sigma": None, "sigma_inv": None}
    assert recommend(Gaussian(latent=True, **timed), 6).settings["schedule_type"] == "discrete"
    guided = recommend(Gaussian(guided=True, **timed), 6).settings
    assert (guided["solver"], guided["schedule_type"], guided["max_order"]) == ("dpmpp", "time_uniform", 2)
    assert guided["thresholding"] and not recommend(Gaussian(guided=True, latent=True), 6).settings["thresholding"]
    assert set(PUBLISHED) <= set(SOLVERS)


def test_the_files_follow_from_the_measurements(tmp_path):
    for name in EMBEDDED:
        copy = tmp_path / f"{name}.json"
        copy.write_text((FOLDER / copy.name).read_text())
        writer.write(name, copy)
        assert copy.read_text() == (FOLDER / copy.name).read_text(), "run  python -m benchmarks.recommend"


def call(main, *arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_sample_says_and_records_what_it_chose(tmp_path):
    flags = ["--dataset_name=digits", "--seeds=0-1", "--subdirs=False", "--device=cpu"]
    done = call(sample_cli.main, *flags, "--solver=ipndm", "--nfe=3", f"--outdir={tmp_path / 'a'}")
    assert done.exit_code == 0, done.output
    line = done.output.splitlines()[0]
    assert line.startswith("3 evaluations: --solver=ipndm --num_steps=5 ") and "models/recommended/digits.json" in line
    record = json.loads((tmp_path / "a" / "sampling.json").read_text())
    assert record["nfe"] == 3 and "digits.json" in record["recommended"]
    explicit = line.partition(": ")[2].partition(" (")[0].split()
    again = call(sample_cli.main, *flags, *explicit, f"--outdir={tmp_path / 'b'}")
    assert again.exit_code == 0 and "evaluations:" not in again.output
    assert json.loads((tmp_path / "b" / "sampling.json").read_text())["settings"] == record["settings"]
    images = [(tmp_path / folder / "000001.png").read_bytes() for folder in "ab"]
    assert images[0] == images[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nfe=5", "--num_steps=6"], "--nfe=5 chooses the number of steps"),
        (["--nfe=5", "--sigmas=80,1"], "--nfe=5 chooses the number of steps"),
        (["--num_steps=6"], "--num_steps needs --solver"),
        (["--solver=heun", "--nfe=5", "--afs=False"], "it can spend 4 or 6; afs=True"),
        (["--predictor_path=digits-amed-3", "--nfe=4"], "--nfe=4: this predictor spends 3"),
        (["--predictor_path=digits-amed-99"], "sample.py --list"),
    ],
)
def test_sample_refuses(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    network = [] if "--predictor_path" in flags[0] else ["--dataset_name=digits"]
    done = call(sample_cli.main, *network, *flags, "--device=cpu")
    assert done.exit_code != 0 and message in done.output and not list(tmp_path.iterdir())


def test_training_takes_the_recipe_of_a_number_of_evaluations(tmp_path):
    """``--nfe`` of train.py: the options are printed by --dry-run, and name their evaluations."""

    def options(*flags):
        done = call(train.main, *flags, "-n", "--device=cpu", f"--outdir={tmp_path}")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1]), done.stdout

    five, text = options("--dataset_name=digits", "--sampler_stu=ipndm", "--nfe=5", "--M=2")
    recipe, _ = training_recipe("digits", "ipndm")
    assert five | recipe | {"M": 2} == five and "-4-5-ipndm-" in text  # what was written wins
    six, text = options("--dataset_name=digits", "--nfe=6")
    assert six["afs"] is False and "-4-6-amed-" in text
    span, text = options("--dataset_name=digits", "--sampler_stu=span", "--nfe=4")
    assert span["pairs"] == 384 and "-6-4-span-" in text
    paper, _ = options("--dataset_name=cifar10", "--nfe=5")
    assert (paper["total_kimg"], paper["schedule_type"]) == (10, "time_uniform")
    wrong = call(train.main, "--dataset_name=digits", "--nfe=6", "--afs=True", "-n", "--device=cpu")
    assert "it can spend 5 or 7" in wrong.output


def test_a_schedule_for_a_number_of_evaluations(tmp_path):
    flags = ["--dataset_name=digits", "--method=dmn", "--solver=heun", "--device=cpu", f"--dest={tmp_path / 's.json'}"]
    done = call(optimize_schedule.main, *flags, "--nfe=6")
    assert done.exit_code == 0, done.output
    assert len(json.loads((tmp_path / "s.json").read_text())["sigmas"]) == 4
    wrong = call(optimize_schedule.main, *flags, "--nfe=6", "--num_steps=4", "--overwrite=True")
    assert "leave out --nfe or --num_steps" in wrong.output


# --------------------------------------------------------------------------------------------------
# Predictors that come with the repository


def test_all_predictors_are_there_and_small():
    names = {f"{name}-{kind}-{nfe}" for name in EMBEDDED for kind in KINDS for nfe in (3, 4, 5, 6)}
    assert set(shipped_predictors()) == names
    assert sum(path.stat().st_size for path in shipped_predictors().values()) < 3_000_000
    listed = call(sample_cli.main, "--list").output
    assert all(name in listed for name in (*shipped_predictors(), *EMBEDDED, "ipndm", "imagenet64"))


def test_a_folder_of_that_name_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_predictor("digits-span-3") == shipped_predictors()["digits-span-3"]
    (tmp_path / "digits-span-3").write_bytes(b"x")
    assert str(find_predictor("digits-span-3")) == "digits-span-3"


@pytest.mark.parametrize("dataset_name", EMBEDDED)
def test_shipped_predictors_keep_what_their_records_say(dataset_name):
    """The recorded distance to the converged solution, here of 8 seeds and a coarser reference."""
    net = create_model(dataset_name).to(memory_format=torch.channels_last)
    latents = draw_noise(net, SeededGenerators(range(8)))
    reference = sample(net, latents, solver="heun", num_steps=19)
    with Image.open(ROOT / "docs" / "quick_start.png") as grid:
        shown = np.asarray(grid).astype(float)
    for name, path in shipped_predictors().items():
        if not name.startswith(dataset_name):
            continue
        predictor = load_predictor(path)
        shipped = predictor.provenance["shipped"]
        assert predictor.provenance["network_hash"] == net.weights_hash
        assert {"command", "seeds", "date", "machine"} <= shipped.keys() and "--seed=0" in shipped["command"]
        settings = settings_of(predictor, Settings(dataset_name=dataset_name))
        images, info = sample(net, latents, predictor=predictor, return_info=True, **settings.arguments())
        distance = (images - reference).square().mean(dim=(1, 2, 3)).sqrt().mean().item()
        assert info.nfe == shipped["nfe"] == int(name.rpartition("-")[2])
        assert distance == pytest.approx(shipped["distance"], rel=0.35, abs=0.008), name
        if name == "cifar10-small-span-3":  # the picture in README is what its command makes
            first = image_grid(to_uint8(images), 8).astype(float)
            assert first.shape[1] == shown.shape[1] and np.abs(first - shown[:32]).mean() < 3


def test_recommended_settings_make_good_images():
    """Near the converged solution, where the defaults of the solver alone are far from it."""
    net = create_model("digits")
    latents = draw_noise(net, SeededGenerators(range(4)))
    reference = sample(net, latents, solver="heun", num_steps=19)

    def distances(**settings):
        return (sample(net, latents, **settings) - reference).square().mean(dim=(1, 2, 3)).sqrt()

    assert (distances(nfe=5, solver="ipndm") < 0.99 * distances(num_steps=7, solver="ipndm", afs=True)).all()
    assert (distances(nfe=5, solver="dpmpp") < 0.8 * distances(num_steps=6, solver="dpmpp")).all()


def test_nothing_said_means_five_evaluations(tmp_path):
    flags = ["--dataset_name=digits", "--seeds=0", "--device=cpu", f"--outdir={tmp_path}"]
    done = call(sample_cli.main, *flags)
    best = evidence()["digits"]["best"]["5"]
    assert done.exit_code == 0 and done.output.startswith(f"5 evaluations: --solver={best} "), done.output
    assert json.loads((tmp_path / "sampling.json").read_text())["nfe"] == 5
