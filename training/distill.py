"""Distillation from Python: a network in, a predictor or a few-step network out."""

from contextlib import nullcontext
from tempfile import TemporaryDirectory

import torch

from models import create_model
from models.denoiser import Denoiser
from torch_utils.errors import UserError, did_you_mean
from torch_utils.options import flags_of
from training.checkpoint import load_predictor
from training.flags import OBJECTIVES, new_options
from training.objectives import TRAINERS
from training.options import SFDOptions

_OF_THE_NETWORK = {"model_path", "dataset_name", "tokenizer_path", "amp", "compile", "channels_last"}


def distill(
    net: Denoiser,
    *,
    nfe: int | None = None,
    outdir=None,
    device: torch.device | str | None = None,
    **options,
):
    """Trains a few-step sampler for a network: an AMEDPredictor or a SpanSolver, on the CPU.

    With objective="sfd" the result is a network for few steps, on the device (``EDMDenoiser``).

    net: a network of ``models.wrap`` or ``create_model``. It is used as it is and not changed.
    nfe: network evaluations of the result, with recommended settings for all that is not given.
        Default: None, the number of num_steps.
    outdir: folder for the run, in which train.py --resume can continue it. Default: None, nothing
        is kept but the result.
    device: where to train. Default: where net is.
    options: those of train.py by their names, for example sampler_stu, num_steps, total_kimg,
        batch, seed. Default: sampler_stu="span", and the defaults of train.py.

    Raises UserError for options that do not go together or that the network cannot have.
    """
    if not isinstance(net, Denoiser):
        raise UserError(f"distill: wrap the network first: models.wrap(net, ...), not {type(net).__name__}")
    wrong = sorted(options.keys() & _OF_THE_NETWORK)
    if wrong:
        raise UserError(f"distill: {wrong[0]} belongs to the network, which is used as it is; leave it out")
    if device is None:
        device = next(net.parameters(), torch.empty(0)).device
    known = {"objective"}.union(*(flags_of(kind) for kind in OBJECTIVES.values()))
    for name in options:
        if name not in known:
            raise UserError(f"distill: there is no option '{name}'{did_you_mean(name, known, ())}")
    given = {**options, "dataset_name": net.dataset_name or "custom"}
    if options.get("objective") != "sfd":
        given = {"sampler_stu": "span", **given}
    elif net.few_step is not None:  # a second stage
        given["teacher"] = net.source_path or "the network"
    with TemporaryDirectory() if outdir is None else nullcontext(outdir) as folder:
        given["outdir"] = str(folder)
        chosen = new_options(dict.fromkeys(known) | given, set(given), nfe)
        path = TRAINERS[type(chosen)](chosen, device, net=net)
        if isinstance(chosen, SFDOptions):
            return create_model(given["dataset_name"], path, device=device)
        return load_predictor(path)
