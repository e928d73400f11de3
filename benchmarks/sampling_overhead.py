"""Cost of sampling beside the network: sample.py end to end against its evaluations alone.

    OMP_NUM_THREADS=1 taskset -c 1 python -m benchmarks.sampling_overhead

End to end is everything from drawing the noise to the last PNG file (network, predictor, solver,
decoding, rounding, checks, writing), without start-up and loading. The evaluations alone are the
same number of calls of the network on the same batches.
"""

import tempfile
from pathlib import Path

import click
import torch
from tqdm import tqdm

from benchmarks.measuring import describe_machine, interleaved, spread
from evaluation.fid import StreamedFID
from models import create_model
from models.compile import AUTOCAST, prepare_network
from sampling.folder import Folder
from sampling.generate import generate_images
from sampling.run import write_images
from solvers import make_solver
from torch_utils.cli import Command
from torch_utils.distributed import pick_device
from torch_utils.markdown import table, table_line
from torch_utils.seeds import SeededGenerators
from training.predictor import AMEDPredictor


@click.command(cls=Command)
@click.option("--dataset_name", default="digits", show_default=True)
@click.option("--model_path", default=None)
@click.option("--num_images", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--num_steps", type=click.IntRange(min=2), default=6, show_default=True, help="Time steps without predictor"
)
@click.option("--repeats", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--amp", type=click.Choice(list(AUTOCAST)), default="none", show_default=True)
@click.option("--device", default=None)
def main(dataset_name, model_path, num_images, batch, num_steps, repeats, amp, device):
    device = pick_device(device)
    net = prepare_network(create_model(dataset_name, model_path, device=device), amp)
    intervals = num_steps // 2
    predictor = AMEDPredictor(num_steps=intervals + 1, scale_dir=0.01).to(device).eval().requires_grad_(False)
    plain = {"solver": "dpmpp", "num_steps": num_steps}
    learned = {"solver": "amed", "num_steps": intervals + 1, "predictor": predictor}
    print(describe_machine(device))
    print(f"{dataset_name}, {num_images} images in batches of {batch}, amp {amp}, {repeats} interleaved repeats\n")
    header = ["sampling", "NFE", "end to end, s", "network alone, s", "ratio, CPU time", "ratio, wall"]
    print(table(header, []), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for label, arguments, more in (
            ("dpmpp, PNG files", plain, {}),
            ("dpmpp, FID stream without files", plain, {"stream": dataset_name}),
            ("amed with predictor, PNG files", learned, {}),
        ):
            row = measure(net, label, arguments, num_images, batch, repeats, device, Path(folder), **more)
            print(table_line(row), flush=True)


def measure(net, label, arguments, num_images, batch, repeats, device, folder, stream=None) -> list[str]:
    steps, with_predictor = arguments["num_steps"], "predictor" in arguments
    nfe = make_solver(arguments["solver"], {}, {}).evaluations(steps - 1, False, with_predictor) * net.evals_per_call
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    sigma = torch.tensor(1.0, device=device)
    sizes = [min(batch, num_images - start) for start in range(0, num_images, batch)]
    inputs = {
        size: (torch.randn(size, *shape, device=device), net.make_cond(SeededGenerators(range(size))))
        for size in set(sizes)
    }

    @torch.no_grad()
    def network():
        for size in sizes:
            x, cond = inputs[size]
            for _ in range(nfe // net.evals_per_call):
                net(x, sigma, **cond)

    features = StreamedFID(stream, num_images, device=device) if stream else None

    def end_to_end():
        batches = generate_images(net, range(num_images), batch=batch, device=device, **arguments)
        target = None if stream else Folder(folder, subdirs=True, inters=False)
        write_images(batches, target, nfe, tqdm(disable=True), features)

    seconds = interleaved({"all": end_to_end, "network": network}, repeats, device)
    pairs = list(zip(seconds["all"], seconds["network"], strict=True))
    wall, cpu = ([whole[kind] / alone[kind] for whole, alone in pairs] for kind in (0, 1))
    times = [spread([pair[side][1] for pair in pairs]) for side in (0, 1)]
    return [label, str(nfe), *times, spread(cpu, 4), spread(wall, 4)]


if __name__ == "__main__":
    main()
