"""Options as dataclass fields: a new option of sampling is declared in one place."""

from dataclasses import dataclass, fields

import click
import pytest
from click.testing import CliRunner

from models import create_model
from sampling.options import SampleOptions
from sampling.settings import ComputeOptions, Settings, recorded_settings, settings_of
from sampling.text import TextOptions
from solvers.span_table import SpanSolver
from tools.compare_options import CompareOptions
from torch_utils.cli import Command
from torch_utils.options import (
    ALWAYS,
    CHANGED,
    REQUIRED,
    changed,
    flag,
    flags,
    given_flags,
    like,
    names_of_written,
    part,
    read_flags,
    recorded,
)
from training.checkpoint import save_predictor
from training.predictor import AMEDPredictor


@dataclass(frozen=True, kw_only=True)
class Paint:
    colour: str = flag("Of the wall", "white", click.Choice(["white", "red"]), record=CHANGED)
    layers: int | None = flag("How many", kind=click.IntRange(min=1), called="coats", record=ALWAYS)
    matt: bool = flag("Without gloss", False)


@dataclass(frozen=True, kw_only=True)
class House:
    paint: Paint = part(layers=None, colour={"help": "Of all walls"}, matt={"required": True})
    rooms: int = flag("Their number", REQUIRED)
    doors: int = like(Paint, "layers", default=3, called="doors", help="Their number")
    written: frozenset[str] = names_of_written()


def call(cls, *arguments):
    seen = []

    @click.command(cls=Command)
    @flags(cls)
    @click.pass_context
    def command(ctx, **values):
        seen.append(read_flags(cls, values, given_flags(ctx)))

    done = CliRunner().invoke(command, list(arguments))
    return seen[0] if seen else done.output


def test_fields_make_flags():
    house = call(House, "--rooms=3", "--colour=red", "--doors=3", "--matt=no")
    paint = Paint(colour="red", layers=None, matt=False)
    assert house == House(paint=paint, rooms=3, doors=3, written=frozenset({"rooms", "colour", "doors", "matt"}))
    assert call(Paint, "--coats=2", "--matt=yes") == Paint(layers=2, matt=True)
    text = call(House, "--help")
    assert "Of all walls" in text and "--coats" not in text and "[required]" in text and "[default: 3; x>=1]" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--matt=no"], "Missing option '--rooms'"),
        (["--rooms=2"], "Missing option '--matt'"),
        (["--rooms=2", "--doors=0"], "range"),
        (["--rooms=2", "--colour=x"], "white"),
    ],
)
def test_fields_check_flags(arguments, message):
    assert message in call(House, *arguments)


def test_fields_make_records():
    assert recorded(Paint()) == {"coats": None}
    assert recorded(Paint(colour="red", layers=2, matt=True), Paint(layers=2)) == {"colour": "red", "coats": 2}
    assert changed(Paint(colour="red", matt=True), but=["matt"]) == {"colour": "red"}


@dataclass(frozen=True, kw_only=True)
class MoreSettings(Settings):
    """What one line more in ``Settings`` would be."""

    shine: float = flag("A new option", 0.0, record=CHANGED)


@dataclass(frozen=True, kw_only=True)
class MoreCompute(ComputeOptions):
    hurry: bool = flag("A new option", False, record=CHANGED)


@pytest.mark.parametrize(
    "predictor", [None, AMEDPredictor(num_steps=4), SpanSolver(num_steps=4)], ids=["plain", "amed", "span"]
)
def test_one_line_makes_an_option_of_sampling(predictor, tmp_path):
    """Flag, record and sampler argument follow from the field, wherever the rest comes from."""
    settings = call(MoreSettings, "--dataset_name=digits", "--solver=euler", "--shine=2")
    assert settings.shine == 2
    net = create_model("digits")
    plain, file = MoreSettings(dataset_name="digits", solver="euler"), None
    if predictor is not None:
        file = tmp_path / "predictor.safetensors"
        save_predictor(predictor, file)
        settings = settings_of(predictor, MoreSettings(dataset_name="digits", shine=2), frozenset({"shine"}))
        plain = settings_of(predictor, MoreSettings(dataset_name="digits"))
    assert settings.arguments()["shine"] == 2
    before = recorded_settings(plain, net, file, ComputeOptions())
    assert recorded_settings(settings, net, file, MoreCompute(hurry=True)) == before | {"shine": 2, "hurry": True}
    assert set(before) >= {entry.name for entry in fields(Settings)} - {"options", "nfe"}


def test_both_command_lines_have_the_options_that_they_share():
    sample, compare = call(SampleOptions), call(CompareOptions)
    assert sample.text == compare.text == TextOptions() and sample.compute == compare.compute == ComputeOptions()
