"""One run of sample.py, from the options to the last file."""

import platform
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from evaluation.fid import StreamedFID
from evaluation.verifiers import Verifier, check_verifier, load_verifier, score_images
from models.compile import check_compile, prepare_network
from sampling.folder import Folder, Place, begin_folder, default_folder, format_seeds, write_grid
from sampling.generate import Batch, generate_fitting, generate_images, prompts_of, text_of, until_stopped
from sampling.inputs import ImageInputs
from sampling.options import SampleOptions
from sampling.path_search import search_images
from sampling.quantized import quantized_network
from sampling.search import ScoreFile, keep_best
from sampling.settings import (
    Settings,
    check_network,
    open_network,
    open_predictor,
    recorded_settings,
    remembered_network,
)
from solvers import SOLVERS
from solvers.recommended import default_nfe
from torch_utils import distributed
from torch_utils.errors import UserError
from torch_utils.files import write_json
from torch_utils.images import ImageWriter, image_grid, to_pixels, to_uint8
from torch_utils.memory import AUTO, explained_oom
from torch_utils.progress import progress_bar
from torch_utils.seeds import parse_seeds
from torch_utils.session import deferred_signals
from torch_utils.transfer import Arrival, one_ahead, to_device
from torch_utils.version import code_version


def open_verifier(text: str | None, net, device: torch.device) -> Verifier | None:
    if text is None:
        return None
    with distributed.local_main_first():
        return load_verifier(text, net, device)


def score_of(verifier: Verifier, images: torch.Tensor, seeds: list[int], cond, rows, prompts) -> torch.Tensor:
    """Scores of images [B,C,H,W] in [-1, 1], of these rows of a batch with condition ``cond``."""
    pixels = torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2).contiguous()
    labels = cond.get("class_labels")
    if labels is not None:
        labels = labels.index_select(0, to_device(torch.tensor(list(rows)), labels.device))
    return score_images(verifier, pixels, seeds, labels, prompts_of(seeds, prompts))


def search(
    batches: Iterator[Batch], verifier: Verifier, candidates: int, prompts, scores: ScoreFile
) -> Iterator[Batch]:
    """The best candidate of every seed. The choices are written to ``scores``."""

    def score(batch: Batch, rows: list[int]) -> torch.Tensor:
        seeds = [batch.seeds[row] for row in rows]
        images = batch.images.index_select(0, to_device(torch.tensor(rows), batch.images.device))
        return score_of(verifier, images, seeds, batch.cond, rows, prompts)

    return keep_best(batches, candidates, score, scores.add)


def describe_run(
    settings: Settings, options: SampleOptions, net, predictor, predictor_file, verifier: Verifier | None, device
) -> dict:
    """The record of a run.

    "settings" holds everything that changes the images. A folder holds images of one such setting.
    """
    recorded = recorded_settings(settings, net, predictor_file, *options.recorded_parts())
    nfe = settings.evaluations(net, predictor)
    spent = {"nfe": nfe}
    if verifier is not None:
        candidates = options.search.candidates
        recorded |= {"candidates": candidates, "verifier": verifier.name, "verifier_sha256": verifier.digest}
        spent = {"nfe": candidates * nfe, "nfe_per_candidate": nfe, "scores": ScoreFile.NAME}
    if options.search.along_path:
        spent = {"nfe": options.search.budget}  # at most
    return {
        "settings": recorded,
        **spent,
        "network_file": net.source_path,
        "tokenizer_path": options.text.tokenizer_path,
        "predictor_file": str(predictor_file) if predictor_file is not None else None,
        "batch": options.batch,
        "processes": distributed.world_size(),
        "device": device.type,
        "versions": {"code": code_version(), "python": platform.python_version(), "torch": torch.__version__},
    }


def write_images(
    batches: Iterator[Batch],
    folder: Folder | None,
    nfe: int | None,
    progress,
    stream: StreamedFID | None = None,
    ahead: bool = False,
) -> None:
    """Writes the batches of ``generate_images`` to a folder, a stream of features, or both.

    batches: the batches.
    folder: output folder; None: write no images.
    nfe: evaluations per image that every batch must have spent; None: they differ.
    progress: progress bar.
    stream: receives the pixels of all images, to measure them. Default None.
    ahead: start every batch before the one before it is read. Default False.

    Files are encoded and written in the background. Raises UserError with the seeds of images that
    are not finite.
    """
    strips = folder is not None and folder.inters

    def start(result: Batch) -> tuple[Batch, torch.Tensor, Arrival]:
        """Begins to copy the pixels of a batch, and whether its images are finite, to the host."""
        if nfe is not None and result.info.nfe != nfe:
            raise RuntimeError(f"sampling took {result.info.nfe} network evaluations instead of {nfe}")
        images = result.images[None]
        pixels = to_pixels(torch.cat([result.intermediates, images]) if strips else images)
        finite = result.images.isfinite().flatten(1).all(dim=1).to(torch.uint8)
        return result, pixels, Arrival(torch.cat([pixels.flatten(), finite]))

    # A GPU works on the next batch while the host writes this one.
    started = map(start, batches)
    with ImageWriter() as writer:
        for result, pixels, arrival in one_ahead(started) if ahead else started:
            count = len(result.seeds)
            everything = arrival.read()
            finite = [bool(value) for value in everything[-count:]]
            if stream is not None and all(finite):
                stream.append(pixels[-1], result.seeds)
            steps = everything[:-count].view(pixels.shape)
            images = to_uint8(steps[-1])
            for row, seed in enumerate(result.seeds):
                if folder is None or not finite[row]:
                    continue
                if strips:
                    writer.submit(image_grid(to_uint8(steps[:, row]), columns=len(steps)), folder.strip(seed))
                writer.submit(images[row], folder.image(seed))
            bad = [seed for seed, good in zip(result.seeds, finite, strict=True) if not good]
            if bad:
                raise UserError(
                    f"not finite (NaN or infinite) for seeds {format_seeds(bad)[:200]}: not written;"
                    " try --amp=none, more steps or another solver"
                )
            progress.update(count)


