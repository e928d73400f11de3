"""How the settings of the demo were chosen: plain solvers and AMED on validation seeds.

    python -m benchmarks.demo_settings --dataset_name=digits --part=plain

Parts:
    reference   score of the converged solution
    plain       solver x schedule x analytical first step
    few         more solvers at 3, 4, 5, 6 and 8 evaluations
    teachers    the teachers themselves, M = 1, 2, 4
    amed        from the paper's settings to the demo's
    demo        the demo's settings; --kimg=1.5 --seed=1 for other training seeds

All parts but "teachers" and "few" use five evaluations. Every row is appended to
benchmarks/<dataset_name>_settings.jsonl when it is measured, and is not measured again. Scores:
Fréchet distance of ``--num`` images in the features of the network's own classifier; mean distance
(root mean square over pixels in [-1, 1]) to Heun with 51 time steps from the same noise.
"""

import time

import click
import numpy as np
import torch

from benchmarks import ROOT
from benchmarks.measuring import measured
from evaluation.detectors import EMBEDDED, load_detector
from evaluation.frechet import FeatureStatistics, Reference, frechet_distance
from models import create_model, zoo
from models.inputs import draw_noise
from solvers import sample
from solvers.recommended import training_recipe
from torch_utils.cli import Command
from torch_utils.images import to_uint8
from torch_utils.remote import cache_dir
from torch_utils.seeds import SeededGenerators
from training.amed_trainer import Distiller

REFERENCE = {"solver": "heun", "num_steps": 51}
FIRST_SEED = 100_000  # the demo's table uses seeds 0-999

SCHEDULES = [("time_uniform", rho) for rho in (0.7, 1, 1.4, 2)] + [("polynomial", rho) for rho in (3, 5, 7)]
SOLVERS = [
    {"solver": "euler"},
    {"solver": "dpm"},
    {"solver": "ipndm", "max_order": 2},
    {"solver": "ipndm", "max_order": 3},
    {"solver": "ipndm", "max_order": 4},
    {"solver": "dpmpp", "max_order": 2, "thresholding": False},
    {"solver": "dpmpp", "max_order": 3, "thresholding": False},
    {"solver": "dpmpp", "max_order": 3, "thresholding": True},
]

PAPER_AMED = {
    **{"sampler_stu": "amed", "sampler_tea": "heun", "M": 1, "afs": True, "scale_dir": 0.01, "scale_time": 0.0},
    **{"schedule_type": "time_uniform", "schedule_rho": 1},
}
PAPER_PLUGIN = {
    **{"sampler_stu": "ipndm", "sampler_tea": "ipndm", "M": 2, "afs": True, "scale_dir": 0.01, "scale_time": 0.2},
    **{"schedule_type": "polynomial", "schedule_rho": 7, "max_order": 4},
}


def plain_jobs():
    for schedule, rho in SCHEDULES:
        for solver in SOLVERS:
            for afs in ("data", False) if (schedule, rho) in (("time_uniform", 1), ("polynomial", 7)) else ("data",):
                num_steps = 4 if solver["solver"] == "dpm" else 7 if afs else 6
                yield {**solver, "num_steps": num_steps, "schedule_type": schedule, "schedule_rho": rho, "afs": afs}


