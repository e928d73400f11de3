"""A comparison of samplers: images, distances and speed of every job, cached per group of seeds."""

import hashlib
import itertools
import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from evaluation.fid import choose_detector, find_reference
from evaluation.frechet import FeatureStatistics, Reference, frechet_distance
from evaluation.jackknife import Estimate, jackknife
from models.wrapped import WrappedDenoiser
from sampling.folder import format_seeds
from sampling.generate import Batch, generate_images
from sampling.settings import Settings, check_network, open_network, recorded_settings, remembered_network
from solvers.recommended import POLYNOMIAL
from solvers.schedule_file import load_schedule
from solvers.schedules import SCHEDULE_NAMES
from tools.compare_methods import NFE_MARK, SHARED, Method, make_methods, parse_nfe, settings_at
from tools.compare_options import CompareOptions
from torch_utils import distributed
from torch_utils.arrays import read_npz, write_npz
from torch_utils.errors import UserError
from torch_utils.files import check_destination
from torch_utils.images import to_uint8
from torch_utils.memory import explained_oom
from torch_utils.options import changed
from torch_utils.progress import progress_bar
from torch_utils.version import code_version

REFERENCE_SOLVER = {"solver": "heun", **POLYNOMIAL}


# Scores of a row and their headings. Smaller is better for all.
SCORES = {"fid": "FID", "pixel": "distance (pixels)", "feature": "distance (features)"}


@dataclass(frozen=True)
class Job:
    """A method at one number of evaluations.

    method, settings: what is sampled.
    nfe: network evaluations per image.
    requested: the values of --nfe that led to this job.
    key: identifies the job in the cache.
    schedule: file that the noise levels come from. Default None.
    """

    method: Method
    settings: Settings
    nfe: int
    requested: tuple[int, ...]
    key: str
    schedule: str | None = None

    @property
    def stochastic(self) -> bool:
        return self.settings.make_solver().stochastic

    @property
    def name(self) -> str:
        return f"{self.settings.solver}-nfe{self.nfe}-{self.key}"


@dataclass(frozen=True)
class Protocol:
    """Which seeds are sampled, and how they are grouped.

    first, num: the seeds are first .. first + num - 1. All count for the FID.
    groups: number of groups; seed first + i is in group i mod groups.
    num_reference: the distance to the reference solution uses this many of the first seeds.
    pictured: number of seeds whose images the page shows.
    """

    first: int
    num: int
    groups: int
    num_reference: int
    pictured: int = 0

    def check(self) -> None:
        if self.num < 2 * self.groups:
            raise UserError(
                f"--num={self.num}: too few images for --groups={self.groups}: each group needs at least 2"
                f" (--num={2 * self.groups} or more)"
            )
        if self.num_reference > self.num:
            raise UserError(f"--num_reference={self.num_reference}: must not exceed --num={self.num}")
        if 0 < self.num_reference < self.groups:
            raise UserError(
                f"--num_reference={self.num_reference}: each of the --groups={self.groups} needs at least one seed; use"
                " --num_reference=0 for no distances"
            )
        if self.first + self.num > 1 << 32:
            raise UserError(f"--seed={self.first}: all seeds must be below 2^32")

    def seeds(self, group: int) -> range:
        return range(self.first + group, self.first + self.num, self.groups)

    def count(self, group: int, first_seeds: int) -> int:
        """How many of the first ``first_seeds`` seeds belong to a group. They come first in it."""
        return len(range(group, first_seeds, self.groups))

    def merge(self, parts: list[np.ndarray]) -> np.ndarray:
        """Per-seed values of all groups in the order of the seeds."""
        merged = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), dtype=parts[0].dtype)
        for group, part in enumerate(parts):
            merged[group :: self.groups] = part
        return merged


