"""The parts of benchmarks/gpu_check.sh: each is one measurement, kept in a file of its own.

python -m benchmarks.gpu_check --outdir=gpu_check            # on a machine with a GPU
python -m benchmarks.gpu_check --outdir=/tmp/check --small   # anywhere: does it run to its end?
"""

import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import click
import torch

from benchmarks import ROOT
from benchmarks.measuring import describe_machine, interleaved
from models import build_denoiser
from models.compile import prepare_network
from solvers import sample
from torch_utils.cli import PATH, Command
from torch_utils.distributed import pick_device
from torch_utils.errors import UserError
from torch_utils.files import write_json
from torch_utils.markdown import table
from torch_utils.seeds import SeededGenerators
from torch_utils.version import code_version
from training.amed_trainer import Distiller
from training.options import SpanOptions
from training.span_trainer import SpanTrainer
from training.teacher import teacher_set

FID_IMAGES = 50_000
LAST_WORDS = 2000  # characters of a failed program that are recorded


class Skipped(Exception):
    """A part that this machine cannot run; the text says why."""


def cifar_network(device, small: bool):
    """An EDM network of the size of the published CIFAR-10 one (DDPM++), with random weights."""
    torch.manual_seed(0)
    config = {
        "img_resolution": 32,
        "img_channels": 3,
        "label_dim": 0,
        "model_type": "SongUNet",
        "model_channels": 16 if small else 128,
        "channel_mult": [1, 2] if small else [2, 2, 2],
        "num_blocks": 1 if small else 4,
        "augment_dim": 0,
    }
    from models.edm import EDMDenoiser

    weights = {name: value * 1.0 for name, value in EDMDenoiser(**config).state_dict().items()}
    return build_denoiser("edm", config, weights, device=device)


def seconds_of(function: Callable[[], object], device, repeats: int) -> float:
    """Median seconds of a call, after two that are not counted."""
    return statistics.median(wall for wall, _ in interleaved({"": function}, repeats, device, warmup=2)[""])


# Parts: functions of (device, small) that return what is recorded, or raise Skipped.


def doctor(device, small: bool) -> dict:
    return run_program([sys.executable, "-m", "tools.doctor"], 300)


def tests(device, small: bool) -> dict:
    """The tests of devices, which pretend one."""
    selected = ["tests/test_devices.py", "tests/test_device_handling.py"]
    if small:
        selected = ["tests/test_device_handling.py", "-k", "memory_is_full or follows"]
    return run_program([sys.executable, "-m", "pytest", "-q", *selected], 900)


