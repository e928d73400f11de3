"""The table of pretrained networks: settings, addresses of the files, and licences.

    python -m models.zoo list              # print it
    python -m models.zoo verify            # check all downloaded files
    python -m models.zoo verify cifar10    # check the files of one network

The SHA-256 of a file is recorded at its first use.
"""

from dataclasses import dataclass
from pathlib import Path

import click

from torch_utils import distributed
from torch_utils.cli import Group, Known
from torch_utils.download import download_file, download_member, known_sha256, recorded_sha256
from torch_utils.errors import UserError, did_you_mean, parse_json
from torch_utils.files import sha256_of
from torch_utils.remote import fetch, is_remote

PRETRAINED = Path(__file__).resolve().parent / "pretrained"
PREDICTORS = Path(__file__).resolve().parent / "predictors"  # trained, for the embedded networks
_NVIDIA = "https://nvlabs-fi-cdn.nvidia.com/edm"
_OPENAI = "https://openaipublic.blob.core.windows.net"
_ADM_REFERENCES = f"{_OPENAI}/diffusion/jul-2021/ref_batches"
_COMPVIS = "https://ommer-lab.com/files/latent-diffusion"
# The captions that the AMED authors use for Stable Diffusion.
_TEXT_TO_IMAGE_BENCHMARK = "https://github.com/boomb0om/text2image-benchmark/releases/download/v0.0.1"
_COCO_30K_FILE = "MS-COCO_val2014_30k_captions.csv"
COCO_30K = "coco30k"  # stands for these captions as a prompt


@dataclass(frozen=True)
class Card:
    """One pretrained network.

    name: the dataset_name.
    family: name of its family.
    file: name of the weights file.
    resolution, channels: shape of the samples (images, or latents of latent models). Default
        channels: 3.
    label_dim: number of classes. Default: 0, unconditional.
    licence: licence of the weights.
    fid_file: name of the FID reference statistics (mu, sigma). Default: none are published.
    urls: addresses of the weights, official first, then mirrors. Default: none, the files are
        embedded in ``models/pretrained``.
    fid_refs: addresses of the FID reference statistics. Default: none.
    guidance: possible values of guidance_type, the default first.
    sigma_min, sigma_max: range of noise levels for sampling.
    notes: text for the table.
    member: name of the weights inside the zip archive at urls. Default: not an archive.
    other_files: further names of the weights file that a user may have. Default: none.
    companion, companion_urls: a second file for classifier guidance, and its addresses. Default:
        none.
    page: page to download the file from by hand, if there is no direct address. Default: none.
    """

    name: str
    family: str
    file: str
    resolution: int
    licence: str
    channels: int = 3
    label_dim: int = 0
    fid_file: str = ""
    urls: tuple[str, ...] = ()
    fid_refs: tuple[str, ...] = ()
    guidance: tuple[str, ...] = ("none",)
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    notes: str = ""
    member: str = ""
    other_files: tuple[str, ...] = ()
    companion: str = ""
    companion_urls: tuple[str, ...] = ()
    page: str = ""

    @property
    def embedded(self) -> bool:
        return not (self.urls or self.page)

    @property
    def takes_prompts(self) -> bool:
        return self.family == "sd"

    @property
    def takes_images(self) -> bool:
        return self.family == "mr"

    @property
    def folder(self) -> Path:
        """Folder of the files, relative to the working directory unless embedded."""
        return PRETRAINED if self.embedded else Path("src") / self.name

    def downloads(self) -> list[tuple[str, Path]]:
        """(address, place) of every file that can be downloaded."""
        files = ((self.urls, self.file), (self.companion_urls, self.companion), (self.fid_refs, self.fid_file))
        return [(urls[0], self.folder / name) for urls, name in files if urls]


def _edm(name: str, weights: str, fid_file: str, resolution: int, label_dim: int, notes: str) -> Card:
    """A network published with Karras et al. 2022."""
    return Card(
        name=name,
        family="edm",
        file=weights,
        resolution=resolution,
        label_dim=label_dim,
        licence="CC BY-NC-SA 4.0",
        fid_file=fid_file,
        urls=(f"{_NVIDIA}/pretrained/{weights}",),
        fid_refs=(f"{_NVIDIA}/fid-refs/{fid_file}",),
        guidance=("none",) if label_dim else ("none", "uncond"),
        notes=notes,
    )


