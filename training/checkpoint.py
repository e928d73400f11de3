"""Predictor files: safetensors with the whole configuration. Saving, loading, finding by number.

Also reads snapshots of the original AMED code (a pickled predictor and its loss object), as data
only.
"""

import json
import math
import re
from pathlib import Path

import torch

from models import zoo
from solvers.former_names import with_current_names
from solvers.span_heads import SHIFTS
from solvers.span_table import CONFIG_KINDS, SpanSolver, current_config
from torch_utils.errors import UserError, brief
from torch_utils.kinds import check_kinds
from torch_utils.remote import fetch, is_remote
from torch_utils.safe_pickle import PersistentObject, open_binary, safe_load
from torch_utils.tensor_file import is_safetensors, json_entry, read_safetensors, write_safetensors
from training.predictor import AMEDPredictor
from training.run_folder import numbered_runs

FORMAT = "amed-predictor"
PREDICTORS = {"amed": AMEDPredictor, SpanSolver.kind: SpanSolver}  # a file without kind holds an AMEDPredictor

# Constructor arguments of the original predictor, under the same names here.
_ORIGINAL_KEYS = (
    *("dataset_name", "img_resolution", "num_steps", "sampler_stu", "sampler_tea", "M"),
    *("guidance_type", "guidance_rate", "schedule_type", "schedule_rho", "afs", "scale_dir", "scale_time"),
    *("max_order", "predict_x0", "lower_order_final", "hidden_dim", "bottleneck_output_dim", "noise_channels"),
)
# Arguments of the original with only one supported value.
_FIXED = {"output_dim": 1, "bottleneck_input_dim": 64, "embedding_type": "positional"}
# Size argument: layer with that number of rows. Checked before a layer of this size is built.
_SIZES = {"hidden_dim": "enc_layer0", "bottleneck_output_dim": "enc_layer1", "noise_channels": "map_layer0"}


def save_predictor(predictor: AMEDPredictor | SpanSolver, path, provenance: dict | None = None) -> None:
    """Writes weights, configuration and provenance to a safetensors file, atomically.

    predictor: the predictor or span solver.
    path: the file.
    provenance: origin of the predictor (network name and hash, code version, seed, kimg, ...), JSON
        values. Default None: ``predictor.provenance``.
    """
    provenance = predictor.provenance if provenance is None else provenance
    metadata = {"format": FORMAT, "config": json.dumps(predictor.config), "provenance": json.dumps(provenance)}
    if isinstance(predictor, SpanSolver):
        metadata["kind"] = predictor.kind
    write_safetensors(path, predictor.state_dict(), metadata)


def load_predictor(path) -> AMEDPredictor | SpanSolver:
    """The predictor or span solver of a file, on the CPU and in eval mode.

    path: path or binary file object, written by ``save_predictor`` or a ``.pkl`` or ``.pt``
        snapshot of the original code.

    Raises UserError if it is something else, and UnsafePickleError if a snapshot contains more than
    data.
    """
    with open_binary(path) as (file, name):
        start = file.tell()
        head = file.read(9)
        file.seek(start)
        if is_safetensors(head):
            tensors, metadata = read_safetensors(file.read(), name)
            if metadata.get("format") != FORMAT:
                hint = "; a network goes to --model_path" if "family" in metadata else ""
                raise UserError(
                    f"{name} is a safetensors file, but not a predictor: its format is not '{FORMAT}'{hint}"
                )
            config = json_entry(metadata, "config", name)
            provenance = json_entry(metadata, "provenance", name) if "provenance" in metadata else {}
            kind = metadata.get("kind", "amed")
        else:
            config, tensors = _original_snapshot(safe_load(file), name)
            kind, provenance = "amed", {"converted_from": Path(name).name}
    if kind not in PREDICTORS:
        raise UserError(f"{name}: unknown kind of predictor '{kind}'; known: {', '.join(PREDICTORS)}")
    (_check_sizes if kind == "amed" else _check_table)(config, tensors, name)
    return _build(PREDICTORS[kind], config, tensors, provenance, name)


def _check_sizes(config: dict, tensors: dict[str, torch.Tensor], name: str) -> None:
    for key, layer in _SIZES.items():
        weight = tensors.get(f"{layer}.weight")
        if key in config and (weight is None or weight.ndim != 2 or config[key] != weight.shape[0]):
            raise UserError(f"{name}: its '{key}' does not belong to its weights ({layer})")


def _check_table(config: dict, tensors: dict[str, torch.Tensor], name: str) -> None:
    """Checks the sizes in a span solver's configuration against its weights, before building it."""
    try:
        check_kinds(current_config(config), CONFIG_KINDS)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    sizes = {key: list(value.shape) for key, value in with_current_names(tensors).items()}
    if [config.get("num_steps")] != [length + 1 for length in sizes.get("knots", [])]:
        raise UserError(f"{name}: its 'num_steps' does not belong to its weights (knots)")
    channels = {size[0] for key, size in sizes.items() if key.startswith("heads.spatial.write.") and len(size) == 4}
    if "spatial" in (config.get("heads") or []) and {config.get("img_channels")} != channels:
        raise UserError(f"{name}: its 'img_channels' does not belong to its weights (heads)")
    for head in set(SHIFTS) & set(config.get("heads") or []):
        if config.get("embedding_width") != sizes.get(f"heads.{head}.vectors", [None])[-1]:
            raise UserError(f"{name}: its 'embedding_width' does not belong to its weights (heads)")
    # The largest layers of the heads grow with the number of intervals.
    held, intervals = sum(value.numel() for value in tensors.values()), (config["num_steps"] or 1) - 1
    heads = config.get("heads") or ()
    held_by = [("spatial", "img_channels", 16 * 9), *((head, "embedding_width", 1) for head in SHIFTS)]
    for head, key, per_interval in held_by:
        if head in heads and config[key] * per_interval * (intervals - 1) > held:
            raise UserError(f"{name}: its '{key}' does not belong to its weights")
    if config.get("image_shape") != sizes.get("mean"):
        raise UserError(f"{name}: its 'image_shape' does not belong to its weights (mean)")


