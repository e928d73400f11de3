"""Shared parts of the benchmarks: interleaved repetitions, the machine, measured rows.

Variants run in turn, so that other load on the machine slows all of them alike.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from torch_utils.errors import UserError
from torch_utils.version import cpu_name


def describe_machine(device: torch.device | str = "cpu") -> str:
    """One line: hardware, versions, threads, and how busy the machine is."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    names = " + ".join([cpu_name(), *([torch.cuda.get_device_name()] if torch.cuda.is_available() else [])])
    return (
        f"{names}, {cores} of {os.cpu_count()} CPU cores, {torch.get_num_threads()} torch threads, device {device};"
        f" Python {platform.python_version()}, torch {torch.__version__}{load}; {time.strftime('%Y-%m-%d')}"
    )


def synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.device(device).type == "mps":
        torch.mps.synchronize()


def interleaved(
    variants: Mapping[str, Callable[[], object]], repeats: int, device: torch.device | str = "cpu", warmup: int = 1
) -> dict[str, list[tuple[float, float]]]:
    """(wall seconds, CPU seconds of the process) of every variant in every round, A B C A B C ...

    With other load on the machine, CPU seconds are steadier. On a GPU, only wall seconds are
    meaningful.
    """
    for function in variants.values():
        for _ in range(warmup):
            function()
    synchronize(device)
    seconds: dict = {name: [] for name in variants}
    for _ in range(repeats):
        for name, function in variants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            function()
            synchronize(device)
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return seconds


def spread(values: list[float], digits: int = 3) -> str:
    """Median and range, "1.23 (1.20-1.31)"."""
    return f"{statistics.median(values):.{digits}g} ({min(values):.{digits}g}-{max(values):.{digits}g})"


def read_rows(path: Path) -> list[dict]:
    """The rows of a ``.jsonl`` file; none if it does not exist."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def measured(path: Path, key: dict, measure: Callable[[], dict]) -> None:
    """Appends the row ``key | measure()``, with date and machine, unless it exists."""
    if any(all(row.get(name) == value for name, value in key.items()) for row in read_rows(path)):
        return
    row = {**key, **measure(), "date": time.strftime("%Y-%m-%d"), "machine": describe_machine()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def mean_and_error(values) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval (normal approximation)."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return float(values.mean()), 1.96 * float(values.std()) / len(values) ** 0.5


def network_of(folder: Path) -> Path:
    """The one network that tools.train_denoiser left in a folder."""
    found = sorted(folder.glob("network-snapshot-*.safetensors"))
    if len(found) != 1:
        raise UserError(f"{folder} must have one network, but has {len(found)}: train it with --snap=0")
    return found[0]