def few_jobs():
    """Other solvers, orders and numbers of evaluations, where the plain part and
    benchmarks/learned_solvers.py have none.
    """
    uniform, bent, five, seven = ("time_uniform", 1), ("time_uniform", 2), ("polynomial", 5), ("polynomial", 7)
    orders = [
        ({"solver": "ipndm", "max_order": 4}, (five, seven)),
        ({"solver": "ipndm", "max_order": 2}, (uniform,)),
        ({"solver": "dpmpp", "max_order": 2, "thresholding": False}, (uniform, seven)),
    ]
    simple = [
        ({"solver": "euler"}, (uniform, five)),
        ({"solver": "heun"}, (uniform, seven)),
        ({"solver": "dpm"}, (bent,)),
    ]
    for solvers, numbers in ((orders, (3, 4, 6, 8)), (simple, (5, 3, 6, 8, 4))):
        for nfe in numbers:
            for solver, grids in solvers:
                for schedule, rho in grids:
                    num_steps, afs = nfe + 2, "data"
                    if solver["solver"] in ("heun", "dpm"):
                        num_steps, afs = ((nfe + 1) // 2 + 1, "data") if nfe % 2 else (nfe // 2 + 1, False)
                    yield {**solver, "num_steps": num_steps, "schedule_type": schedule, "schedule_rho": rho, "afs": afs}


def cumulative(base, *changes):
    """The base settings, and then with one more change each."""
    yield base
    for change in changes:
        base = {**base, **change}
        yield base


def digits_jobs():
    data_afs, ranges = {"afs": "data"}, {"scale_dir": 0.2, "scale_time": 0.3}
    teacher = {"sampler_tea": "ipndm", "M": 4, "max_order": 3}
    schedule = {"schedule_type": "time_uniform", "schedule_rho": 1.4}
    yield from cumulative(PAPER_AMED, data_afs, teacher, schedule, ranges)
    yield from cumulative(PAPER_PLUGIN, data_afs, teacher, schedule, ranges, {"max_order": 2})
    best = {**PAPER_PLUGIN, **data_afs, **teacher, **schedule, **ranges}
    yield {**best, "sampler_stu": "dpmpp", "thresholding": False}
    yield {**best, "sampler_tea": "heun"}
    yield {**best, "schedule_rho": 1}


def cifar10_jobs():
    data_afs, ranges = {"afs": "data"}, {"scale_dir": 0.2, "scale_time": 0.3}
    yield from cumulative(PAPER_PLUGIN, data_afs, {"max_order": 3})
    yield from cumulative(PAPER_AMED, data_afs, {"M": 3})
    plugin = {**PAPER_PLUGIN, **data_afs}
    yield {**plugin, "M": 4}
    yield {**plugin, **ranges}
    yield {**plugin, "sampler_stu": "dpmpp", "max_order": 3, "thresholding": False}
    yield {**plugin, "schedule_type": "time_uniform", "schedule_rho": 1.4}
    yield {**PAPER_AMED, **data_afs, "schedule_rho": 2}
    for rho in (4, 5):  # where plain iPNDM is best
        for scale_dir in (0.01, 0.05):
            yield {**plugin, "schedule_rho": rho, "scale_dir": scale_dir}


def demo_jobs(dataset_name):
    """The learned methods of the demo, for repeats with other training seeds."""
    for student in ("amed", "ipndm"):  # benchmarks/learned_solvers.py has the repeats of the span solver
        recipe, _ = training_recipe(dataset_name, student)
        yield {key: value for key, value in recipe.items() if key not in ("total_kimg", "batch")} | {"num_steps": 4}


def teacher_jobs():
    for schedule, rho in (("time_uniform", 1), ("time_uniform", 1.4), ("polynomial", 7)):
        for extra in (1, 2, 4):
            for solver in ({"solver": "heun"}, {"solver": "ipndm", "max_order": 3}):
                yield {**solver, "num_steps": 3 * (extra + 1) + 1, "schedule_type": schedule, "schedule_rho": rho}


class Bench:
    """The network, the noise, the converged solution and the scores.

    num: number of seeds.
    batch: images per network call. Default 128.
    first: first seed.
    num_reference: number of seeds with a converged solution. Default None: all.
    """

    def __init__(self, dataset_name, num, batch=128, first=FIRST_SEED, num_reference=None):
        self.dataset_name, self.num_reference = dataset_name, num_reference or num
        self.net = create_model(dataset_name).to(memory_format=torch.channels_last)
        self.batch, self.num = batch, num
        self.first = first
        self.latents = draw_noise(self.net, SeededGenerators(range(first, first + num)))
        self.detector = load_detector(dataset_name)
        self.target = Reference.load(zoo.resolve_fid_ref(dataset_name))
        self.reference = None

    def use(self, net):
        """Takes another network of the same images, with its own starting noise."""
        self.net, self.reference = net, None
        self.latents = draw_noise(net, SeededGenerators(range(self.first, self.first + self.num)))

    def solve(self, count=None, **settings):
        """(images of the first ``count`` seeds, evaluations spent)."""
        parts, info = [], None
        for latents in self.latents[:count].split(self.batch):
            x, info = sample(self.net, latents, return_info=True, **settings)
            parts.append(x)
        return torch.cat(parts), info.nfe

    def converged(self):
        if self.reference is None:
            seeds = str(self.num_reference) if self.first == FIRST_SEED else f"{self.first}-{self.num_reference}"
            cache = cache_dir() / f"{self.dataset_name}-reference-{self.net.weights_hash[:16]}-{seeds}.pt"
            if cache.exists():
                self.reference = torch.load(cache, weights_only=True)
            else:
                self.reference, _ = self.solve(self.num_reference, **REFERENCE)
                cache.parent.mkdir(parents=True, exist_ok=True)
                torch.save(self.reference, cache)
        return self.reference

    def features(self, x, detector):
        """Features [N,D] of the PNG files that these images would be."""
        images = torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2).contiguous()
        return torch.cat([detector(part) for part in images.split(250)])

    def frechet(self, features, target):
        statistics = FeatureStatistics(features.shape[1])
        statistics.append(features)
        return float(frechet_distance(*statistics.moments(), target.mu, target.sigma))

    def apart(self, x):
        """[num_reference]: root mean square distances to the converged solution."""
        reference = self.converged()
        return (x[: len(reference)] - reference).square().mean(dim=(1, 2, 3)).sqrt()

    def score(self, x):
        fid = self.frechet(self.features(x, self.detector), self.target)
        return {"fid": round(fid, 3), "distance": round(float(self.apart(x).mean()), 4)}

    def plain(self, job):
        started = time.perf_counter()
        x, nfe = self.solve(**job)
        return {"nfe": nfe, "seconds": round(time.perf_counter() - started, 1), **self.score(x)}

    def learned(self, job, kimg, batch, seed):
        config = {"num_steps": 4, "dataset_name": self.dataset_name, **job}
        distiller = Distiller(self.net, config, batch=batch, seed=seed)
        started = time.perf_counter()
        rows = [distiller.step(distiller.draw()) for _ in range(int(kimg * 1000 / batch))]
        seconds = time.perf_counter() - started
        last = torch.stack(rows[-10:]).double().mean(0)
        config = distiller.predictor.config
        keys = ("num_steps", "schedule_type", "schedule_rho", "afs", "sigmas")
        settings = {key: config[key] for key in keys}
        if config["sampler_stu"] in ("ipndm", "dpmpp"):
            settings["max_order"] = config["max_order"]
        if config["sampler_stu"] == "dpmpp":
            settings["thresholding"] = config["thresholding"]
        x, nfe = self.solve(solver=config["sampler_stu"], predictor=distiller.predictor, **settings)
        inside = {
            name: np.round(last[:, i].tolist(), 3).tolist()
            for i, name in enumerate(("loss", "r", "scale_dir", "scale_time"))
        }
        return {"nfe": nfe, "training_seconds": round(seconds, 1), **inside, **self.score(x)}


