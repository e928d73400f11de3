"""What few evaluations can do, learned: every restriction of the span solver, the whole of it, AMED, GITS and the best
solvers without training, on an embedded network.

    python -m benchmarks.students --dataset_name=digits --part=plain      # solvers without training, on validation seeds
    python -m benchmarks.students --dataset_name=digits --part=main       # all methods, test seeds, three training seeds
    python -m benchmarks.students --dataset_name=digits --part=ablation   # the full student, one thing changed
    python -m benchmarks.students --dataset_name=digits --part=judge --data=... --test=...   # the second classifier's statistics
    python -m benchmarks.students --dataset_name=digits --part=picture --nfe=3 --seeds=0 --work=...   # docs/students_<...>.png

Every row is appended to benchmarks/students_<dataset_name>.jsonl as soon as it is measured and not measured again; --nfe,
--seeds and --methods take a part of them. benchmarks/report_students.py makes the tables and figures.

Training noise is apart from the seeds that are sampled (torch_utils/seeds.py), and the validation seeds 100000-100255, which
settings were chosen on, are apart from the test seeds 0-999. Students see neither of the two classifiers. Scores:

    fid, fid2   Fréchet distance to the training images in the features of the network's usual classifier, and of a second one
                of another architecture and seed (benchmarks/judges)
    precision, recall   in the features of the second one, against test images
    distance    root mean square over pixels in [-1, 1] to Heun with 51 stamps from the same noise, first 256 seeds

The second classifiers (98.73 % and 70.18 % test accuracy), before --part=judge, which reads the same images:

    python -m tools.train_classifier --arch=residual --seed=1 --width=8 --epochs=2 --data=datasets/mnist-train.zip
        --test=datasets/mnist-test.zip --dest=benchmarks/judges/digits.safetensors
    python -m tools.train_classifier --arch=residual --seed=1 --width=16 --epochs=6 --shift=3 --flip=True
        --data=cifar10-train.zip --test=cifar10-test.zip --dest=benchmarks/judges/cifar10-small.safetensors

training_seconds are of CPU time (of its threads together), without the teacher's pairs, which all students of a seed share.
"""

import contextlib
import io
import json
import shutil
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import optimize_schedule
import train
from benchmarks.demo_settings import FIRST_SEED, ROOT, Bench
from fid import choose_images, image_statistics
from models.detectors import EMBEDDED, PRETRAINED, load_classifier, load_detector
from solvers import sample
from solvers.schedule_file import load_schedule
from tools.demo import HALVES
from torch_utils.cli import Command
from torch_utils.frechet import Reference
from torch_utils.image_data import ImageSource, load_array
from torch_utils.image_writer import image_grid, save_image, to_uint8
from torch_utils.manifold import precision_recall
from training.checkpoint import find_predictor, load_predictor

IMAGES, NEAR, REAL = (
    1000,
    256,
    1000,
)  # test images; those with a reference solution; real images for precision and recall
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

