"""Flags, help and checks from a dataclass; options of solvers in training."""

import json
from dataclasses import dataclass

import click
import pytest
import torch
from click.testing import CliRunner
from test_train_cli import invoke, trained, usual
from test_training_loop import write_tiny
from toy import ToyNet

import sample as sample_cli
from models import create_model
from sampling.settings import Settings, settings_of
from solvers import SOLVERS, Option, Solver, sample
from torch_utils.cli import Command
from torch_utils.errors import UserError
from torch_utils.options import COUNT, REQUIRED, check_options, flag, flags, flags_of
from torch_utils.tensor_file import write_safetensors
from training.checkpoint import load_predictor
from training.loss import DistillationLoss
from training.options import AMEDOptions, SFDOptions, SpanOptions
from training.predictor import AMEDPredictor


@dataclass
class First:
    name: str = flag("Name", REQUIRED, required=False)
    count: int = flag("How many", 4, COUNT, aliases=("--number",), changeable=True)
    rate: float = flag("Rate", 0.5, click.FloatRange(0, 1, max_open=True))
    kind: str | None = flag("Kind", kind=("a", "b"))
    inner: int = 3  # not a flag


@dataclass
class Second(First):
    count: int = 2
    extra: bool = flag("More", True)


def test_flags_and_help_come_from_the_fields():
    @click.command(cls=Command)
    @flags(First, {"second": Second})
    def command(**values):
        click.echo(json.dumps(values))

    params = {param.name: param for param in command.params}
    assert list(params) == ["name", "count", "rate", "kind", "extra"]
    assert params["count"].help == "How many (second: 2)" and params["extra"].help == "second: More"
    assert params["count"].opts == ["--count", "--number"]
    done = CliRunner().invoke(command, ["--number=7", "--extra=False"])
    assert json.loads(done.output) == {"name": None, "count": 7, "rate": 0.5, "kind": None, "extra": False}
    assert [name for name, flag in flags_of(Second).items() if flag.changeable] == ["count"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"count": 0}, "count=0 must be a whole number of at least 1"),
        ({"count": 1.5}, "count=1.5 is of the wrong kind"),
        ({"rate": 1.0}, "rate=1.0 must be a finite number of at least 0 and below 1"),
        ({"rate": float("nan")}, "rate=nan"),
        ({"kind": "c"}, "kind=c: choose from a, b"),
        ({"extra": "yes"}, "extra=yes is of the wrong kind"),
    ],
)
def test_one_check_for_the_command_line_and_for_python(change, message):
    check_options(Second("x"))
    with pytest.raises(UserError, match=message):
        check_options(Second("x", **change))


@pytest.mark.parametrize("kind", [AMEDOptions, SpanOptions, SFDOptions])
def test_every_training_option_has_a_flag_with_help(kind):
    plain = {AMEDOptions: set(), SpanOptions: {"objective", "open"}}.get(kind, {"objective"})
    assert set(flags_of(kind)) == set(kind("digits").to_dict()) - plain
    assert all(flag.help for flag in flags_of(kind).values())


def test_objective_may_be_spelled_out(tmp_path):
    for objective, student in (("per_step", "amed"), ("final", "span"), ("sfd", None)):
        done = invoke(
            "--dataset_name=digits",
            f"--objective={objective}",
            *([] if student is None else [f"--sampler_stu={student}"]),
            "-n",
            f"--outdir={tmp_path}",
        )
        assert done.exit_code == 0, done.output