def pool_moments(parts: list[tuple[int, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and unbiased covariance [D,D] of the union of disjoint sets.

    parts: (count, mean, covariance) of each set.
    """
    total = sum(count for count, _, _ in parts)
    mu = sum(count * mean for count, mean, _ in parts) / total
    scatter = sum((n - 1) * sigma + n * np.outer(mean - mu, mean - mu) for n, mean, sigma in parts)
    return mu, scatter / (total - 1)


def without_each_group(parts: list) -> Iterator[list]:
    """For every group, the parts of all other groups."""
    return (parts[:group] + parts[group + 1 :] for group in range(len(parts)))


def difference(row: dict, other: dict, score: str) -> Estimate | None:
    """The paired difference ``row`` minus ``other`` in a score; None if a row lacks the score."""
    if row[score] is None or other[score] is None:
        return None
    left_out = np.subtract(row[f"{score}_left_out"], other[f"{score}_left_out"])
    return jackknife(row[score] - other[score], left_out)


def add_differences(rows: list[dict], baseline: str) -> list[dict]:
    """The rows with their paired differences to the baseline at the same number of evaluations.

    baseline: label of its method. If it has no row at an NFE, the differences there are None.
    """
    found = {row["nfe"]: row for row in rows if row["method"] == baseline}

    def of(row: dict) -> dict:
        added = {}
        for score in SCORES:
            estimate = difference(row, found[row["nfe"]], score) if row["nfe"] in found else None
            values = (None, None, None) if estimate is None else (estimate.value, estimate.error, estimate.half_width)
            names = (f"{score}_difference", f"{score}_difference_se", f"{score}_difference_ci95")
            added |= dict(zip(names, values, strict=True))
        return row | added

    return [of(row) for row in rows]


def rms(difference: torch.Tensor) -> np.ndarray:
    """Root mean square of each sample, [B,...] -> float64 [B]."""
    return difference.to("cpu", torch.float64).flatten(1).square().mean(1).sqrt().numpy()


def _visible(images: torch.Tensor) -> torch.Tensor:
    """The images as a picture shows them: float32, clipped to [-1, 1]."""
    return images.float().clamp(-1, 1).cpu()


def digest_of(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        return read_npz(path)
    except UserError as exc:
        raise UserError(f"{path}: damaged cache file ({exc}); delete it and run again") from None


class Comparison:
    """The network, the detector, the protocol and the cache of one comparison.

    net: the network.
    detector: gives the features of images. None: no FID and no distance of features.
    target: reference statistics of the FID. None: no FID.
    protocol: seeds and groups.
    options: flags of the run.
    device: where to compute.
    prompts: as in ``generate_images``. Default None.

    Attributes: ``reference``, the settings of the converged solution; ``record``, what every result
    depends on besides its own settings.
    """

    def __init__(
        self,
        net,
        detector,
        target: Reference | None,
        protocol: Protocol,
        options: CompareOptions,
        device: torch.device,
        prompts=None,
    ):
        self.prompts = prompts
        self.net, self.detector, self.target, self.protocol = net, detector, target, protocol
        self.options, self.device, self.batch, self.folder = options, device, options.batch, options.folder
        self.cache = self.folder / "cache"
        self.reference = Settings(num_steps=options.reference_steps + 1, **options.common(), **REFERENCE_SOLVER)
        if options.sigmas is not None:
            ends = {"sigma_max": options.sigmas[0], "sigma_min": options.sigmas[-1]}
            self.reference = replace(self.reference, **ends)
        self.range = self._ends(self.reference)
        self.reference_nfe = self.reference.evaluations(net)
        self.code = code_version()
        solution, digest = self._recorded(self.reference, None), detector and detector.digest
        self.record = {
            "seeds": [protocol.first, protocol.num, protocol.groups, protocol.num_reference, protocol.pictured],
            "solution": solution if protocol.num_reference else None,
            "detector": digest,
            "target": target and hashlib.sha256(target.mu.tobytes() + target.sigma.tobytes()).hexdigest(),
            "intervals": "jackknife",  # older files lack its values
        }
        dealt = [protocol.first, protocol.groups, protocol.num_reference]
        self.solution_key = digest_of([solution, dealt, digest])[:16]

    def _recorded(self, settings: Settings, predictor_file) -> dict:
        """What the images of these settings depend on; of the schedule, only its noise levels."""
        recorded = recorded_settings(settings, self.net, predictor_file, self.options.text, self.options.compute)
        recorded["class"] = None  # drawn by the seed, as in sample.py without --class
        return {name: value for name, value in recorded.items() if name not in SCHEDULE_NAMES}

    def _ends(self, settings: Settings) -> tuple[float, float]:
        """(first, last) noise level."""
        sigmas = settings.resolve(self.net)
        return float(sigmas[0]), float(sigmas[-1])

    def make_job(self, method: Method, settings: Settings, nfe: int, requested=(), schedule=None) -> Job:
        """The job. Raises UserError if the method cannot be compared with the others."""
        ends = self._ends(settings)
        if not np.allclose(ends, self.range, rtol=1e-6, atol=0):
            raise UserError(
                f"'{method.label}' runs from sigma {ends[0]:g} to {ends[1]:g}, the others from {self.range[0]:g} to"
                f" {self.range[1]:g}: set --sigma_max and --sigma_min for all, or leave the method out"
            )
        check_network(self.net, settings, method.predictor, self.device)
        recorded = self._recorded(settings, method.predictor_file)  # checks the solver, too
        key = digest_of([recorded, nfe, self.record])[:16]
        return Job(method, settings, nfe, tuple(requested), key, schedule)

    # Files

    def result_file(self, job: Job) -> Path:
        return self.cache / f"{job.name}.npz"

    def part_file(self, job: Job, group: int) -> Path:
        return self.cache / f"{job.name}-group{group}.npz"

    def solution_file(self, group: int) -> Path:
        return self.cache / f"reference-{self.solution_key}-group{group}.npz"

    # Work

    def generate(self, label: str, settings: Settings, nfe: int, predictor, seeds) -> Iterator[tuple]:
        """Samples in batches: (Batch, images [B,C,H,W] uint8 as sample.py writes them, seconds)."""
        batches = generate_images(
            self.net,
            seeds,
            batch=self.batch,
            predictor=None if predictor is None else predictor.to(self.device),
            prompts=self.prompts,
            negative_prompt=self.options.text.negative_prompt,
            device=self.device,
            **settings.arguments(),
        )
        while True:
            started = self._clock()
            distributed.check_peers()
            with explained_oom(self.device, f"lower --batch (now {self.batch})"):
                result: Batch | None = next(batches, None)
            seconds = self._clock() - started
            if result is None:
                return
            if result.info.nfe != nfe:
                raise RuntimeError(f"{label} took {result.info.nfe} network evaluations instead of {nfe}")
            finite = result.images.isfinite().flatten(1).all(dim=1).tolist()
            bad = [seed for seed, good in zip(result.seeds, finite, strict=True) if not good]
            if bad:
                raise UserError(
                    f"{label} with {nfe} evaluations: images of seeds {format_seeds(bad)[:100]} are not finite; leave the"
                    " method out, or try --amp=none"
                )
            quantised = torch.from_numpy(to_uint8(result.images)).permute(0, 3, 1, 2).contiguous()
            yield result, quantised, seconds

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def try_out(self, job: Job) -> None:
        """Samples one image, to fail before hours are spent on the other jobs."""
        for _, images, _ in self.generate(
            job.method.label, job.settings, job.nfe, job.method.predictor, [self.protocol.first]
        ):
            self._features(images)

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        """Features [B,D] of uint8 images; [B,0] without a detector."""
        return torch.empty(len(images), 0) if self.detector is None else self.detector(images)

    def warm_up(self, job: Job) -> None:
        """Samples one batch, since a GPU chooses its kernels in the first call of a shape."""
        if self.device.type == "cuda":
            seeds = self.protocol.seeds(0)[: self.batch]
            for _ in self.generate(job.method.label, job.settings, job.nfe, job.method.predictor, seeds):
                pass

    def solve(self, group: int) -> None:
        """Stores the reference solution of a group: float32 images in [-1, 1], and features."""
        seeds = self.protocol.seeds(group)[: self.protocol.count(group, self.protocol.num_reference)]
        images, features = [], []
        for result, quantised, _ in self.generate("the reference", self.reference, self.reference_nfe, None, seeds):
            images.append(_visible(result.images).numpy())
            features.append(self._features(quantised).cpu().numpy())
        write_npz(
            self.solution_file(group), compressed=True, images=np.concatenate(images), features=np.concatenate(features)
        )

    def measure(self, job: Job, group: int) -> None:
        """Measures one group of a job and stores the results in one file."""
        protocol, seeds = self.protocol, self.protocol.seeds(group)
        near = 0 if job.stochastic else protocol.count(group, protocol.num_reference)
        pictured = protocol.count(group, protocol.pictured)
        solution = read_arrays(self.solution_file(group)) if near else {}
        solution = {name: torch.from_numpy(values) for name, values in solution.items()}
        statistics = None if self.target is None else FeatureStatistics(self.detector.feature_dim, self.device)
        pixel, feature, pictures = [np.empty(0)], [np.empty(0)], []
        seconds, done = 0.0, 0
        for result, quantised, took in self.generate(
            job.method.label, job.settings, job.nfe, job.method.predictor, seeds
        ):
            features = self._features(quantised)
            if statistics is not None:
                statistics.append(features)
            part = min(max(near - done, 0), len(quantised))
            if part:
                pixel.append(rms(_visible(result.images[:part]) - solution["images"][done : done + part]))
                if self.detector is not None:
                    feature.append(rms(features[:part].cpu() - solution["features"][done : done + part]))
            pictures.append(quantised[: max(pictured - done, 0)].numpy())
            seconds += took
            done += len(quantised)
        moments = {} if statistics is None else dict(zip(("mu", "sigma"), statistics.moments(), strict=True))
        write_npz(
            self.part_file(job, group),
            compressed=True,
            **moments,
            count=done,
            seconds=seconds,
            pixel=np.concatenate(pixel),
            feature=np.concatenate(feature),
            pictures=np.concatenate(pictures),
            how=f"{self.describe_device()}, batch {self.batch}, processes {distributed.world_size()}",
            code=self.code,
        )

    def describe_device(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{self.device.type}, {torch.get_num_threads()} threads"

    def finish(self, job: Job) -> None:
        """Joins the files of the groups into one and removes them: covariances are large."""
        groups = range(self.protocol.groups)
        parts = [read_arrays(self.part_file(job, group)) for group in groups]

        def fid(chosen: list) -> float:
            return frechet_distance(*pool_moments(chosen), self.target.mu, self.target.sigma)

        fids = {}
        if self.target is not None:
            moments = [(int(part["count"]), part["mu"], part["sigma"]) for part in parts]
            left_out = [fid(others) for others in without_each_group(moments)]
            fids = {"fid": fid(moments), "fid_left_out": np.array(left_out)}
        write_npz(
            self.result_file(job),
            compressed=True,
            **fids,
            **{name: np.array([part[name] for part in parts]) for name in ("count", "seconds", "how", "code")},
            **{name: self.protocol.merge([part[name] for part in parts]) for name in ("pixel", "feature", "pictures")},
        )
        for group in groups:
            self.part_file(job, group).unlink(missing_ok=True)

    # Results

    def row(self, job: Job) -> dict:
        """A row of the table, from the file of a finished job."""
        found, groups = read_arrays(self.result_file(job)), self.protocol.groups
        row = {"method": job.method.label, "nfe": job.nfe, "nfe_requested": list(job.requested)}
        row |= self._score("fid", float(found["fid"]) if "fid" in found else None, found.get("fid_left_out", ()))
        for name in ("pixel", "feature"):
            values = found[name]
            parts = [values[group::groups] for group in range(groups)] if len(values) else []
            left_out = [np.concatenate(others).mean() for others in without_each_group(parts)]
            row |= self._score(name, float(values.mean()) if len(values) else None, left_out)
        return row | {
            "images_per_second": float(found["count"].sum() / found["seconds"].sum()),
            "timed_on": "; ".join(dict.fromkeys(found["how"].tolist())),
            "images": int(found["count"].sum()),
            "reference_images": len(found["pixel"]),
            "settings": describe_settings(job.settings),
            "command": self.sample_command(job),
            "code": "; ".join(dict.fromkeys(found["code"].tolist())),
            "key": job.key,
        }

    @staticmethod
    def _score(name: str, whole: float | None, left_out) -> dict:
        """The fields of one score in a row. left_out [groups]: the score without each group."""
        estimate = None if whole is None else jackknife(whole, left_out)
        return {
            name: whole,
            f"{name}_se": None if estimate is None else estimate.error,
            f"{name}_ci95": None if estimate is None else estimate.half_width,
            f"{name}_left_out": [float(value) for value in left_out],
        }

    def pictures(self, job: Job) -> np.ndarray:
        """Images of the seeds that the page shows, uint8 [N,H,W,C]."""
        return read_arrays(self.result_file(job))["pictures"].transpose(0, 2, 3, 1)

    def reference_pictures(self) -> np.ndarray | None:
        """The reference solution of the same seeds, as far as it was computed; None: not at all."""
        files = [self.solution_file(group) for group in range(self.protocol.groups)]
        if not self.protocol.num_reference or not all(file.is_file() for file in files):
            return None
        images = self.protocol.merge([read_arrays(file)["images"] for file in files])
        return to_uint8(torch.from_numpy(images[: self.protocol.pictured]))

    def sample_command(self, job: Job) -> str:
        """The call of sample.py that makes the images of a job; "" for a network from Python."""
        if isinstance(self.net, WrappedDenoiser) and self.options.compute.model_path is None:
            return ""
        settings = job.settings
        flags = {"dataset_name": settings.dataset_name}
        if job.method.predictor_file is not None:
            flags["predictor_path"] = job.method.predictor_file
        else:
            flags["solver"] = settings.solver
            if job.schedule is not None:
                flags["schedule"] = job.schedule
            elif settings.sigmas is not None:
                flags["sigmas"] = ",".join(f"{sigma:.12g}" for sigma in settings.sigmas)
            else:
                flags |= {name: getattr(settings, name) for name in SCHEDULE_NAMES}
            flags |= {"afs": settings.afs or None, **settings.options}
            flags |= changed(settings, but=(*flags, *SCHEDULE_NAMES, "sigmas", "sigmas_cond", "options"))
        flags |= changed(self.options.text) | changed(self.options.compute, but=("channels_last", "device"))
        flags["seeds"] = f"{self.protocol.first}-{self.protocol.first + self.protocol.num - 1}"
        given = (f"--{name}={shlex.quote(_short(value))}" for name, value in flags.items() if value is not None)
        return " ".join(["python sample.py", *given])


def _short(value) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def describe_settings(settings: Settings) -> str:
    """The schedule and options of a job in a few words."""
    if settings.sigmas is not None:
        words = ["sigmas " + ",".join(f"{sigma:g}" for sigma in settings.sigmas)]
        if settings.sigmas_cond is not None:
            words += ["sigmas_cond " + ",".join(f"{sigma:g}" for sigma in settings.sigmas_cond)]
    else:
        rho = "" if settings.schedule_type == "logsnr" else f" rho {settings.schedule_rho:g}"
        words = [f"{settings.schedule_type}{rho}, {settings.num_steps - 1} intervals"]
    words += [f"{name}={_short(value)}" for name, value in settings.options.items()]
    words += [f"afs={settings.afs}"] if settings.afs else []
    others = changed(settings, but=(*SHARED, *SCHEDULE_NAMES, "sigmas_cond", "options", "afs"))
    words += [name if value is True else f"{name}={_short(value)}" for name, value in others.items()]
    return ", ".join(words)


def make_jobs(comparison: Comparison, methods: list[Method], nfes: list[int]) -> list[Job]:
    """Every method at every number of evaluations that it can spend, without repetitions.

    Of --solvers=all, those that do not work with this network or machine are left out, with a note.
    """
    jobs: dict[str, Job] = {}
    refusal = None
    for method in methods:
        try:
            own = _jobs_of(comparison, method, nfes)
        except UserError as error:
            if method.named:
                raise
            refusal = error
            distributed.print0(f"left out {method.label}: {error}", file=sys.stderr)
            continue
        for job in own:
            known = jobs.get(job.key)
            jobs[job.key] = job if known is None else replace(known, requested=known.requested + job.requested)
    if not jobs:
        raise refusal
    return _distinguish(list(jobs.values()))


def _scheduled_jobs(comparison: Comparison, method: Method, nfes: list[int]) -> list[Job]:
    """A job per schedule file of a method. Missing files of a pattern are skipped, with a note."""
    files = {method.schedule: None}
    if NFE_MARK in method.schedule:
        files = {method.schedule.replace(NFE_MARK, str(nfe)): nfe for nfe in nfes}
        missing = [nfe for file, nfe in files.items() if not Path(file).is_file()]
        if len(missing) == len(files):
            raise UserError(f"'{method.label}': no schedule file {' or '.join(files)}")
        if missing:
            skipped = ",".join(map(str, missing))
            distributed.print0(f"{method.label}: no schedule file for NFE {skipped}, skipped", file=sys.stderr)
        files = {file: nfe for file, nfe in files.items() if nfe not in missing}
    jobs, warnings = [], {}
    for file, nfe in files.items():
        schedule = load_schedule(file)
        settings = method.settings
        warnings |= dict.fromkeys(schedule.warnings(comparison.net, settings.solver, settings.afs))
        levels = {"sigmas": schedule.sigmas, "sigmas_cond": schedule.sigmas_cond, "num_steps": len(schedule.sigmas)}
        levels["options"] = {**schedule.own_options(settings.solver), **settings.options}
        settings = replace(settings, **levels)
        spent = _spent(comparison, method, settings)
        requested = (spent,) if nfe is None and spent in nfes else (nfe,) if nfe is not None else ()
        jobs.append(comparison.make_job(method, settings, spent, requested, file))
    for line in warnings:
        distributed.print0(f"Warning: {method.label}: {line}", file=sys.stderr)
    return jobs


def _spent(comparison: Comparison, method: Method, settings: Settings) -> int:
    spent = settings.evaluations(comparison.net, method.predictor)
    if spent < 1:
        raise UserError(f"'{method.label}' would not evaluate the network: give it more noise levels")
    return spent


def _jobs_of(comparison: Comparison, method: Method, nfes: list[int]) -> list[Job]:
    if method.schedule is not None:
        return _scheduled_jobs(comparison, method, nfes)
    if method.predictor is not None or method.settings.sigmas is not None:
        return [comparison.make_job(method, method.settings, _spent(comparison, method, method.settings))]
    tuned = comparison.options.presets == "recommended"
    chosen = [(nfe, *settings_at(method, comparison.net, nfe, tuned)) for nfe in nfes]
    return [comparison.make_job(method, settings, spent, (nfe,)) for nfe, settings, spent in chosen]


def _distinguish(jobs: list[Job]) -> list[Job]:
    """Adds the folder, or more of the path, to the labels of predictors that would be equal."""
    names = (lambda file: file.parent.name, lambda file: f"{file.parent.name}/{file.name}", str)
    kinds = [job.method.label for job in jobs]
    for name in names:
        seen = [(job.method.label, job.nfe) for job in jobs]
        for index, job in enumerate(jobs):
            if seen.count(seen[index]) > 1 and job.method.predictor_file is not None:
                label = f"{kinds[index]} {name(job.method.predictor_file.resolve())}"
                jobs[index] = replace(job, method=replace(job.method, label=label))
    return jobs


def share_out(costs: list[float], processes: int) -> list[list[int]]:
    """Indices of the pieces of work for each process.

    Takes the pieces by decreasing cost; each goes to the process with the least work so far.
    """
    loads, shares = [0.0] * processes, [[] for _ in range(processes)]
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = loads.index(min(loads))
        loads[least] += costs[index]
        shares[least].append(index)
    return [sorted(share) for share in shares]


def prepare(options: CompareOptions, device: torch.device, net=None) -> tuple[Comparison, list[Job]]:
    """The comparison and its jobs. Finds all mistakes before anything is written.

    net: the network to use as it is. Default: the one that the options name is opened.
    """
    if "groups" not in options.written:  # fewer where there are few images
        least = min(options.num // 2, options.num_reference or options.num)
        options = replace(options, groups=max(2, min(options.groups, least)))
    if options.num_reference is None:
        options = replace(options, num_reference=min(256, options.num))
    protocol = Protocol(options.seed, options.num, options.groups, options.num_reference)
    protocol.check()
    nfes = parse_nfe(options.nfe)
    methods = make_methods(options)
    if options.reference_name is None and not options.num_reference:
        raise UserError("nothing to measure: give --ref for FIDs (fid.py ref makes it), or leave --num_reference=0 out")
    folder = options.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--outdir={folder} is a file; choose a folder")
    check_destination(folder / "results.csv", "--outdir")
    seeds = list(range(protocol.first, protocol.first + protocol.num))
    options = replace(options, text=options.text.resolve())
    prompts = options.text.read(options.network, seeds, options.compute.model_path)
    target = detector = None
    if options.reference_name is not None:
        target = find_reference(options.reference_name)
    else:
        distributed.print0("Note: no FIDs, distances only: --ref names reference statistics", file=sys.stderr)
    if target is not None or options.detector is not None:
        detector = choose_detector(options.detector, target, device, options.trust)
    for method in methods:
        if net is None:
            found = remembered_network(method.predictor_file, method.settings, options.compute)
            options = replace(options, compute=found)
    if net is None:
        net = open_network(methods[0].settings, options.compute, device)
    if net.few_step is not None:  # it has no converged solution
        if "num_reference" in options.written and protocol.num_reference:
            raise UserError("--num_reference: a network for few steps has no reference solution; leave it out")
        if options.reference_name is None:
            raise UserError("a network for few steps is compared by FID: give --ref (fid.py ref makes it)")
        options, protocol = replace(options, num_reference=0), replace(protocol, num_reference=0)
    else:
        check_network(net, methods[0].settings, None, device)
    options.text.prepare(net, options.network.dataset_name, prompts)
    # As many columns as fit side by side; fewer of large images, which the page embeds.
    protocol = replace(protocol, pictured=min(protocol.num, 16, max(4, 2**16 // net.img_resolution**2)))
    comparison = Comparison(net, detector, target, protocol, options, device, prompts)
    jobs = make_jobs(comparison, methods, nfes)
    labels = list(dict.fromkeys(job.method.label for job in jobs))
    if options.baseline not in (None, *labels):
        raise UserError(f"--baseline={options.baseline}: choose from the compared methods, {', '.join(labels)}")
    return comparison, jobs


def compute(comparison: Comparison, jobs: list[Job]) -> int:
    """Computes what the cache lacks, shared by the processes. Returns the number of jobs."""
    rank, processes, groups = distributed.rank(), distributed.world_size(), range(comparison.protocol.groups)
    # Only one process looks, since files may appear between the looks of several.
    pending = [not comparison.result_file(job).is_file() for job in jobs]
    pending = [job for job, missing in zip(jobs, distributed.broadcast_object(pending), strict=True) if missing]
    units = [(job, group) for job, group in itertools.product(pending, groups)]
    missing = [not comparison.part_file(job, group).is_file() for job, group in units]
    units = [unit for unit, wanted in zip(units, distributed.broadcast_object(missing), strict=True) if wanted]
    untried = [job for job, group in units if group == 0]

    def try_out():
        for job in untried[rank::processes]:
            comparison.try_out(job)

    def solve():
        if comparison.protocol.num_reference and any(not job.stochastic for job, _ in units):
            for group in groups[rank::processes]:
                if not comparison.solution_file(group).is_file():
                    comparison.solve(group)

    def measure():
        share = share_out([job.nfe for job, _ in units], processes)[rank]
        warm = None
        with progress_bar(len(share), unit="group") as bar:
            for job, group in (units[index] for index in share):
                bar.set_description(f"{job.method.label} {job.nfe}")
                if job is not warm:
                    comparison.warm_up(job)
                    warm = job
                comparison.measure(job, group)
                if processes == 1 and all(comparison.part_file(job, other).is_file() for other in groups):
                    comparison.finish(job)
                bar.update()

    def finish():
        for job in pending[rank::processes]:
            if not comparison.result_file(job).is_file():
                comparison.finish(job)

    for stage in (try_out, solve, measure, finish):
        with distributed.together():
            stage()
    return len(pending)
