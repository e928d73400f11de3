"""Images from noise, with a trained predictor or with any plain solver.

    python sample.py --predictor_path=7                                   # exps/00007-*; its settings
    python sample.py --dataset_name=digits --solver=ipndm --num_steps=6 --grid=True
    python sample.py --dataset_name=ms_coco --solver=dpmpp --num_steps=8 --prompt="a red fox in snow" --batch=4
    torchrun --standalone --nproc_per_node=8 sample.py --predictor_path=7 --seeds=0-49999 --batch=512
    python sample.py --dataset_name=digits --solver=ipndm --candidates=4 --verifier=classifier      # the best of four

One seed is one image, whatever the batch size and the number of processes. A rerun continues where the last one
stopped; ``sampling.json`` beside the images says how they were made. Under torchrun write --r as --solver_r: torchrun
takes --r for one of its own options.

--fid_ref gives the FID of the images as they are made; they are not written then unless --save_images=True.
"""

import hashlib
import json
import math
import platform
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
from click.core import ParameterSource

from fid import StreamedFID
from models import create_model, use_tokenizer, zoo
from models.execution import AUTOCAST, COMPILE_MODES, prepare_network
from models.verifiers import FORMS, Verifier, judge, load_verifier
from solvers import SOLVERS, SampleInfo, make_rule, resolve_sigmas, sample
from solvers.flags import SCHEDULE_NAMES, rule_flags, rule_option_names, schedule_flags
from solvers.loop import afs_direction, check_predictor
from solvers.noise_search import ScoreFile, keep_best
from solvers.schedule_file import Schedule, schedule_file_flag, use_schedule
from solvers.span import SpanStudent
from torch_utils import distributed
from torch_utils.cli import PATH, Command, Number, offline_flag
from torch_utils.download import sha256_of
from torch_utils.errors import UserError
from torch_utils.image_data import atomic_path, decode_image, is_whole_png, remove_leftovers
from torch_utils.image_writer import ImageWriter, image_grid, save_image, to_pixels, to_uint8
from torch_utils.json_file import read_json
from torch_utils.locks import held, is_held, locked
from torch_utils.memory import AUTO, BatchSize, explained_oom, first_batch, is_out_of_memory, release_memory
from torch_utils.progress import progress_bar
from torch_utils.prompts import FILES, read_prompts
from torch_utils.seeds import SeededGenerators, among, candidate_seed, parse_ranges, parse_seeds
from torch_utils.session import session
from torch_utils.signals import Interrupted, deferred_signals
from training.checkpoint import find_predictor, load_predictor
from training.config import code_version

GRID_LIMIT = 100
RECORD = "sampling.json"
_GUIDANCE_OPTIONS = ("guidance_type", "guidance_rate")
TEXT_OPTIONS = ("prompt", "negative_prompt", "tokenizer_path")


# ----------------------------------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class Settings:
    """What is sampled and how; None stands for the network's own value, an option not named for the solver's."""

    dataset_name: str
    solver: str
    num_steps: int | None = 6
    schedule_type: str = "polynomial"
    schedule_rho: float = 7
    sigma_min: float | None = None
    sigma_max: float | None = None
    sigmas: list[float] | None = None  # replaces the five settings above
    sigmas_net: list[float] | None = None  # what the network is told in their place
    afs: bool | str = False
    options: dict = field(default_factory=dict)  # of the solver
    original_code: bool = False  # of solver and schedule
    denoise_to_zero: bool = False
    guidance_type: str | None = None
    guidance_rate: float | None = None

    def rule(self):
        """The solver with its options; UserError where they do not go together."""
        return make_rule(self.solver, self.options, {"original_code": self.original_code})

    def arguments(self) -> dict:
        """Keyword arguments of ``solvers.sample``."""
        names = ("solver", *SCHEDULE_NAMES, "sigmas", "sigmas_net", "afs", "denoise_to_zero", "original_code")
        return {name: getattr(self, name) for name in names} | self.options

    def warnings(self) -> list[str]:
        """One line for every setting that changes nothing."""
        whole = self.sigmas is not None
        bent = not whole and self.schedule_type == "discrete" and self.schedule_rho != 1
        if self.original_code and "original_code" not in SOLVERS[self.solver].options and not bent:
            return [
                f"original_code has no effect on '{self.solver}' with {'this' if whole else self.schedule_type} schedule"
            ]
        return []

    def resolve(self, net) -> torch.Tensor:
        """The noise levels, float64 on the CPU."""
        names = (*SCHEDULE_NAMES, "sigmas", "original_code")
        return resolve_sigmas(net, **{name: getattr(self, name) for name in names})

    def evaluations(self, net, predictor=None) -> int:
        """Network evaluations per image that these settings should take."""
        if predictor is not None:
            calls = predictor.evaluations()
        else:
            calls = self.rule().evaluations(len(self.resolve(net)) - 1, self.afs)
        return (calls + bool(self.denoise_to_zero)) * getattr(net, "evals_per_call", 1)


