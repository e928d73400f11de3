r"""Learned solvers with few evaluations: the span solver and its restrictions, AMED, schedules.

    python -m benchmarks.learned_solvers --dataset_name=digits --part=main

Parts:
    plain      solvers without training, on validation seeds
    choices    rates and variants of restrictions, on validation seeds
    main       all methods, test seeds, three training seeds
    ablation   the full span solver with one change each
    judge      statistics of the second classifier (--data, --test)
    picture    docs/learned_solvers_<dataset_name>.png (--nfe=3 --seeds=0 --work=...)

Every row is appended to benchmarks/learned_solvers_<dataset_name>.jsonl when it is measured, and is
not measured again. --nfe, --seeds and --methods select rows. benchmarks/report_learned_solvers.py
makes tables and figures. Trained solvers stay in --work and are not trained again. A row with fewer
images, or without scores of groups, is measured again; if it holds a table or a schedule, this is
scored without training.

Training noise is separate from the seeds that are sampled (torch_utils/seeds.py). The validation
seeds 100000-100255, for choosing settings, are separate from the test seeds: 0-4999 of digits,
0-999 of natural images. Training does not use the two classifiers. Scores:

    fid, fid2: Fréchet distance to the training images in the features of the network's usual
        classifier, and of a second one of another architecture and seed (benchmarks/judges)
    precision, recall: in the features of the second classifier, against test images, for the
        first 1,000 seeds
    distance: root mean square over pixels in [-1, 1] to Heun with 51 time steps from the same
        noise, first 256 seeds
    ..._left_out: the same without one of 20 groups of seeds at a time (seed g, g + 20, ...), from
        which the jackknife computes intervals of differences between methods

The second classifiers (98.73 % and 70.18 % test accuracy) have to exist before --part=judge, which
reads the same images:

    python -m tools.train_classifier --arch=residual --seed=1 --width=8 --epochs=2 \
        --data=datasets/mnist-train.zip --test=datasets/mnist-test.zip \
        --dest=benchmarks/judges/digits.safetensors
    python -m tools.train_classifier --arch=residual --seed=1 --width=16 --epochs=6 --shift=3 \
        --flip=True --data=cifar10-train.zip --test=cifar10-test.zip \
        --dest=benchmarks/judges/cifar10-small.safetensors

training_seconds: CPU time of all threads, without the teacher pairs, which all solvers of a seed
share. parameters: trained numbers. pairs: teacher pairs for training and validation. calls: network
calls in sequence; calls in one batch count as one, as in EPD.
"""

import contextlib
import hashlib
import io
import json
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import optimize_schedule
import train
from benchmarks.demo_settings import FIRST_SEED, ROOT, Bench
from benchmarks.report_learned_solvers import check_row, is_current, read, rows_file
from evaluation.detectors import EMBEDDED, PRETRAINED, load_classifier, load_detector
from evaluation.fid import choose_images, image_statistics
from evaluation.frechet import Reference
from evaluation.precision_recall import precision_recall
from solvers import sample
from solvers.recommended import training_recipe
from solvers.schedule_file import load_schedule
from solvers.solver import DIRECTION_SIGMA
from solvers.span_table import Plan, SpanSolver
from torch_utils.cli import Command
from torch_utils.images import ImageSource, image_grid, load_array, save_image, to_uint8
from training.checkpoint import find_predictor, load_predictor
from training.options import SpanOptions

IMAGES = {"digits": 5000, "cifar10-small": 1000}  # default numbers of test images
GROUPS = 20  # of the seeds, for intervals
NEAR, REAL = 256, 1000  # seeds with a reference solution; images for precision and recall
PAIRS, VALIDATION = 384, 64
SHOWN = ("full + spatial,time", "dyweight", "AMED-Plugin (iPNDM)")  # in the picture
ACROSS, LABEL = 16, 24  # images in a line; pixels for its label
TEACHER = {"solver": "deis", "num_steps": 31, "schedule_type": "polynomial", "schedule_rho": 7}  # training's default
GRIDS = [("time_uniform", 1), ("polynomial", 5), ("polynomial", 7), ("logsnr", 7)]
PLAIN = {
    "ipndm": {"solver": "ipndm", "max_order": 3},
    "dpmpp": {"solver": "dpmpp", "max_order": 3, "thresholding": False},
    "unipc": {"solver": "unipc", "max_order": 3, "thresholding": False},
    "deis": {"solver": "deis", "max_order": 3},
}