def _pfgmpp(name: str, folder: str, resolution: int, label_dim: int, fid_file: str, notes: str) -> Card:
    """A network published with Xu et al. 2023 (PFGM++): a training state with averaged weights."""
    return Card(
        name=name,
        family="edm",
        file="training-state.pt",
        resolution=resolution,
        label_dim=label_dim,
        licence="CC BY-NC-SA 4.0",
        fid_file=fid_file,
        fid_refs=(f"{_NVIDIA}/fid-refs/{fid_file}",),
        guidance=("none",) if label_dim else ("none", "uncond"),
        notes=notes,
        page=f"https://github.com/Newbeeer/pfgmpp (Google Drive, pfgmpp/{folder})",
    )


def _cm(animal_or_room: str) -> Card:
    """An EDM network published with Song et al. 2023."""
    file, reference = f"edm_{animal_or_room}256_ema.pt", f"VIRTUAL_lsun_{animal_or_room}256.npz"
    return Card(
        name=f"lsun_{animal_or_room}",
        family="cm",
        file=file,
        resolution=256,
        licence="MIT",
        fid_file=reference,
        urls=(f"{_OPENAI}/consistency/{file}",),
        fid_refs=(f"{_ADM_REFERENCES}/lsun/{animal_or_room}/{reference}",),
        guidance=("none", "uncond"),
        notes="EDM network of the consistency-models paper",
    )


def _restoration(name: str, file: str, notes: str, max_sigma: int) -> Card:
    """A network published with Luo et al. 2023 (IR-SDE, Refusion).

    max_sigma: of its noise process, of images in 0..255; the range grows with it.
    """
    return Card(
        name=name,
        family="mr",
        file=file,
        resolution=256,
        licence="MIT",
        guidance=("none", "uncond"),
        notes=notes,
        sigma_min=0.000147330942 * max_sigma,
        sigma_max=1.568607946 * max_sigma,
        page="https://github.com/Algolzw/image-restoration-sde (Google Drive)",
    )


def _adm(name: str, size: int, fid_ref: str, notes: str = "", sigma_range=(0.010483843, 152.166977)) -> Card:
    """A network published with Dhariwal & Nichol 2021, and its classifier."""
    file, companion = f"{size}x{size}_diffusion.pt", f"{size}x{size}_classifier.pt"
    return Card(
        name=name,
        family="adm",
        file=file,
        resolution=size,
        label_dim=1000,
        licence="MIT",
        fid_file=fid_ref.rpartition("/")[2],
        urls=(f"{_OPENAI}/diffusion/jul-2021/{file}",),
        fid_refs=(fid_ref,),
        guidance=("none", "cg"),
        sigma_min=sigma_range[0],
        sigma_max=sigma_range[1],
        notes=notes or "ADM, class-conditional; cg: guided by its classifier",
        companion=companion,
        companion_urls=(f"{_OPENAI}/diffusion/jul-2021/{companion}",),
    )