def settings_from_flags(options: dict, given: set[str]) -> Settings:
    """Settings of a plain solver. options: all flags by name; given: those that the user wrote."""
    solver = options["solver"]
    if options["dataset_name"] is None or solver is None:
        raise UserError("say what to sample: --predictor_path, or --dataset_name together with --solver")
    explicit = {name: options[name] for name in rule_option_names() if name in given and name != "original_code"}
    if make_rule(solver, explicit).needs_predictor:
        raise UserError(f"--solver={solver} needs a trained predictor: give --predictor_path (train.py makes one)")
    if options["sigmas"] is not None:
        extra = [name for name in SCHEDULE_NAMES if name in given]
        if extra:
            raise UserError(f"--sigmas is the whole schedule: leave out --{extra[0]}")
    names = ("dataset_name", "solver", *SCHEDULE_NAMES, "sigmas", "afs", "denoise_to_zero", *_GUIDANCE_OPTIONS)
    values = {name: options[name] for name in names}
    if options["sigmas"] is not None:
        values["num_steps"] = len(options["sigmas"])
    values["sigmas_net"] = options.get("sigmas_net")  # only a schedule file has them
    return Settings(**values, options=explicit, original_code=bool(options["original_code"]))


def settings_from_predictor(config: dict, options: dict, given: set[str]) -> Settings:
    """Settings that a predictor was trained for, with the flags that the user wrote in their place.

    Flags that contradict the training are refused by ``check_network``, as ``solvers.sample`` does;
    those about the network here.
    """
    network = ("dataset_name", *_GUIDANCE_OPTIONS)
    for name in network:
        if name in given and config[name] not in (None, options[name]):
            raise UserError(
                f"--{name}={options[name]}: the predictor was trained with {name}={config[name]}; leave the flag out"
            )
    values = {"solver": config["sampler_stu"], **{name: config[name] for name in (*SCHEDULE_NAMES, "sigmas", "afs")}}
    if given & set(SCHEDULE_NAMES):
        values["sigmas"] = None  # the other way to say where the noise levels are
    values |= {name: options[name] for name in values if name in given}
    if values["sigmas"] is not None:
        values["num_steps"] = len(values["sigmas"])
    # What an old or hand-made predictor may leave open.
    values |= {name: options[name] if config[name] is None else config[name] for name in network}
    if values["dataset_name"] is None:
        raise UserError("this predictor does not say which network it belongs to: give --dataset_name")
    if options["r"] is not None:
        raise UserError("--r is what the predictor learned; leave it out")
    if values["solver"] not in SOLVERS:
        raise UserError(f"the predictor was trained for an unknown solver '{values['solver']}'")
    taken = SOLVERS[values["solver"]].options
    rule_options = {name: config[name] for name in taken if config.get(name) is not None}
    for name in rule_option_names():
        if name in given and name in taken:
            rule_options[name] = options[name]
        elif name in given and options[name] not in (None, False, config.get(name)):
            raise UserError(f"--{name} has no effect with the predictor's solver; leave it out")
    rule_options.pop("original_code", None)
    more = {"original_code": bool(options.get("original_code")), "denoise_to_zero": options["denoise_to_zero"]}
    return Settings(**values, options=rule_options, **more)


def settings_from_student(student: SpanStudent, options: dict, given: set[str]) -> Settings:
    """Settings of a span student; UserError where a flag that the user wrote contradicts them."""
    config = student.config
    own = {name: config[name] for name in ("dataset_name", *_GUIDANCE_OPTIONS)}
    own = {name: options[name] if value is None else value for name, value in own.items()}
    if own["dataset_name"] is None:
        raise UserError("this student does not say which network it belongs to: give --dataset_name")
    brought = {**own, "solver": student.solver, "afs": student.afs}
    brought |= {name: config[name] for name in ("num_steps", "sigma_min", "sigma_max")}
    for name in ("schedule_type", "schedule_rho", "sigmas", *rule_option_names(), *brought):
        if name in given and options[name] != brought.get(name):
            raise UserError(f"--{name}: the span student brings its own solver, schedule and first step; leave it out")
    lists = {name: getattr(student, name)().tolist() for name in ("sigmas", "sigmas_net")}
    return Settings(**brought, **lists, denoise_to_zero=options["denoise_to_zero"])


def settings_of(predictor, options: dict, given: set[str]) -> Settings:
    """Settings that a predictor of any kind was trained for."""
    if isinstance(predictor, SpanStudent):
        return settings_from_student(predictor, options, given)
    return settings_from_predictor(predictor.config, options, given)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling


@dataclass
class Batch:
    """Result of one batch. images: [B,C,H,W] in about [-1, 1]; intermediates: [K,B,C,H,W] denoised images, or None; cond:
    what the network was called with."""

    seeds: list[int]
    images: torch.Tensor
    intermediates: torch.Tensor | None
    info: SampleInfo
    cond: Mapping


