"""Checks this installation. One line per finding; the exit code is 1 if something is broken.

    python -m tools.doctor

Checks versions, devices, optional packages, downloaded files and free disk space. Samples a few
images with the embedded networks on every device and compares them with known values. Takes
seconds, downloads nothing and leaves no files.
"""

if __name__ == "__main__":
    from torch_utils.usage import check_usage

    check_usage("tools.doctor")

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch

from torch_utils.cli import Command
from torch_utils.download import no_network, recorded_sha256

OK, NOTE, FAIL = "ok", "note", "FAIL"
ROOT = Path(__file__).resolve().parents[1]
LOW_DISK_GIB = 2
VARIABLES = ("AMED_CACHE", "AMED_OFFLINE", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
Finding = tuple[str, str]

# Images of seeds 0-3 by iPNDM (order 4) with 6 time steps: means of the quadrants (rows of an
# image, then columns) over the channels, in [-1, 1]. From a run in float32 on a CPU;
# tests/test_doctor.py computes them with loops of its own.
PROBE = {"solver": "ipndm", "num_steps": 6, "max_order": 4}
EXPECTED = {
    "digits": (
        (-0.7767, -0.8987, -0.9009, -0.7301),
        (-0.9209, -0.7538, -0.7873, -0.8171),
        (-0.8677, -0.8544, -0.9184, -0.7691),
        (-0.8056, -0.8437, -1.0066, -0.8266),
    ),
    "cifar10-small": (
        (0.2186, 0.0551, -0.3110, -0.4193),
        (-0.1241, 0.7266, -0.2631, 0.0448),
        (0.0595, 0.2227, 0.1117, 0.2467),
        (-0.4444, -0.2138, -0.5180, -0.4156),
    ),
}
TOLERANCE = 0.01  # rounding, TF32 included, stays below 0.003; other weights or a broken kernel give 0.05 and more


# --------------------------------------------------------------------------------------------------
# Packages


def requirements() -> dict[str, list[str]]:
    """The packages that this project needs, by extra; those of the core under ''."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {"": project["dependencies"], **project["optional-dependencies"]}


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def package_name(requirement: str) -> str:
    """The name in "name>=version,!=version"."""
    return re.match(r"[\w.-]*\w", requirement)[0]


def missing_package(requirement: str) -> str | None:
    """What is wrong with an installed package, in a few words, or None.

    requirement: as in "name>=version,!=version".
    """
    name = package_name(requirement)
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"{name} is not installed"
    for relation, bound in re.findall(r"(>=|!=)([\d.]+)", requirement):
        if relation == ">=" and _numbers(version) < _numbers(bound):
            return f"{name} {version} is older than {bound}"
        if relation == "!=" and _numbers(version) == _numbers(bound):
            return f"{name} {version} has an error that affects this code: install another version"
    return None


def check_packages() -> Iterator[Finding]:
    yield (OK if sys.version_info >= (3, 11) else FAIL), f"Python {platform.python_version()} on {platform.platform()}"
    if not (ROOT / "pyproject.toml").is_file():
        yield NOTE, "no pyproject.toml beside the code: package versions were not checked"
        return
    for extra, wanted in requirements().items():
        problems = [problem for problem in map(missing_package, wanted) if problem]
        names = [package_name(requirement) for requirement in wanted]
        if not problems:
            versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
            yield OK, f"extra '{extra}' is present ({versions})" if extra else versions
        elif extra:
            yield NOTE, f"extra '{extra}' is absent ({'; '.join(problems)}): pip install -e '.[{extra}]' if you need it"
        else:
            yield FAIL, f"{'; '.join(problems)}: pip install -e ."


# --------------------------------------------------------------------------------------------------
# Machine


def devices() -> list[str]:
    """Every usable device, the CPU first."""
    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return [*names, "mps"] if torch.backends.mps.is_available() else names


def check_devices() -> Iterator[Finding]:
    capability = torch.backends.cpu.get_cpu_capability()
    yield OK, f"CPU: {torch.get_num_threads()} threads of {os.cpu_count()} processors, {capability}"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            yield OK, f"CUDA {torch.version.cuda} device {index}: {found.name}, {found.total_memory / 2**30:.0f} GiB"
    elif torch.version.cuda or torch.version.hip:
        yield NOTE, "PyTorch is built for GPUs, but finds none: if this machine has one, check the driver"
    else:
        yield NOTE, "PyTorch is built for the CPU only"
    if torch.backends.mps.is_available():
        yield OK, "MPS is available"
    backends = torch.distributed.is_available() and [
        name for name in ("gloo", "nccl") if getattr(torch.distributed, f"is_{name}_available")()
    ]
    yield (OK, f"torchrun backends: {', '.join(backends)}") if backends else (NOTE, "no backend for torchrun")
    settings = ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ)
    yield OK, f"environment: {settings or 'none of ' + ', '.join(VARIABLES) + ' is set'}"


def check_places() -> Iterator[Finding]:
    """Free disk space, and the downloaded files."""
    from models import zoo
    from torch_utils.remote import cache_dir

    for what, folder in (("working directory", Path.cwd()), ("cache", cache_dir())):
        place = next(path for path in (folder, *folder.parents) if path.is_dir())
        free = shutil.disk_usage(place).free / 2**30
        if not os.access(place, os.W_OK):
            yield NOTE, f"{what} {folder} is not writable: run elsewhere, or set AMED_CACHE"
        elif free < LOW_DISK_GIB:
            yield NOTE, f"{what} {folder}: only {free:.1f} GiB are free, large networks will not fit"
        else:
            yield OK, f"{what} {folder}: {free:.0f} GiB free"
    cached = sorted(path for path in cache_dir().rglob("*") if path.is_file()) if cache_dir().is_dir() else []
    size = sum(path.stat().st_size for path in cached) / 2**20
    names = ", ".join(path.name for path in cached[:6]) + (", ..." if len(cached) > 6 else "")
    yield OK, f"cache holds {len(cached)} files, {size:.0f} MiB{f': {names}' if cached else ''}"
    for card in zoo.CARDS.values():
        for name in (card.file, *card.other_files, card.companion, card.fid_file):
            path = card.folder / name
            if name and not card.embedded and path.is_file():
                yield _downloaded(path)


def _downloaded(path: Path) -> Finding:
    known = recorded_sha256(path)
    if known is None:
        return NOTE, f"{path}: its checksum will be recorded on first use"
    if known[1]:
        return OK, f"{path}: {path.stat().st_size / 2**20:.0f} MiB, as recorded"
    return NOTE, f"{path} was changed since its checksum was recorded: run 'python -m models.zoo verify'"


# --------------------------------------------------------------------------------------------------
# End to end


def quadrants(images: torch.Tensor) -> torch.Tensor:
    """Means [B,4] of the quadrants of images [B,C,H,W], over all channels."""
    return torch.nn.functional.adaptive_avg_pool2d(images.float().cpu().mean(1, keepdim=True), 2).flatten(1)


def probe(name: str, device: str) -> torch.Tensor:
    """Images [4,C,H,W] of seeds 0-3 by an embedded network."""
    from models import create_model
    from models.inputs import draw_inputs
    from solvers import sample

    with no_network():
        net = create_model(name, device=device)
    return sample(net, draw_inputs(net, range(4), device=device)[0], **PROBE)


def check_network(name: str, device: str) -> Iterator[Finding]:
    """Compares images, their files and their features with known values."""
    from evaluation.detectors import load_detector
    from evaluation.frechet import Reference
    from models import zoo
    from torch_utils.images import load_array, save_image, to_uint8

    started = time.perf_counter()
    images = probe(name, device)
    error = float((quadrants(images) - torch.tensor(EXPECTED[name])).abs().max())
    if not error < TOLERANCE:
        yield FAIL, f"{name} on {device}: its images are off by {error:.3g} (at most {TOLERANCE} expected)"
        return
    pixels = to_uint8(images)
    with tempfile.TemporaryDirectory() as folder:
        for seed, image in enumerate(pixels):
            save_image(image, Path(folder) / f"{seed:06d}.png")
        read = load_array(folder)
    if not (read.transpose(0, 2, 3, 1) == pixels).all():
        yield FAIL, f"{name} on {device}: images change when they are written to PNG files and read again"
        return
    with no_network():
        features = load_detector(name, device)(torch.from_numpy(read))
        reference = Reference.load(zoo.resolve_fid_ref(name))
    if features.shape != (4, len(reference.mu)) or not features.isfinite().all():
        yield FAIL, f"{name} on {device}: the features of its images are unusable"
        return
    seconds = time.perf_counter() - started
    yield OK, f"{name} on {device}: 4 images, files and features are right (error {error:.1g}, {seconds:.1f} s)"


def checks() -> dict[str, Callable[[], Iterator[Finding]]]:
    found = {"packages": check_packages, "devices": check_devices, "places": check_places}
    for name in EXPECTED:
        for device in devices():
            found[f"{name} on {device}"] = lambda name=name, device=device: check_network(name, device)
    return found


def examine(check: Callable[[], Iterator[Finding]], what: str) -> list[Finding]:
    """The findings of a check. An exception becomes a finding."""
    findings = []
    try:
        for finding in check():
            findings.append(finding)
    except Exception as error:  # report it and continue with the other checks
        findings.append((FAIL, f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"))
    return findings


@click.command(cls=Command)
def main():
    """Checks the installation. One line per finding; exit code 1 if something is broken."""
    broken = 0
    for what, check in checks().items():
        for verdict, text in examine(check, what):
            broken += verdict == FAIL
            click.echo(f"{verdict:<5} {text}")
    click.echo(f"{broken} broken: please report them with this whole output" if broken else "all checks passed")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
