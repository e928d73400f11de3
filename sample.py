"""Images from noise, with a trained predictor or with any plain solver.

    python sample.py --predictor_path=7                                   # exps/00007-*; its settings
    python sample.py --dataset_name=digits --solver=ipndm --num_steps=6 --grid=True
    python sample.py --dataset_name=ms_coco --solver=dpmpp --num_steps=8 --prompt="a red fox in snow" --batch=4
    torchrun --standalone --nproc_per_node=8 sample.py --predictor_path=7 --seeds=0-49999 --batch=512
    python sample.py --dataset_name=digits --solver=ipndm --candidates=4 --verifier=classifier      # the best of four

One seed is one image, whatever the batch size and the number of processes. A rerun continues where the last one
stopped; ``sampling.json`` beside the images says how they were made. Under torchrun write --r as --solver_r: torchrun
takes --r for one of its own options.

--fid_ref gives the FID of the images as they are made; they are not written then unless --save_images=True.
"""

import click
from click.core import ParameterSource

from evaluation.verifiers import FORMS
from models.compile import AUTOCAST
from sampling.flags import compile_flag, schedule_file_flag, schedule_flags, solver_flags, text_flags, use_schedule
from sampling.folder import GRID_LIMIT
from sampling.run import run
from solvers import SOLVERS
from torch_utils.cli import PATH, Command, Number, offline_flag
from torch_utils.errors import UserError
from torch_utils.memory import BatchSize
from torch_utils.session import session


def _plain_solvers() -> str:
    return ", ".join(name for name, solver in SOLVERS.items() if not solver.needs_predictor)


@click.command(cls=Command, may_be_empty=("prompt", "negative_prompt"))
@click.option(
    "--predictor_path", type=PATH, metavar="N|DIR|FILE", help="Trained predictor: experiment number, folder or file"
)
@click.option("--dataset_name", metavar="NAME", help="Network, where there is no predictor: digits, cifar10, ...")
@click.option(
    "--model_path",
    type=PATH,
    metavar="FILE",
    help="The network's file (default: embedded or downloaded); diffusers: a folder or hub id",
)
@click.option("--solver", metavar="NAME", help=f"Plain solver: {_plain_solvers()}")
@schedule_flags
@schedule_file_flag
@solver_flags
@click.option("--denoise_to_zero", type=bool, default=False, show_default=True, help="One more evaluation at the end")
@click.option("--guidance_type", metavar="NAME", help="Guidance, where the network takes one")
@click.option("--guidance_rate", type=Number(), help="Its strength (default: 7.5 for cfg, 1 for cg)")
@text_flags("the number of a caption being its seed")
@click.option("--seeds", default="0-63", show_default=True, help="One image each: 0-63 or 1,2,5-10")
@click.option(
    "--batch",
    type=BatchSize(),
    default=64,
    show_default=True,
    help="Images per process and network call; auto: as many as fit into memory. The noise does not depend on it, but rounding"
    " does: single pixels change by one grey level, under --amp most of them and by several",
)
@click.option("--class", "class_idx", type=click.IntRange(min=0), help="Class of all images (default: drawn per seed)")
@click.option(
    "--candidates",
    type=int,
    metavar="N",
    help="Noise search: for every seed the best of N images is kept; N times the evaluations",
)
@click.option("--verifier", type=PATH, metavar="V", help=f"What is best: {FORMS} (evaluation/verifiers.py)")
@click.option(
    "--outdir",
    type=PATH,
    metavar="DIR",
    help="Default: samples/<dataset_name>/<solver>_nfe<NFE>[_best<N>], or a"
    " folder beside it where that holds images of other settings",
)
@click.option("--subdirs", type=bool, default=True, show_default=True, help="A folder for every 1000 seeds")
@click.option("--grid", type=bool, default=False, show_default=True, help=f"Also grid.png, of up to {GRID_LIMIT}")
@click.option(
    "--return_inters", type=bool, default=False, show_default=True, help="Also strips of denoised images, in inters/"
)
@click.option("--fid_ref", type=PATH, metavar="NPZ|URL|NAME", help="Also the FID of these images, as fid.py calc --ref")
@click.option(
    "--fid_detector", type=PATH, metavar="NAME|PATH", help="Its detector (default: the reference's, else inception)"
)
@click.option(
    "--fid_json", type=PATH, metavar="FILE", help="Also write the FID and how the images were made to this file"
)
@click.option("--save_images", type=bool, help="Write images (default: True, with --fid_ref False)")
@click.option("--overwrite", type=bool, default=False, show_default=True, help="Redo images that exist already")
@click.option("--amp", type=click.Choice(list(AUTOCAST)), default="none", show_default=True, help="Mixed precision")
@click.option("--use_fp16", type=bool, default=False, show_default=True, help="The same as --amp=fp16")
@compile_flag
@click.option("--channels_last", type=bool, help="Memory layout (default: True on the CPU in float32)")
@click.option("--device", help="cpu, cuda or mps (default: the best there is)")
@offline_flag
@click.pass_context
def main(ctx, **options):
    """Samples images, one per seed, with a trained predictor or a plain solver."""
    given = {name for name in options if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT}
    if options["use_fp16"]:
        if "amp" in given and options["amp"] != "fp16":
            raise UserError(f"--use_fp16=True means --amp=fp16, but --amp={options['amp']} was given; choose one")
        options["amp"] = "fp16"
    schedule = use_schedule(options, given)
    with session(options["device"]) as device:
        run(options, given, device, schedule)


if __name__ == "__main__":
    main()