@torch.no_grad()
def generate_images(
    net,
    seeds: Sequence[int],
    *,
    batch: int = 64,
    predictor=None,
    labels: int | Sequence[int] | None = None,
    prompts: str | Mapping[int, str] | None = None,
    negative_prompt: str | None = None,
    candidates: int = 1,
    first: int = 0,
    keep_intermediates: bool = False,
    device: torch.device | str | None = None,
    **arguments,
) -> Iterator[Batch]:
    """Samples batch after batch; the noise (and the class, if none is given) of an image depends on its seed alone.

    labels: None, one class for all, or one per seed. prompts: of text-to-image networks, one text for all, or texts by
    seed; negative_prompt: for the unconditional side (None: the network's default). candidates: so many images for each
    seed, one after the other, of one class or prompt, the first of them the usual one. first: how many of all these images
    to leave out. keep_intermediates: also the denoised images at the start of every interval. arguments: as of ``solvers.sample`` (solver, num_steps, afs, ...). device:
    where net is (found if None).
    """
    if device is None:
        device = next(net.parameters()).device
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    rows = [(index, number) for index in range(len(seeds)) for number in range(candidates)][first:]

    def draw(start: int) -> tuple:
        part = rows[start : start + batch]
        chosen = [int(seeds[index]) for index, _ in part]
        noises = SeededGenerators([candidate_seed(seeds[index], number) for index, number in part])
        latents = _to_device(noises.randn(shape), device)
        generators = noises
        if candidates > 1:  # the class is drawn after the noise of the seed itself
            generators = SeededGenerators(chosen)
            generators.randn(shape)
        of_batch = labels if labels is None or isinstance(labels, int) else [labels[index] for index, _ in part]
        cond = net.make_cond(generators, of_batch, **_text_of(chosen, prompts, negative_prompt))
        noises.join(generators)
        return chosen, noises, latents, cond

    drawn = draw(0) if rows else None
    for start in range(0, len(rows), batch):
        chosen, noises, latents, cond = drawn
        denoised: list[torch.Tensor] = []

        def keep(i, sigma, x, image, denoised=denoised):
            denoised.append(net.decode(image))

        x, info = sample(
            net,
            latents,
            predictor=predictor,
            cond=cond,
            return_info=True,
            callback=keep if keep_intermediates else None,
            noise=lambda noises=noises: noises.randn(shape),
            **arguments,
        )
        images = net.decode(x)
        if start + batch < len(rows):  # while a GPU still works on the images above: nothing has waited for them yet
            drawn = draw(start + batch)
        yield Batch(chosen, images, torch.stack(denoised) if keep_intermediates else None, info, cond)