def _search_paths(settings: Settings, options: SampleOptions, verifier: Verifier, net, seeds, **arguments):
    """``search_images`` with the arguments of ``generate_images``."""
    prompts, negative = arguments["prompts"], arguments["negative_prompt"]
    return search_images(
        net,
        seeds,
        lambda image, seed, cond: float(score_of(verifier, image, [seed], cond, [0], prompts)),
        method=options.search.search,
        budget=options.search.budget,
        first=options.search.candidates,
        sigmas=settings.resolve(net),
        finish=settings.make_solver(),
        device=arguments["device"],
        labels=arguments["labels"],
        text=lambda seeds: text_of(seeds, prompts, negative),
    )


def report_measures(stream: StreamedFID, path: str | None, record: dict, place: Place | None) -> None:
    """Prints the measures (rank 0), and records them. Every process calls it.

    path: file for them and the record of the run; None: none.
    place: the folder of the images, whose record gets the measures; None: they were not written.
    """
    result = stream.result("sample.py, not written" if place is None else str(place.folder.path))
    if result is None:
        return
    if path is not None:
        write_json(path, asdict(result) | {"sampling": record})
    if place is not None:
        place.note({"measured": asdict(result) | {"seeds": record["seeds"]}})
    print("\n".join(result.lines()), flush=True)


@dataclass
class Opened:
    """What a run needs, opened and checked, before anything is written.

    options, settings: with everything that the network, a predictor or a rerun decides.
    net: the network.
    predictor, predictor_file: None: a plain solver.
    inputs: images that sampling starts from. None: noise.
    seeds: of the images, in the order in which they are sampled.
    prompts: a text, texts by seed, or None.
    verifier: of a search. None: no search.
    stream: measures the images. None: nothing does.
    source: where recommended settings come from. None: they are the user's.
    """

    options: SampleOptions
    settings: Settings
    net: Any
    predictor: Any
    predictor_file: Path | None
    inputs: ImageInputs | None
    seeds: list[int]
    prompts: Any
    verifier: Verifier | None
    stream: StreamedFID | None
    source: str | None


def open_run(options: SampleOptions, device: torch.device) -> Opened:
    """Opens the files of a run, and makes all checks. UserError for what cannot work."""
    output = options.output
    options.check()
    inputs = options.inputs.open()
    every = inputs is not None and "seeds" not in options.written
    seeds = list(range(len(inputs))) if every else parse_seeds(options.seeds)
    settings, predictor, predictor_file = open_predictor(options.predictor_path, options.settings, options.written)
    compute = remembered_network(predictor_file, settings, options.compute)
    # What is wrong for sure is noticed before anything large is loaded.
    options.inputs.check_name(settings.dataset_name)
    if inputs is not None:
        inputs.check_seeds(seeds)
    options = replace(options, text=options.text.resolve(), compute=compute)
    prompts = options.text.read(settings, seeds, options.compute.model_path)
    if options.quantize != "none" and not isinstance(prompts, str | None):
        raise UserError("--quantize needs noise as its start, and one prompt for all images")
    if options.search.verifier is not None:
        check_verifier(options.search.verifier, settings.dataset_name)
    stream = output.stream(settings.dataset_name, len(seeds), device)
    opened_with = options.compute
    if options.quantize != "none":
        check_compile(options.compute.compile, device, eight_bits=True)
        opened_with = replace(options.compute, compile="none")  # the 8-bit network is compiled
    net = open_network(settings, opened_with, device, options.class_idx)
    source = None
    if predictor is None and settings.nfe is not None:
        asked = settings.nfe if "nfe" in options.written else default_nfe(net)
        settings, source = replace(settings, nfe=asked).for_network(net, options.written)
        distributed.print0(f"{asked} evaluations: {settings.flags()} ({source})")
    check_network(net, settings, predictor, device)
    if inputs is None and net.takes_images:
        raise UserError(f"{settings.dataset_name} restores images: give --images, a folder of degraded images")
    if inputs is not None:
        inputs.check(net)
        seeds = inputs.order(seeds)
        if output.grid and inputs.same_size(seeds) < len(seeds):
            raise UserError("--grid needs images of one size: leave it out, or choose by --seeds")
    if options.search.along_path and net.few_step is not None:
        raise UserError(f"--search={options.search.search} changes the steps: use the original network")
    if options.quantize != "none":
        one = {"labels": options.class_idx, "negative_prompt": options.text.negative_prompt}
        net = quantized_network(net, settings.arguments(), predictor, device, prompts=prompts, **one)
        prepare_network(net, "none", options.compute.channels_last, options.compute.compile)
    warnings = settings.warnings()
    if options.schedule is not None:
        warnings += options.schedule.warnings(net, settings.solver, settings.afs)
    for line in warnings:
        distributed.print0(f"Warning: {line}", file=sys.stderr)
    options.text.prepare(net, settings.dataset_name, prompts)
    verifier = open_verifier(options.search.verifier, net, device)
    return Opened(options, settings, net, predictor, predictor_file, inputs, seeds, prompts, verifier, stream, source)


