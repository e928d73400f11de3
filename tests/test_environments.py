"""Other machines: versions of packages, encodings without the printed letters, notebooks."""

import ast
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tools import doctor
from torch_utils.cli import Command, Group

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = sorted(
    path
    for path in [*ROOT.glob("*.py"), *(ROOT / "examples").glob("*.py")]
    + [path for folder in ("benchmarks", "models", "tools", "torch_utils") for path in (ROOT / folder).glob("*.py")]
    if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
)
# Neither text files, nor names of files, nor the output are UTF-8, as with code page 1252 or
# without a locale.
POOR = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}


def python(*arguments, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | POOR | environment, capture_output=True)


# --------------------------------------------------------------------------------------------------
# Output


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_every_program_is_one_of_our_commands(path):
    """These see to it at their start that output never raises."""
    decorators = [
        decorator
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for decorator in getattr(node, "decorator_list", [])
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) in ("click.command", "click.group")
    ]
    assert decorators
    for decorator in decorators:
        kinds = {keyword.arg: ast.unparse(keyword.value) for keyword in decorator.keywords}
        assert kinds.get("cls") == ("Group" if decorator.func.attr == "group" else "Command")


PRINTS = """
import sys, click
from torch_utils.cli import Command, Group
from torch_utils.errors import UserError
from torch_utils.progress import progress_bar, say

@click.{kind}(cls={cls})
def main(): pass

@{decorator}(cls=Command)
def run():
    print("\\u56fe out"); print("\\u56fe err", file=sys.stderr)
    click.echo("\\u56fe echo"); say("\\u56fe say")
    with progress_bar(2, desc="\\u56fe bar") as bar:
        bar._printed_at = 0
        bar.update(); bar.refresh()
    raise UserError("\\u56fe \\udc80 end")

{program}()
"""


@pytest.mark.parametrize("encoding, group", [("cp1252", False), ("utf-8", True)])
def test_output_never_raises(encoding, group):
    """Also not for the name of a file that is not UTF-8 (a lone surrogate), in UTF-8."""
    names = {"kind": "group", "cls": "Group", "decorator": "main.command", "program": "main"}
    if not group:
        names = {"kind": "command", "cls": "Command", "decorator": "click.command", "program": "run"}
    done = python("-c", PRINTS.format(**names), *(["run"] if group else []), PYTHONIOENCODING=encoding)
    text = (done.stdout + done.stderr).decode(encoding)
    assert done.returncode == 2 and "Traceback" not in text, text
    letter = "\u56fe" if encoding == "utf-8" else "\\u56fe"
    for part in ("out", "err", "echo", "say", "bar", "\\udc80 end"):
        assert (part if "end" in part else f"{letter} {part}") in text, part


@pytest.mark.slow
def test_training_and_sampling_in_a_folder_with_a_foreign_name(tmp_path):
    """The first line of train.py names the folder; the records name it as well."""
    folder = tmp_path / "\u56fe\u50cf"
    flags = [f"--outdir={folder}", "--total_kimg=0.004", "--batch=2", "--num_steps=3", "--nosubdir", "--M=1"]
    done = python("train.py", "--dataset_name=digits", *flags, PYTHONIOENCODING="cp1252")
    assert done.returncode == 0, done.stderr
    assert b"\\u56fe" in done.stdout or b"\\udc" in done.stdout
    flags = [f"--predictor_path={folder}", f"--outdir={folder / 'images'}", "--seeds=0-1", "--device=cpu"]
    done = python("sample.py", *flags)
    assert done.returncode == 0, done.stderr
    assert len(list(folder.rglob("images/**/*.png"))) == 2


# --------------------------------------------------------------------------------------------------
# Notebooks


def test_the_backend_of_a_notebook_is_left_alone(tmp_path):
    """matplotlib refuses MPLBACKEND at its import where the notebook's package is not installed."""
    pytest.importorskip("matplotlib")
    code = (
        "import os, sys; from torch_utils.plots import new_figure; f = new_figure('a plot'); f.add_subplot().plot([1, 2]);"
        "f.savefig(sys.argv[1]); assert 'matplotlib.pyplot' not in sys.modules; print(os.environ['MPLBACKEND'])"
    )
    backend = "module://matplotlib_inline.backend_inline"
    done = python("-c", code, tmp_path / "plot.png", MPLBACKEND=backend)
    assert done.returncode == 0 and done.stdout.decode().strip() == backend, done.stderr
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# --------------------------------------------------------------------------------------------------
# Versions


@pytest.mark.parametrize(
    "version, problem",
    [
        ("8.0.4", "click 8.0.4 is older than 8.1"),
        ("8.1.0", None),
        ("8.1.8", None),
        ("8.2.1", None),
        ("8.3.0", "click 8.3.0 has an error that affects this code: install another version"),
        ("8.3.1", "click 8.3.1 has an error that affects this code: install another version"),
        ("8.3.2", None),
        ("10.0", None),
    ],
)
def test_versions_that_are_excluded(version, problem, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    (requirement,) = [text for text in doctor.requirements()[""] if doctor.package_name(text) == "click"]
    assert doctor.missing_package(requirement) == problem


@pytest.mark.parametrize("cls", [Command, Group])
@pytest.mark.parametrize("newer", [False, True], ids=["8.1", "8.2 and newer"])
def test_usage_errors_in_every_click(cls, newer, monkeypatch):
    """click 8.1 has no NoArgsIsHelpError."""
    if not newer:
        monkeypatch.delattr(click.exceptions, "NoArgsIsHelpError", raising=False)

    @(click.group if cls is Group else click.command)(cls=cls)
    @click.option("--number", type=int)
    def main(number):
        pass

    if cls is Group:
        main.command("run")(lambda: None)
    for arguments in (["--number=x"], ["--nope"]):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2 and result.output.startswith("Error: ") and result.output.count("\n") == 1
    empty = CliRunner().invoke(main, [])
    assert empty.output.startswith("Usage") if cls is Group else empty.exit_code == 0


def test_flags_with_an_optional_value():
    """Which click 8.3.0 and 8.3.1 refuse."""
    import compare
    import optimize_schedule
    import sample
    import train

    for program in (compare, optimize_schedule, sample, train):
        if not any(param.name == "compile" for param in program.main.params):
            continue
        context = program.main.make_context("program", ["--compile"], resilient_parsing=True)
        assert context.params["compile"] == "default", program
        context = program.main.make_context("program", ["--compile", "--device=cpu"], resilient_parsing=True)
        assert (context.params["compile"], context.params["device"]) == ("default", "cpu"), program
