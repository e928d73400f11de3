r"""Images from a diffusers pipeline in a few evaluations, with a trained predictor.

    python examples/diffusers_amed.py --pipeline=stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --predictor=7 --prompt="a photo of a red fox in the snow" --seeds=0-3 --outdir=foxes

The predictor has to be trained on the same network: train.py --dataset_name=diffusers
--model_path=..., or ms_coco for Stable Diffusion 1.5. See docs/diffusers.md.
"""

from pathlib import Path

import click
import torch

from models.diffusers import load_diffusers
from torch_utils.cli import PATH, Command
from torch_utils.errors import UserError
from torch_utils.files import atomic_path
from torch_utils.seeds import parse_seeds


@click.command(cls=Command)
@click.option("--pipeline", type=PATH, required=True, metavar="DIR|ID", help="Folder of a pipeline, or hub id")
@click.option(
    "--predictor",
    type=PATH,
    required=True,
    metavar="N|DIR|FILE",
    help="Trained predictor: experiment number, folder or file",
)
@click.option("--prompt", default=None, help="What to draw, for text-to-image pipelines")
@click.option("--guidance", type=float, default=7.5, show_default=True, help="Guidance rate, as in training")
@click.option("--seeds", default="0-3", show_default=True, help="One image per seed: 0-3 or 1,2,5-10")
@click.option("--outdir", type=PATH, default="diffusers-samples", show_default=True, help="Where the images go")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--time_only", is_flag=True, help="Do not let the predictor see the U-Net's bottleneck")
def main(pipeline, predictor, prompt, guidance, seeds, outdir, device, time_only):
    """Samples one image per seed, all in one batch."""
    net = load_diffusers(pipeline, device=device)  # runs no code of the pipeline, and says what is wrong with it
    from sampling.diffusers_scheduler import AMEDScheduler  # needs diffusers

    pipe = net.pipeline
    pipe.scheduler = AMEDScheduler.from_predictor(predictor, pipe.scheduler.config, None if time_only else net.network)

    seeds = parse_seeds(seeds)
    arguments = {
        "num_inference_steps": len(pipe.scheduler),
        "generator": [torch.Generator().manual_seed(s) for s in seeds],
    }
    if hasattr(pipe, "encode_prompt"):
        if prompt is None:
            raise UserError("this pipeline needs a text: give --prompt")
        arguments |= {"prompt": [prompt] * len(seeds), "guidance_scale": guidance}
    else:
        arguments |= {"batch_size": len(seeds)}

    for seed, image in zip(seeds, pipe(**arguments).images, strict=True):
        with atomic_path(Path(outdir) / f"{seed:06d}.png") as path:
            image.save(path, format="PNG")
    click.echo(f"{len(seeds)} images in {len(pipe.scheduler)} evaluations -> {outdir}")


if __name__ == "__main__":
    main()
