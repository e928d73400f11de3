"""Packs a trained predictor for others: the file, a model card, sample images.

    python -m tools.share exps/00007-digits-... --to=fast-digits
    python -m tools.share 7 --to=hf:owner/fast-digits --figures=comparison/results.json
    python -m tools.share predictor.safetensors --to=shared --images=0 --license=apache-2.0

Only safetensors, JSON, Markdown and PNG are written and uploaded. Others use the result with
--predictor_path=hf:owner/fast-digits.
"""

if __name__ == "__main__":
    from torch_utils.usage import check_usage

    check_usage("tools.share")

import json
import math
import re
import shutil
import sys
import tempfile
from pathlib import Path

import click
import numpy as np

if not __package__:  # run as a file: the repository root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.jackknife import interval_text
from models.zoo import CUSTOM, DIFFUSERS, find_card, takes_prompts
from sampling.generate import generate_images
from sampling.settings import ComputeOptions, Settings, check_network, open_network, open_predictor
from solvers.span_table import SpanSolver
from torch_utils.cli import PATH, Command, offline_flag
from torch_utils.download import offline
from torch_utils.errors import MissingExtra, UserError, brief
from torch_utils.files import read_json, write_json, write_text
from torch_utils.hub import first_line
from torch_utils.images import image_grid, save_image, to_uint8
from torch_utils.markdown import table
from torch_utils.session import session
from training.checkpoint import save_predictor

PREDICTOR, DETAILS, CARD, IMAGES = "predictor.safetensors", "predictor.json", "README.md", "images.png"
WRITTEN = (PREDICTOR, DETAILS, CARD, IMAGES)
LIBRARY = "amed-solver"  # in the card, which says that the folder may be written again
_HUB_ID = re.compile(r"hf:([\w.-]+/[\w.-]+)")
# Settings that a reader of the card looks for; the rest is in predictor.json.
_SHOWN = (
    *(
        "dataset_name",
        "guidance_type",
        "guidance_rate",
        "preset",
        "sampler_stu",
        "sampler_tea",
        "num_steps",
        "sigma_min",
    ),
    *("sigma_max", "schedule_type", "schedule_rho", "afs", "first_step", "heads", "scale_dir", "scale_time"),
)


def read_figures(paths) -> list[dict]:
    """Rows of measured figures, from results.json (compare.py) and fid.py --json files."""
    rows = []
    for path in paths:
        try:
            content = read_json(path)
            entries = content["rows"] if "rows" in content else [{"method": content.get("source"), **content}]
            for entry in entries:
                rows.append(
                    {
                        "method": str(entry["method"]),
                        "nfe": entry.get("nfe") or (content.get("sampling") or {}).get("nfe"),
                        "fid": float(entry["fid"]),
                        "ci95": entry.get("fid_ci95"),
                        "images": int(entry["images"]),
                        "detector": entry.get("detector") or content.get("facts", {}).get("features"),
                    }
                )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"--figures={path} is not a results.json of compare.py or a file of fid.py --json ({brief(error)})"
            ) from None
    return rows


def sample_images(source, count: int, model_path, prompt, device) -> np.ndarray:
    """A grid [H,W,C] of the images of the seeds 0, 1, ..., as sample.py makes them."""
    settings, predictor, _ = open_predictor(str(source), Settings(), frozenset())
    if prompt is None and takes_prompts(settings.dataset_name, model_path):
        raise _text_is_missing()
    net = open_network(settings, ComputeOptions(model_path=model_path), device)
    check_network(net, settings, predictor, device)
    if net.takes_prompts and prompt is None:
        raise _text_is_missing()
    batches = generate_images(
        net, range(count), predictor=predictor.to(device), prompts=prompt, device=device, **settings.arguments()
    )
    images = np.concatenate([to_uint8(batch.images) for batch in batches])
    return image_grid(images, columns=math.ceil(math.sqrt(count)))


def _text_is_missing() -> UserError:
    return UserError("this network needs a text for its images: give --prompt, or --images=0")


def _front_matter(entries: dict) -> str:
    """The metadata of a card. JSON values are YAML."""
    lines = [f"{name}: {json.dumps(value)}" for name, value in entries.items() if value not in (None, [], {})]
    return "\n".join(["---", *lines, "---", ""])


def _figure(row: dict) -> str:
    return interval_text(row["fid"], row["ci95"], ".3g", ".2g") if row["ci95"] else f"{row['fid']:.3g}"