def test_a_plugin_of_deis_trains_and_samples_with_its_mode(tmp_path):
    tiny = write_tiny("edm_song_uncond", tmp_path / "tiny.safetensors")
    flags = ["--sampler_stu=deis", "--deis_mode=rhoab", "--sampler_tea=dpm", "--r=0.4", "--total_kimg=0.008"]
    done = invoke(*usual(tiny, tmp_path / "exps"), *flags)
    assert done.exit_code == 0 and "no effect" not in done.output, done.output
    path = trained(done.output)
    predictor = load_predictor(path)
    assert predictor.config["deis_mode"] == "rhoab" and predictor.config["r"] == 0.4
    assert json.loads((path.parent / "training_options.json").read_text())["deis_mode"] == "rhoab"

    net = create_model("custom", tiny)
    latents = torch.randn(2, net.img_channels, net.img_resolution, net.img_resolution)
    settings = {"solver": "deis", "num_steps": 3, "afs": True, "max_order": 3, "predictor": predictor}
    own = sample(net, latents, **settings)
    assert torch.equal(own, sample(net, latents, **settings, deis_mode="rhoab"))
    with pytest.raises(UserError, match="deis_mode=tab: the predictor was trained with deis_mode=rhoab"):
        sample(net, latents, **settings, deis_mode="tab")
    other = AMEDPredictor(**{**predictor.config, "deis_mode": "tab"})
    other.load_state_dict(predictor.state_dict())
    assert not torch.allclose(own, sample(net, latents, **{**settings, "predictor": other}), rtol=1e-3)

    arguments = [f"--predictor_path={path}", f"--model_path={tiny}", "--seeds=0", f"--outdir={tmp_path / 'out'}"]
    done = CliRunner().invoke(sample_cli.main, [*arguments, "--device=cpu"])
    assert done.exit_code == 0, done.output
    (record,) = (tmp_path / "out").rglob("sampling.json")
    assert '"deis_mode": "rhoab"' in record.read_text()


def test_published_weights_are_trained_and_sampled_with():
    config = {"sampler_stu": "ipndm_v", "num_steps": 5, "original_code": True, "max_order": 4}
    predictor = AMEDPredictor(**config)
    assert DistillationLoss(ToyNet(), predictor.config).student_solver.original_code
    asked = Settings(dataset_name="digits")
    assert settings_of(predictor, asked).original_code
    assert not settings_of(predictor, asked, frozenset({"original_code"})).original_code  # refused later on
    latents = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    settings = {"solver": "ipndm_v", "num_steps": 5, "predictor": predictor.double()}
    own = sample(ToyNet(), latents, **settings)
    assert torch.equal(own, sample(ToyNet(), latents, **settings, original_code=True))
    settings["predictor"] = AMEDPredictor(**{**config, "original_code": False}).double()
    settings["predictor"].load_state_dict(predictor.state_dict())
    assert not torch.allclose(own, sample(ToyNet(), latents, **settings))


def test_an_option_of_a_new_solver_is_kept_by_its_predictor(monkeypatch):
    class Damped(Solver):
        name = "damped"
        options = {"damping": Option(float, 0.0, "share of the step that is left out")}

        def update(self, x, history, sigma_next, index, total, scale=1.0):
            d, sigma = history[-1]
            return x + scale * (1 - self.damping) * (sigma_next - sigma) * d

    monkeypatch.setitem(SOLVERS, "damped", Damped)
    assert AMEDPredictor(sampler_stu="damped").config["damping"] == 0.0
    predictor = AMEDPredictor(sampler_stu="damped", damping=0.25)
    assert DistillationLoss(ToyNet(), predictor.config).student_solver.damping == 0.25
    with pytest.raises(UserError, match="damping=x is of the wrong kind"):
        AMEDPredictor(sampler_stu="damped", damping="x")
    with pytest.raises(UserError, match="unknown predictor setting 'dampening'"):
        AMEDPredictor(sampler_stu="damped", dampening=0.25)


def test_files_with_options_of_other_solvers_still_load(tmp_path):
    """Predictors used to carry four options whatever their solver."""
    old = {"max_order": 3, "predict_x0": True, "lower_order_final": True, "thresholding": None}
    predictor = AMEDPredictor(num_steps=3)
    metadata = {"format": "amed-predictor", "config": json.dumps({**predictor.config, **old})}
    write_safetensors(tmp_path / "old.safetensors", predictor.state_dict(), metadata)
    loaded = load_predictor(tmp_path / "old.safetensors")
    assert old.items() <= loaded.config.items()
    latents = torch.randn(2, 3, 16, 16)
    results = [
        sample(ToyNet(torch.float32), latents, solver="amed", num_steps=3, predictor=p) for p in (predictor, loaded)
    ]
    assert torch.equal(*results)
