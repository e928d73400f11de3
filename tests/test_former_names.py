"""Files, flags and arguments with the former names of settings work as before."""

import json

import pytest
import torch
from toy import ToyNet

from sampling.folder import _difference
from solvers import sample
from solvers.former_names import FORMER_NAMES
from solvers.schedule_file import load_schedule
from solvers.span_table import GROUPS, SpanSolver
from torch_utils.tensor_file import read_safetensors, write_safetensors
from training.checkpoint import load_predictor, save_predictor
from training.options import SpanOptions

FORMER = {name: former for former, name in FORMER_NAMES.items()}


def with_former_names(values):
    return {FORMER.get(name, name): value for name, value in values.items()}


def shaken(**settings):
    student = SpanSolver(learn=list(GROUPS), parallel=2, num_steps=5, **settings)
    generator = torch.Generator().manual_seed(0)
    for value in student.parameters():
        value.data += 0.1 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return student


def test_a_predictor_file(tmp_path):
    student = shaken(sigma_scale_bound=0.4, last_step_gains=2)
    path = tmp_path / "student.safetensors"
    save_predictor(student, path)
    tensors, metadata = read_safetensors(path.read_bytes(), str(path))
    config = with_former_names(json.loads(metadata["config"]))
    config["learn"] = [FORMER[name] for name in config["learn"]]
    assert config["time_bound"] == 0.4 and "labels" in config["learn"]
    write_safetensors(path, with_former_names(tensors), metadata | {"config": json.dumps(config)})
    found = load_predictor(path)
    assert found.config == student.config and found.config["time_bound"] == 0.4
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in found.state_dict().items())
    assert torch.equal(found.inner, student.substeps) and torch.equal(found.contrast, student.state_gain)


def test_settings_of_a_student():
    assert (
        SpanSolver(learn=["labels", "scale"], scaled=1).config
        == SpanSolver(learn=["knots", "step_gain"], last_step_gains=1).config
    )
    assert SpanSolver.preset("full", time_bound=0.2).config["sigma_scale_bound"] == 0.2


def test_options_of_a_run():
    values = {"dataset_name": "digits", "time_bound": 0.3, "lrs": "labels=0.5", "phases": "labels+time:1,all:1"}
    options = SpanOptions.from_dict(values)
    student = options.make_student(0.002, 80.0)
    assert options.sigma_scale_bound == 0.3 and options.rates(student)["knots"] == 0.5
    assert options.phase_list(student)[0] == (frozenset({"knots", "sigma_scale"}), 0.5)


def test_noise_levels_that_the_network_is_conditioned_on(tmp_path):
    levels = {"sigmas": [80.0, 3.0, 0.002], "sigmas_net": [80.0, 2.0, 0.002]}
    latents = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    former = sample(ToyNet(), latents, solver="euler", **levels)
    now = sample(ToyNet(), latents, solver="euler", sigmas=levels["sigmas"], sigmas_cond=levels["sigmas_net"])
    assert torch.equal(former, now) and not torch.equal(
        now, sample(ToyNet(), latents, solver="euler", sigmas=[80, 3, 0.002])
    )
    content = {"format": "amed-schedule-1", **levels, "solver": "euler", "solver_options": {}, "afs": False}
    content |= {"method": "x", "settings": {}, "network": None, "network_hash": None, "sigma_min": 0.002}
    content |= {"sigma_max": 80.0, "evaluations": 0, "seconds": 0, "versions": {}}
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps(content))
    assert load_schedule(path).sigmas_cond == levels["sigmas_net"]


@pytest.mark.parametrize("value", [None, [80.0, 2.0, 0.002]])
def test_the_record_of_a_folder(value):
    assert _difference({"solver": "euler", "sigmas_net": value}, {"solver": "euler", "sigmas_cond": value}) == ""
