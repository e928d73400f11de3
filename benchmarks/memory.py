"""Peak memory of distillation by number of time steps, micro-batches and checkpointing.

    OMP_NUM_THREADS=1 python -m benchmarks.memory --dataset_name=digits --batch=64

Every setting is one iteration in its own process. Prints how far its resident memory rises above
that of the loaded network. For the reading of checkpoints see benchmarks.full_size.
"""

import json
import subprocess
import sys

import click

from benchmarks.measuring import describe_machine
from models import create_model
from torch_utils.cli import Command
from torch_utils.markdown import table_line
from torch_utils.memory import peak_memory
from training.amed_trainer import Distiller


def measure(dataset_name, num_steps, batch, batch_gpu, checkpointing) -> float:
    net = create_model(dataset_name)
    config = {
        "sampler_stu": "ipndm",
        "sampler_tea": "ipndm",
        "M": 2,
        "scale_dir": 0.01,
        "scale_time": 0.2,
        "max_order": 4,
    }
    more = {"batch": batch, "batch_gpu": batch_gpu, "checkpointing": checkpointing}
    distiller = Distiller(net, {**config, "num_steps": num_steps}, **more)
    before = peak_memory()
    distiller.iterate()
    return peak_memory() - before


@click.command(cls=Command, help=__doc__.split("\n")[0])
@click.option("--dataset_name", default="digits", show_default=True)
@click.option("--batch", type=click.IntRange(min=4), default=64, show_default=True)
@click.option("--one", hidden=True, help="One setting, as JSON")
def main(dataset_name, batch, one):
    if one is not None:
        print(measure(**json.loads(one)))
        return
    print(f"{dataset_name}, AMED-Plugin(iPNDM), batch {batch}, MB above the loaded network; {describe_machine()}\n")
    print(table_line(["time steps", "plain", "batch_gpu = a quarter", "checkpointing"]), "|---|---|---|---|", sep="\n")
    for num_steps in (3, 4, 6, 11):
        found = []
        for batch_gpu, checkpointing in ((None, False), (batch // 4, False), (None, True)):
            own = {"num_steps": num_steps, "batch_gpu": batch_gpu, "checkpointing": checkpointing}
            setting = json.dumps({"dataset_name": dataset_name, "batch": batch, **own})
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.memory", f"--one={setting}"], capture_output=True, text=True
            )
            if done.returncode:
                raise click.ClickException(done.stderr[-2000:])
            found.append(float(done.stdout))
        print(table_line([num_steps, *(f"{value:.0f}" for value in found)]), flush=True)


if __name__ == "__main__":
    main()
