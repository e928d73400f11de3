"""Writes the recommended settings of the embedded networks from the measurements that chose them.

    python -m benchmarks.recommend

Reads the rows of plain solvers in ``benchmarks/<dataset_name>_settings.jsonl`` (demo_settings.py)
and ``learned_solvers_<dataset_name>.jsonl`` (learned_solvers.py). All were measured on 256
validation seeds, from 100000 on, which no published table uses. For every solver and number of
evaluations the settings with the least product of FID* and distance to the converged solution are
taken, which asks for good images and for those of the exact solution alike. The best solver of a
number of evaluations is found in the same way. The recipes for training ("train") are kept as they
are.
"""

import json
from collections import defaultdict

import click

from benchmarks import ROOT
from benchmarks.measuring import read_rows
from evaluation.detectors import EMBEDDED
from models import create_model
from solvers.recommended import FOLDER
from torch_utils.cli import Command

FILES = ("{}_settings.jsonl", "learned_solvers_{}.jsonl")


def score(row: dict) -> float:
    return row["fid"] * row["distance"]


def choose(dataset_name: str, network: str) -> tuple[dict, dict]:
    """(solver -> evaluations -> row, evaluations -> best solver). network: start of its hash."""
    found = defaultdict(lambda: defaultdict(list))
    for name in FILES:
        path = ROOT / "benchmarks" / name.format(dataset_name)
        for row in read_rows(path):
            if row["part"] == "plain" and network.startswith(row["network"]):
                settings = {key: value for key, value in row["settings"].items() if key != "num_steps"}
                found[settings.pop("solver")][row["nfe"]].append({**row, "settings": settings, "file": path.name})
    plain = {
        solver: {str(nfe): min(rows, key=score) for nfe, rows in sorted(numbers.items())}
        for solver, numbers in sorted(found.items())
    }
    numbers = sorted({int(number) for rows in plain.values() for number in rows})
    complete = [str(number) for number in numbers if all(str(number) in plain[name] for name in ("ipndm", "unipc"))]
    best = {
        number: min((name for name in plain if number in plain[name]), key=lambda name: score(plain[name][number]))
        for number in complete
    }
    return plain, best


def write(dataset_name: str, path) -> None:
    network = create_model(dataset_name).weights_hash
    plain, best = choose(dataset_name, network)
    train = json.loads(path.read_text(encoding="utf-8"))["train"] if path.exists() else {}

    def line(row):
        kept = {key: row[key] for key in ("settings", "fid", "distance", "date", "file")}
        return json.dumps(kept)

    def block(rows, indent):
        inside = ",\n".join(f"{indent}  {json.dumps(key)}: {value}" for key, value in rows.items())
        return f"{{\n{inside}\n{indent}}}"

    parts = {
        "network_sha256": json.dumps(network),
        "chosen_by": json.dumps("python -m benchmarks.recommend: least FID* x distance on 256 validation seeds"),
        "best": json.dumps(best),
        "plain": block(
            {name: block({nfe: line(row) for nfe, row in rows.items()}, "    ") for name, rows in plain.items()}, "  "
        ),
        "train": block({name: json.dumps(recipe) for name, recipe in train.items()}, "  "),
    }
    path.write_text(block(parts, "") + "\n", encoding="utf-8")


@click.command(cls=Command)
def main():
    """Write models/recommended/<dataset_name>.json of both embedded networks."""
    for dataset_name in EMBEDDED:
        write(dataset_name, FOLDER / f"{dataset_name}.json")


if __name__ == "__main__":
    main()