# The budget of every span student, whatever it learns: samples, teacher pairs, the loss.
BUDGET = {
    **{"dataset_name": None, "sampler_stu": "span", "objective": "final", "batch": 8, "total_kimg": 0.96},
    **{"pairs": PAIRS, "val_pairs": VALIDATION, "val_every": 40, "loss": "features+0.2*huber"},
}
# A quarter less for the preset that tries starts, as its three trials take a tenth of the run each: 0.72 * 1.3 = 0.94.
TRIED = {"total_kimg": 0.72}
STUDENTS = (
    *("full + spatial,time", "full + spatial", "full", "ld3", "s4s", "dyweight", "gs", "amed-table", "epd"),
    "dyweight + spatial,time",  # a restriction with our heads: how much of the gain is theirs
)
# Schedules for iPNDM, with the options of optimize_schedule.py. GITS: l2 cost with coefficient 1, its best setting here
# (docs/schedules.md); LD3: its own trainer, as in benchmarks/schedules.sh, which tries four grids before it trains.
SCHEDULES = {
    "gits": {"method": "gits", "metric": "l2", "coeff": 1.0, "num_warmup": 64},
    "ld3, own trainer": {
        **{"method": "ld3", "num_train": 64, "num_valid": 32, "rounds": 10, "rounds_grid": 4, "checkpointing": False},
        **{"solver_tea": "ipndm", "num_steps_tea": 31},
    },
}
STEPS = {  # time stamps of a preset that spend nfe evaluations; None: impossible
    "ld3": lambda nfe: {"num_steps": nfe + 1},
    "s4s": lambda nfe: {"num_steps": nfe + 1},
    "gs": lambda nfe: {"num_steps": nfe + 1},
    "dyweight": lambda nfe: {"num_steps": nfe + 2},
    "full": lambda nfe: {"num_steps": nfe + 2},
    "amed-table": lambda nfe: _two_per_interval(nfe),
    # Three calls an interval (two in one batch), the first of all free or not.
    "epd": lambda nfe: {3: {"num_steps": 2, "afs": False}, 5: {"num_steps": 3}, 6: {"num_steps": 3, "afs": False},
                        8: {"num_steps": 4}}.get(nfe),
}  # fmt: skip
ABLATIONS = {
    "no first step": {"afs": False, "num_steps": -1},
    "first step of mean zero": {"afs": True},
    "loss in pixels": {"loss": "huber"},
    "loss in features only": {"loss": "features"},
    "loss in features of the FID classifier (a leak)": {"loss": "benchmarks.students:judge_of_fid"},
    "loss in features of the second classifier (a leak)": {"loss": "benchmarks.students:second_judge"},
    "distribution term": {"w_dist": 0.3},
    "anchor to the teacher's states": {"w_anchor": 0.1},
    "sample head": {"heads": "sample"},
    "time head": {"heads": "time"},
    "time scale within 5 %": {"time_bound": 0.05},
    "time scale within 30 %": {"time_bound": 0.3},
    "two calls in one batch": {"parallel": 2},
    "twice the training": {"total_kimg": 1.44},
    "both heads, loss in pixels": {"heads": "spatial,time", "loss": "huber"},
    "both heads, four times the training": {"heads": "spatial,time", "total_kimg": 2.88},
}
STRUCTURE = {  # ablations of the student's structure, which the command line does not offer
    "time scale fixed": {"learn": ["labels", "inner", "corrections", "contrast"]},
    "coefficients free, not relative": {"relative": False},
    "coefficients of the theory": {"learn": ["labels", "inner", "time", "inner_time", "contrast"]},
    "labels fixed": {"learn": ["time", "inner_time", "corrections", "contrast"]},
    "no contrast": {"learn": ["labels", "inner", "time", "inner_time", "corrections"]},
}