def _short(value) -> str:
    if isinstance(value, list):
        return ", ".join(map(_short, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def make_card(predictor, name: str, place: str, figures: list[dict], images: bool, licence, base_model) -> str:
    """The text of the model card.

    predictor: AMEDPredictor or SpanSolver.
    name: title.
    place: what users give as --predictor_path.
    figures: of ``read_figures``.
    images: whether there is a picture.
    licence, base_model: for the metadata, or None.
    """
    config, provenance = predictor.config, predictor.provenance
    network = config.get("dataset_name") or provenance.get("dataset_name") or "unknown"
    evaluations = predictor.evaluations()
    kind = "span solver" if isinstance(predictor, SpanSolver) else "AMED predictor"
    card = None if network == "unknown" else find_card(network)
    text_to_image = config.get("guidance_type") == "cfg" or (card is not None and card.takes_prompts)
    task = "text-to-image" if text_to_image else "unconditional-image-generation"
    results = [
        {
            "task": {"type": task},
            "dataset": {"type": "images", "name": network},
            "metrics": [
                {
                    "type": "fid",
                    "value": row["fid"],
                    "name": f"FID of {row['images']} images, {row['method']}, NFE {row['nfe']}",
                }
            ],
        }
        for row in figures
    ]
    meta = {
        "license": licence,
        "library_name": LIBRARY,
        "pipeline_tag": task,
        "tags": ["diffusion", "sampler", "distillation", kind.replace(" ", "-").lower()],
        "base_model": base_model,
        "base_model_relation": "adapter" if base_model else None,
        "model-index": [{"name": name, "results": results}] if results else None,
    }
    settings = [(key, _short(config[key])) for key in _SHOWN if config.get(key) not in (None, [], False)]
    settings += [
        (key, provenance[key]) for key in ("network", "network_hash", "kimg", "code_version") if provenance.get(key)
    ]
    path = (
        f" --model_path={base_model or 'FOLDER'}"
        if network == DIFFUSERS
        else " --model_path=FILE"
        if network == CUSTOM
        else ""
    )
    parts = [
        _front_matter(meta),
        f"# {name}\n",
        f"A {kind} for the diffusion network `{network}`: images in {evaluations} evaluations of the network. It holds "
        "learned settings of a sampler, not the network itself, and works only with the network that it was trained for.\n",
    ]
    if images:
        parts.append(f"![Images of the seeds 0, 1, ...]({IMAGES})\n")
    if figures:
        rows = [
            (row["method"], row["nfe"] or "", _figure(row), row["images"], row["detector"] or "") for row in figures
        ]
        parts.append("## Measured\n\n" + table(("method", "NFE", "FID", "images", "features"), rows) + "\n")
        if network in ("digits", "cifar10-small"):
            parts.append(
                "The features are those of a small network of its own: compare with figures of the same kind only.\n"
            )
    else:
        parts.append("## Measured\n\nNothing was measured for this card.\n")
    parts.append("## Settings\n\n" + table(("setting", "value"), settings) + f"\n\nAll of them are in `{DETAILS}`.\n")
    parts.append("## Use\n\n" + _usage(place, path, text_to_image or network == DIFFUSERS))
    return "\n".join(parts)


def _usage(place: str, path: str, in_pipelines: bool) -> str:
    prompt = ' --prompt="a red fox in the snow"' if in_pipelines else ""
    command = (
        f"On the command line:\n\n```sh\npython sample.py --predictor_path={place}{path}{prompt} --seeds=0-15\n```\n"
    )
    if in_pipelines:
        return command + (
            "\nIn a pipeline of diffusers, `pipe`:\n\n```python\nfrom sampling.diffusers_scheduler import AMEDScheduler\n\n"
            f'scheduler = AMEDScheduler.from_predictor("{place}", pipe.scheduler.config, pipe.unet)\n'
            "pipe.scheduler = scheduler\nimages = pipe(prompt, num_inference_steps=len(scheduler)).images\n```\n\n"
            f"In ComfyUI: put `{PREDICTOR}` into `models/predictors`, and use the nodes of `integrations/comfyui`: Load "
            "Predictor, Learned Sampler and Learned Sigmas, connected to SamplerCustom.\n"
        )
    return command + (
        "\nIn Python, with the network `net` (a denoiser D(x; sigma)) and noise `latents`:\n\n```python\n"
        "from solvers.k_sampler import learned_sigmas, sample_learned\n"
        "from training.checkpoint import find_predictor, load_predictor\n\n"
        f'predictor = load_predictor(find_predictor("{place}"))\nsigmas = learned_sigmas(predictor, net)\n'
        "x = sample_learned(net, latents * sigmas[0], sigmas, predictor=predictor)\n```\n\n"
        "In k-diffusion: `sample_learned` is a sampling function like `k_diffusion.sampling.sample_heun`, for the same "
        "kind of model.\n"
    )


def write_folder(folder: Path, predictor, card: str, figures: list[dict], grid) -> None:
    """Writes the files of ``WRITTEN``. UserError if the folder holds something else."""
    known = (folder / CARD).is_file() and f'library_name: "{LIBRARY}"' in (folder / CARD).read_text(encoding="utf-8")
    others = [] if known or not folder.is_dir() else sorted(entry.name for entry in folder.iterdir())
    if folder.exists() and (others or not folder.is_dir()):
        raise UserError(f"{folder} is not empty ({', '.join(others[:3]) or 'a file'}): choose another folder for --to")
    folder.mkdir(parents=True, exist_ok=True)
    save_predictor(predictor, folder / PREDICTOR)
    details = {"config": predictor.config, "provenance": predictor.provenance, "figures": figures}
    if isinstance(predictor, SpanSolver):
        details["table"] = predictor.table()
    write_json(folder / DETAILS, details)
    if grid is not None:
        save_image(grid, folder / IMAGES)
    elif (folder / IMAGES).exists():
        (folder / IMAGES).unlink()
    write_text(folder / CARD, card)


def upload(folder: Path, repo: str, private: bool) -> str:
    """Uploads the files of ``WRITTEN`` to a repository of the hub. Returns its address."""
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise MissingExtra("huggingface_hub", "hub", "an upload to the Hugging Face hub") from None
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=repo, allow_patterns=list(WRITTEN), commit_message="Predictor, card and images"
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(f"hf:{repo}: the upload failed ({first_line(error)}); see 'hf auth login'") from None
    return f"hf:{repo}"


GROUPS = {
    "Output": "target private",
    "Model card": "figures licence base_model",
    "Sample images": "images prompt model_path device offline",
}


@click.command(cls=Command, groups=GROUPS)
@click.argument("run", type=PATH, metavar="N|DIR|FILE")
@click.option("--to", "target", type=PATH, required=True, metavar="FOLDER|hf:owner/name", help="Where the result goes")
@click.option(
    "--figures",
    type=PATH,
    multiple=True,
    metavar="JSON",
    help="Measured figures: results.json of compare.py, or of fid.py --json",
)
@click.option(
    "--images", type=click.IntRange(min=0, max=64), default=16, show_default=True, help="Sample images; 0: none"
)
@click.option("--prompt", default=None, help="Text of the sample images")
@click.option(
    "--model_path", type=PATH, default=None, metavar="FILE", help="File of the network, for the sample images"
)
@click.option("--license", "licence", default=None, metavar="ID", help="Licence of the predictor, such as apache-2.0")
@click.option("--base_model", default=None, metavar="owner/name", help="The network on the hub")
@click.option("--private", is_flag=True, help="Make a private repository")
@click.option("--device", default=None, help="cpu, cuda or mps (default: the fastest available)")
@offline_flag
def main(run, target, figures, images, prompt, model_path, licence, base_model, private, device):
    """Packs the trained predictor RUN for others: the file, a model card, sample images."""
    hub = _HUB_ID.fullmatch(target)
    if hub is None and target.startswith(("hf:", "https:", "http:")):
        raise UserError(f"--to={target}: give a folder, or hf:owner/name")
    if hub is not None and offline():
        raise UserError(f"--to={target}: an upload needs the network; give a folder")
    for flag, value in (("prompt", prompt), ("model_path", model_path)):
        if images == 0 and value is not None:
            raise UserError(f"--{flag} has no effect with --images=0: leave it out")
    rows = read_figures(figures)
    with session(device) as where:
        _, predictor, source = open_predictor(run, Settings(), frozenset())
        grid = None if images == 0 else sample_images(source, images, model_path, prompt, where)
    name = hub[1].split("/")[1] if hub else Path(target).resolve().name
    card = make_card(predictor.to("cpu"), name, target, rows, grid is not None, licence, base_model)
    temporary = Path(tempfile.mkdtemp()) if hub else None
    try:
        folder = temporary / name if temporary else Path(target)
        write_folder(folder, predictor, card, rows, grid)
        place = upload(folder, hub[1], private) if hub else str(folder)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary)
    click.echo(f"{', '.join(name for name in WRITTEN if name != IMAGES or grid is not None)} -> {place}")


if __name__ == "__main__":
    main()
