"""One run of sample.py: everything between the flags and the last file."""

import platform
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from evaluation.fid import StreamedFID
from evaluation.verifiers import FORMS, Verifier, judge, load_verifier
from models import zoo
from sampling.folder import Folder, begin_folder, format_seeds, write_grid
from sampling.generate import Batch, generate_fitting, generate_images, prompts_of, until_stopped
from sampling.search import ScoreFile, keep_best
from sampling.settings import Settings, check_text, open_network, open_predictor, read_text, recorded_settings
from solvers.schedule_file import Schedule
from torch_utils import distributed
from torch_utils.errors import UserError
from torch_utils.files import write_json
from torch_utils.images import ImageWriter, image_grid, to_pixels, to_uint8
from torch_utils.memory import AUTO, explained_oom
from torch_utils.progress import progress_bar
from torch_utils.seeds import parse_seeds
from torch_utils.session import deferred_signals
from torch_utils.version import code_version


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
        write_json(options["fid_json"], content)
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
        place, todo = None, None
        with distributed.together():
            if distributed.rank() == 0 and options["save_images"]:
                place, todo = begin_folder(
                    folder, options["outdir"] is None, locks, record, seeds, options["overwrite"]
                )
                folder = place.folder
        if stream is not None:  # features come from images as they are made: those of an earlier run are made again
            todo = seeds
        todo, folder = distributed.broadcast_object((todo, folder))

        share = todo[distributed.rank() :: distributed.world_size()]
        started = time.perf_counter()
        generate = generate_fitting if options["batch"] == AUTO else partial(generate_images, batch=options["batch"])
        advice = f"lower --batch (now {options['batch']}), or --batch=auto"
        with distributed.together():
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
