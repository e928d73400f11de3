r"""SFD beside the span solver with heads: 1 to 4 evaluations.

    python -m benchmarks.sfd --dataset_name=digits    # measures
    python -m benchmarks.sfd                          # renews docs/sfd.md

Rows are appended to benchmarks/sfd.jsonl when they are measured, and are not measured again. Seeds,
test images, scores and the columns of a row are those of benchmarks/learned_solvers.py. Training
takes the evaluations of ``BUDGET``, about as long as that of the span solver at three and four.
training_seconds: CPU time of train.py, with the teacher's trajectories; that of the span solver is
without its teacher pairs.

"SFD" trains the network for its number of evaluations. "SFD, longer" does so ``LONGER`` times as
long. "SFD, features" adds the features of the denoiser's encoder to the loss. "SFD, second stage"
trains half of the budget with 7 time steps, and with the other half one evaluation against these.
"""

import contextlib
import copy
import io
import json
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import click

import train
from benchmarks.demo_settings import FIRST_SEED, ROOT, Bench
from benchmarks.learned_solvers import LearnedSolvers, flags, span_flags
from benchmarks.measuring import read_rows
from benchmarks.report_learned_solvers import collect, difference, mean, seeds_of, spread
from benchmarks.report_learned_solvers import read as read_learned
from evaluation.detectors import EMBEDDED
from models.edm import load_edm_network
from tools.make_docs import renew
from torch_utils.cli import Command
from torch_utils.markdown import table as markdown

FILE, PAGE = ROOT / "benchmarks" / "sfd.jsonl", ROOT / "docs" / "sfd.md"
BUDGET = 10_000  # evaluations of the network in a training, where a backward pass counts two
LONGER = 5  # times the budget, and the teacher trajectories
CACHE, BATCH = 128, 8  # teacher trajectories; samples per iteration
RATES = (2e-4, 1e-3)
CHOSEN_AT = 2  # evaluations at which the rate is chosen
HEADS = ("spatial,time", "spatial,blocks")  # of the span solver
METHODS = (
    "plain, best fid",
    *(f"full + {heads}" for heads in HEADS),
    "SFD",
    "SFD, longer",
    "SFD, features",
    "SFD, second stage",
)


def settings_for(dataset_name, nfe, rate, budget=BUDGET, **more):
    """Flags of train.py for a training of this length. more: further flags."""
    num_steps = nfe + 2  # the first step is analytical
    points = more.get("M", 3)
    teacher = (points + 1) * (num_steps - 1) - ("teacher" in more)
    samples = max((budget - more.get("teacher_cache", CACHE) * teacher) / (3 * nfe), BATCH)
    return {
        **{"dataset_name": dataset_name, "objective": "sfd", "num_steps": num_steps, "batch": BATCH, "lr": rate},
        **{"total_kimg": round(samples / BATCH) * BATCH / 1000, "teacher_cache": CACHE, "device": "cpu", **more},
    }


class Tuned(LearnedSolvers):
    """Trains, samples and scores few-step networks, except rows that exist."""

    def __init__(self, dataset_name, work):
        super().__init__(dataset_name, work)
        self.file = FILE

    def rows(self):
        return [{**row, "current": True} for row in read_rows(FILE)]

    def tune(self, settings, seed, name):
        """(what the row states about the training, the network), by train.py unless in ``work``."""
        folder = self.work / name.replace(" ", "_")
        settings = {**settings, "seed": seed}
        command = "python train.py " + " ".join(flags({k: v for k, v in settings.items() if k != "teacher"}))
        done = folder / "trained.json"
        if not done.exists() or json.loads(done.read_text())["command"] != command:
            shutil.rmtree(folder, ignore_errors=True)
            started = time.process_time()
            with contextlib.redirect_stdout(io.StringIO()):
                train.main([*flags(settings | {"outdir": folder}), "--nosubdir"], standalone_mode=False)
            seconds = round(time.process_time() - started, 1)
            done.write_text(json.dumps({"command": command, "training_seconds": seconds}))
        facts = json.loads(done.read_text())
        (path,) = folder.glob("network-*.safetensors")
        net = load_edm_network(path)
        parameters = sum(value.numel() for value in net.parameters())
        return {**facts, "parameters": parameters, "pairs": settings["teacher_cache"], "file": path}, net

    def network(self, nfe, seed, rate, longer=1, **more):
        more["teacher_cache"] = longer * CACHE
        settings = settings_for(self.dataset_name, nfe, rate, longer * BUDGET, **more)
        name = f"sfd-{nfe}-{seed}-{rate:g}" + (f"-{longer}" if longer > 1 else "") + more.get("loss", "")
        return self.tune(settings, seed, name)

    def second_stage(self, seed, rate):
        """One evaluation, with half of the budget for a first stage of 7 time steps."""
        first = settings_for(self.dataset_name, 5, rate, BUDGET / 2)
        facts, _ = self.tune(first, seed, f"sfd-first-{seed}-{rate:g}")
        second = settings_for(self.dataset_name, 1, rate, BUDGET / 2, M=2, teacher=facts["file"])
        after, net = self.tune(second, seed, f"sfd-second-{seed}-{rate:g}")
        after["training_seconds"] = round(after["training_seconds"] + facts["training_seconds"], 1)
        after["command"] = f"{facts['command']}; {after['command']} --teacher=<its network>"
        return after, net

    @staticmethod
    def facts_of(facts):
        return {name: value for name, value in facts.items() if name != "file"}

    def images_of(self, bench, net, nfe):
        """(images of the test or validation seeds, evaluations spent)."""
        other = copy.copy(bench)
        other.net = net
        return other.solve(nfe=nfe)

    def test(self, made, nfe):
        facts, net = made()
        x, spent = self.images_of(self.bench, net, nfe)
        return {**self.facts_of(facts), "nfe_spent": spent, **self.scored(x)}

    def validate(self, bench, nfe, seed, rate):
        facts, net = self.network(nfe, seed, rate)
        x, spent = self.images_of(bench, net, nfe)
        return {**self.facts_of(facts), "nfe_spent": spent, **bench.score(x)}

    def choices(self, seed):
        bench = Bench(self.dataset_name, 256, first=FIRST_SEED, num_reference=64)
        for rate in RATES:
            key = {"part": "choice", "method": "SFD", "rate": rate, "nfe": CHOSEN_AT, "seed": seed}
            self.once(key, partial(self.validate, bench, CHOSEN_AT, seed, rate))

    def best_rate(self):
        rows = [
            row
            for row in read_rows(FILE)
            if row["part"] == "choice" and row["network"] == self.bench.net.weights_hash[:16]
        ]
        return min(rows, key=lambda row: row["fid"])["rate"]

    def main(self, nfes, seed, wanted):
        self.choices(0)
        rate = self.best_rate()
        for nfe in nfes:
            makers = {"SFD": partial(self.network, nfe, seed, rate)}
            makers["SFD, longer"] = partial(self.network, nfe, seed, rate, LONGER)
            if nfe == 1:
                makers["SFD, features"] = partial(self.network, nfe, seed, rate, loss="features")
                makers["SFD, second stage"] = partial(self.second_stage, seed, rate)
            works = {name: partial(self.test, made, nfe) for name, made in makers.items()}
            for heads in HEADS:
                settings = span_flags(self.dataset_name, nfe, "full", {"heads": heads})
                works[f"full + {heads}"] = partial(self.trained, settings, seed, f"span {heads}-{nfe}-{seed}")
            known = {(row["method"], row["nfe"], row.get("seed")) for row in solvers_of(self.dataset_name)}
            for name, work in works.items():
                if (not wanted or name in wanted) and (name, nfe, seed) not in known:
                    self.once({"part": "main", "method": name, "nfe": nfe, "seed": seed}, work)