@contextmanager
def waits_of(device) -> Iterator[list]:
    """Context with a list of warnings, one for each time that the host waits for an NVIDIA GPU."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield (found := [])
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    found += [entry for entry in seen if "synchronizing" in str(entry.message)]


def solvers(device, small: bool) -> dict:
    """All solvers of tests/test_devices.py: images beside those of the CPU, and waits of a run."""
    sys.path.append(str(ROOT / "tests"))
    from test_devices import CASES, SHAPE, Halving

    differences, waits = {}, {}
    for name in list(CASES)[: 4 if small else None]:
        images = []
        for place in (torch.device("cpu"), device):
            torch.manual_seed(0)
            net, arguments = Halving(SimpleNamespace(silent=nullcontext)).to(place), CASES[name](5)
            if "predictor" in arguments:
                arguments["predictor"].to(place)
            generators = SeededGenerators(range(2))
            x = generators.randn(SHAPE).to(place)
            draw = partial(generators.randn, SHAPE)
            sample(net, x, noise=draw, **arguments)  # tables are moved in the first run
            generators = SeededGenerators(range(2))
            draw = partial(generators.randn, SHAPE)
            with waits_of(place) as found:
                made = sample(net, x, noise=draw, **arguments)
            images.append(made.cpu())
        differences[name], waits[name] = float((images[0] - images[1]).abs().max()), len(found)
    return {"differences": differences, "waits": waits}


VARIANTS = {
    "eager": {},
    "eager, tf32": {"tf32": True},
    "eager, bf16": {"amp": "bf16"},
    "eager, fp16": {"amp": "fp16"},
    "compiled": {"compile_mode": "default"},
    "compiled, bf16": {"compile_mode": "default", "amp": "bf16"},
    "graphs, bf16": {"compile_mode": "reduce-overhead", "amp": "bf16"},
}


def prepared(device, small: bool, tf32: bool = False, **settings):
    from models.compile import choose_backends

    if device.type != "cuda" and (settings.get("compile_mode") or settings.get("amp") == "fp16" or tf32):
        raise Skipped("no GPU")
    choose_backends(tf32, bench=False)
    return prepare_network(cifar_network(device, small), **settings)


def sampling(device, small: bool, name: str) -> dict:
    """Seconds of iPNDM with five evaluations against five calls of the bare network."""
    net, found = prepared(device, small, **VARIANTS[name]), {}
    for batch in (2,) if small else (1, 8, 64, 512):
        x, sigma = torch.randn(batch, 3, 32, 32, device=device), torch.tensor(1.0, device=device)

        @torch.no_grad()
        def network(x=x, sigma=sigma):
            for _ in range(5):
                net(x, sigma)

        whole = partial(sample, net, x, solver="ipndm", num_steps=6)
        repeats = 2 if small else 10
        alone, all_of_it = seconds_of(network, device, repeats), seconds_of(whole, device, repeats)
        found[str(batch)] = {"network": alone, "sampling": all_of_it, "images per second": batch / all_of_it}
    return found


def distillation(device, small: bool, name: str) -> dict:
    """Seconds of an AMED iteration, and of as many calls of the network without gradient."""
    net, batch = prepared(device, small, **VARIANTS[name]), 2 if small else 128
    config = {"sampler_stu": "amed", "sampler_tea": "heun", "num_steps": 3 if small else 4, "afs": True}
    config |= {"scale_dir": 0.01}
    distiller = Distiller(net, config, batch=batch, device=device)
    return {"iteration": seconds_of(distiller.iterate, device, 1 if small else 5), "batch": batch}


def span_training(device, small: bool, name: str) -> dict:
    """Seconds of an iteration of the span solver's training."""
    net, batch = prepared(device, small, **VARIANTS[name]), 2 if small else 64
    options = SpanOptions(
        dataset_name="cifar10",
        seed=0,
        num_steps=3 if small else 5,
        pairs=batch * 2,
        val_pairs=batch,
        batch=batch,
        num_steps_tea=4 if small else 19,
        init="preset",
        heads="none",
        loss="features+0.2*huber",
        val_every=10_000,
        total_kimg=100,
    )
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"gpu-check-{os.getpid()}"
    try:
        pairs = teacher_set(net, options.teacher(0.002, 80.0), folder / "set.safetensors", batch=batch, device=device)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    student = options.make_student(0.002, 80.0)
    if student.config["first_step"] == "gaussian":
        student.measure_gaussian(net, calls=batch)
    trainer = SpanTrainer(net, student, pairs, options, 100, device)
    return {"iteration": seconds_of(trainer.iterate, device, 1 if small else 5), "batch": batch}


def nccl(device, small: bool) -> dict:
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if count < 2:
        raise Skipped(f"{count} GPUs")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    command += ["sample.py", "--dataset_name=digits", "--solver=ipndm", "--num_steps=6", "--seeds=0-1023"]
    return {"processes": count, **run_program([*command, "--fid_ref=digits"], 600)}


def fid_loader(device, small: bool) -> dict:
    more = ["--num_images=50", "--repeats=1"] if small else ["--num_images=5000", "--repeats=3"]
    return run_program([sys.executable, "-m", "benchmarks.fid_loader", *more], 600)


def published_fid(device, small: bool) -> dict:
    """FIDs of the official CIFAR-10 network with 50,000 images, beside the published ones.

    edm with 35 evaluations: Karras et al. 2022, Table 2. DPM-Solver++(3M) and iPNDM with 6: the
    table of Zhou et al. 2024 (arXiv 2312.00094).
    """
    if device.type != "cuda":
        raise Skipped("no GPU")
    try:
        socket.create_connection(("nvlabs-fi-cdn.nvidia.com", 443), timeout=10).close()
    except OSError:
        raise Skipped("no network access") from None
    cases = {
        "edm": (18, 1.97, ["--denoise_to_zero=True"]),
        "dpmpp": (7, 11.99, ["--schedule_type=logsnr"]),
        "ipndm": (7, 7.05, []),
    }
    found = {}
    for solver, (steps, published, more) in cases.items():
        command = [sys.executable, "sample.py", "--dataset_name=cifar10", f"--solver={solver}", "--batch=512"]
        command += [f"--num_steps={steps}", f"--seeds=0-{FID_IMAGES - 1}", "--fid_ref=cifar10", *more]
        found[solver] = {**run_program(command, 3600), "published": published}
    return found