def _two_per_interval(nfe):
    """AMED's stamps: two evaluations an interval, the first free where the number is odd."""
    return {"num_steps": (nfe + 1) // 2 + 1} if nfe % 2 else {"num_steps": nfe // 2 + 1, "afs": False}


def judge_of_fid(net):
    """For the ablation of leaks: the features that FID is measured with."""
    return _features(PRETRAINED / EMBEDDED[_name_of(net)])


def second_judge(net):
    return _features(judge_file(_name_of(net)))


def _name_of(net):
    return "digits" if net.img_channels == 1 else "cifar10-small"


def _features(file):
    """The features of a classifier of images in [-1, 1], with gradients."""
    model, _ = load_classifier(file)
    return lambda images: model.features((images.clamp(-1, 1) + 1) / 2)


def judge_file(dataset_name):
    return ROOT / "benchmarks" / "judges" / f"{dataset_name}.safetensors"


def flags(settings):
    return [f"--{name}={value}" for name, value in settings.items() if value is not None]


def amed_flags(dataset_name, nfe, name):
    """AMED as it was tuned for the demo, at another number of evaluations."""
    tuned = {k: v for k, v in HALVES[dataset_name].learned[name].items() if k != "seed"}
    steps = _two_per_interval(nfe)
    return {"dataset_name": dataset_name, **tuned, **steps}


def span_flags(dataset_name, nfe, preset, changes=None):
    steps = STEPS[preset](nfe)
    if steps is None:
        return None
    changes = {"heads": "none" if preset == "full" else None, **(changes or {})}
    steps = {**steps, "num_steps": steps["num_steps"] + changes.pop("num_steps", 0)}
    if changes.get("parallel") == 2:  # the same number of calls, but for the first point, where there is only one
        if nfe % 2 == 0:
            return None
        steps["num_steps"] = (nfe - 1) // 2 + 3
    budget = {**BUDGET, **(TRIED if preset == "full" else {})}
    return {**budget, "dataset_name": dataset_name, "preset": preset, **steps, **changes}


class Students:
    """Trains, samples and scores; the rows that are there already."""

    def __init__(self, dataset_name, work):
        self.dataset_name, self.work = dataset_name, Path(work) / dataset_name
        self.file = ROOT / "benchmarks" / f"students_{dataset_name}.jsonl"
        self.bench = Bench(dataset_name, IMAGES, first=0, num_reference=NEAR)
        self.second = load_detector(judge_file(dataset_name))
        self.second_target = Reference.load(judge_file(dataset_name).with_suffix(".npz"))
        with np.load(judge_file(dataset_name).with_suffix(".npz")) as file:
            self.real = torch.from_numpy(file["real"].astype(np.float32))[:REAL]

    def rows(self):
        """Read anew each time: several processes may work at once."""
        return (
            [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]
            if self.file.exists()
            else []
        )

    def once(self, key, work):
        """The row of this key, measured by ``work()`` if it is not there."""
        key = {**key, "network": self.bench.net.weights_hash[:16]}
        claim = self.work / "claims" / "-".join(str(value).replace(" ", "_") for value in key.values())
        if any(all(row.get(name) == value for name, value in key.items()) for row in self.rows()) or claim.exists():
            return
        claim.parent.mkdir(parents=True, exist_ok=True)
        claim.touch()
        try:
            row = {**key, **work(), "date": time.strftime("%Y-%m-%d")}
        finally:
            claim.unlink()
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({name: value for name, value in row.items() if name not in ("network", "table")}), flush=True)

    def scored(self, x):
        features = self.bench.features(x, self.second)
        precision, recall = precision_recall(self.real, features)
        second = self.bench.frechet(features, self.second_target)
        return {
            **self.bench.score(x),
            **{"fid2": round(second, 3), "precision": round(precision, 4), "recall": round(recall, 4)},
        }

    # Methods

    def solved(self, **settings):
        x, nfe = self.bench.solve(**settings)
        return {"nfe_spent": nfe, **self.scored(x), "settings": {k: v for k, v in settings.items() if k != "predictor"}}

    @staticmethod
    def trained_settings(predictor):
        """What sample.py gives the loop for this predictor."""
        config = predictor.config
        if getattr(predictor, "kind", None) == "span":
            return {"solver": "span", "predictor": predictor}
        names = ("num_steps", "schedule_type", "schedule_rho", "afs", "sigmas")
        names += {"ipndm": ("max_order",), "dpmpp": ("max_order", "thresholding")}.get(config["sampler_stu"], ())
        return {"solver": config["sampler_stu"], "predictor": predictor, **{name: config[name] for name in names}}

    def sampled(self, file):
        """The scores of a trained predictor, and its table if it is one."""
        predictor = load_predictor(file)
        config, found = predictor.config, self.solved(**self.trained_settings(predictor))
        if getattr(predictor, "kind", None) == "span":
            plan = predictor.plan()
            table = {
                "sigmas": plan.sigmas.tolist(),
                "sigmas_net": plan.sigmas_net.tolist(),
                "steps": [[part.tolist() for part in step] for step in plan.steps],
                "inner": [[[part.tolist() for part in point] for point in points] for points in plan.inner],
                "first_step": config["first_step"],
            }
            found["table"] = json.loads(json.dumps(table), parse_float=lambda text: round(float(text), 6))
        return found

    def trained(self, settings, seed, name):
        """Trains with train.py's command line, then scores."""
        folder = self.work / name.replace(" ", "_")
        shutil.rmtree(folder, ignore_errors=True)
        settings = {**settings, "seed": seed}
        more = {"outdir": folder}
        if settings.get("sampler_stu") == "span":
            states = "-states" if settings.get("w_anchor") else ""
            more["teacher_set"] = self.work / f"pairs-{seed}{states}.safetensors"
            if not more["teacher_set"].exists():  # its time is nobody's: a run of one iteration makes it
                first = {**settings, **more, "total_kimg": 0.008, "init": "preset"}
                with contextlib.redirect_stdout(io.StringIO()):
                    train.main([*flags(first), "--nosubdir"], standalone_mode=False)
                shutil.rmtree(folder)
        started = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()) as output:
            train.main([*flags(settings | more), "--nosubdir"], standalone_mode=False)
        seconds = time.process_time() - started
        start = [line for line in output.getvalue().splitlines() if line.startswith("after ")]
        return {
            "command": "python train.py " + " ".join(flags(settings)),
            "training_seconds": round(seconds, 1),
            **({"start": start[0].split(": ")[1].split(" ")[0]} if start else {}),
            **self.sampled(find_predictor(folder)),
        }

    def changed(self, nfe, seed, name, changes):
        """The full student with another structure: trained from the configuration that the command line would make."""
        from training.final_config import FinalOptions

        original = FinalOptions.student_config

        def with_changes(options, *arguments, **more):
            return {**original(options, *arguments, **more), **changes}

        FinalOptions.student_config = with_changes
        try:
            found = self.trained(span_flags(self.dataset_name, nfe, "full"), seed, f"{name}-{nfe}-{seed}")
        finally:
            FinalOptions.student_config = original
        return {**found, "command": found["command"] + f"  # with {changes} in the student's configuration"}

    def scheduled(self, name, nfe, seed):
        """iPNDM on an optimised schedule of ``SCHEDULES``."""
        destination = self.work / f"{name.replace(' ', '_')}-{nfe}-{seed}.json"
        destination.unlink(missing_ok=True)
        settings = {"dataset_name": self.dataset_name, **SCHEDULES[name], "solver": "ipndm", "num_steps": nfe + 2}
        settings |= {"afs": "data", "seed": seed}
        started = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            optimize_schedule.main(flags(settings | {"dest": destination}), standalone_mode=False)
        seconds = time.process_time() - started
        schedule = load_schedule(destination)
        command = "python optimize_schedule.py " + " ".join(flags(settings))
        told = {} if schedule.sigmas_net is None else {"sigmas_net": list(schedule.sigmas_net)}
        found = self.solved(**PLAIN["ipndm"], sigmas=list(schedule.sigmas), **told, afs="data")
        return {"command": command, "training_seconds": round(seconds, 1), **found}

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
                            **bench.score(bench.solve(**settings, num_steps=nfe + 2)[0]),
                            "settings": settings,
                        },
                    )

    def best_plain(self, nfe, score):
        """Settings of the plain candidate that was best on the validation seeds."""
        rows = [row for row in self.rows() if row["part"] == "plain" and row["nfe"] == nfe]
        if not rows:
            raise click.ClickException(f"run --part=plain --nfe={nfe} first")
        return {**min(rows, key=lambda row: row[score])["settings"], "num_steps": nfe + 2}

    def main(self, nfes, seeds, wanted):
        def take(name, nfe, seed, work):
            if not wanted or name in wanted:
                self.once({"part": "main", "method": name, "nfe": nfe, "seed": seed}, work)

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
                for name in STUDENTS:
                    preset, _, heads = name.partition(" + ")
                    settings = span_flags(self.dataset_name, nfe, preset, {"heads": heads} if heads else None)
                    if settings is not None:
                        key = f"{name}-{nfe}-{seed}"
                        take(name, nfe, seed, lambda f=settings, s=seed, k=key: self.trained(f, s, k))

    def ablation(self, nfes, seeds, wanted):
        for seed in seeds:
            for nfe in nfes:
                for name, changes in ABLATIONS.items():
                    settings = span_flags(self.dataset_name, nfe, "full", changes)
                    if settings is not None and (not wanted or name in wanted):
                        key = {"part": "ablation", "method": name, "nfe": nfe, "seed": seed}
                        self.once(key, lambda f=settings, s=seed, k=f"{name}-{nfe}-{seed}": self.trained(f, s, k))
                for name, changes in STRUCTURE.items():
                    if not wanted or name in wanted:
                        key = {"part": "ablation", "method": name, "nfe": nfe, "seed": seed}
                        self.once(key, lambda n=nfe, s=seed, k=name, c=changes: self.changed(n, s, k, c))

    def picture(self, nfe, seed):
        """The same seeds by several methods, one line each, from the students that are still in the folder of work."""
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
        save_image(np.asarray(figure), ROOT / "docs" / f"students_{self.dataset_name}.png")

    def shown(self, **settings):
        """The first images as one uint8 strip [H,W,3], twice as large."""
        x, _ = sample(self.bench.net, self.bench.latents[:ACROSS], return_info=True, **settings)
        strip = image_grid(to_uint8(x), ACROSS)
        return np.broadcast_to(strip, (*strip.shape[:2], 3)).repeat(2, 0).repeat(2, 1)


def make_judge(dataset_name, data, test):
    """Statistics of the training images and features of test images, in one file beside the second classifier."""
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
@click.option("--part", type=click.Choice(["plain", "main", "ablation", "judge", "picture"]), required=True)
@click.option("--nfe", default="3,4,5,6", show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True, help="Of training")
@click.option("--methods", default="", help="Some of them, separated by ;")
@click.option("--work", default=None, help="Folder of the trained students (default: a temporary one)")
@click.option("--data", help="judge: training images, zip or folder")
@click.option("--test", help="judge: test images")
def main(dataset_name, part, nfe, seeds, methods, work, data, test):
    """Train and score students on an embedded network."""
    if part == "judge":
        make_judge(dataset_name, data, test)
        return
    with tempfile.TemporaryDirectory() as temporary:
        students = Students(dataset_name, work or temporary)
        nfes, seeds = ([int(value) for value in text.split(",")] for text in (nfe, seeds))
        wanted = [name.strip() for name in methods.split(";") if name.strip()]
        if part == "plain":
            students.plain(nfes)
        elif part == "picture":
            students.picture(nfes[0], seeds[0])
        else:
            getattr(students, part)(nfes, seeds, wanted)


if __name__ == "__main__":
    main()
