"""Fréchet inception distance of images to reference statistics (protocol and file format of EDM).

``pairs`` compares images one by one instead: PSNR, SSIM and LPIPS of files with equal names.

    python fid.py calc --images=samples/cifar10/amed_nfe5 --ref=cifar10
    python fid.py ref --data=datasets/my-data.zip --dest=my-data.npz
    python fid.py inspect --images=photos.zip
    python fid.py calc --images=generated --ref=photos.zip --metrics=fid,kid,precision,recall
    torchrun --standalone --nproc_per_node=8 fid.py calc --images=samples --ref=my-data.npz

    python fid.py ref --data=photos --dest=photos.npz --num=5000
    python fid.py ref --data=datasets/mnist-train.zip --dest=digits.npz --detector=digits
    python fid.py inspect --images=samples/cifar10/amed_nfe5
    python fid.py inspect --images=datasets/my-data.zip

    python fid.py pairs --images=restored --ref=originals
    python fid.py pairs --images=restored --ref=originals --channels=y --crop=4
    python fid.py pairs --images=restored.zip --ref=originals --metrics=psnr,ssim,lpips

--ref is a network of models/zoo.py (its reference is downloaded), a file or a URL. In a folder
written by sample.py only the samples count, not grid.png and inters/. A folder that holds images of
two runs is refused. docs/images.md says which files count and how they are read. Under torchrun
write --num as --num_images, since torchrun has an option --num of its own.

--detector=digits with --ref=digits uses the features of the embedded digit classifier. This
FID-digits is not comparable with the usual Inception FID.
"""

if __name__ == "__main__":
    from torch_utils.usage import check_usage

    check_usage("fid")

from collections import Counter
from dataclasses import asdict
from pathlib import Path

import click

from evaluation.fid import calculate_fid, choose_detector, choose_images, image_statistics, metric_names
from evaluation.frechet import Reference
from evaluation.image_pairs import CHANNELS, METRICS, compare_pairs
from torch_utils import distributed
from torch_utils.cli import PATH, SEED, Group, offline_flag
from torch_utils.errors import UserError
from torch_utils.files import check_destination, write_json
from torch_utils.image_listing import describe
from torch_utils.images import ImageSource
from torch_utils.session import session

CALC = {
    "What to measure": "images ref metrics | num seed detector trust",
    "Output": "json_path | feature_cache",
    "Speed": "batch device | workers offline",
}
PAIRS = {"What to measure": "images ref metrics channels crop", "Output": "json_path", "Speed": "device"}
REF = {"What to measure": "data detector num seed trust", "Output": "dest", "Speed": "batch device offline"}


def choice_flags(command):
    """Decorator: which images."""
    command = click.option("--seed", type=SEED, default=0, show_default=True, help="Random seed of --num")(command)
    return click.option(
        "--num", "--num_images", type=click.IntRange(min=2), help="Use this many random images (default: all)"
    )(command)


def device_flags(command):
    """Decorator: where the network computes, and what it may be."""
    command = offline_flag(command)
    help = "Run a TorchScript detector of unknown origin"
    command = click.option("--trust", type=bool, default=False, show_default=True, help=help)(command)
    return click.option("--device", help="cpu, cuda or mps (default: the fastest available)")(command)


@click.group(cls=Group)
def main():
    """Fréchet inception distance (FID): calc; ref, which makes statistics; inspect; pairs: PSNR."""


@main.command(groups=CALC)
@click.option("--images", type=PATH, required=True, metavar="PATH", help="Folder or zip of images to evaluate")
@click.option("--ref", type=PATH, required=True, metavar="NPZ|URL|NAME|PATH", help="Reference statistics, or images")
@choice_flags
@click.option("--batch", type=click.IntRange(min=1), default=250, show_default=True, help="Images per network call")
@click.option(
    "--detector", type=PATH, default=None, metavar="NAME|PATH", help="Default: the reference's, else inception"
)
@click.option("--workers", type=click.IntRange(min=0), help="Processes that decode images (default: 0 on the CPU)")
@click.option(
    "--feature-cache",
    "--feature_cache",
    type=PATH,
    default=None,
    metavar="NPZ",
    help="Store features in this file and reuse them",
)
@click.option("--json", "json_path", type=PATH, default=None, metavar="FILE", help="Also write the result to this file")
@click.option(
    "--metrics",
    default="fid",
    show_default=True,
    metavar="NAME,...",
    help="Measures: fid, kid, precision, recall, density, coverage; all but fid need images as --ref",
)
@device_flags
def calc(images, ref, num, seed, batch, detector, workers, feature_cache, json_path, metrics, device, trust):
    """FID of images. Prints 'FID 12.3456 images=... detector=... weights=... ref=...'."""
    for flag, path in (("--json", json_path), ("--feature-cache", feature_cache)):
        if path is not None:
            check_destination(path, flag)
    with session(device) as device:
        result = calculate_fid(
            images,
            ref,
            num=num,
            seed=seed,
            batch=batch,
            detector=detector,
            feature_cache=feature_cache,
            device=device,
            trust=trust,
            workers=workers,
            metrics=metric_names(metrics),
        )
        if result is not None:
            if json_path is not None:
                write_json(json_path, asdict(result))
            print("\n".join(result.lines()), flush=True)
        distributed.barrier()


