r"""PFGM++ beside EDM: three networks of one recipe, FID with 5 and 35 evaluations.

    for D in 0 128 2048; do
        python -m tools.train_denoiser --data=cifar10-train.zip --outdir=runs/pfgmpp/$D \
            --extra_dims=$D --xflip=True --amp=bf16 --compile=True --total_kimg=150 --snap=0 \
            --ema_kimg=10 --warmup_kimg=5
    done
    python -m benchmarks.pfgmpp --networks=runs/pfgmpp    # measures
    python -m benchmarks.pfgmpp                           # renews docs/pfgmpp.md

Solvers are trained on the network of ``LEARNED_ON`` extra dimensions. Rows are appended to
benchmarks/pfgmpp.jsonl when they are measured, and are not measured again. Seeds, scores and the
columns of a row are those of benchmarks/learned_solvers.py for the natural images. The starting
noise of a seed is that of EDM times a factor, so differences between networks are paired.
"""

import tempfile
from functools import partial
from pathlib import Path

import click
import torch

from benchmarks.demo_settings import ROOT
from benchmarks.learned_solvers import LearnedSolvers, amed_flags, span_flags
from benchmarks.measuring import network_of, read_rows
from benchmarks.report_learned_solvers import difference
from models import create_model
from models.inputs import draw_inputs
from solvers import sample
from tools.make_docs import renew
from torch_utils.cli import PATH, Command
from torch_utils.images import image_grid, save_image, to_uint8
from torch_utils.markdown import table as markdown

FILE, PAGE = ROOT / "benchmarks" / "pfgmpp.jsonl", ROOT / "docs" / "pfgmpp.md"
DATASET = "cifar10-small"
DIMS = (0, 128, 2048)
LEARNED_ON, FEW = 128, 5
ACROSS = 16  # images in a row of the picture
PLAIN = {
    f"iPNDM-3, {FEW}": {"solver": "ipndm", "max_order": 3, "num_steps": FEW + 1},
    "Heun, 35": {"solver": "heun", "num_steps": 18, "denoise_to_zero": True},
}
AMED, SPAN = f"AMED-Plugin (iPNDM), {FEW}", f"full + spatial,time, {FEW}"


class Networks(LearnedSolvers):
    """Scores networks of one architecture, except rows that exist."""

    def __init__(self, work):
        super().__init__(DATASET, work)
        self.file = FILE

    def rows(self):
        return [{**row, "current": True} for row in read_rows(FILE)]

    def measure(self, dims, path):
        """All rows of the network in ``path``, which has ``dims`` extra dimensions."""
        self.bench.use(create_model("custom", path).to(memory_format=torch.channels_last))
        works = {name: partial(self.solved, **settings) for name, settings in PLAIN.items()}
        if dims == LEARNED_ON:
            own = {"dataset_name": "custom", "model_path": path, "device": "cpu"}
            recipes = {
                AMED: amed_flags(DATASET, FEW, "AMED-Plugin (iPNDM)"),
                SPAN: span_flags(DATASET, FEW, "full", {"heads": "spatial,time"}),
            }
            works |= {
                name: partial(self.trained, settings | own, 0, f"{name}-{dims}") for name, settings in recipes.items()
            }
        for method, work in works.items():
            self.once({"method": method, "nfe": int(method.split()[-1]), "extra_dims": dims}, work)


def draw(paths):
    """The same seeds by Heun's method with 35 evaluations, one row per network."""
    rows = []
    for path in paths.values():
        net = create_model("custom", path)
        latents, cond = draw_inputs(net, range(ACROSS))
        rows.append(sample(net, latents, cond=cond, **PLAIN["Heun, 35"]))
    grid = image_grid(to_uint8(torch.cat(rows)), ACROSS)
    save_image(grid.repeat(2, 0).repeat(2, 1), PAGE.with_name("pfgmpp.png"))


def table():
    """Scores of every network, and differences of FID to EDM."""
    rows = {(row["method"], row["extra_dims"]): {**row, "current": True} for row in read_rows(FILE)}
    if not rows:
        return "Not measured."
    lines = []
    for method in (*PLAIN, AMED, SPAN):
        cells = []
        for dims in DIMS:
            row = rows.get((method, dims))
            cell = f"{row['fid']:.2f} / {row['fid2']:.1f} / {row['distance']:.3f}" if row else ""
            if row and dims and (edm := rows.get((method, 0))):
                apart = difference([row], [edm], "fid")
                cell += f" ({apart.value:+.2f} ± {apart.half_width:.2f})"
            cells.append(cell)
        lines.append([method, *cells])
    return markdown(["sampler, evaluations", "EDM", *(f"D = {dims}" for dims in DIMS[1:])], lines)


def document_parts():
    return {"pfgmpp": table}


@click.command(cls=Command)
@click.option("--networks", type=PATH, help="Folder with one folder per network (default: only renew docs/pfgmpp.md)")
@click.option("--work", type=PATH, help="Folder of the trained solvers (default: a temporary one)")
def main(networks, work):
    """Scores PFGM++ networks beside EDM."""
    if networks is None:
        renew(PAGE, document_parts(), check=False)
        return
    paths = {dims: network_of(Path(networks) / str(dims)) for dims in DIMS}
    with tempfile.TemporaryDirectory() as temporary:
        own = Networks(work or temporary)
        for dims, path in paths.items():
            own.measure(dims, path)
    draw(paths)


if __name__ == "__main__":
    main()
