r"""CLIP score: how well images fit the captions they were made from.

    python clip_score.py calc --images=samples/ms_coco/dpmpp_nfe8 --prompts=captions.csv
    python clip_score.py calc --images=samples.zip --prompts=captions.txt \
        --model=openai/clip-vit-large-patch14
    torchrun --standalone --nproc_per_node=8 clip_score.py calc --images=samples.zip \
        --prompts=captions.csv --num_images=5000

The score is the mean over the images of the cosine similarity between the CLIP embeddings of image
and caption, from -1 to 1. It depends on the CLIP model. Others report 100 max(0, cosine), which
--json contains too, or 2.5 max(0, cosine) (Hessel et al. 2021).

Image 000123.png belongs to the caption of seed 123. This is line 123 of a .txt file, counted from
0, or that row of a .csv or .jsonl file. If the file has a column file_name (as the metadata.csv of
a Hugging Face imagefolder), an image belongs to the caption that names it.

--model is a folder in the format of transformers or an id of the Hugging Face hub. Without network
access, copy the folder that `hf download <id> --local-dir <folder>` makes, and pass it. Under
torchrun write --num as --num_images, since torchrun has an option --num of its own.
"""

if __name__ == "__main__":
    from torch_utils.usage import check_usage

    check_usage("clip_score")

from dataclasses import asdict

import click

from evaluation.clip import DEFAULT_CLIP
from evaluation.clip_score import calculate_clip_score
from torch_utils import distributed
from torch_utils.cli import PATH, SEED, Group, offline_flag
from torch_utils.files import check_destination, write_json
from torch_utils.session import session


@click.group(cls=Group)
def main():
    """CLIP score of images and their captions."""


GROUPS = {
    "What to measure": "images prompts column model num seed",
    "Output": "json_path",
    "Speed": "batch device amp offline",
}


@main.command(groups=GROUPS)
@click.option(
    "--images", type=PATH, required=True, metavar="PATH", help="Folder or zip of images, named after their seeds"
)
@click.option("--prompts", type=PATH, required=True, metavar="FILE", help="Captions: .txt (one a line), .csv or .jsonl")
@click.option(
    "--column", default=None, metavar="NAME", help="Column of the captions (default: prompt, caption or text)"
)
@click.option(
    "--model", type=PATH, default=DEFAULT_CLIP, show_default=True, metavar="ID|DIR", help="CLIP model for transformers"
)
@click.option(
    "--num",
    "--num_images",
    type=click.IntRange(min=1),
    default=None,
    help="Use this many random images of those with a caption (default: all)",
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Random seed of --num")
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Images per network call")
@click.option("--json", "json_path", type=PATH, default=None, metavar="FILE", help="Also write the result to this file")
@click.option("--device", default=None, help="cpu, cuda or mps (default: the fastest available)")
@click.option("--amp", type=bool, default=False, show_default=True, help="Half precision: faster, slightly different")
@offline_flag
def calc(json_path, device, **options):
    """CLIP score of images; prints 'CLIP score 0.3012 images=... model=... weights=...'."""
    if json_path is not None:
        check_destination(json_path, "--json")
    with session(device) as device:
        result = calculate_clip_score(device=device, **options)
        if distributed.rank() == 0:
            if json_path is not None:
                write_json(json_path, asdict(result))
            print(result.line(), flush=True)
        distributed.barrier()


if __name__ == "__main__":
    main()
