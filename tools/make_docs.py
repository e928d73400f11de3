"""Regenerates the generated parts of docs/solvers.md and docs/flags.md.

    python -m tools.make_docs            # rewrite them
    python -m tools.make_docs --check    # exit with status 1 if they are outdated

Only the text between the markers is generated. The rest of the files is written by hand.
"""

import importlib
import inspect
import json
import re
import sys
from pathlib import Path

import click

from solvers import SCHEDULES, SOLVERS
from torch_utils import usage
from torch_utils.cli import Command
from torch_utils.errors import UserError
from torch_utils.files import write_text
from torch_utils.markdown import table

DOCS = Path(__file__).resolve().parent.parent / "docs"
MANY = 600  # intervals, for the average number of evaluations
DOCUMENT = DOCS / "solvers.md"
SCRIPTS = {
    "train.py": "train",
    "sample.py": "sample",
    "fid.py": "fid",
    "clip_score.py": "clip_score",
    "compare.py": "compare",
    "optimize_schedule.py": "optimize_schedule",
    "python -m tools.dataset_tool": "tools.dataset_tool",
    "python -m tools.train_denoiser": "tools.train_denoiser",
    "python -m tools.train_classifier": "tools.train_classifier",
    "python -m tools.model_statistics": "tools.model_statistics",
    "python -m tools.demo": "tools.demo",
    "python -m tools.export": "tools.export",
    "python -m tools.share": "tools.share",
    "python -m models.zoo": "models.zoo",
    "python -m tools.doctor": "tools.doctor",
}


def order(rule) -> str:
    found = re.search(r"order ([\d-]+)", rule.summary)
    return found[1] if found else "-"


def solver_table() -> str:
    rows = []
    for solver, rule in SOLVERS.items():
        options = ", ".join(f"`{name}={option.default}`" for name, option in rule.options.items()) or "-"
        evaluations = "-" if rule.needs_predictor else f"{rule().evaluations(MANY) / MANY:.2g}"
        learned = "2" if rule.can_learn else "-"
        roles = [word for word, can in (("student", rule.can_learn), ("teacher", rule.can_teach)) if can]
        rows.append([f"`{solver}`", rule.summary, order(rule), evaluations, learned, options, ", ".join(roles) or "-"])
    header = ["solver", "what it is", "order", "NFE per interval", "with a predictor", "options (default)", "roles"]
    return table(header, rows)


def rule_notes() -> str:
    return "\n\n".join(f"**`{name}`.** {inspect.getdoc(rule)}" for name, rule in SOLVERS.items())


def schedule_table() -> str:
    rows = [[f"`{name}`", " ".join(inspect.getdoc(function).split())] for name, function in SCHEDULES.items()]
    return table(["schedule_type", "noise levels"], rows)


def flag_row(option: click.Option) -> list[str]:
    names = ", ".join(f"`{name}`" for name in option.opts)
    value = option.default
    if option.required:
        value = "required"
    elif callable(value) or value is None or "UNSET" in repr(value):
        value = ""
    return [names, str(value), " ".join((option.help or "").split())]


def flag_tables() -> str:
    """Every option of every script, read from the commands."""
    parts = []
    for title, module in SCRIPTS.items():
        command = importlib.import_module(module).main
        commands = getattr(command, "commands", None) or {"": command}
        for name, one in commands.items():
            options = [p for p in one.params if isinstance(p, click.Option)]
            about = (one.help or "").strip().split("\n\n")[0]
            rows = table(["flag", "default", "meaning"], [flag_row(option) for option in options])
            parts.append(f"## {title} {name}".rstrip() + f"\n\n{' '.join(about.split())}\n\n{rows}")
    return "\n\n".join(parts)


PARTS = {"solvers": solver_table, "rules": rule_notes, "schedules": schedule_table}
FLAG_PARTS = {"flags": flag_tables}
DOCUMENTS = {DOCUMENT: PARTS, DOCS / "flags.md": FLAG_PARTS}


def render(text: str, parts=None) -> str:
    """The document with every generated part renewed. Raises UserError if a marker is missing."""
    for name, make in (PARTS if parts is None else parts).items():
        start, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
        if text.count(start) != 1 or text.count(end) != 1 or text.index(end) < text.index(start):
            raise UserError(f"the document needs one '{start}' followed by one '{end}'")
        before, rest = text.split(start)
        text = f"{before}{start}\n{make()}\n{end}{rest.split(end)[1]}"
    return text


def renew_commands(check: bool) -> bool:
    """Renews what torch_utils/usage.py reads, or only looks; returns whether it was stale."""
    parts = (f"{json.dumps(name)}: {json.dumps(described)}" for name, described in commands().items())
    old = usage.FILE.read_text(encoding="utf-8") if usage.FILE.is_file() else ""
    return replace_text(usage.FILE, old, "{\n" + ",\n".join(parts) + "\n}\n", check)


def replace_text(path: Path, old: str, new: str, check: bool) -> bool:
    """Writes the new text of a file, or only says that it differs; returns whether it does."""
    if new == old:
        click.echo(f"{path} is up to date")
    elif check:
        click.echo(f"{path} is stale: run  python -m tools.make_docs", err=True)
    else:
        write_text(path, new)
        click.echo(f"{path} renewed")
    return new != old


def commands() -> dict[str, dict]:
    """What a user can see of every command line, by the name of its module."""
    found = {module: importlib.import_module(module).main for module in SCRIPTS.values()}
    return {module: usage.describe(command) for module, command in found.items()}


def renew(path: Path, parts: dict, check: bool) -> bool:
    """Renews one document, or only checks it. Returns whether it was outdated."""
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    old = path.read_text(encoding="utf-8")
    try:
        new = render(old, parts)
    except UserError as error:
        raise UserError(f"--file={path}: {error}") from None
    return replace_text(path, old, new, check)


@click.command(cls=Command)
@click.option("--check", is_flag=True, help="Change nothing; exit with status 1 if a document is stale")
@click.option("--file", "path", type=click.Path(path_type=Path), help="One document with the parts of docs/solvers.md")
def main(check, path):
    """Regenerates the generated parts of the documentation."""
    documents = DOCUMENTS if path is None else {path: PARTS}
    stale = [renew(document, parts, check) for document, parts in documents.items()]
    if path is None:
        stale.append(renew_commands(check))
    if check and any(stale):
        sys.exit(1)


if __name__ == "__main__":
    main()