def asked_folder(opened: Opened, nfe: int) -> Folder:
    """The output folder that the options name, or the default one."""
    options, settings, inputs = opened.options, opened.settings, opened.inputs
    if options.search.along_path:
        found = default_folder(settings.dataset_name, settings.solver, options.search.budget)
        default = found.with_name(f"{found.name}_{options.search.search}")
    else:
        inserted = opened.predictor is not None and not SOLVERS[settings.solver].needs_predictor
        searched = None if opened.verifier is None else options.search.candidates or 1
        default = default_folder(settings.dataset_name, settings.solver, nfe, inserted, searched)
    names = () if inputs is None else tuple(inputs.names)
    output = options.output
    return Folder(Path(output.outdir or default), output.subdirs, output.return_inters, names)


def batches_of(opened: Opened, share: list[int], folder: Folder, device: torch.device) -> Iterator[Batch]:
    """The images of these seeds, the best candidates of a search."""
    options, settings, verifier = opened.options, opened.settings, opened.verifier
    candidates = options.search.candidates or 1
    generate = generate_fitting if options.batch == AUTO else partial(generate_images, batch=options.batch)
    if options.search.along_path:
        generate = partial(_search_paths, settings, options, verifier)
    batches = generate(
        opened.net,
        share,
        predictor=None if opened.predictor is None else opened.predictor.to(device),
        labels=options.class_idx,
        prompts=opened.prompts,
        negative_prompt=options.text.negative_prompt,
        candidates=candidates,
        keep_intermediates=folder.inters,
        inputs=opened.inputs,
        device=device,
        **settings.arguments(),
    )
    if verifier is None or options.search.along_path:
        return batches
    return search(batches, verifier, candidates, opened.prompts, folder.scores())


def run(options: SampleOptions, device: torch.device) -> None:
    """Samples the images of the options. Every process of a torchrun calls it."""
    opened = open_run(options, device)
    options, settings, seeds, stream = opened.options, opened.settings, opened.seeds, opened.stream
    output, verifier = options.output, opened.verifier
    record = describe_run(settings, options, opened.net, opened.predictor, opened.predictor_file, verifier, device)
    record |= {} if opened.source is None else {"recommended": opened.source}
    if opened.inputs is not None:
        record["settings"] |= opened.inputs.record()
    nfe = settings.evaluations(opened.net, opened.predictor)
    folder = asked_folder(opened, nfe)
    nfe = None if options.search.along_path else nfe
    distributed.barrier()  # nothing is written before every process has passed all checks
    with ExitStack() as locks:
        place, todo = None, None
        with distributed.together():
            if distributed.rank() == 0 and output.writes_images:
                place, todo = begin_folder(folder, output.outdir is None, locks, record, seeds, output.overwrite)
                folder = place.folder
        if stream is not None:  # features are computed while sampling, so existing images are sampled again
            todo = seeds
        todo, folder = distributed.broadcast_object((todo, folder))

        share = todo[distributed.rank() :: distributed.world_size()]
        started = time.perf_counter()
        advice = f"lower --batch (now {options.batch}), or --batch=auto"
        with distributed.together():
            batches = batches_of(opened, share, folder, device)
            with (
                deferred_signals() as received,
                progress_bar(len(share), unit="img", desc=folder.path.name) as bar,
                explained_oom(device, advice),
            ):
                target = folder if output.writes_images else None
                write_images(until_stopped(batches, received), target, nfe, bar, stream, ahead=device.type != "cpu")
        seconds = time.perf_counter() - started
        if distributed.rank() == 0:
            if place is not None:
                place.end()
            if output.grid:
                write_grid(folder, seeds)
            each = "" if verifier is None or nfe is None else f" ({options.search.candidates} candidates of {nfe})"
            print(
                f"sampled {len(todo)} images ({len(seeds) - len(todo)} skipped) NFE={record['nfe']}{each} in {seconds:.1f} s"
                f" ({len(todo) / max(seconds, 1e-9):.1f} img/s)"
                + (f" -> {folder.path}" if output.writes_images else ""),
                flush=True,
            )
        if stream is not None:
            report_measures(stream, output.fid_json, record | {"seeds": format_seeds(seeds)}, place)
        distributed.barrier()