# The budget of every span solver: samples, teacher pairs, the loss.
BUDGET = {
    **{"dataset_name": None, "sampler_stu": "span", "objective": "final", "batch": 8, "total_kimg": 0.96},
    **{"pairs": PAIRS, "val_pairs": VALIDATION, "val_every": 40, "loss": "features+0.2*huber"},
}
# Less for the preset that tries starts: its three trials each take a tenth of the run, and 0.72 *
# 1.3 = 0.94.
TRIED = {"total_kimg": 0.72}
_PLACES = {
    "amed-table": ("substeps", "substep_sigma_scale", "step_gain"),
    "epd": ("substeps", "substep_sigma_scale", "step_gain", "coef_offset"),
}


def _rates(groups, rate):
    return {"lrs": ",".join(f"{group}={rate}" for group in groups)}, {}


PINNED = {
    "learn": ["knots", "sigma_scale", "coef_offset"]
}  # dyweight with a last row that sums to one, like the others
METHODS = {  # method -> preset, flags, changes of the student's configuration
    **{preset: (preset, {}, {}) for preset in ("ld3", "s4s", "dyweight", "gs", "amed-table", "epd", "full")},
    **{f"full + {heads}": ("full", {"heads": heads}, {}) for heads in ("spatial,time", "spatial,blocks", "spatial")},
    **{
        f"{preset}, rate 0.2": (preset, *_rates(groups, 0.2)) for preset, groups in _PLACES.items()
    },  # the published rate
    "dyweight, last sum one": ("dyweight", {}, PINNED),
    # A restriction with our heads, to see their share of the gain.
    "dyweight + spatial,time": ("dyweight", {"heads": "spatial,time"}, {}),
    "dyweight, last sum one + spatial,time": ("dyweight", {"heads": "spatial,time"}, PINNED),
}
# Schedules for iPNDM, with options of optimize_schedule.py. GITS: l2 cost with coefficient 1, its
# best setting here (docs/schedules.md). LD3: its own trainer, which tries four grids before
# training.
SCHEDULES = {
    "gits": {"method": "gits", "metric": "l2", "coeff": 1.0, "num_warmup": 64},
    "ld3, own trainer": {
        **{"method": "ld3", "num_train": 64, "num_valid": 32, "rounds": 10, "rounds_grid": 4, "checkpointing": False},
        **{"solver_tea": "ipndm", "num_steps_tea": 31, "max_order": 3},
    },
}
# Variants of LD3 compared on validation seeds: solver, and what its directions are divided by.
DIRECTIONS = {
    f"{solver}, direction_sigma={level}": {"solver": solver, **order, "direction_sigma": level}
    for solver, order in (("ipndm", {"max_order": 3}), ("euler", {"max_order": None}))
    for level in ("point", "network")
}
STEPS = {  # time steps of a preset that spend nfe evaluations; None: impossible
    "ld3": lambda nfe: {"num_steps": nfe + 1},
    "s4s": lambda nfe: {"num_steps": nfe + 1},
    "gs": lambda nfe: {"num_steps": nfe + 1},
    "dyweight": lambda nfe: {"num_steps": nfe + 2},
    "full": lambda nfe: {"num_steps": nfe + 2},
    "amed-table": lambda nfe: _two_per_interval(nfe),
    # Three calls per interval (two in one batch); with or without analytical first step.
    "epd": lambda nfe: {3: {"num_steps": 2, "afs": False}, 5: {"num_steps": 3}, 6: {"num_steps": 3, "afs": False},
                        8: {"num_steps": 4}}.get(nfe),
}  # fmt: skip
ABLATIONS = {
    "no first step": {"afs": False, "num_steps": -1},
    "first step of mean zero": {"afs": True},
    "loss in pixels": {"loss": "huber"},
    "loss in features only": {"loss": "features"},
    "loss in features of the FID classifier (a leak)": {"loss": "benchmarks.learned_solvers:judge_of_fid"},
    "loss in features of the second classifier (a leak)": {"loss": "benchmarks.learned_solvers:second_judge"},
    "distribution term": {"w_dist": 0.3},
    "anchor to the teacher's states": {"w_anchor": 0.1},
    "sample head": {"heads": "sample"},
    "time head": {"heads": "time"},
    "time scale within 5 %": {"sigma_scale_bound": 0.05},
    "time scale within 30 %": {"sigma_scale_bound": 0.3},
    "two calls in one batch": {"parallel": 2},  # even numbers of evaluations
    "two calls in one batch, no first step": {"parallel": 2, "afs": False},  # odd ones
    "twice the training": {"total_kimg": 1.44},
    "both heads, loss in pixels": {"heads": "spatial,time", "loss": "huber"},
    "both heads, four times the training": {"heads": "spatial,time", "total_kimg": 2.88},
}
STRUCTURE = {  # ablations of the solver's structure, which the command line does not offer
    "time scale fixed": {"learn": ["knots", "substeps", "coef_offset", "state_gain"]},
    "coefficients free, not relative": {"relative": False},
    "coefficients of the theory": {"learn": ["knots", "substeps", "sigma_scale", "substep_sigma_scale", "state_gain"]},
    "labels fixed": {"learn": ["sigma_scale", "substep_sigma_scale", "coef_offset", "state_gain"]},
    "no contrast": {"learn": ["knots", "substeps", "sigma_scale", "substep_sigma_scale", "coef_offset"]},
}
# Variants of each preset compared on validation seeds: (flags, changes of the configuration). A
# variant without changes is the preset itself.
CHOICES = {
    **{
        preset: {f"rate {rate}": _rates(groups, rate) for rate in (0.02, 0.05, 0.1, 0.2, 0.4)}
        for preset, groups in _PLACES.items()
    },
    "dyweight": {"free last sum": ({}, {}), "last sum one": ({}, PINNED)},
    "gs": {
        "order lowered, to sigma_min": ({}, {}),
        "order kept, to sigma_min": ({}, {"lower_order_final": False}),
        "order kept, to 0.0105": ({"sigma_min": 0.01048599}, {"lower_order_final": False}),  # as published
    },
}