def _build(cls, config: dict, tensors: dict[str, torch.Tensor], provenance: dict, name: str):
    try:
        predictor = cls(**config)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{name}: its configuration is not that of a predictor ({str(error)[:200]})") from None
    try:
        predictor.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise UserError(f"{name}: its weights do not fit its configuration: {str(error)[:400]}") from None
    predictor.provenance = provenance
    return predictor.eval()


def _original_snapshot(content, name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """(config, weights) of a snapshot of the original code, {"model", "loss_fn"} or a predictor."""
    model, loss = content, None
    if isinstance(content, dict):
        model, loss = content.get("model"), content.get("loss_fn")
    if not isinstance(model, PersistentObject) or model.class_name != "AMED_predictor":
        found = type(content).__name__
        if isinstance(content, PersistentObject):
            found = f"an object of class {content.class_name}"
        elif isinstance(content, dict):
            entries = (
                f"{brief(key)} ({getattr(value, 'class_name', type(value).__name__)})"
                for key, value in list(content.items())[:8]
            )
            found = ", ".join(entries)[:300] or "nothing"
        raise UserError(f"{name} holds no AMED predictor (AMED_predictor): found {found}")
    given = {**model.attributes, **model.init_kwargs}
    for key, value in _FIXED.items():
        if given.get(key, value) != value:
            raise UserError(f"{name}: predictors with another '{key}' than {value} are not supported")
    config = {key: given[key] for key in _ORIGINAL_KEYS if key in given}
    if isinstance(loss, PersistentObject):
        config |= {key: loss.state[key] for key in ("sigma_min", "sigma_max") if key in loss.state}
    for key, value in config.items():
        finite = not isinstance(value, float) or math.isfinite(value)
        if not (value is None or isinstance(value, (str, int, float, bool))) or not finite:
            raise UserError(f"{name}: its '{key}' is not a plain value")
    return config, {key: value.to(torch.float32) for key, value in model.state_dict().items()}


# --------------------------------------------------------------------------------------------------
# Finding

# In a repository of the hub, as tools.share, train.py and a pipeline's scheduler write it.
REMOTE_NAMES = ("predictor.safetensors", "predictor-[0-9]*.safetensors", "*/predictor.safetensors")
_FILE_NAMES = (r"predictor-(\d+(?:\.\d+)?)\.safetensors", r"network-snapshot-(\d+)\.pkl", r"network-snapshot-(\d+)\.pt")


def find_predictor(predictor_path, exps="./exps") -> Path:
    """The predictor file that a command line names.

    predictor_path: number of an experiment ("7" is ``exps/00007-*``), folder or file. In a folder,
        the file with the largest kimg in its name is used.
    exps: folder of the experiments. Default "./exps".

    Raises UserError if the name matches nothing, or more than one folder.
    """
    text = str(predictor_path).strip()
    if is_remote(text):
        return fetch(text, REMOTE_NAMES)
    exps = Path(exps)
    if not text:
        raise UserError("predictor_path is empty: give an experiment number, a folder, a file, or an address")
    if re.fullmatch(r"[0-9]{1,9}", text):
        numbered = numbered_runs(exps)
        matches = [folder for number, folder in numbered if number == int(text)]
        if len(matches) > 1:
            names = ", ".join(folder.name for folder in matches)
            raise UserError(f"predictor_path={text} is ambiguous: {names}; give the folder instead")
        if matches:
            return _newest(matches[0])
        if not Path(text).exists():
            there = ", ".join(folder.name for _, folder in numbered) or "no experiments"
            raise UserError(f"no experiment {text} in {exps}; it holds {there}")
    path = Path(text)
    if not path.exists() and (exps / path).exists():
        path = exps / path
    if not path.exists() and text in shipped_predictors():
        return shipped_predictors()[text]
    if path.is_dir():
        return _newest(path)
    if not path.is_file():
        raise UserError(
            f"there is no predictor at {path}; give an experiment number, a folder, a file, an address, or a name that"
            " 'python sample.py --list' prints"
        )
    return path


def shipped_predictors() -> dict[str, Path]:
    """The predictors that come with the repository: their files by name."""
    found = [(path, path.stem.rpartition("-")) for path in zoo.PREDICTORS.glob("*.safetensors")]
    return {path.stem: path for path, parts in sorted(found, key=lambda item: (item[1][0], item[1][2]))}


def _newest(folder: Path) -> Path:
    if (folder / REMOTE_NAMES[0]).is_file():  # shared, or in the folder of a scheduler
        return folder / REMOTE_NAMES[0]
    found = []
    for path in folder.iterdir():
        for preference, pattern in enumerate(_FILE_NAMES):
            match = re.fullmatch(pattern, path.name)
            if match and path.is_file():
                found.append((float(match[1]), -preference, path))
    networks = sorted(folder.glob("network-*.safetensors"))
    if not found and networks:
        raise UserError(f"{folder} holds a network, not a predictor: use --model_path={networks[-1]}")
    if not found:
        raise UserError(f"{folder} holds no predictor yet (no predictor-*.safetensors, no network-snapshot-*.pkl)")
    return max(found)[2]