@main.command(groups=REF)
@click.option("--data", type=PATH, required=True, metavar="PATH", help="Folder or zip of images")
@click.option("--dest", type=PATH, required=True, metavar="NPZ", help="Where to write the statistics")
@click.option("--batch", type=click.IntRange(min=1), default=500, show_default=True, help="Images per network call")
@click.option(
    "--detector", type=PATH, default="inception", show_default=True, metavar="NAME|PATH", help="Network of the features"
)
@choice_flags
@device_flags
def ref(data, dest, batch, detector, num, seed, device, trust):
    """Reference statistics of a dataset, for --ref."""
    if Path(dest).suffix != ".npz":
        raise UserError(f"--dest={dest}: must end in .npz")
    check_destination(dest, "--dest")
    with session(device) as device:
        source = ImageSource(data)
        indices = choose_images(source, num, seed)
        network = choose_detector(detector, None, device, trust)
        statistics = image_statistics(source, indices, network, batch, device)
        if distributed.rank() == 0:
            mu, sigma = statistics.moments()
            Reference(mu, sigma, network.name, network.digest, len(indices)).save(dest)
            print(f"{dest}: {len(indices)} images, {network.feature_dim} features, detector={network.name}", flush=True)
        distributed.barrier()


@main.command()
@click.option("--images", type=PATH, required=True, metavar="PATH", help="Folder or zip of images")
def inspect(images):
    """Formats, modes and sizes of images, and what is left out."""
    source = ImageSource(images, uniform=False)
    print(f"{images}: {len(source)} images")
    kinds: dict[str, Counter] = {"format": Counter(), "mode": Counter(), "size": Counter()}
    for index in range(len(source)):
        for kind, value in source.header(index).items():
            kinds[kind][value] += 1
    for kind, found in kinds.items():
        shown = ", ".join(f"{value} ({count})" for value, count in found.most_common(8))
        print(f"{kind}: {shown}" + (f", and {len(found) - 8} others" if len(found) > 8 else ""))
    if len(kinds["size"]) > 1:
        print("calc and ref need images of one size: they refuse these")
    print(f"left out: {describe(source.ignored) or 'nothing'}")
    if source.labels is not None:
        print(f"labels: {len(set(source.labels))} classes")


@main.command(groups=PAIRS)
@click.option("--images", type=PATH, required=True, metavar="PATH", help="Folder or zip of images to evaluate")
@click.option("--ref", type=PATH, required=True, metavar="PATH", help="Folder or zip of originals of the same names")
@click.option("--metrics", default="psnr,ssim", show_default=True, metavar="NAME,...", help=", ".join(METRICS))
@click.option("--channels", type=click.Choice(CHANNELS), default="rgb", show_default=True, help="y: only luma (BT.601)")
@click.option("--crop", type=click.IntRange(0), default=0, show_default=True, help="Pixels to leave out at every side")
@click.option("--json", "json_path", type=PATH, default=None, metavar="FILE", help="Also write all values to this file")
@click.option("--device", help="For LPIPS: cpu, cuda or mps (default: the fastest available)")
def pairs(images, ref, metrics, channels, crop, json_path, device):
    """PSNR and SSIM of restored images and their originals, paired by file name.

    Prints the means over images, 'PSNR 27.1234 SSIM 0.8123 images=... channels=... crop=...'.
    """
    if json_path is not None:
        check_destination(json_path, "--json")
    with session(device) as device:
        if distributed.rank() == 0:
            names = [name.strip() for name in metrics.split(",") if name.strip()]
            result = compare_pairs(images, ref, names, channels, crop, device)
            if json_path is not None:
                write_json(json_path, {"means": result.means(), **asdict(result)})
            print(result.line(), flush=True)
        distributed.barrier()


if __name__ == "__main__":
    main()