def _to_device(noise: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Through pinned memory to a CUDA device, so that nothing waits for the copy."""
    if torch.device(device).type == "cuda":
        return noise.pin_memory().to(device, non_blocking=True)
    return noise.to(device)


def prompts_of(seeds: list[int], prompts: str | Mapping[int, str] | None) -> list[str] | None:
    """One text per seed, None without prompts."""
    if prompts is None:
        return None
    return [prompts if isinstance(prompts, str) else prompts[seed] for seed in seeds]


def generate_fitting(net, seeds: Sequence[int], *, device: torch.device, **arguments) -> Iterator[Batch]:
    """The same with the largest batch that memory allows: it is halved when an allocation fails, and that is said.

    The images are those of any other batch. Raises UserError where not even one image fits.
    """
    rows = len(seeds) * arguments.get("candidates", 1)
    batch, start, told = min(first_batch(device), max(rows, 1)), 0, None
    while start < rows:
        try:
            for result in generate_images(net, seeds, batch=batch, device=device, first=start, **arguments):
                start += len(result.seeds)
                if told != batch:
                    told = _tell_batch(batch, device)
                yield result
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if batch == 1:
                raise UserError(f"{device} is out of memory even with --batch=1: use another device or --amp") from None
        release_memory()
        batch //= 2


def _tell_batch(batch: int, device: torch.device) -> int:
    rank = f" (rank {distributed.rank()})" if distributed.world_size() > 1 else ""
    print(f"Note: --batch=auto: {batch} images at once fit into the memory of {device}{rank}", file=sys.stderr)
    return batch


def until_stopped(batches: Iterator[Batch], received: list[int]) -> Iterator[Batch]:
    """The batches, up to a failure of another process (UserError) or to a signal (Interrupted)."""
    for result in batches:
        yield result
        distributed.check_peers()
        if received:
            raise Interrupted(received[0], ": the images that are done are kept; repeat the command to go on")


def _text_of(seeds: list[int], prompts: str | Mapping[int, str] | None, negative_prompt: str | None) -> dict:
    """Keyword arguments of ``make_cond``; none for networks that take no prompts."""
    own = prompts if isinstance(prompts, str) else prompts_of(seeds, prompts)
    text = {"prompts": own, "negative_prompt": negative_prompt}
    return {name: value for name, value in text.items() if value is not None}


# ----------------------------------------------------------------------------------------------------------------------
# The output folder


@dataclass(frozen=True)
class Folder:
    """Where the image of a seed and its companions lie."""

    path: Path
    subdirs: bool
    inters: bool

    def image(self, seed: int) -> Path:
        parent = self.path / f"{seed - seed % 1000:06d}" if self.subdirs else self.path
        return parent / f"{seed:06d}.png"

    def strip(self, seed: int) -> Path:
        return self.path / "inters" / f"{seed:06d}.png"

    @property
    def grid(self) -> Path:
        return self.path / "grid.png"

    def scores(self) -> ScoreFile:
        """What the search over noises chose, and why."""
        return ScoreFile(self.path, distributed.rank())

    def done(self, seed: int) -> bool:
        return is_whole_png(self.image(seed)) and (not self.inters or is_whole_png(self.strip(seed)))

    def begun(self) -> list[int]:
        """The seeds of which there are images or strips."""
        parents = [self.path, self.path / "inters"]
        if self.subdirs and self.path.is_dir():
            parents += [path for path in self.path.iterdir() if re.fullmatch("[0-9]{6,10}", path.name)]
        files = {path for parent in parents if parent.is_dir() for path in parent.iterdir()}
        numbers = {int(path.stem) for path in files if re.fullmatch(r"[0-9]{6,10}\.png", path.name)}
        return sorted(seed for seed in numbers if not files.isdisjoint((self.image(seed), self.strip(seed))))

    def record(self) -> dict | None:
        """The contents of ``sampling.json``, None where there is none."""
        path = self.path / RECORD
        if not path.exists():
            return None
        try:
            record = read_json(path)
            parse_ranges(record["seeds"])
            dict(record["settings"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{path} is not a record of sample.py; choose another --outdir") from None
        return record


def format_seeds(seeds: Sequence[int]) -> str:
    """The inverse of ``parse_seeds``: [0, 1, 2, 7] -> "0-2,7" (sorted, repetitions dropped)."""
    parts: list[list[int]] = []
    for seed in sorted(set(seeds)):
        if parts and seed == parts[-1][1] + 1:
            parts[-1][1] = seed
        else:
            parts.append([seed, seed])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


class OtherSettings(UserError):
    """The folder holds images of other settings, or is about to."""


def prepare_folder(
    folder: Folder, record: dict, seeds: list[int], overwrite: bool, *, busy: bool = False, keep_others: bool = False
) -> list[int]:
    """Sees to it that the folder will hold images of one kind only, writes its record, returns the seeds to do.

    busy: another command is writing images there. keep_others: not even ``overwrite`` replaces
    images of other settings.
    """
    old = folder.record()
    made: list[int] = []
    if old is not None:
        before = Folder(folder.path, bool(old["settings"].get("subdirs")), inters=False)
        made = parse_seeds(old["seeds"]) if busy else among(before.begun(), parse_ranges(old["seeds"]))
        different = _difference(old["settings"], record["settings"])
        if different and busy:
            raise OtherSettings(
                f"another command is writing images with other settings to {folder.path} ({different});"
                " choose another --outdir"
            )
        if made and different:
            _check_replacement(folder, seeds, made, different, overwrite and not keep_others)
            _remove(before, made)
            made = []
    elif not overwrite and any(folder.image(seed).exists() for seed in seeds):
        raise UserError(
            f"{folder.path} holds images but no {RECORD}, so nobody knows how they were made;"
            " choose another --outdir, or --overwrite=True to replace them"
        )
    record = record | {"seeds": format_seeds([*made, *seeds])}
    with atomic_path(folder.path / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    todo = seeds if overwrite else [seed for seed in seeds if not folder.done(seed)]
    for parent in {folder.path, folder.path / "inters", *(folder.image(seed).parent for seed in todo)}:
        remove_leftovers(parent)
    return todo


class Place:
    """The output folder during a run; only the first process of a run works with it.

    Several commands with the same settings may write to one folder at the same time, each its own
    seeds: the record is changed under a lock, and every command holds a lock of its own as long as it
    writes, so that one with other settings is refused. locks: holds it, and gives it back in the end.
    """

    def __init__(self, folder: Folder, locks: ExitStack):
        self.folder, self._locks = folder, locks
        self._mark = folder.path / f".writing-{secrets.token_hex(6)}.lock"

    def _locked(self):
        path = self.folder.path
        return locked(path / ".record.lock", f"another command is starting or ending in {path}; waiting for it")

    def _busy(self) -> bool:
        return any([is_held(path) for path in self.folder.path.glob(".writing-*.lock")])  # all: it removes old ones

    def begin(self, *arguments, **more) -> list[int]:
        """``prepare_folder``, and what a killed run left is put in order."""
        with self._locked():
            busy = self._busy()
            todo = prepare_folder(self.folder, *arguments, busy=busy, **more)
            if not busy:
                self.folder.scores().merge()
            self._locks.enter_context(held(self._mark, f"{self._mark} is in use"))
        return todo

    def end(self) -> None:
        """All images are written."""
        with self._locked():
            self._locks.close()
            if not self._busy():
                self.folder.scores().merge()


def begin_folder(
    folder: Folder, default: bool, locks: ExitStack, record: dict, seeds: list[int], overwrite: bool
) -> tuple:
    """(place, seeds to do). default: the user named no folder; where the usual one holds images of other settings, a
    folder beside it is taken, named after the settings. locks: see ``Place``."""
    if not default:
        place = Place(folder, locks)
        return place, place.begin(record, seeds, overwrite)
    settings = {name: value for name, value in _meaning(record["settings"]).items() if name != "subdirs"}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    own = Place(replace(folder, path=folder.path.with_name(f"{folder.path.name}_{digest}")), locks)
    if own.folder.record() is not None:
        return own, own.begin(record, seeds, overwrite)
    usual = Place(folder, locks)
    try:
        return usual, usual.begin(record, seeds, overwrite, keep_others=True)
    except OtherSettings as error:
        print(f"Note: {str(error).partition(';')[0]}; writing to {own.folder.path}", file=sys.stderr)
    return own, own.begin(record, seeds, overwrite)


def _check_replacement(folder: Folder, seeds: list[int], made: list[int], different: str, overwrite: bool) -> None:
    """Images made with other settings may go only if the user says so and all of them are replaced."""
    if not overwrite:
        raise OtherSettings(
            f"{folder.path} holds images made with other settings ({different});"
            " choose another --outdir, or --overwrite=True to replace them"
        )
    rest = sorted(set(made) - set(seeds))
    if rest:
        raise UserError(
            f"{folder.path} also holds seeds {format_seeds(rest)[:60]} made with other settings ({different});"
            f" choose another --outdir, or overwrite all of them (--seeds={format_seeds(made)[:60]})"
        )


def _remove(folder: Folder, seeds: list[int]) -> None:
    """Removed at once and not one by one: a rerun that breaks off must not leave a mixture."""
    for seed in seeds:
        folder.image(seed).unlink(missing_ok=True)
        folder.strip(seed).unlink(missing_ok=True)
    folder.grid.unlink(missing_ok=True)
    folder.scores().remove()


def _meaning(settings: dict) -> dict:
    """What the images depend on, of the settings of a record: the noise levels, not how they were asked for; the
    strength of the guidance that the network has."""
    found = {name: value for name, value in json.loads(json.dumps(settings)).items() if value is not None}
    if "sigmas" in found:
        found = {name: value for name, value in found.items() if name not in SCHEDULE_NAMES}
    found.pop("guidance_type", None)
    if not found.get("guidance_rate"):
        found.pop("guidance_rate", None)
    return found


def _difference(old: dict, new: dict) -> str:
    """The first setting that makes other images, "" where there is none."""
    before, now = _meaning(old), _meaning(new)
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if "sigmas" in names:  # said in the words of the flags
        names += [name for name in SCHEDULE_NAMES if old.get(name) != new.get(name)]
    first = ("predictor_sha256", "network_sha256", "solver", *SCHEDULE_NAMES)
    for name in [*(name for name in first if name in names), *names]:
        return f"{name}: {_short(old.get(name))} there, {_short(new.get(name))} now"
    return ""


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def write_grid(folder: Folder, seeds: Sequence[int]) -> None:
    """One picture of the images of the first seeds, in seed order, read back from their files."""
    chosen = sorted(seeds)[:GRID_LIMIT]
    images = [decode_image(folder.image(seed).read_bytes(), str(folder.image(seed))) for seed in chosen]
    stacked = np.stack(images).transpose(0, 2, 3, 1)
    save_image(image_grid(stacked, columns=math.ceil(math.sqrt(len(chosen)))), folder.grid)


# ----------------------------------------------------------------------------------------------------------------------
# One run


def open_predictor(options: dict, given: set[str]):
    """(settings, predictor or None, the predictor's file or None)."""
    if options["predictor_path"] is None:
        return settings_from_flags(options, given), None, None
    path = find_predictor(options["predictor_path"])
    predictor = load_predictor(path)
    return settings_of(predictor, options, given), predictor, path


def read_text(prompt: str | None, dataset_name: str, seeds: list[int]) -> str | dict[int, str] | None:
    """What --prompt says: a text for all images, or the captions of a .txt or .csv file by their seeds."""
    card = zoo.find_card(dataset_name)
    if prompt is None and card is not None and card.takes_prompts:  # said before gigabytes are read
        raise _text_is_missing(dataset_name)
    if prompt is None or not _is_file_of_prompts(prompt):
        return prompt
    captions = read_prompts(prompt)
    without = [seed for seed in seeds if seed not in captions]
    if without:
        raise UserError(
            f"{prompt} has no caption for seeds {format_seeds(without)[:60]}; it has them for --seeds="
            f"{format_seeds(captions)[:60]}"
        )
    return captions


def _text_is_missing(dataset_name: str) -> UserError:
    return UserError(f"{dataset_name} needs a text: give --prompt=TEXT, or --prompt=FILE with captions (.txt or .csv)")


def _is_file_of_prompts(prompt: str) -> bool:
    return Path(prompt).suffix.lower() in FILES


def check_text(net, dataset_name: str, options: dict, prompts) -> None:
    """UserError where prompts are missing, are of no use, or cannot be encoded."""
    if not getattr(net, "takes_prompts", False):
        for given in TEXT_OPTIONS:
            if options[given] is not None:
                raise UserError(f"--{given}: {dataset_name} is no text-to-image network; leave it out")
        return
    if prompts is None:
        raise _text_is_missing(dataset_name)
    if options["negative_prompt"] is not None and net.evals_per_call == 1:
        raise UserError("--negative_prompt has no effect without classifier-free guidance; leave it out")
    if options["tokenizer_path"] is not None:
        use_tokenizer(net, options["tokenizer_path"])
    seed = next(iter(prompts)) if isinstance(prompts, dict) else 0
    net.make_cond(SeededGenerators([seed]), **_text_of([seed], prompts, options["negative_prompt"]))


def recorded_text(options: dict) -> dict:
    """The texts that were given, of a file its name and checksum."""
    texts = {name: options[name] for name in ("prompt", "negative_prompt") if options.get(name) is not None}
    if "prompt" in texts and _is_file_of_prompts(texts["prompt"]):
        path = Path(texts["prompt"])
        texts["prompt"] = {"file": path.name, "sha256": sha256_of(path)}
    return texts


def open_network(settings: Settings, options: dict, predictor, device: torch.device):
    """The network, with precision and memory layout as asked; warns where the predictor was trained on another one."""
    net = create_model(
        settings.dataset_name, options["model_path"], settings.guidance_type, settings.guidance_rate, device
    )
    prepare_network(net, options["amp"], options["channels_last"], options["compile"])
    # What the network cannot do is said before anything is written.
    if options["class_idx"] is not None:
        net.make_cond(SeededGenerators([0]), options["class_idx"])
    check_network(net, settings, predictor, device)
    return net


def check_network(net, settings: Settings, predictor, device: torch.device) -> None:
    """UserError where the network cannot do what the settings ask; warns where the predictor belongs to other weights."""
    if settings.afs:
        zero = torch.zeros(1, net.img_channels, net.img_resolution, net.img_resolution, device=device)
        kind = predictor.first_direction if isinstance(predictor, SpanStudent) else settings.afs
        afs_direction(net, zero, torch.ones((), device=device), kind)
    if isinstance(predictor, SpanStudent):
        predictor.check_network(net)
    elif predictor is not None:
        rule, sigmas = settings.rule(), settings.resolve(net)
        try:
            check_predictor(predictor, net, rule, sigmas, vars(settings))
        except UserError as error:
            raise UserError(f"--{error}") from None
    if predictor is not None:
        resolution = predictor.config["img_resolution"]
        if resolution not in (None, net.img_resolution):
            raise UserError(f"the predictor is for images of {resolution} pixels, the network for {net.img_resolution}")
        trained_on = predictor.provenance.get("network_hash")
        if trained_on not in (None, net.weights_hash) and distributed.rank() == 0:
            print(f"Warning: the predictor was trained on other weights than {net.source_path}", file=sys.stderr)


def check_search(candidates: int | None, verifier: str | None) -> None:
    """UserError where --candidates and --verifier do not go together."""
    if candidates is not None and candidates < 1:
        raise UserError(f"--candidates={candidates}: of every seed there must be at least 1 image")
    if verifier is None and candidates not in (None, 1):
        raise UserError(f"--candidates={candidates}: say how to choose among them, --verifier={FORMS}")
    if verifier is not None and candidates is None:
        raise UserError(f"--verifier={verifier[:100]} has no effect without --candidates=N: give both or none")


def open_verifier(text: str | None, net, device: torch.device) -> Verifier | None:
    if text is None:
        return None
    with distributed.local_main_first():
        return load_verifier(text, net, device)


def search(
    batches: Iterator[Batch], verifier: Verifier, candidates: int, prompts, scores: ScoreFile
) -> Iterator[Batch]:
    """The best candidate of every seed; what was chosen goes to ``scores``."""

    def score(batch: Batch, rows: list[int]) -> torch.Tensor:
        seeds = [batch.seeds[row] for row in rows]
        pixels = torch.from_numpy(to_uint8(batch.images[rows])).permute(0, 3, 1, 2).contiguous()
        labels = batch.cond.get("class_labels")
        return judge(verifier, pixels, seeds, None if labels is None else labels[rows], prompts_of(seeds, prompts))

    return keep_best(batches, candidates, score, scores.add)


def recorded_settings(settings: Settings, options: dict, net, predictor_file: Path | None) -> dict:
    """What the images depend on, with the defaults of the solver and the noise levels spelled out."""
    rule, sigmas = settings.rule(), settings.resolve(net)
    recorded = asdict(settings) | {"fingerprint": rule.bind(net, sigmas).fingerprint}
    for name in recorded.pop("options") | rule.options:
        value = getattr(rule, name)
        recorded[name] = str(value) if value in (math.inf, -math.inf) else value  # JSON has no infinity
    recorded["original_code"] = getattr(rule, "original_code", None) or None
    recorded["guidance_rate"] = getattr(net, "guidance_rate", None)  # None: the network takes no guidance
    return recorded | {
        **recorded_text(options),
        "sigmas": sigmas.tolist(),
        "class": options["class_idx"],
        "amp": options["amp"],
        **({"compile": options["compile"]} if options["compile"] != "none" else {}),
        "network_sha256": net.weights_hash,
        "predictor_sha256": sha256_of(predictor_file) if predictor_file is not None else None,
    }


def describe_run(
    settings: Settings, options: dict, net, predictor, predictor_file: Path | None, verifier: Verifier | None, device
) -> dict:
    """The record of a run. What changes the images is under "settings"; a folder holds images of one such setting."""
    recorded = recorded_settings(settings, options, net, predictor_file) | {"subdirs": options["subdirs"]}
    nfe = settings.evaluations(net, predictor)
    spent = {"nfe": nfe}
    if verifier is not None:
        candidates = options["candidates"]
        recorded |= {"candidates": candidates, "verifier": verifier.name, "verifier_sha256": verifier.digest}
        spent = {"nfe": candidates * nfe, "nfe_per_candidate": nfe, "scores": ScoreFile.NAME}
    return {
        "settings": recorded,
        **spent,
        "network_file": net.source_path,
        "tokenizer_path": options["tokenizer_path"],
        "predictor_file": str(predictor_file) if predictor_file is not None else None,
        "batch": options["batch"],
        "processes": distributed.world_size(),
        "device": device.type,
        "versions": {"code": code_version(), "python": platform.python_version(), "torch": torch.__version__},
    }


def write_images(
    batches: Iterator[Batch], folder: Folder | None, nfe: int, progress, stream: StreamedFID | None = None
) -> None:
    """Drains ``generate_images`` into the files of a folder, a stream of features, or both.

    Files are encoded and written in the background. UserError, naming the seeds, where an image is not finite.
    """
    with ImageWriter() as writer:
        for result in batches:
            if result.info.nfe != nfe:
                raise RuntimeError(f"sampling took {result.info.nfe} network evaluations instead of {nfe}")
            pixels = to_pixels(result.images)
            finite = result.images.isfinite().flatten(1).all(dim=1).tolist()
            if stream is not None and all(finite):
                stream.append(pixels)
            images = None if folder is None else to_uint8(pixels)
            for row, seed in enumerate(result.seeds):
                if folder is None or not finite[row]:
                    continue
                if folder.inters:
                    steps = to_uint8(torch.cat([result.intermediates[:, row], result.images[row : row + 1]]))
                    writer.submit(image_grid(steps, columns=len(steps)), folder.strip(seed))
                writer.submit(images[row], folder.image(seed))
            bad = [seed for seed, good in zip(result.seeds, finite, strict=True) if not good]
            if bad:
                raise UserError(
                    f"not finite (NaN or infinite) for seeds {format_seeds(bad)[:200]}: not written;"
                    " try --amp=none, more steps or another solver"
                )
            progress.update(len(result.seeds))


def open_stream(options: dict, given: set[str], count: int, device: torch.device) -> StreamedFID | None:
    """What --fid_ref asks for; sets ``options["save_images"]``. UserError for flags that would have no effect."""
    if options["fid_ref"] is None:
        for name in ("fid_detector", "fid_json", "save_images"):
            if name in given and options[name] is not True:
                raise UserError(f"--{name} goes with --fid_ref; leave it out, or give the reference as well")
        options["save_images"] = True
        return None
    options["save_images"] = bool(options["save_images"])
    if not options["save_images"]:
        for name in ("outdir", "grid", "return_inters", "overwrite", "subdirs", "candidates"):
            if name in given:
                raise UserError(f"--{name}: with --fid_ref nothing is written; add --save_images=True or leave it out")
    return StreamedFID(options["fid_ref"], count, options["fid_detector"], device)


def report_fid(stream: StreamedFID, options: dict, record: dict, source: str) -> None:
    """Every process calls it; rank 0 prints the FID, and writes it beside the record of the run with --fid_json."""
    result = stream.result(source)
    if result is None:
        return
    if options["fid_json"] is not None:
        content = asdict(result) | {"sampling": record | {"seeds": format_seeds(parse_seeds(options["seeds"]))}}
        with atomic_path(options["fid_json"]) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(result.line(), flush=True)


def run(options: dict, given: set[str], device: torch.device, schedule: Schedule | None = None) -> None:
    """Everything between the flags and the last file; every process of a torchrun calls it."""
    seeds = parse_seeds(options["seeds"])
    check_search(options["candidates"], options["verifier"])
    settings, predictor, predictor_file = open_predictor(options, given)
    options["prompt"] = zoo.resolve_prompts(options["prompt"])
    prompts = read_text(options["prompt"], settings.dataset_name, seeds)
    net = open_network(settings, options, predictor, device)
    warnings = settings.warnings()
    if schedule is not None:
        warnings += schedule.warnings(net, settings.solver, settings.afs)
    for line in warnings:
        distributed.print0(f"Warning: {line}", file=sys.stderr)
    check_text(net, settings.dataset_name, options, prompts)
    verifier, candidates = open_verifier(options["verifier"], net, device), options["candidates"] or 1
    record = describe_run(settings, options, net, predictor, predictor_file, verifier, device)
    stream = open_stream(options, given, len(seeds), device)
    nfe = settings.evaluations(net, predictor)
    best_of = "" if verifier is None else f"_best{candidates}"
    default = Path("samples") / settings.dataset_name / f"{settings.solver}_nfe{nfe}{best_of}"
    folder = Folder(Path(options["outdir"] or default), options["subdirs"], options["return_inters"])
    distributed.barrier()  # nothing is written before every process has got so far
    with ExitStack() as locks:
        place, todo, error = None, None, None
        if distributed.rank() == 0 and options["save_images"]:
            try:
                place, todo = begin_folder(
                    folder, options["outdir"] is None, locks, record, seeds, options["overwrite"]
                )
                folder = place.folder
            except Exception as exc:  # raised by agree(), on every rank
                error = exc
        distributed.agree(error)
        if stream is not None:  # features come from images as they are made: those of an earlier run are made again
            todo = seeds
        todo, folder = distributed.broadcast_object((todo, folder))

        share = todo[distributed.rank() :: distributed.world_size()]
        started = time.perf_counter()
        generate = generate_fitting if options["batch"] == AUTO else partial(generate_images, batch=options["batch"])
        advice = f"lower --batch (now {options['batch']}), or --batch=auto"
        try:
            batches = generate(
                net,
                share,
                predictor=None if predictor is None else predictor.to(device),
                labels=options["class_idx"],
                prompts=prompts,
                negative_prompt=options["negative_prompt"],
                candidates=candidates,
                keep_intermediates=folder.inters,
                device=device,
                **settings.arguments(),
            )
            if verifier is not None:
                batches = search(batches, verifier, candidates, prompts, folder.scores())
            with (
                deferred_signals() as received,
                progress_bar(len(share), unit="img", desc=folder.path.name) as bar,
                explained_oom(device, advice),
            ):
                target = folder if options["save_images"] else None
                write_images(until_stopped(batches, received), target, nfe, bar, stream)
        except Exception as exc:  # raised by agree(), on every rank
            error = exc
        distributed.agree(error)
        seconds = time.perf_counter() - started
        if distributed.rank() == 0:
            if place is not None:
                place.end()
            if options["grid"]:
                write_grid(folder, seeds)
            each = "" if verifier is None else f" ({candidates} candidates of {nfe})"
            print(
                f"sampled {len(todo)} images ({len(seeds) - len(todo)} skipped) NFE={record['nfe']}{each} in {seconds:.1f} s"
                f" ({len(todo) / max(seconds, 1e-9):.1f} img/s)"
                + (f" -> {folder.path}" if options["save_images"] else ""),
                flush=True,
            )
        if stream is not None:
            report_fid(
                stream, options, record, str(folder.path) if options["save_images"] else "sample.py, not written"
            )
        distributed.barrier()


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def text_flags(which_caption: str):
    """Decorator: the flags of text-to-image networks. which_caption: what decides between the captions of a file."""
    options = (
        click.option(
            "--prompt",
            type=PATH,
            metavar="TEXT|FILE",
            help="Text-to-image networks: a text for all images, or a .txt (one a line) or .csv file of captions,"
            f" {which_caption}; {zoo.COCO_30K}: the 30,000 captions of MS-COCO, downloaded",
        ),
        click.option(
            "--negative_prompt", metavar="TEXT", help="What the guidance leads away from (default: an empty text)"
        ),
        click.option(
            "--tokenizer_path", type=PATH, metavar="DIR", help="Tokenizer of Stable Diffusion (default: from the hub)"
        ),
    )

    def add(command):
        for option in reversed(options):
            command = option(command)
        return command

    return add


def compile_flag(command):
    """Decorator: the flag --compile of commands that only run the network forwards."""
    return click.option(
        "--compile",
        type=click.Choice(COMPILE_MODES),
        default="none",
        show_default=True,
        is_flag=False,
        flag_value="default",
        help="torch.compile of the network (--compile is --compile=default); minutes to start. reduce-overhead records CUDA"
        " graphs, for small batches",
    )(command)


def _plain_solvers() -> str:
    return ", ".join(name for name, rule in SOLVERS.items() if not rule.needs_predictor)


@click.command(cls=Command, may_be_empty=("prompt", "negative_prompt"))
@click.option(
    "--predictor_path", type=PATH, metavar="N|DIR|FILE", help="Trained predictor: experiment number, folder or file"
)
@click.option("--dataset_name", metavar="NAME", help="Network, where there is no predictor: digits, cifar10, ...")
@click.option(
    "--model_path",
    type=PATH,
    metavar="FILE",
    help="The network's file (default: embedded or downloaded); diffusers: a folder or hub id",
)
@click.option("--solver", metavar="NAME", help=f"Plain solver: {_plain_solvers()}")
@schedule_flags
@schedule_file_flag
@rule_flags
@click.option("--denoise_to_zero", type=bool, default=False, show_default=True, help="One more evaluation at the end")
@click.option("--guidance_type", metavar="NAME", help="Guidance, where the network takes one")
@click.option("--guidance_rate", type=Number(), help="Its strength (default: 7.5 for cfg, 1 for cg)")
@text_flags("the number of a caption being its seed")
@click.option("--seeds", default="0-63", show_default=True, help="One image each: 0-63 or 1,2,5-10")
@click.option(
    "--batch",
    type=BatchSize(),
    default=64,
    show_default=True,
    help="Images per process and network call; auto: as many as fit into memory. The noise does not depend on it, but rounding"
    " does: single pixels change by one grey level, under --amp most of them and by several",
)
@click.option("--class", "class_idx", type=click.IntRange(min=0), help="Class of all images (default: drawn per seed)")
@click.option(
    "--candidates",
    type=int,
    metavar="N",
    help="Noise search: for every seed the best of N images is kept; N times the evaluations",
)
@click.option("--verifier", type=PATH, metavar="V", help=f"What is best: {FORMS} (models/verifiers.py)")
@click.option(
    "--outdir",
    type=PATH,
    metavar="DIR",
    help="Default: samples/<dataset_name>/<solver>_nfe<NFE>[_best<N>], or a"
    " folder beside it where that holds images of other settings",
)
@click.option("--subdirs", type=bool, default=True, show_default=True, help="A folder for every 1000 seeds")
@click.option("--grid", type=bool, default=False, show_default=True, help=f"Also grid.png, of up to {GRID_LIMIT}")
@click.option(
    "--return_inters", type=bool, default=False, show_default=True, help="Also strips of denoised images, in inters/"
)
@click.option("--fid_ref", type=PATH, metavar="NPZ|URL|NAME", help="Also the FID of these images, as fid.py calc --ref")
@click.option(
    "--fid_detector", type=PATH, metavar="NAME|PATH", help="Its detector (default: the reference's, else inception)"
)
@click.option(
    "--fid_json", type=PATH, metavar="FILE", help="Also write the FID and how the images were made to this file"
)
@click.option("--save_images", type=bool, help="Write images (default: True, with --fid_ref False)")
@click.option("--overwrite", type=bool, default=False, show_default=True, help="Redo images that exist already")
@click.option("--amp", type=click.Choice(list(AUTOCAST)), default="none", show_default=True, help="Mixed precision")
@click.option("--use_fp16", type=bool, default=False, show_default=True, help="The same as --amp=fp16")
@compile_flag
@click.option("--channels_last", type=bool, help="Memory layout (default: True on the CPU in float32)")
@click.option("--device", help="cpu, cuda or mps (default: the best there is)")
@offline_flag
@click.pass_context
def main(ctx, **options):
    """Samples images, one per seed, with a trained predictor or a plain solver."""
    given = {name for name in options if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT}
    if options["use_fp16"]:
        if "amp" in given and options["amp"] != "fp16":
            raise UserError(f"--use_fp16=True means --amp=fp16, but --amp={options['amp']} was given; choose one")
        options["amp"] = "fp16"
    schedule = use_schedule(options, given)
    with session(options["device"]) as device:
        run(options, given, device, schedule)


if __name__ == "__main__":
    main()