def _ldm(name: str, archive: str, fid_ref: str, notes: str) -> Card:
    """An unconditional network published with Rombach et al. 2022."""
    return Card(
        name=name,
        family="ldm",
        file="model.ckpt",
        resolution=64,
        licence="MIT",
        fid_file=fid_ref.rpartition("/")[2],
        urls=(f"{_COMPVIS}/{archive}",),
        fid_refs=(fid_ref,) if fid_ref else (),
        guidance=("none", "uncond"),
        sigma_min=0.0387590,
        sigma_max=83.8225,
        notes=notes,
        member="model.ckpt",
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
            licence="Apache-2.0",
            fid_file="digits-fid.npz",
            guidance=("none", "uncond"),
            notes="handwritten digits, embedded; FID uses the features of its own small classifier",
        ),
        Card(
            name="cifar10-small",
            family="edm",
            file="cifar10-small-edm.safetensors",
            resolution=32,
            licence="Apache-2.0",
            fid_file="cifar10-small-fid.npz",
            guidance=("none", "uncond"),
            notes="a small network for natural images, embedded; FID uses the features of its own classifier",
        ),
        _edm("cifar10", "edm-cifar10-32x32-uncond-vp.pkl", "cifar10-32x32.npz", 32, 0, "DDPM++"),
        _edm("cifar10_cond", "edm-cifar10-32x32-cond-vp.pkl", "cifar10-32x32.npz", 32, 10, "DDPM++, class-conditional"),
        _edm("ffhq", "edm-ffhq-64x64-uncond-vp.pkl", "ffhq-64x64.npz", 64, 0, "DDPM++"),
        _edm("afhqv2", "edm-afhqv2-64x64-uncond-vp.pkl", "afhqv2-64x64.npz", 64, 0, "DDPM++"),
        _edm("imagenet64", "edm-imagenet-64x64-cond-adm.pkl", "imagenet-64x64.npz", 64, 1000, "ADM, class-conditional"),
        _pfgmpp("cifar10_pfgmpp128", "cifar10_ncsnpp_D_128", 32, 0, "cifar10-32x32.npz", "NCSN++, PFGM++ with D=128"),
        _pfgmpp(
            "cifar10_pfgmpp2048", "cifar10_ncsnpp_D_2048", 32, 0, "cifar10-32x32.npz", "NCSN++, PFGM++ with D=2048"
        ),
        _pfgmpp(
            "cifar10_pfgmpp2048_cond",
            "cifar10_ncsnpp_D_2048_conditional",
            32,
            10,
            "cifar10-32x32.npz",
            "NCSN++, PFGM++ with D=2048, class-conditional",
        ),
        _pfgmpp("cifar10_ncsnpp", "cifar10_ncsnpp_D_inf", 32, 0, "cifar10-32x32.npz", "NCSN++, EDM beside PFGM++"),
        _pfgmpp("ffhq_pfgmpp128", "ffhq_ddpm_D_128", 64, 0, "ffhq-64x64.npz", "DDPM++, PFGM++ with D=128"),
        _pfgmpp("ffhq_ddpmpp", "ffhq_ddpm_D_inf", 64, 0, "ffhq-64x64.npz", "DDPM++, EDM beside PFGM++"),
        _cm("bedroom"),
        _cm("cat"),
        _adm(
            "imagenet64_adm",
            64,
            f"{_NVIDIA}/fid-refs/imagenet-64x64.npz",
            "ADM with its cosine noise schedule; cg: guided by its classifier",
            (0.00642541, 80.0),
        ),
        _adm("imagenet128", 128, f"{_ADM_REFERENCES}/imagenet/128/VIRTUAL_imagenet128_labeled.npz"),
        _adm("imagenet256", 256, f"{_ADM_REFERENCES}/imagenet/256/VIRTUAL_imagenet256_labeled.npz"),
        _adm("imagenet512", 512, f"{_ADM_REFERENCES}/imagenet/512/VIRTUAL_imagenet512.npz"),
        _ldm(
            "lsun_bedroom_ldm",
            "lsun_bedrooms.zip",
            f"{_ADM_REFERENCES}/lsun/bedroom/VIRTUAL_lsun_bedroom256.npz",
            "latents of 256x256 images; no mirror is known",
        ),
        _ldm(
            "ffhq_ldm", "ffhq.zip", "", "latents of 256x256 images; no mirror is known, no FID reference is published"
        ),
        _restoration("ir_sde_deraining", "ir-sde-deraining.pth", "IR-SDE: removes rain", 10),
        _restoration("ir_sde_deblurring", "ir-sde-deblurring.pth", "IR-SDE: removes motion blur", 10),
        _restoration("ir_sde_inpainting", "ir-sde-inpainting.pth", "IR-SDE: fills in missing parts", 30),
        _restoration("ir_sde_sisr", "ir-sde-sisr.pth", "IR-SDE: four times larger, of bicubically enlarged images", 30),
        _restoration("ir_sde_deshadow", "ir-sde-deshadow.pth", "IR-SDE: removes shadows", 30),
        _restoration("refusion", "refusion.pth", "Refusion, NAFNet: any of its tasks", 50),
        Card(
            name="ms_coco",
            family="sd",
            file="v1-5-pruned-emaonly.safetensors",
            resolution=64,
            channels=4,
            licence="CreativeML OpenRAIL-M",
            urls=(
                "https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5/resolve/main/"
                "v1-5-pruned-emaonly.safetensors",
            ),
            guidance=("cfg", "none"),
            sigma_min=0.0291675,
            sigma_max=14.6146,
            notes="Stable Diffusion 1.5, latents of 512x512 images; from the community mirror, because the original "
            "repository (runwayml) was removed; no FID reference is published",
            other_files=("v1-5-pruned-emaonly.ckpt",),
        ),
    )
}

