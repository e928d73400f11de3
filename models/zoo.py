"""The table of pretrained networks: what each one is, where its file comes from and under which licence.

``python -m models.zoo list`` prints it.
"""

from dataclasses import dataclass
from pathlib import Path

import click

from torch_utils import distributed
from torch_utils.download import download_file
from torch_utils.errors import UserError

PRETRAINED = Path(__file__).resolve().parent / "pretrained"
_NVIDIA = "https://nvlabs-fi-cdn.nvidia.com/edm"


@dataclass(frozen=True)
class Card:
    """One pretrained network.

    urls, fid_refs: addresses of the weights and of the FID reference statistics (mu, sigma), official first, then
    mirrors; both empty where the files are embedded in ``models/pretrained``. guidance: the values of guidance_type it
    accepts. sigma_min, sigma_max: the range that is sampled.
    """

    name: str
    family: str
    file: str
    resolution: int
    channels: int
    label_dim: int
    licence: str
    fid_file: str
    urls: tuple[str, ...] = ()
    fid_refs: tuple[str, ...] = ()
    guidance: tuple[str, ...] = ("none",)
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    notes: str = ""

    @property
    def embedded(self) -> bool:
        return not self.urls

    @property
    def folder(self) -> Path:
        """Where the files are, or will be downloaded to: relative to the working directory unless embedded."""
        return PRETRAINED if self.embedded else Path("src") / self.name


def _edm(name: str, weights: str, fid_file: str, resolution: int, label_dim: int, notes: str) -> Card:
    """A network published with Karras et al. 2022."""
    return Card(
        name=name,
        family="edm",
        file=weights,
        resolution=resolution,
        channels=3,
        label_dim=label_dim,
        licence="CC BY-NC-SA 4.0",
        fid_file=fid_file,
        urls=(f"{_NVIDIA}/pretrained/{weights}",),
        fid_refs=(f"{_NVIDIA}/fid-refs/{fid_file}",),
        guidance=("none",) if label_dim else ("none", "uncond"),
        notes=notes,
    )


CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        Card(
            name="digits",
            family="edm",
            file="digits-edm.safetensors",
            resolution=32,
            channels=1,
            label_dim=0,
            licence="Apache-2.0",
            fid_file="digits-fid.npz",
            guidance=("none", "uncond"),
            notes="handwritten digits, embedded; its FID is taken in the features of its own small classifier",
        ),
        _edm("cifar10", "edm-cifar10-32x32-uncond-vp.pkl", "cifar10-32x32.npz", 32, 0, "DDPM++"),
        _edm("ffhq", "edm-ffhq-64x64-uncond-vp.pkl", "ffhq-64x64.npz", 64, 0, "DDPM++"),
        _edm("afhqv2", "edm-afhqv2-64x64-uncond-vp.pkl", "afhqv2-64x64.npz", 64, 0, "DDPM++"),
        _edm("imagenet64", "edm-imagenet-64x64-cond-adm.pkl", "imagenet-64x64.npz", 64, 1000, "ADM, class-conditional"),
    )
}

# Known from the original code; their families have no loader yet.
LATER = ("lsun_bedroom", "lsun_cat", "imagenet256", "ms_coco", "lsun_bedroom_ldm", "ffhq_ldm")

CUSTOM = "custom"  # any EDM network of the user's own; needs a model_path and is not compared with a card


def get_card(dataset_name: str) -> Card:
    """The card of a network. Raises UserError for a name that is unknown or not available yet."""
    if dataset_name in CARDS:
        return CARDS[dataset_name]
    known = ", ".join(CARDS)
    if dataset_name in LATER:
        raise UserError(f"dataset_name '{dataset_name}' is not available yet; available: {known}")
    raise UserError(
        f"dataset_name '{dataset_name}' is unknown; use one of {known}, or {CUSTOM} with --model_path for an EDM "
        f"network of your own (not available yet: {', '.join(LATER)})"
    )


def resolve(dataset_name: str, model_path: str | Path | None = None) -> Path:
    """The weights file of a network: ``model_path`` if given, else the embedded or downloaded one.

    Downloads go to ``./src/<dataset_name>/``; under torchrun the first process of each machine downloads and the others
    wait, so all processes have to call this. Raises UserError where there is no such file and it cannot be downloaded.
    """
    if dataset_name == CUSTOM and not model_path:
        raise UserError(f"dataset_name '{CUSTOM}' needs --model_path, the file of an EDM network")
    card = None if dataset_name == CUSTOM else get_card(dataset_name)
    if model_path:
        path = Path(model_path)
        if not path.is_file():
            raise UserError(f"--model_path={path} is not a file; give the weights file itself")
        return path
    return _fetch(card, card.file, card.urls, "pass --model_path")


def resolve_fid_ref(dataset_name: str) -> Path:
    """The FID reference statistics (npz) that belong to a network; downloaded like ``resolve`` does."""
    card = get_card(dataset_name)
    return _fetch(card, card.fid_file, card.fid_refs, "pass --ref")


def _fetch(card: Card, name: str, urls: tuple[str, ...], hint: str) -> Path:
    path = card.folder / name
    if not urls:
        if not path.is_file():
            raise UserError(f"{path} is missing from this copy of the code: restore it from the repository, or {hint}")
        return path
    with distributed.local_main_first():
        download_file(list(urls), path, desc=f"{card.name}: {name}", hint=hint)
    return path


def format_table() -> str:
    """The table as text: one line per network, then where each file comes from and where it is looked for."""
    rows = [("dataset_name", "family", "images", "classes", "guidance", "sigma", "licence", "state", "notes")]
    for card in CARDS.values():
        path = card.folder / card.file
        state = "embedded" if card.embedded else "downloaded" if path.is_file() else "not downloaded"
        rows.append(
            (
                card.name,
                card.family,
                f"{card.channels}x{card.resolution}x{card.resolution}",
                str(card.label_dim or "-"),
                " ".join(card.guidance),
                f"{card.sigma_min:g}..{card.sigma_max:g}",
                card.licence,
                state,
                card.notes,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [
        "",
        f"not available yet: {' '.join(LATER)}",
        "",
        "files (put them there yourself on a machine without network):",
    ]
    for card in CARDS.values():
        for url, name in ((*card.urls[:1], card.file), (*card.fid_refs[:1], card.fid_file)) if card.urls else ():
            lines.append(f"  {url}  ->  {card.folder / name}")
    return "\n".join(lines)


@click.group()
def main():
    """The pretrained networks that this code knows."""


@main.command("list")
def list_command():
    """Print the table of networks."""
    click.echo(format_table())


if __name__ == "__main__":
    main()
