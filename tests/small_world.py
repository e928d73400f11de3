"""Small stand-ins for the files that the documents' commands expect: networks, images, runs."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from latent_nets import tiny_case
from PIL import Image
from test_k_sampler import span

from evaluation.detectors import load_detector
from evaluation.frechet import Reference
from models import zoo
from models.edm import EDMDenoiser, save_edm_safetensors
from tools.dataset_tool import make_dataset
from training.checkpoint import save_predictor

WORDS = ["<|startoftext|>", "<|endoftext|>", *"abcde", *(f"{letter}</w>" for letter in "abcde")]


def describe(path: Path, family: str, config: dict) -> None:
    """Writes ``<path>.json``, the sizes of a network that is not the published one."""
    Path(f"{path}.json").write_text(json.dumps({"family": family, "config": config}))


def part(weights: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def adm_config(facts: dict) -> dict:
    return {"model": facts["init_kwargs_model"], "classifier": facts["init_kwargs_classifier"]}


def write_cm(path: Path) -> None:
    facts, weights, _ = tiny_case("cm_lsun")
    torch.save(weights, path)
    describe(path, "cm", facts["init_kwargs"])


def write_adm(path: Path, classifier: str) -> None:
    facts, weights, _ = tiny_case("adm_guided")
    torch.save(part(weights, "model."), path)
    torch.save(part(weights, "classifier."), path.with_name(classifier))
    describe(path, "adm", adm_config(facts))


def write_latent(path: Path, case: str, family: str) -> None:
    """A latent diffusion network, family "ldm" or "sd"."""
    facts, weights, _ = tiny_case(case)
    torch.save({"state_dict": weights, "global_step": 3, "callbacks": {SimpleNamespace: 1}}, path)
    describe(path, family, facts["init_kwargs"])


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def write_edm(path: Path, resolution: int, channels: int = 3, classes: int = 0) -> None:
    torch.manual_seed(0)
    sizes = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    net = EDMDenoiser(resolution, channels, classes, model_type="SongUNet", **sizes)
    save_edm_safetensors(net, path)


def write_zoo(source: Path) -> None:
    """Networks and a reference where downloaded ones are looked for."""
    for name in ("cifar10", "ffhq", "imagenet64", "imagenet256", "ffhq_ldm", "ms_coco"):
        card = zoo.get_card(name)
        path = source / name / card.file
        path.parent.mkdir(parents=True)
        if card.family == "edm":
            write_edm(path, card.resolution, classes=card.label_dim)
        elif card.family == "adm":
            write_adm(path, card.companion)
        else:
            write_latent(path, "sd_cfg_kl" if card.family == "sd" else "ldm_uncond_vq", card.family)
    write_reference(source / "cifar10" / zoo.get_card("cifar10").fid_file, "cifar10-small")


def write_reference(path: Path, detector: str) -> None:
    known = load_detector(detector)
    Reference(np.zeros(known.feature_dim), np.eye(known.feature_dim), known.name, known.digest).save(path)


def write_images(folder: Path, count: int = 12, size: tuple = (32, 32, 3), kind: str = "png") -> None:
    """Images with smooth content, named after their seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for seed in range(count):
        coarse = Image.fromarray(random.integers(0, 256, [4, 4, *size[2:]], dtype=np.uint8))
        coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC).save(folder / f"{seed:06d}.{kind}")


def write_inputs(folder: Path) -> None:
    """Everything that the documents' commands read and do not make themselves."""
    write_zoo(folder / "src")
    write_tokenizer(folder / "tokenizer")
    for place in ("generated", "restored", "originals", "samples/cifar10/amed_nfe5", "samples/ms_coco/dpmpp_nfe10"):
        write_images(folder / place)
    for kind in ("cat", "dog"):
        write_images(folder / "photos" / kind, size=(40, 48, 3), kind="jpg")
    (folder / "captions.csv").write_text("seed,prompt\n" + "".join(f"{seed},a b\n" for seed in range(12)))
    (folder / "datasets").mkdir()
    for name in ("photos", "cifar10-train", "cifar10-test", "datasets/cifar10-32x32"):
        make_dataset(folder / "photos", folder / f"{name}.zip", (32, 32), "center-crop")
    digits = {"images": np.zeros([12, 28, 28], np.uint8), "labels": np.arange(12) % 10}
    digits["images"][:, 8:20, 8:20] = np.arange(12)[:, None, None] * 20
    np.savez(folder / "mnist_train.npz", **digits)
    make_dataset(folder / "mnist_train.npz", folder / "datasets" / "mnist-test.zip", (32, 32), "pad")
    write_reference(folder / "my-statistics.npz", "digits")
    write_edm(folder / "net.pkl", 32, channels=1)
    shutil.copy(folder / "net.pkl", folder / "FILE")
    student = span("full", dataset_name="digits", sigma_min=0.002, sigma_max=80.0)
    save_predictor(student, folder / "exps" / "00000-digits" / "predictor-000001.safetensors")
    save_predictor(student, folder / "predictor.safetensors")
    rows = [{"method": "span", "nfe": 4, "fid": 1.5, "images": 5000}]
    (folder / "comparison").mkdir()
    (folder / "comparison" / "results.json").write_text(json.dumps({"rows": rows, "facts": {}}))