@click.command(cls=Command)
@click.option("--dataset_name", type=click.Choice(list(EMBEDDED)), required=True)
@click.option("--part", type=click.Choice(["reference", "plain", "few", "teachers", "amed", "demo"]), required=True)
@click.option("--num", type=click.IntRange(2), default=256, show_default=True, help="Validation images")
@click.option("--kimg", type=float, default=0.5, show_default=True, help="Length of each training")
@click.option("--batch", type=int, default=16, show_default=True, help="Batch of each training")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of each training")
def main(dataset_name, part, num, kimg, batch, seed):
    """Measures candidate settings of the demo on validation seeds."""
    bench = Bench(dataset_name, num)
    results = ROOT / "benchmarks" / f"{dataset_name}_settings.jsonl"
    learned = part in ("amed", "demo")
    training = {"kimg": kimg, "batch": batch, "seed": seed} if learned else {}
    jobs = {
        "reference": lambda: [REFERENCE],
        "plain": plain_jobs,
        "few": few_jobs,
        "teachers": teacher_jobs,
        "amed": {"digits": digits_jobs, "cifar10-small": cifar10_jobs}[dataset_name],
        "demo": lambda: demo_jobs(dataset_name),
    }[part]
    for job in jobs():
        key = {
            "part": "plain" if part == "few" else part,
            "network": bench.net.weights_hash[:16],
            "num": num,
            **training,
            "settings": job,
        }
        measured(results, key, lambda job=job: bench.learned(job, **training) if learned else bench.plain(job))


if __name__ == "__main__":
    main()