REMOTE_NAMES = ("network.safetensors", "[!p]*.safetensors")  # of a network in a repository of the hub
CUSTOM = "custom"  # any network of the user, at model_path; it has no card
DIFFUSERS = "diffusers"  # a pipeline in diffusers format: model_path is its folder or hub id
NAMES = Known((*CARDS, CUSTOM, DIFFUSERS), "dataset_name '{}' is unknown")


def get_card(dataset_name: str) -> Card:
    """The card of a network. Raises UserError for an unknown name."""
    if dataset_name in CARDS:
        return CARDS[dataset_name]
    raise UserError(
        f"dataset_name '{dataset_name}' is unknown{did_you_mean(dataset_name, [*CARDS, CUSTOM, DIFFUSERS])}"
        f" ({CUSTOM} and {DIFFUSERS} with --model_path: a network of your own, a pipeline)"
    )


def find_card(dataset_name: str) -> Card | None:
    """The card of a network; None for CUSTOM and DIFFUSERS. UserError for an unknown name."""
    return None if dataset_name in (CUSTOM, DIFFUSERS) else get_card(dataset_name)


def takes_prompts(dataset_name: str, model_path: str | None = None) -> bool | None:
    """Whether a network needs prompts, as far as this can be seen without loading it; else None."""
    card = find_card(dataset_name)
    if card is not None:
        return card.takes_prompts
    if dataset_name == DIFFUSERS and model_path:
        from models.diffusers import takes_prompts

        return takes_prompts(model_path)
    return None


def resolve(dataset_name: str, model_path: str | Path | None = None) -> Path:
    """The weights file of a network, downloaded if necessary.

    dataset_name: name of the network.
    model_path: the file itself. Default: the embedded file, or the one in
        ``./src/<dataset_name>/``, downloaded at the first use.

    All processes of torchrun must call this: the first one of each machine downloads, the others
    wait. The SHA-256 of a downloaded file is recorded beside it at the first use. Raises UserError
    if the file does not exist and cannot be downloaded, or has changed since the first use.
    """
    card = find_card(dataset_name)
    if card is None and not model_path:
        raise UserError(f"dataset_name '{dataset_name}' needs --model_path, the file of a network or MODULE:FUNCTION")
    if is_remote(model_path):
        return fetch(str(model_path), REMOTE_NAMES, description=True)
    if model_path:
        path = Path(model_path)
        if (path / "model_index.json").is_file():
            raise UserError(f"--model_path={path} is a diffusers pipeline: use it with --dataset_name={DIFFUSERS}")
        if not path.is_file():
            raise UserError(f"--model_path={path} is not a file; give the weights file itself")
        return path
    assert card is not None  # see the first check
    names = (card.file, *card.other_files)
    name = next((name for name in names if (card.folder / name).is_file()), card.file)
    return _fetch(card, name, card.urls, "pass --model_path", card.member)


def resolve_companion(dataset_name: str, model_path: str | Path | None = None) -> Path | None:
    """The second file of a network, beside ``model_path`` if that is given, or None."""
    card = find_card(dataset_name)
    if card is None or not card.companion:
        return None
    if is_remote(model_path):
        raise UserError("guidance_type 'cg' needs the classifier beside the network: download both, and give the file")
    if model_path:
        path = Path(model_path).with_name(card.companion)
        if not path.is_file():
            raise UserError(f"guidance_type 'cg' also needs the classifier: put {card.companion} beside {model_path}")
        return path
    return _fetch(card, card.companion, card.companion_urls, "pass --model_path, with the classifier beside that file")


def resolve_fid_ref(dataset_name: str) -> Path:
    """The FID reference statistics (npz) of a network, downloaded if necessary."""
    card = get_card(dataset_name)
    if not card.fid_file:
        raise UserError(
            f"no FID reference statistics are published for {dataset_name}: make them from your images with "
            "'python fid.py ref' and pass the file as --ref"
        )
    return _fetch(card, card.fid_file, card.fid_refs, "pass --ref")


