r"""Samples images from noise, with a trained predictor or with any plain solver.

    python sample.py --predictor_path=7                                   # exps/00007-*
    python sample.py --dataset_name=digits --nfe=5 --grid=True            # the best plain solver
    python sample.py --dataset_name=ms_coco --solver=dpmpp --num_steps=8 --batch=4 \
        --prompt="a red fox in snow"
    torchrun --standalone --nproc_per_node=8 sample.py --predictor_path=7 --seeds=0-49999
    python sample.py --dataset_name=digits --solver=ipndm --candidates=4 --verifier=classifier

One seed is one image, for any batch size and any number of processes. A rerun continues where the
last one stopped. ``sampling.json`` beside the images records how they were made. Under torchrun
write --r as --solver_r, since torchrun has an option --r of its own.

--fid_ref and --metrics measure the images while sampling (FID, KID, precision, recall, ...). Images
are then written only with --save_images=True.
"""

if __name__ == "__main__":
    from torch_utils.usage import check_usage

    check_usage("sample")

import click

from sampling.flags import solver_option_names, use_schedule
from sampling.listing import list_flag
from sampling.options import SampleOptions
from sampling.run import run
from torch_utils.cli import Command, offline_flag
from torch_utils.errors import UserError
from torch_utils.options import flags, given_flags, read_flags
from torch_utils.session import session

GROUPS = {
    "What to sample": "dataset_name predictor_path seeds class_idx prompt list"
    " | model_path guidance_type guidance_rate negative_prompt tokenizer_path images observe observations noise_level jacobian",
    "Solver and schedule": "solver nfe num_steps | schedule schedule_type schedule_rho sigma_min sigma_max sigmas afs"
    " denoise_to_zero",
    "Options of solvers": "| " + " ".join(solver_option_names()),
    "Best of several images": "candidates verifier | search budget",
    "Output": "outdir grid fid_ref metrics | save_images fid_detector fid_json return_inters subdirs overwrite",
    "Speed": "batch device | amp use_fp16 compile channels_last dtype tf32 bench quantize offline",
}


@click.command(cls=Command, groups=GROUPS, may_be_empty=("prompt", "negative_prompt"))
@flags(SampleOptions)
@click.option("--use_fp16", type=bool, default=False, show_default=True, help="The same as --amp=fp16")
@list_flag
@offline_flag
@click.pass_context
def main(ctx, **values):
    """Samples images, one per seed, with a trained predictor or a plain solver."""
    given = given_flags(ctx)
    if values["use_fp16"]:
        if "amp" in given and values["amp"] != "fp16":
            raise UserError(f"--use_fp16=True means --amp=fp16, but --amp={values['amp']} was given; choose one")
        values["amp"] = "fp16"
    schedule = use_schedule(values, given)
    options = read_flags(SampleOptions, values, given, schedule=schedule)
    with session(options.compute.device) as device:
        run(options, device)


if __name__ == "__main__":
    main()
