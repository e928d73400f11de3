"""Comparisons from Python: a network in, a table out."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from models.denoiser import Denoiser
from sampling.settings import ComputeOptions, NetworkSettings
from sampling.text import TextOptions
from tools.compare_options import CompareOptions
from tools.compare_run import compute, prepare
from tools.report import write_report
from torch_utils.errors import UserError
from torch_utils.locks import only_command
from training.checkpoint import save_predictor


def compare(
    net: Denoiser,
    *,
    solvers: Sequence[str] | str = ("euler", "dpmpp", "ipndm"),
    nfe: Sequence[int] | int = (3, 5, 8),
    predictors: Sequence = (),
    num: int = 256,
    outdir=None,
    device: torch.device | str | None = None,
    **options,
) -> list[dict]:
    """Samplers on one network, the same seeds and the same range of noise; one dictionary per row.

    net: a network of ``models.wrap`` or ``create_model``. It is used as it is.
    solvers: names, with options of their own if need be, as "dpmpp:max_order=2". Default: three.
    nfe: network evaluations per image. Default: 3, 5 and 8.
    predictors: trained predictors or their files, each at its own number of evaluations.
    num: images per method, of the seeds 0 .. num - 1. Default: 256.
    outdir: folder for results.csv, results.json, results.md and index.html, and for the cache.
        Default: None, nothing is kept.
    device: where to sample. Default: where net is.
    options: of compare.py by their names, for example ref (for FIDs; without it there are distances
        only), num_reference, schedule_type, afs.

    A row has the method, nfe, pixel (the mean distance to the converged solution from the same
    noise, root mean square per value), fid and feature (None without ref), their intervals, and
    images_per_second.

    Raises UserError for what compare.py refuses.
    """
    if not isinstance(net, Denoiser):
        raise UserError(f"compare: wrap the network first: models.wrap(net, ...), not {type(net).__name__}")
    if device is None:
        device = next(net.parameters(), torch.empty(0)).device
    listed = [solvers] if isinstance(solvers, str) else solvers
    wanted = [nfe] if isinstance(nfe, int) else nfe
    with TemporaryDirectory() if outdir is None else nullcontext(outdir) as folder:
        places = [_file_of(predictor, Path(folder) / "predictors") for predictor in predictors]
        try:
            chosen = CompareOptions(
                network=NetworkSettings(dataset_name=net.dataset_name or "custom"),
                solvers=",".join(listed) or "none",
                nfe=",".join(map(str, wanted)),
                predictor_path=",".join(places) or None,
                num=num,
                outdir=str(folder),
                text=TextOptions(),
                compute=ComputeOptions(),
                written=frozenset(options),
                **options,
            )
        except TypeError as error:
            raise UserError(f"compare: {error}") from None
        comparison, jobs = prepare(chosen, torch.device(device), net)
        with only_command(Path(folder) / ".lock", f"another comparison works in {folder}: choose another outdir"):
            compute(comparison, jobs)
            if outdir is not None:
                write_report(comparison, jobs, "compare() from Python")
            return [comparison.row(job) for job in jobs]


def _file_of(predictor, folder: Path) -> str:
    """The file of a predictor; one of its own where it is an object."""
    if isinstance(predictor, str | Path):
        return str(predictor)
    number = len(list(folder.glob("*"))) if folder.is_dir() else 0
    path = folder / f"{number:03d}" / "predictor-000000.safetensors"
    save_predictor(predictor, path)
    return str(path)