def resolve_prompts(prompt: str | None) -> str | None:
    """Return ``prompt``, or for COCO_30K the file of 30,000 captions of MS-COCO (val2014).

    The file is downloaded to ``./src/ms_coco/`` if necessary.
    """
    if prompt != COCO_30K:
        return prompt
    address = f"{_TEXT_TO_IMAGE_BENCHMARK}/{_COCO_30K_FILE}"
    return str(_fetch(get_card("ms_coco"), _COCO_30K_FILE, (address,), "give a .csv file of captions of your own"))


def _fetch(card: Card, name: str, urls: tuple[str, ...], hint: str, member: str = "") -> Path:
    path = card.folder / name
    if not urls:
        if not path.is_file() and card.page:
            raise UserError(f"{card.name} has no direct address: download it from {card.page} to {path}, or {hint}")
        if not path.is_file():
            raise UserError(f"{path} is missing from this copy of the code: restore it from the repository, or {hint}")
        return path
    with distributed.local_main_first():
        if member:
            download_member(list(urls), path, member, desc=f"{card.name}: {name}", hint=hint)
        else:
            download_file(list(urls), path, desc=f"{card.name}: {name}", hint=hint)
        known_sha256(path, pinned=True)
    return path


def read_sidecar(path: Path) -> tuple[str, dict] | None:
    """(family, constructor arguments) of a network of other sizes than the published ones.

    They are read from ``<checkpoint>.json`` beside the checkpoint: {"family": ..., "config": {...}}
    with the config of ``models.build_denoiser``. Returns None without such a file. Raises UserError
    if it is damaged or has other contents.
    """
    file = path.with_name(path.name + ".json")
    if not file.is_file():
        return None
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        family, config = content["family"], content["config"]
        if not isinstance(family, str) or not isinstance(config, dict):
            raise TypeError
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(
            f'{file} does not describe the network {path.name}: it should read {{"family": "...", "config": {{...}}}}'
        ) from None
    return family, config


def format_table() -> str:
    """The table as text: one line per network, then the address and the place of each file."""
    rows = [("dataset_name", "family", "sampled", "classes", "guidance", "sigma", "licence", "state", "notes")]
    for card in CARDS.values():
        there = any((card.folder / name).is_file() for name in (card.file, *card.other_files))
        state = "embedded" if card.embedded else "downloaded" if there else "not downloaded"
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
    lines += ["", "files (put them there yourself on a machine without network):"]
    for card in CARDS.values():
        for url, path in card.downloads():
            unpacked = f"  ('{card.member}' in it)" if card.member and url in card.urls else ""
            lines.append(f"  {url}  ->  {path}{unpacked}")
        if card.page:
            lines.append(f"  {card.page}  ->  {card.folder / card.file}")
    return "\n".join(lines)


def verify(card: Card) -> list[tuple[str, Path]]:
    """Check the files of a card. Returns (state, path) of each file that exists or is recorded.

    The states are "ok", "differs", "missing" and "not recorded".
    """
    states = []
    places = [card.folder / name for name in (card.file, *card.other_files, card.companion, card.fid_file) if name]
    for path in [] if card.embedded else places:
        known = recorded_sha256(path)
        if path.is_file():
            state = "not recorded" if known is None else "ok" if sha256_of(path) == known[0] else "differs"
            states.append((state, path))
        elif known is not None:
            states.append(("missing", path))
    return states


@click.group(cls=Group)
def main():
    """The table of pretrained networks."""


@main.command("list")
def list_command():
    """Print the table of networks."""
    click.echo(format_table())


@main.command("verify")
@click.argument("name", required=False)
def verify_command(name):
    """Compare the files of one or all networks with the SHA-256 recorded at their first use."""
    states = [state for card in ([get_card(name)] if name else CARDS.values()) for state in verify(card)]
    for state, path in states:
        click.echo(f"{state:<12}  {path}")
    bad = sum(state in ("differs", "missing") for state, _ in states)
    click.echo(f"{len(states)} files of {name or 'all networks'} checked, {bad} missing or different")
    if bad:
        raise UserError("move the files that differ away: they are downloaded again at the next use")


if __name__ == "__main__":
    main()