def _two_per_interval(nfe):
    """AMED's time steps: two evaluations per interval, the first free for an odd number."""
    return {"num_steps": (nfe + 1) // 2 + 1} if nfe % 2 else {"num_steps": nfe // 2 + 1, "afs": False}


def judge_of_fid(net):
    """The features of the FID's classifier, for the ablation of leaks."""
    return _features(PRETRAINED / EMBEDDED[_name_of(net)])


def second_judge(net):
    return _features(judge_file(_name_of(net)))


def _name_of(net):
    return "digits" if net.img_channels == 1 else "cifar10-small"


def _features(file):
    """The features of a classifier of images in [-1, 1], with gradients."""
    model, _ = load_classifier(file)
    return lambda images: model.features((images.clamp(-1, 1) + 1) / 2)


def has_heads(settings):
    return settings.get("heads") not in (None, "none")


def judge_file(dataset_name):
    return ROOT / "benchmarks" / "judges" / f"{dataset_name}.safetensors"


def _schedule_command(settings):
    return "python optimize_schedule.py " + " ".join(flags(settings))


def flags(settings):
    return [f"--{name}={value}" for name, value in settings.items() if value is not None]


def amed_flags(dataset_name, nfe, name):
    """The network's recommended AMED settings, with another number of evaluations."""
    tuned, _ = training_recipe(dataset_name, "amed" if name == "AMED-Solver" else "ipndm")
    steps = _two_per_interval(nfe)
    return {"dataset_name": dataset_name, **tuned, **steps}


def span_flags(dataset_name, nfe, preset, changes=None):
    steps = STEPS[preset](nfe)
    if steps is None:
        return None
    changes = {"heads": "none" if preset == "full" else None, **(changes or {})}
    steps = {**steps, "num_steps": steps["num_steps"] + changes.pop("num_steps", 0)}
    if changes.get("parallel") == 2:  # two calls at every point but the first, which has one (none with a first step)
        first_step = changes.get("afs") is not False
        if (nfe % 2 == 0) != first_step:
            return None
        steps["num_steps"] = (nfe + 1) // 2 + 1 + first_step
    budget = {**BUDGET, **(TRIED if preset == "full" else {})}
    return {**budget, "dataset_name": dataset_name, "preset": preset, **steps, **changes}


@contextlib.contextmanager
def structured(changes):
    """Context that applies ``changes`` to the configuration of every trained span solver."""
    original = SpanOptions.student_config

    def with_changes(options, *arguments, **more):
        return {**original(options, *arguments, **more), **changes}

    SpanOptions.student_config = with_changes
    try:
        yield
    finally:
        SpanOptions.student_config = original


class TableSolver(SpanSolver):
    """A span solver without heads that uses the table of an earlier row instead of parameters."""

    def __init__(self, table, net):
        points = max(map(len, table["substeps"]))
        nested = {"base": "midpoint", "parallel": points} if table["substeps"][0] else {"parallel": points + 1}
        ends = {"sigma_max": table["sigmas"][0], "sigma_min": table["sigmas"][-1]}
        super().__init__(num_steps=len(table["sigmas"]), first_step=table["first_step"], **ends, **nested)
        if table["first_step"] == "gaussian":
            self.measure_gaussian(net)

        def tensors(parts):
            return [torch.tensor(part, dtype=torch.float64) for part in parts]

        steps, substeps = map(tensors, table["steps"]), [list(map(tensors, points)) for points in table["substeps"]]
        self.numbers = Plan(*tensors([table["sigmas"], table["sigmas_cond"]]), list(steps), substeps)

    def plan(self):
        return self.numbers

    def sigmas(self):
        return self.numbers.sigmas

    def sigmas_cond(self):
        return self.numbers.sigmas_cond


def table_of(student):
    """The numbers of a span solver as a row stores them, rounded to six places."""
    plan = student.plan()
    table = {
        "sigmas": plan.sigmas.tolist(),
        "sigmas_cond": plan.sigmas_cond.tolist(),
        "steps": [[part.tolist() for part in step] for step in plan.steps],
        "substeps": [[[part.tolist() for part in point] for point in points] for points in plan.substeps],
        "first_step": student.config["first_step"],
    }
    return json.loads(json.dumps(table), parse_float=lambda text: round(float(text), 6))


def budget(settings, predictor):
    """The cost of a predictor, as a row states it. settings: flags of train.py."""
    pairs = settings.get("pairs", 0) + settings.get("val_pairs", 0)
    if getattr(predictor, "kind", None) != "span":
        parameters = sum(value.numel() for value in predictor.parameters())
        return {"parameters": parameters, "calls": predictor.evaluations(), "pairs": pairs}
    weights = sum(value.numel() for value in predictor.head_parameters())
    calls = predictor.intervals * (1 + predictor.nested) - predictor.analytic
    return {"parameters": predictor.scalars() + weights, "calls": calls, "pairs": pairs}


def schedule_budget(settings, name):
    """The cost of an optimised schedule. Its ends are fixed, and the first step is analytical."""
    learned = len(settings["sigmas"]) - 2
    learned += learned if settings.get("sigmas_cond") else 0
    used = ("num_warmup", "num_train", "num_valid")
    pairs = sum(SCHEDULES[name].get(option, 0) for option in used)
    return {"parameters": learned, "calls": len(settings["sigmas"]) - 2, "pairs": pairs}


def left_out(name, values, score):
    """A row's entries for a score of ``values`` [N,...]: all, and without each group of seeds."""
    group = torch.arange(len(values)) % GROUPS
    others = [round(score(values[group != number]), 6) for number in range(GROUPS)]
    return {name: round(score(values), 6), f"{name}_left_out": others}


class LearnedSolvers:
    """Trains, samples and scores learned solvers, except rows that exist."""

    def __init__(self, dataset_name, work, images=None):
        self.dataset_name, self.images = dataset_name, images or IMAGES[dataset_name]
        self.work = Path(work) / dataset_name
        self.file = rows_file(dataset_name)
        self.bench = Bench(dataset_name, self.images, first=0, num_reference=NEAR)
        self.second = load_detector(judge_file(dataset_name))
        self.second_target = Reference.load(judge_file(dataset_name).with_suffix(".npz"))
        with np.load(judge_file(dataset_name).with_suffix(".npz")) as file:
            self.real = torch.from_numpy(file["real"].astype(np.float32))[:REAL]

    def rows(self):
        """All rows, read each time, since several processes may run at once."""
        return read(self.dataset_name)

    def once(self, key, work, settings=None, structure=None):
        """Measures the row of a key with ``work()``, unless it exists with enough images.

        settings, structure: as in ``train`` for a span solver, so that the table of an earlier row
            can be scored again.

        Raises UserError if the row did not spend the evaluations of its key.
        """
        key = {**key, "network": self.bench.net.weights_hash[:16]}
        claim = self.work / "claims" / "-".join(str(value).replace(" ", "_") for value in key.values())
        found = [row for row in self.rows() if all(row.get(name) == value for name, value in key.items())]
        if any(is_current(row, self.images) for row in found) or claim.exists():
            return
        claim.parent.mkdir(parents=True, exist_ok=True)
        claim.touch()
        try:
            row = {
                **key,
                **((found and self.again(found[0], settings, structure)) or work()),
                "date": time.strftime("%Y-%m-%d"),
            }
        finally:
            claim.unlink()
        check_row(row)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        hidden = ("network", "table", "settings", *(name for name in row if name.endswith("_left_out")))
        print(json.dumps({name: value for name, value in row.items() if name not in hidden}), flush=True)

    def again(self, row, settings, structure):
        """Scores the schedule or table of an earlier row again; None if its settings changed."""
        if row["method"] in SCHEDULES:
            today = _schedule_command(self.schedule_flags(row["method"], row["nfe"], row["seed"]))
            if set(row["command"].split()) != set(today.split()):
                return None
            found = {**schedule_budget(row["settings"], row["method"]), **self.solved(**row["settings"])}
        elif settings is not None and row.get("table") and not has_heads(settings):
            with structured(structure or {}):
                found = budget(settings, SpanOptions(**settings).make_student(0.002, 80.0))
            found |= self.solved(solver="span", predictor=TableSolver(row["table"], self.bench.net))
        else:
            return None
        kept = ("command", "training_seconds", "start", "table")
        return {**{name: row[name] for name in kept if name in row}, **found, "scored_again": True}

    def scored(self, x):
        features = {"fid": self.bench.features(x, self.bench.detector), "fid2": self.bench.features(x, self.second)}
        targets = {"fid": self.bench.target, "fid2": self.second_target}
        precision, recall = precision_recall(self.real, features["fid2"][:REAL])
        apart = self.bench.apart(x)
        found = {"images": len(x), "precision": round(precision, 4), "recall": round(recall, 4)}
        for name in targets:
            found |= left_out(name, features[name], lambda part, n=name: self.bench.frechet(part, targets[n]))
        return found | left_out("distance", apart, lambda part: float(part.mean()))

    # Methods

    def solved(self, **settings):
        x, nfe = self.bench.solve(**settings)
        return {"nfe_spent": nfe, **self.scored(x), "settings": {k: v for k, v in settings.items() if k != "predictor"}}

    @staticmethod
    def trained_settings(predictor):
        """Arguments of ``sample`` for this predictor."""
        config = predictor.config
        if getattr(predictor, "kind", None) == "span":
            return {"solver": "span", "predictor": predictor}
        names = ("num_steps", "schedule_type", "schedule_rho", "afs", "sigmas")
        names += {"ipndm": ("max_order",), "dpmpp": ("max_order", "thresholding")}.get(config["sampler_stu"], ())
        return {"solver": config["sampler_stu"], "predictor": predictor, **{name: config[name] for name in names}}

    def sampled(self, predictor):
        """The scores of a trained predictor, with its table if it has one."""
        found = self.solved(**self.trained_settings(predictor))
        if getattr(predictor, "kind", None) == "span":
            found["table"] = table_of(predictor)
        return found

    def train(self, settings, seed, name, structure=None):
        """(what the row states about the training, the predictor), by train.py unless in ``work``.

        settings: flags of train.py.
        seed: of the training.
        name: of the folder in ``work``.
        structure: changes of the solver's configuration that the command line does not offer.
        """
        folder = self.work / name.replace(" ", "_")
        settings = {**settings, "seed": seed}
        command = "python train.py " + " ".join(flags(settings))
        command += f"  # with {structure} in the student's configuration" if structure else ""
        done = folder / "trained.json"
        if done.exists() and (facts := json.loads(done.read_text()))["command"] == command:
            return facts, load_predictor(find_predictor(folder))
        shutil.rmtree(folder, ignore_errors=True)
        more = {"outdir": folder}
        with structured(structure or {}):
            if settings.get("sampler_stu") == "span":
                apart = [name for name in ("w_anchor", "sigma_min") if settings.get(name)]
                more["teacher_set"] = self.work / f"{'-'.join(['pairs', str(seed), *apart])}.safetensors"
                if not more["teacher_set"].exists():  # made by a run of one iteration, whose time is not counted
                    first = {**settings, **more, "total_kimg": 0.008, "init": "preset"}
                    with contextlib.redirect_stdout(io.StringIO()):
                        train.main([*flags(first), "--nosubdir"], standalone_mode=False)
                    shutil.rmtree(folder)
            started = time.process_time()
            with contextlib.redirect_stdout(io.StringIO()) as output:
                train.main([*flags(settings | more), "--nosubdir"], standalone_mode=False)
            seconds = time.process_time() - started
        start = [line for line in output.getvalue().splitlines() if line.startswith("after ")]
        predictor = load_predictor(find_predictor(folder))
        facts = {
            "command": command,
            "training_seconds": round(seconds, 1),
            **({"start": start[0].split(": ")[1].split(" ")[0]} if start else {}),
            **budget(settings, predictor),
        }
        done.write_text(json.dumps(facts))
        return facts, predictor

    def trained(self, settings, seed, name, structure=None):
        facts, predictor = self.train(settings, seed, name, structure)
        return {**facts, **self.sampled(predictor)}

    def schedule_flags(self, name, nfe, seed, **changes):
        """Flags of optimize_schedule.py for a schedule of ``SCHEDULES``."""
        settings = {"dataset_name": self.dataset_name, **SCHEDULES[name], "solver": "ipndm", "num_steps": nfe + 2}
        return {**settings, "afs": "data", "seed": seed, **changes}

    def optimized(self, settings):
        """(what the row states about the search, arguments of ``sample``)."""
        command = _schedule_command(settings)
        folder = self.work / f"schedule-{hashlib.sha256(command.encode()).hexdigest()[:12]}"
        done, destination = folder / "optimized.json", folder / "schedule.json"
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            started = time.process_time()
            with contextlib.redirect_stdout(io.StringIO()):
                optimize_schedule.main(flags(settings | {"dest": destination}), standalone_mode=False)
            seconds = time.process_time() - started
            done.write_text(json.dumps({"command": command, "training_seconds": round(seconds, 1)}))
        schedule = load_schedule(destination)
        found = {**PLAIN.get(schedule.solver, {"solver": schedule.solver}), **schedule.own_options(schedule.solver)}
        sigma_cond = {} if schedule.sigmas_cond is None else {"sigmas_cond": list(schedule.sigmas_cond)}
        found |= {"sigmas": list(schedule.sigmas), **sigma_cond, "afs": "data"}
        return json.loads(done.read_text()), found

    def scheduled(self, name, nfe, seed):
        """iPNDM on an optimised schedule of ``SCHEDULES``."""
        facts, settings = self.optimized(self.schedule_flags(name, nfe, seed))
        return {**facts, **schedule_budget(settings, name), **self.solved(**settings)}

    # Parts

    def plain(self, nfes):
        """All plain candidates on the validation seeds, by FID and distance."""
        bench = Bench(self.dataset_name, 256, first=FIRST_SEED)
        for nfe in nfes:
            for name, options in PLAIN.items():
                for kind, rho in GRIDS:
                    settings = {**options, "schedule_type": kind, "schedule_rho": rho, "afs": "data"}
                    key = {"part": "plain", "method": name, "nfe": nfe, "grid": f"{kind}:{rho}"}
                    self.once(
                        key,
                        lambda settings=settings, nfe=nfe: {
                            **self.validated(bench, num_steps=nfe + 2, **settings),
                            "settings": settings,
                        },
                    )

    @staticmethod
    def validated(bench, **settings):
        x, nfe = bench.solve(**settings)
        return {"nfe_spent": nfe, **bench.score(x)}

    def choices(self, nfes, seeds, wanted):
        """The variants of ``CHOICES``: validation loss, and scores on validation seeds."""
        bench = Bench(self.dataset_name, 256, first=FIRST_SEED, num_reference=64)
        for seed in seeds:
            for nfe in nfes:
                for preset, variants in CHOICES.items():
                    for variant, (changes, structure) in variants.items():
                        settings = span_flags(self.dataset_name, nfe, preset, changes)
                        if settings is not None and (not wanted or {preset, f"{preset}, {variant}"} & set(wanted)):
                            key = {"part": "choice", "method": preset, "variant": variant, "nfe": nfe, "seed": seed}
                            own = f" {variant}".replace(",", "") if changes or structure else ""
                            name = (
                                f"{preset}{own}-{nfe}-{seed}"  # the same name as in main, so that predictors are shared
                            )
                            self.once(
                                key, lambda f=settings, s=seed, k=name, c=structure: self.chosen(bench, f, s, k, c)
                            )
                method = "ld3, own trainer"
                for variant, changes in DIRECTIONS.items():
                    if not wanted or {method, f"{method}, {variant}"} & set(wanted):
                        default = changes["direction_sigma"] == DIRECTION_SIGMA.default
                        changes = {**changes, "direction_sigma": None if default else changes["direction_sigma"]}
                        settings = self.schedule_flags(method, nfe, seed, **changes)
                        key = {"part": "choice", "method": method, "variant": variant, "nfe": nfe, "seed": seed}
                        self.once(key, lambda f=settings: self.chosen_schedule(bench, f))

    def chosen(self, bench, settings, seed, name, structure):
        facts, predictor = self.train(settings, seed, name, structure)
        best = predictor.provenance["validation"]["best"]
        return {**facts, "validation": best, **self.validated(bench, **self.trained_settings(predictor))}

    def chosen_schedule(self, bench, settings):
        facts, found = self.optimized(settings)
        return {**facts, **self.validated(bench, **found), "settings": found}

    def best_plain(self, nfe, score):
        """Settings of the plain solver that was best on the validation seeds."""
        rows = [row for row in self.rows() if row["part"] == "plain" and row["nfe"] == nfe]
        if not rows:
            raise click.ClickException(f"run --part=plain --nfe={nfe} first")
        return {**min(rows, key=lambda row: row[score])["settings"], "num_steps": nfe + 2}

    def main(self, nfes, seeds, wanted):
        def take(name, nfe, seed, work, settings=None, structure=None):
            if not wanted or name in wanted:
                self.once({"part": "main", "method": name, "nfe": nfe, "seed": seed}, work, settings, structure)

        take("teacher", 30, None, lambda: self.solved(**TEACHER))
        for nfe in nfes:
            for score in ("fid", "distance"):
                take(f"plain, best {score}", nfe, None, lambda n=nfe, s=score: self.solved(**self.best_plain(n, s)))
        for seed in seeds:
            for nfe in nfes:
                for name in SCHEDULES:
                    take(name, nfe, seed, lambda k=name, n=nfe, s=seed: self.scheduled(k, n, s))
                for name in ("AMED-Solver", "AMED-Plugin (iPNDM)"):
                    settings = amed_flags(self.dataset_name, nfe, name)
                    take(name, nfe, seed, lambda f=settings, s=seed, k=f"{name}-{nfe}-{seed}": self.trained(f, s, k))
                for name, (preset, changes, structure) in METHODS.items():
                    settings = span_flags(self.dataset_name, nfe, preset, changes)
                    if settings is not None:
                        work = partial(self.trained, settings, seed, f"{name}-{nfe}-{seed}", structure)
                        take(name, nfe, seed, work, settings, structure)

    def ablation(self, nfes, seeds, wanted):
        changed = {**{name: (changes, None) for name, changes in ABLATIONS.items()}}
        changed |= {name: (None, structure) for name, structure in STRUCTURE.items()}
        for seed in seeds:
            for nfe in nfes:
                for name, (changes, structure) in changed.items():
                    settings = span_flags(self.dataset_name, nfe, "full", changes)
                    if settings is not None and (not wanted or name in wanted):
                        key = {"part": "ablation", "method": name, "nfe": nfe, "seed": seed}
                        work = partial(self.trained, settings, seed, f"{name}-{nfe}-{seed}", structure)
                        self.once(key, work, settings, structure)

    def picture(self, nfe, seed):
        """The same seeds by several methods, one line each, from the solvers in ``work``."""
        lines = [("teacher, 30 evaluations", self.shown(**TEACHER))]
        for name in SHOWN:
            folder = self.work / f"{name}-{nfe}-{seed}".replace(" ", "_")
            lines.append(
                (f"{name}, {nfe}", self.shown(**self.trained_settings(load_predictor(find_predictor(folder)))))
            )
        plain = self.best_plain(nfe, "fid")
        lines.append((f"{plain['solver']}, {nfe}", self.shown(**plain)))
        height, width = lines[0][1].shape[:2]
        figure = Image.new("RGB", (width, (height + LABEL) * len(lines)), "white")
        draw, font = ImageDraw.Draw(figure), ImageFont.load_default(15)
        for index, (label, strip) in enumerate(lines):
            top = index * (height + LABEL)
            draw.text((2, top + 4), label, fill="black", font=font)
            figure.paste(Image.fromarray(strip), (0, top + LABEL))
        save_image(np.asarray(figure), ROOT / "docs" / f"learned_solvers_{self.dataset_name}.png")

    def shown(self, **settings):
        """The first images as one uint8 strip [H,W,3], enlarged twice."""
        x, _ = sample(self.bench.net, self.bench.latents[:ACROSS], return_info=True, **settings)
        strip = image_grid(to_uint8(x), ACROSS)
        return np.broadcast_to(strip, (*strip.shape[:2], 3)).repeat(2, 0).repeat(2, 1)


def make_judge(dataset_name, data, test):
    """Statistics of training images and features of test images, beside the second classifier."""
    detector, device = load_detector(judge_file(dataset_name)), torch.device("cpu")
    source = ImageSource(data)
    statistics = image_statistics(source, choose_images(source, None, 0), detector, 250, device)
    mu, sigma = statistics.moments()
    chosen = choose_images(ImageSource(test), REAL, 0)
    images = torch.from_numpy(load_array(ImageSource(test))[chosen])
    real = torch.cat([detector(part) for part in images.split(250)])
    np.savez_compressed(
        judge_file(dataset_name).with_suffix(".npz"), mu=mu, sigma=sigma, real=real.numpy().astype(np.float16)
    )


@click.command(cls=Command)
@click.option("--dataset_name", type=click.Choice(list(EMBEDDED)), required=True)
@click.option("--part", type=click.Choice(["plain", "choices", "main", "ablation", "judge", "picture"]), required=True)
@click.option("--nfe", default="3,4,5,6", show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True, help="Training seeds")
@click.option("--methods", default="", help="Methods to measure, separated by ; (default: all)")
@click.option(
    "--images", type=click.IntRange(NEAR), help="Test images (default: 5000 of digits, 1000 of natural images)"
)
@click.option("--work", default=None, help="Folder of the trained solvers (default: a temporary one)")
@click.option("--data", help="judge: training images, zip or folder")
@click.option("--test", help="judge: test images")
def main(dataset_name, part, nfe, seeds, methods, images, work, data, test):
    """Trains and scores learned solvers on an embedded network."""
    if part == "judge":
        make_judge(dataset_name, data, test)
        return
    with tempfile.TemporaryDirectory() as temporary:
        solvers = LearnedSolvers(dataset_name, work or temporary, images)
        nfes, seeds = ([int(value) for value in text.split(",")] for text in (nfe, seeds))
        wanted = [name.strip() for name in methods.split(";") if name.strip()]
        if part == "plain":
            solvers.plain(nfes)
        elif part == "picture":
            solvers.picture(nfes[0], seeds[0])
        else:
            getattr(solvers, part)(nfes, seeds, wanted)


if __name__ == "__main__":
    main()