def run_program(command: list[str], timeout: int) -> dict:
    """The output of a program. Raises RuntimeError with its last words if it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"took longer than {timeout} s") from None
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {(done.stdout + done.stderr).strip()[-LAST_WORDS:]}")
    return {"output": done.stdout[-4000:]}


def parts(small: bool) -> dict[str, Callable]:
    """Name -> part, in the order in which they run."""
    found: dict[str, Callable] = {"doctor": doctor, "tests": tests, "solvers": solvers}
    names = ("eager", "eager, bf16", "graphs, bf16") if small else VARIANTS
    for what, function in (("sampling", sampling), ("distillation", distillation), ("span training", span_training)):
        for name in names:
            if function is sampling or "graphs" not in name:  # a graph would overwrite what gradients need
                found[f"{what}, {name}"] = partial(function, name=name)
    return found | {"nccl": nccl, "fid loader": fid_loader, "published FID": published_fid}


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def page(record: dict) -> str:
    """The Markdown page of everything that was recorded."""
    rows = []
    for name, result in record["parts"].items():
        values = result.get("result")
        if values is None:
            text = result.get("skipped") or result.get("failed")
        elif "output" in values:
            text = "passed"
        elif "differences" in values:
            worst, slowest = (max(values[what], key=values[what].get) for what in ("differences", "waits"))
            text = f"images differ from those of the CPU by at most {values['differences'][worst]:.2g} ({worst})"
            text += f"; at most {values['waits'][slowest]} waits in a run ({slowest})"
        elif "iteration" in values:
            text = f"{values['iteration']:.4g} s per iteration of {values['batch']} samples"
        elif name.startswith("sampling"):
            text = "; ".join(
                f"batch {batch}: {of['sampling'] / of['network']:.3f} of the network, {of['images per second']:.4g} img/s"
                for batch, of in values.items()
            )
        else:
            text = "; ".join(
                f"{key} (published {of['published']}): {last_line(of['output'])}" for key, of in values.items()
            )
        state = "skipped: " if "skipped" in result else "failed: " if "failed" in result else ""
        rows.append([name, state + last_line(text).replace("|", "/"), f"{result['seconds']:.0f} s"])
    head = f"# GPU check\n\n{record['machine']}\n\ncode {record['code']}, {record['system']}\n\n"
    note = "Made with the smallest sizes: the figures mean nothing.\n\n" if record["small"] else ""
    return head + note + table(["part", "result", "took"], rows) + "\n"


@click.command(cls=Command)
@click.option("--outdir", type=PATH, default="gpu_check", show_default=True, metavar="DIR", help="Where to write")
@click.option("--only", default=None, metavar="TEXT", help="Only the parts whose names contain this text")
@click.option("--small", is_flag=True, help="The smallest sizes, to see that everything runs")
@click.option("--device", default=None, help="cpu, cuda or mps (default: the fastest available)")
def main(outdir, only, small, device):
    """Measure everything that needs a GPU, and write one JSON and one Markdown page."""
    device, folder = pick_device(device), Path(outdir)
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    record = {
        "machine": describe_machine(device),
        "system": platform.platform(),
        "code": code_version(),
        "small": small,
        "parts": {},
    }
    chosen = {name: part for name, part in parts(small).items() if (only or "") in name}
    if not chosen:
        raise UserError(f"--only={only}: the parts are {'; '.join(parts(small))}")
    for name, part in chosen.items():
        path = folder / "parts" / f"{name.replace(', ', '-').replace(' ', '_')}.json"
        begin, result = time.perf_counter(), {}
        try:
            result = json.loads(path.read_text()) if path.is_file() else {"result": part(device, small)}
        except Skipped as reason:
            result["skipped"] = str(reason)
        except (UserError, RuntimeError, MemoryError, OSError) as error:
            result["failed"] = f"{type(error).__name__}: {error}"
        state = "done" if "result" in result else ": ".join(list(result.items())[0])
        if "seconds" in result:
            state = "done before"
        elif "failed" not in result:
            write_json(path, result | {"seconds": time.perf_counter() - begin})
        record["parts"][name] = {"seconds": time.perf_counter() - begin} | result
        print(f"{name}: {state} ({record['parts'][name]['seconds']:.1f} s)", flush=True)
        write_json(folder / "gpu_check.json", record)
        (folder / "gpu_check.md").write_text(page(record), encoding="utf-8")
    print(f"wrote {folder / 'gpu_check.md'} and {folder / 'gpu_check.json'}")


if __name__ == "__main__":
    main()
