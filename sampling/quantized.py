"""8-bit networks for sample.py: calibrated on the run's own settings, and kept for the next run."""

import hashlib
import json
from pathlib import Path

import torch

from models import quantize
from sampling.generate import generate_images
from torch_utils import distributed
from torch_utils.errors import UserError
from torch_utils.files import read_json, write_json
from torch_utils.seeds import stream_seeds

IMAGES = 16  # that are sampled for the calibration


def quantized_network(net, arguments: dict, predictor=None, device: torch.device | None = None, **conditions):
    """A copy of the network with 8-bit layers.

    The calibration is kept in ``src/<dataset_name>/int8-<hash>.json``; the hash is that of the
    weights and of all settings. Every process calls this; the first one calibrates.

    net: the network in floating point.
    arguments: keyword arguments of ``solvers.sample``.
    predictor: of the run. Default None.
    device: where net is. Default: that of its parameters.
    conditions: labels, prompts and negative_prompt of ``generate_images``; a single one for all.
    """
    learned = None if predictor is None else {**predictor.config, "hash": _hash_tensors(predictor)}
    described = [net.weights_hash, arguments, learned, conditions, IMAGES, quantize.SAMPLES]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:16]
    path = Path("src") / str(net.dataset_name) / f"int8-{digest}.json"
    with distributed.local_main_first():
        calibration = _read(path)
        if calibration is None:
            distributed.print0(f"calibrating 8-bit layers on {IMAGES} images, kept in {path}")
            calibration = quantize.calibrate(net, sampled_states(net, arguments, predictor, device, **conditions))
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, calibration)
    return quantize.apply_ranges(net, calibration)


def _hash_tensors(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> dict | None:
    """A calibration of an earlier run; None if there is none."""
    if not path.is_file():
        return None
    try:
        content = read_json(path)
        levels = [float(sigma) for sigma in content["sigmas"]]
        grids = {name: [(float(s), float(z)) for s, z in grid] for name, grid in content["layers"].items()}
        if min(levels) <= 0 or any(len(grid) != len(levels) or min(grid)[0] <= 0 for grid in grids.values()):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not a calibration of sample.py: delete it") from None
    return {"sigmas": levels, "layers": grids}


def sampled_states(net, arguments: dict, predictor=None, device: torch.device | None = None, **conditions) -> list:
    """(x, sigma, cond) of every evaluation of one sampled batch; see ``quantized_network``."""
    states = []

    def record(module, args, kwargs):
        states.append((args[0].clone(), torch.as_tensor(args[1]).clone(), dict(kwargs)))

    handle = net.register_forward_pre_hook(record, with_kwargs=True)
    try:
        seeds = stream_seeds(0, 0, IMAGES)
        for _ in generate_images(
            net, seeds, batch=IMAGES, predictor=predictor, device=device, **conditions, **arguments
        ):
            pass
    finally:
        handle.remove()
    return states
