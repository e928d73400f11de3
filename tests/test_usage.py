"""Help and usage errors: without torch, in groups, with examples; values that are missing."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from test_docs_commands import check

from tools import make_docs
from torch_utils import usage
from torch_utils.cli import Command, Known
from torch_utils.errors import UserError, did_you_mean

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = json.loads(usage.FILE.read_text(encoding="utf-8"))
MAIN = ("sample", "train", "compare", "optimize_schedule")
# Commands and subcommands by what a user types.
ALL = {
    f"{name} {part}".strip(): described
    for name, command in COMMANDS.items()
    for part, described in command.get("commands", {"": command}).items()
}


def test_the_descriptions_are_up_to_date():
    described = json.loads(json.dumps(make_docs.commands()))
    assert described == COMMANDS, "run  python -m tools.make_docs"


IMPORTS = """
import contextlib, io, runpy, sys
for name in sys.argv[1:]:
    for arguments in (["--help"], ["-h"], ["--nope"], ["--help-all"]):
        out = io.StringIO()
        sys.argv = [name, *arguments]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                runpy.run_path(name, run_name="__main__")
            except SystemExit as end:
                code = end.code
        text = out.getvalue()
        assert "No such option" in text if code else text.startswith("Usage: "), (name, arguments, text)
loaded = {"torch", "numpy", "requests"} & sys.modules.keys()
assert not loaded, loaded
"""


def test_help_and_usage_errors_come_before_torch():
    """That is what makes them instant: importing torch takes seconds."""
    modules = {name for name in COMMANDS if not name.startswith("models.")}
    files = sorted(f"{name.replace('.', '/')}.py" for name in modules)
    done = subprocess.run([sys.executable, "-c", IMPORTS, *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [name for name, described in ALL.items() if len(described["options"]) > 1])
def test_help_in_groups(name):
    described = ALL[name]
    known = {option["name"] for option in described["options"] if "argument" not in option}
    grouped = [word for names in described["groups"].values() for word in names.split() if word != "|"]
    assert len(grouped) == len(set(grouped)) and set(grouped) <= known, set(grouped) - known
    command = usage.build(described)
    short, long = (CliRunner().invoke(command, [flag], prog_name=name).output for flag in ("--help", "--help-all"))
    for text in (short, long):
        assert text.count("\n  python") + text.count("\n  torchrun") == 3
        assert "\nOther:" not in text and text.index("Examples:") < text.index(":\n  --")
        if name in MAIN:
            assert text.index("--dataset_name") < text.index("--device")
    shown, flags = ([line.split()[0] for line in text.splitlines() if line.startswith("  -")] for text in (short, long))
    assert len(flags) - flags.count("--help-all") == len(known) + 1
    assert len(shown) <= 24 and ("--help-all" in shown) == (len(flags) > len(shown))
    assert (len(flags) > len(shown)) == (len(known) > 12)
    assert all(option["record"][1] for option in described["options"] if option["name"] in known), "a flag without help"


@pytest.mark.parametrize("name", ALL)
def test_three_examples_of_the_command_itself(name):
    _, _, part = name.partition(" ")
    examples = ALL[name]["examples"]
    few = len(ALL[name]["options"]) <= 1
    assert len(examples) == 3 or (few and examples), examples
    assert all(f" {part} " in f"{example} " for example in examples if part)


@pytest.mark.parametrize("name", ALL)
def test_examples_can_be_run(name):
    for example in ALL[name]["examples"]:
        words = shlex.split(example.partition("...")[0])
        place = next(k for k, word in enumerate(words) if word.endswith(".py") or words[k - 1] == "-m")
        module = words[place].removesuffix(".py").replace("/", ".")
        check(module, [*words[place + 1 :], *(["..."] if "..." in example else [])])


@click.command(cls=Command)
@click.option("--grid", type=bool, default=False)
@click.option("--seeds", default="0-63")
@click.option("--outdir")
@click.option("--mode", is_flag=False, flag_value="default")
@click.option("--quick", is_flag=True)
@click.option("--kind", type=click.Choice(["polynomial", "logsnr"]))
@click.option("--solver", type=Known(["ipndm", "dpmpp"], "unknown solver '{}'"))
def program(**values):
    click.echo(json.dumps(values))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--grid", "--seeds=0-3"], {"grid": True, "seeds": "0-3"}),
        (["--seeds=0-3", "--grid"], {"grid": True, "seeds": "0-3"}),
        (["--grid", "False", "--quick"], {"grid": False, "quick": True}),
        (["--mode", "--grid"], {"mode": "default", "grid": True}),
        (["--outdir", "-5"], {"outdir": "-5"}),
        (["--outdir", "--other"], {"outdir": "--other"}),
        (["--seeds=--grid"], {"seeds": "--grid", "grid": False}),
    ],
)
def test_no_flag_is_taken_for_a_value(arguments, expected):
    done = CliRunner().invoke(program, arguments)
    assert done.exit_code == 0, done.output
    assert expected.items() <= json.loads(done.output).items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--outdir", "--seeds=0-3"], "--outdir needs a value: write --outdir=VALUE"),
        (["--seeds", "--grid"], "--seeds needs a value"),
        (["--outdir"], "--outdir needs a value"),
        (["--seeds", "--help"], "--seeds needs a value"),
        (["--kind=polinomial"], "did you mean polynomial"),
        (["--solver=ipdnm"], "unknown solver 'ipdnm'; did you mean ipndm? Choose from ipndm, dpmpp"),
        (["--seed=3"], "No such option"),
    ],
)
def test_usage_errors(arguments, message):
    done = CliRunner().invoke(program, arguments)
    assert done.exit_code == 2 and message in done.output and done.output.count("\n") == 1


def test_a_flag_of_new_code_is_left_to_it(monkeypatch, capsys, tmp_path):
    """commands.json may be older than the code: what the code declares is not called unknown."""
    described = {"x": COMMANDS["sample"]}
    (tmp_path / "torch_utils").mkdir()
    (tmp_path / "solvers").mkdir()
    file = tmp_path / "torch_utils" / "commands.json"
    file.write_text(json.dumps(described))
    monkeypatch.setattr(usage, "FILE", file)
    monkeypatch.setattr(sys, "argv", ["x", "--flavour=3"])
    with pytest.raises(SystemExit) as end:
        usage.check_usage("x")
    assert end.value.code == 2 and "No such option" in capsys.readouterr().err
    (tmp_path / "solvers" / "own.py").write_text('options = {"flavour": 1}\n')
    assert usage.check_usage("x") is None


def test_did_you_mean():
    assert did_you_mean("digts", ["digits", "cifar10"]) == "; did you mean digits? Choose from digits, cifar10"
    assert did_you_mean("HEUN", ["heun", "dpm"], ()) == "; did you mean heun?"
    assert did_you_mean("xyz", ["heun", "dpm"]) == "; choose from heun, dpm"
    assert issubclass(UserError, ValueError)