def solvers_of(dataset_name):
    """The rows of benchmarks/learned_solvers.py on all of its test images."""
    return [row for row in read_learned(dataset_name) if row["part"] == "main" and row["current"]]


def table(dataset_name):
    """Scores and costs of every method; intervals are those of the difference to SFD."""
    own = [row for row in read_rows(FILE) if f"--dataset_name={dataset_name} " in f"{row['command']} "]
    found = collect([{**row, "current": True} for row in [*solvers_of(dataset_name), *own]], "main")
    lines = []
    for nfe in sorted({row["nfe"] for row in own if row["part"] == "main"}):
        for method in METHODS:
            group = found.get((method, nfe))
            if group:
                lines.append([nfe, method, seeds_of([group]), *_cells(group, found.get(("SFD", nfe)))])
    titles = ["FID\\*", "minus that of SFD", "second classifier", "precision", "recall", "distance", "CPU seconds"]
    return markdown(["evaluations", "method", "training seeds", *titles], lines) if lines else "Not measured."


def _cells(group, sfd):
    apart = difference(group, sfd, "fid") if sfd and group is not sfd else None
    values = {name: [row[name] for row in group] for name in ("fid", "fid2", "precision", "recall", "distance")}
    return [
        spread(values["fid"], 2),
        f"{apart.value:+.2f} ± {apart.half_width:.2f}" if apart else "",
        spread(values["fid2"], 1),
        *(f"{mean(group, name):.2f}" for name in ("precision", "recall")),
        spread(values["distance"], 3),
        f"{mean(group, 'training_seconds'):.0f}" if "training_seconds" in group[0] else "-",
    ]


def choice_table():
    lines = ["| network | rate | FID\\* | distance |", "|---|---|---|---|"]
    for row in (row for row in read_rows(FILE) if row["part"] == "choice"):
        name = row["command"].split("--dataset_name=")[1].split()[0]
        lines.append(f"| {name} | {row['rate']:g} | {row['fid']:.2f} | {row['distance']:.3f} |")
    return "\n".join(lines)


def document_parts():
    return {**{f"{name} sfd": partial(table, name) for name in EMBEDDED}, "rates sfd": choice_table}


@click.command(cls=Command)
@click.option("--dataset_name", type=click.Choice(list(EMBEDDED)), help="Default: only renew docs/sfd.md")
@click.option("--nfe", default="2,1,3,4", show_default=True)
@click.option("--seeds", default="0", show_default=True, help="Training seeds")
@click.option("--methods", default="", help="Methods to measure, separated by ; (default: all)")
@click.option("--work", default=None, help="Folder of the trained networks (default: a temporary one)")
def main(dataset_name, nfe, seeds, methods, work):
    """Trains and scores few-step networks beside the span solver with heads."""
    if dataset_name is None:
        renew(PAGE, document_parts(), check=False)
        return
    with tempfile.TemporaryDirectory() as temporary:
        wanted = [name.strip() for name in methods.split(";") if name.strip()]
        tuned = Tuned(dataset_name, Path(work or temporary))
        for seed in seeds.split(","):
            tuned.main([int(value) for value in nfe.split(",")], int(seed), wanted)


if __name__ == "__main__":
    main()
