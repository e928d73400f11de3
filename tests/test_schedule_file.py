"""The schedule file: it reads back as written, gives clear errors, and replaces --sigmas."""

import importlib
import json
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

from sampling import folder
from sampling.flags import schedule_file_flag, use_schedule
from sampling.settings import Settings
from solvers.schedule_file import FORMAT, Schedule, load_schedule, save_schedule
from torch_utils.cli import Command
from torch_utils.errors import UserError
from torch_utils.options import flags, given_flags
from training.checkpoint import load_predictor
from training.predictor import AMEDPredictor, trainable_options

SIGMAS = [80.0, 1 / 3, 0.002]


def make(**changes):
    values = {
        "sigmas": SIGMAS,
        "solver": "ipndm",
        "method": "gits",
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "sigmas_cond": [79.0, 0.35, 0.0021],
        "solver_options": {"max_order": 3},
        "afs": "data",
        "settings": {"coeff": 1.15, "metric": "dev"},
        "network": "digits",
        "network_hash": "ab" * 32,
        "evaluations": 1200,
        "seconds": 3.25,
        "versions": {"torch": "2"},
    }
    return Schedule(**(values | changes))


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "s.json"
    save_schedule(path, make())
    assert load_schedule(path) == make() and load_schedule(str(path)).sigmas == SIGMAS
    save_schedule(path, make(sigmas_cond=None, network_hash=None, afs=True))
    assert load_schedule(path) == make(sigmas_cond=None, network_hash=None, afs=True)
    assert [entry.name for entry in path.parent.iterdir()] == ["s.json"]
    assert json.loads(path.read_text())["format"] == FORMAT


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "s.json"
    save_schedule(path, make())
    schedule = make()
    schedule.seconds = float("nan")  # not JSON
    with pytest.raises(ValueError):
        save_schedule(path, schedule)
    assert load_schedule(path) == make() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("sigmas", [80, 90, 1], "strictly decreasing"),
        ("sigmas", [80, 1, 0], "positive"),
        ("sigmas", [80], "at least two"),
        ("sigmas", "80,1", "must be finite numbers"),
        ("sigmas", [80, "1", 0.1], "must be finite numbers"),
        ("sigmas", [80, float("nan"), 0.1], "must be finite numbers"),
        ("sigmas", [[80, 1], [2, 1]], "must be finite numbers"),
        ("sigmas_cond", [79, 0.3], "sigmas_cond has 2 entries, but sigmas has 3"),
        ("sigmas_cond", [79, 0.3, -1], "sigmas_cond must be positive"),
        ("solver", None, "solver must be text"),
        ("network_hash", 3, "network_hash must be text or null"),
        ("settings", [], "settings must be an object"),
        ("afs", "yes", "afs must be"),
        ("afs", 1, "afs must be"),
        ("sigma_min", 100, "sigma_min must be below sigma_max"),
        ("evaluations", -1, "must not be negative"),
        ("seconds", True, "must be finite numbers"),
        ("format", "amed-schedule-99", '"format": "amed-schedule-1"'),
        ("surprise", 1, "unknown field 'surprise'"),
    ],
)
def test_bad_fields(tmp_path, field, value, message):
    path = tmp_path / "s.json"
    save_schedule(path, make())
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError, match=message) as caught:
        load_schedule(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"{'sigmas': [3, 2, 1]}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[80, 1, 0.1]", "is not a schedule file of this version"),
        (b'{"sigmas": [80, 1, 0.1]}', "is not a schedule file of this version"),
        (b'{"format": "amed-schedule-1"}', "lacks the field 'sigmas'"),
    ],
)
def test_not_a_schedule(tmp_path, content, message):
    path = tmp_path / "s.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_schedule(path)


def test_no_file(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match="cannot read the schedule"):
            load_schedule(path)


def test_warnings():
    net = SimpleNamespace(weights_hash="ab" * 32, sigma_min=0.002, sigma_max=80)
    assert make().warnings(net, "ipndm") == make().warnings(net, "ipndm", afs="data") == []
    assert make().warnings(SimpleNamespace(), "ipndm") == []  # a network that says nothing of itself
    assert make(network_hash=None).warnings(net, "ipndm") == []
    for name, share in (("sigma_min", 1.005), ("sigma_max", 0.995)):
        ends = {"sigma_min": 0.002, "sigma_max": 80.0, "weights_hash": None}
        (line,) = make().warnings(SimpleNamespace(**ends | {name: ends[name] * share}), "ipndm")
        assert line.startswith("the schedule was optimised for noise levels 0.002..80,")
        rounded = SimpleNamespace(**ends | {name: ends[name] * (1 + (share - 1) / 10)})
        assert make().warnings(rounded, "ipndm") == []
    other = SimpleNamespace(weights_hash="cd" * 32, sigma_min=0.03, sigma_max=14.6)
    lines = make().warnings(other, "euler", afs=False)
    for line, word in zip(
        lines, ("another network ('digits'", "'ipndm', not for 'euler'", "afs=data", "0.03..14.6"), strict=True
    ):
        assert word in line


def run_flags(*arguments):
    """What a command line with the flag makes of these arguments."""
    seen = {}

    @click.command(cls=Command)
    @flags(Settings)
    @schedule_file_flag
    @click.pass_context
    def command(ctx, **options):
        given = given_flags(ctx)
        seen.update(schedule=use_schedule(options, given), options=options, given=given)

    done = CliRunner().invoke(command, list(arguments))
    return done, seen


