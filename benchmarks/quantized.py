"""8-bit networks with five evaluations: time, distance to the float32 network, FID.

    python -m benchmarks.quantized --dataset_name=cifar10-small    # measures
    python -m benchmarks.quantized                                 # renews docs/quantization.md

The solver is the best plain one of benchmarks/learned_solvers.py. Variants are timed in turn on one
batch of 64 images, in CPU seconds of one thread; they are compiled before. Seeds and scores are of
benchmarks/learned_solvers.py. Rows are appended to benchmarks/quantized.jsonl when they are
measured, and are not measured again.
"""

import statistics
import tempfile

import click
import torch

from benchmarks.demo_settings import ROOT
from benchmarks.learned_solvers import LearnedSolvers
from benchmarks.measuring import interleaved, measured, read_rows
from benchmarks.report_learned_solvers import difference
from evaluation.detectors import EMBEDDED
from models import create_model
from models.compile import prepare_network
from models.quantize import quantize
from sampling.quantized import sampled_states
from solvers import sample
from tools.make_docs import renew
from torch_utils.cli import Command
from torch_utils.markdown import table as markdown

FILE, PAGE = ROOT / "benchmarks" / "quantized.jsonl", ROOT / "docs" / "quantization.md"
FEW, IMAGES, BATCH, ROUNDS = 5, 1000, 64, 9
FLOAT = "float32"
CONVOLUTIONS = ("aten::mkldnn_convolution", "aten::addmm", "aten::mm")  # with linear layers


def variants(dataset_name, settings):
    """{name: network}."""
    made = {
        FLOAT: prepare_network(create_model(dataset_name)),
        "float32, compiled": prepare_network(create_model(dataset_name), compile_mode="default"),
        "bfloat16": prepare_network(create_model(dataset_name), "bf16"),
        "bfloat16, compiled": prepare_network(create_model(dataset_name), "bf16", compile_mode="default"),
    }
    states = sampled_states(made[FLOAT], settings)
    made["int8"], made["int8, compiled"] = (quantize(made[FLOAT], states) for _ in range(2))
    prepare_network(made["int8, compiled"], compile_mode="default")
    return {**made, "int8, one range per layer": quantize(made[FLOAT], states, per_level=False)}


def convolution_share(call):
    """The part of the time of a call that is spent in convolutions and linear layers."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    return sum(times.get(name, 0) for name in CONVOLUTIONS) / sum(times.values())


@torch.no_grad()
def measure(dataset_name, work):
    """One row per variant of the network."""
    own = LearnedSolvers(dataset_name, work, IMAGES)
    bench, latents = own.bench, own.bench.latents[:BATCH]
    plain = own.best_plain(FEW, "fid")
    networks = variants(dataset_name, plain)
    calls = {name: lambda net=net: sample(net, latents, **plain) for name, net in networks.items()}
    seconds = {name: [cpu for _, cpu in rounds] for name, rounds in interleaved(calls, ROUNDS, warmup=2).items()}
    share, images = round(convolution_share(calls[FLOAT]), 3), {}
    for name, net in networks.items():
        bench.net = net
        images[name], _ = bench.solve(**plain)
        bench.net = networks[FLOAT]
        ratios = [first / second for first, second in zip(seconds[FLOAT], seconds[name], strict=True)]
        row = {
            "settings": plain,
            "convolution_share": share,
            "faster": round(statistics.median(ratios), 3),
            "faster_range": [round(min(ratios), 3), round(max(ratios), 3)],
            "rms": round(float((images[name] - images[FLOAT]).square().mean().sqrt()), 4),
            **own.scored(images[name]),
        }
        measured(FILE, {"dataset_name": dataset_name, "variant": name, "batch": BATCH}, lambda row=row: row)


def table():
    rows, lines = [{**row, "current": True} for row in read_rows(FILE)], []
    if not rows:
        return "Not measured."
    for row in rows:
        exact = next(one for one in rows if one["dataset_name"] == row["dataset_name"] and one["variant"] == FLOAT)
        apart = difference([row], [exact], "fid")
        change = "" if row is exact else f" ({apart.value:+.2f} ± {apart.half_width:.2f})"
        low, high = row["faster_range"]
        faster = "1" if row is exact else f"{row['faster']:.2f} ({low:.2f}-{high:.2f})"
        cells = [row["dataset_name"], row["variant"], faster, f"{row['rms']:.4f}", f"{row['fid']:.2f}{change}"]
        lines.append(cells)
    shares = {row["dataset_name"]: row["convolution_share"] for row in rows}
    parts = " and ".join(f"{100 * share:.0f} % ({name})" for name, share in shares.items())
    lines_below = f"\n\nShare of convolutions and linear layers in the time of float32: {parts}."
    return markdown(["network", "numbers", "times as fast", "rms to float32", "FID\\* (change)"], lines) + lines_below


def document_parts():
    return {"quantized": table}


@click.command(cls=Command)
@click.option("--dataset_name", type=click.Choice(list(EMBEDDED)), help="Default: only renew docs/quantization.md")
def main(dataset_name):
    """Times and scores 8-bit networks beside those in floating point."""
    if dataset_name is None:
        renew(PAGE, document_parts(), check=False)
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        measure(dataset_name, work)


if __name__ == "__main__":
    main()
