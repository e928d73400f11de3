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

from sampling.flags import flags_of, given_flags, read_flags, use_schedule
from sampling.listing import list_flag
from sampling.options import SampleOptions
from sampling.run import run
from torch_utils.cli import Command, offline_flag
from torch_utils.errors import UserError
from torch_utils.session import session


@click.command(cls=Command, may_be_empty=("prompt", "negative_prompt"))
@flags_of(SampleOptions)
@click.option("--use_fp16", type=bool, default=False, show_default=True, help="The same as --amp=fp16")
@list_flag
@offline_flag
@click.pass_context
def main(ctx, **flags):
    """Samples images, one per seed, with a trained predictor or a plain solver."""
    given = given_flags(ctx)
    if flags["use_fp16"]:
        if "amp" in given and flags["amp"] != "fp16":
            raise UserError(f"--use_fp16=True means --amp=fp16, but --amp={flags['amp']} was given; choose one")
        flags["amp"] = "fp16"
    schedule = use_schedule(flags, given)
    options = read_flags(SampleOptions, flags, given, schedule=schedule)
    with session(options.compute.device) as device:
        run(options, device)


if __name__ == "__main__":
    main()