def test_flag(tmp_path):
    save_schedule(tmp_path / "s.json", make())
    done, seen = run_flags(f"--schedule={tmp_path / 's.json'}", "--afs=True")
    assert done.exit_code == 0 and seen["schedule"] == make()
    assert seen["options"]["sigmas"] == SIGMAS and "schedule" not in seen["options"]
    assert seen["given"] == {"sigmas", "afs"}
    done, seen = run_flags("--sigmas=3,2,1")
    assert seen["schedule"] is None and seen["options"]["sigmas"] == [3, 2, 1] and seen["given"] == {"sigmas"}


def test_an_option_of_the_schedule_comes_with_the_file(tmp_path):
    """direction_sigma does, max_order does not, and solvers without the option do not get it."""
    schedule = make(solver_options={"max_order": 3, "direction_sigma": "network"})
    assert schedule.own_options("euler") == {"direction_sigma": "network"} and schedule.own_options("dpmpp") == {}
    save_schedule(tmp_path / "s.json", schedule)

    def recorded(*flags, out="images"):
        out = tmp_path / out
        more = ("--dataset_name=digits", "--seeds=0", f"--outdir={out}")
        done = run("sample", *more, *flags)
        assert done.exit_code == 0, done.output
        return json.loads((out / "sampling.json").read_text())["settings"], next(out.rglob("*.png")).read_bytes()

    file = f"--schedule={tmp_path / 's.json'}"
    settings, image = recorded(file, "--solver=ipndm")
    assert settings["direction_sigma"] == "network" and settings["max_order"] == 4
    other, plain = recorded(file, "--solver=ipndm", "--direction_sigma=point", out="point")
    assert other["direction_sigma"] == "point" and plain != image
    record = tmp_path / "point" / "sampling.json"  # a record of before says nothing of it, and may be continued
    content = json.loads(record.read_text())
    del content["settings"]["direction_sigma"]
    record.write_text(json.dumps(content))
    assert recorded(file, "--solver=ipndm", "--direction_sigma=point", out="point")[1] == plain
    assert "direction_sigma" not in recorded(file, "--solver=dpmpp", out="dpmpp")[0]


def test_settings_without_effect_do_not_stop_a_folder_from_being_continued():
    levels = {"sigmas": [3.0, 2.0], "solver": "ipndm"}
    network = {**levels, "direction_sigma": "network"}
    assert folder._difference(levels, network) == ""
    told = {"sigmas_cond": [3.0, 1.9]}
    assert "direction_sigma" in folder._difference({**levels, **told}, {**network, **told})


def test_predictors_have_no_option_of_the_schedule():
    config = {"sampler_stu": "ipndm", "sampler_tea": "euler"}
    assert "direction_sigma" not in {**trainable_options(), **AMEDPredictor(**config).config}


def test_flag_mistakes(tmp_path):
    save_schedule(tmp_path / "s.json", make())
    for arguments, message in (
        ((f"--schedule={tmp_path / 's.json'}", "--num_steps=3"), "leave out --num_steps"),
        ((f"--schedule={tmp_path / 's.json'}", "--sigmas=3,2,1"), "leave out --sigmas"),
        ((f"--schedule={tmp_path / 'none.json'}",), "cannot read the schedule"),
    ):
        done, _ = run_flags(*arguments)
        assert done.exit_code == 2 and message in done.output and len(done.output.splitlines()) == 1


def run(script, *arguments):
    return CliRunner().invoke(importlib.import_module(script).main, list(arguments), catch_exceptions=False)


def test_the_schedule_of_a_file_reaches_sampling_and_training(tmp_path):
    """The noise levels unchanged, sigma_cond, and a warning for another solver or network."""
    sigmas, sigma_cond = [80.0, 5.0, 0.002], [79.0, 5.1, 0.002]
    path = tmp_path / "s.json"
    save_schedule(path, make(sigmas=sigmas, sigmas_cond=sigma_cond, network_hash="0" * 64))
    common = ["--dataset_name=digits", f"--schedule={path}"]
    done = run("sample", *common, "--solver=euler", "--seeds=0-1", f"--outdir={tmp_path / 'images'}")
    assert done.exit_code == 0, done.output
    assert "optimised for another network" in done.output and "for the solver 'ipndm', not for 'euler'" in done.output
    recorded = json.loads((tmp_path / "images" / "sampling.json").read_text())["settings"]
    assert recorded["sigmas"] == sigmas and recorded["sigmas_cond"] == sigma_cond
    refused = run("train", *common, f"--outdir={tmp_path / 'exps'}", "--sampler_stu=euler")
    assert refused.exit_code == 2 and "which training cannot use" in refused.output
    save_schedule(path, make(sigmas=sigmas, sigmas_cond=None))
    wanted = ["--sampler_stu=ipndm", "--sampler_tea=ipndm", "--batch=2", "--total_kimg=0.002", "--M=0", "--afs=False"]
    done = run("train", *common, *wanted, f"--outdir={tmp_path / 'exps'}")
    assert done.exit_code == 0, done.output
    (predictor,) = (tmp_path / "exps").glob("*/predictor-*.safetensors")
    assert load_predictor(predictor).config["sigmas"] == sigmas
    for script, more in (("sample", ["--solver=euler"]), ("train", [])):
        done = run(script, *common, *more, "--num_steps=4")
        assert done.exit_code == 2 and "--schedule sets the whole schedule: leave out --num_steps" in done.output
