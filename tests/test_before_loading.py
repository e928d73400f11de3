"""What the command line alone shows to be wrong is noticed before a network is opened."""

import json

import pytest
from click.testing import CliRunner
from small_world import write_images
from test_k_sampler import span

import compare as compare_cli
import models
import models.diffusers
import optimize_schedule as optimize_cli
import sample as sample_cli
import train as train_cli
from models import zoo
from tools import share
from training.checkpoint import save_predictor


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with some files, where no network can be opened."""

    def refuse(*args, **more):
        raise AssertionError("a network was opened")

    monkeypatch.setattr(zoo, "resolve", refuse)
    monkeypatch.setattr(models, "load_own", refuse)
    monkeypatch.setattr(models.diffusers, "load_diffusers", refuse)
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos", 2)
    (tmp_path / "captions.txt").write_text("a\n" * 64)
    (tmp_path / "pipeline").mkdir()
    parts = {"unet": "UNet2DConditionModel", "scheduler": "DDIMScheduler", "vae": "AutoencoderKL"}
    index = {"_class_name": "StableDiffusionPipeline"} | {name: ["diffusers", kind] for name, kind in parts.items()}
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps(index))
    save_predictor(span(dataset_name="ms_coco"), tmp_path / "text.safetensors")
    return tmp_path


def refused(command, flags: str, message: str) -> None:
    done = CliRunner().invoke(command, flags.split())
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit), (done.output, done.exception)
    assert message in done.output.strip().splitlines()[-1], done.output


OBSERVED = "--observe=sr:2 --observations=photos"


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--dataset_name=cifar10 --class=3", "--class=3: cifar10 is unconditional: it takes no class"),
        ("--dataset_name=imagenet64 --class=1000", "class 1000 is out of range"),
        ("--dataset_name=ms_coco --prompt=a --class=1", "takes prompts, not classes"),
        ("--dataset_name=diffusers --model_path=pipeline --prompt=a --class=1", "takes prompts, not classes"),
        ("--dataset_name=ms_coco", "ms_coco needs a text: give --prompt"),
        ("--dataset_name=diffusers --model_path=pipeline", "diffusers needs a text: give --prompt"),
        ("--predictor_path=text.safetensors", "ms_coco needs a text: give --prompt"),
        ("--dataset_name=ms_coco --prompt=captions.txt --seeds=60-70", "has no caption for seeds 64-70"),
        (
            "--dataset_name=ms_coco --prompt=a --guidance_type=none --negative_prompt=b",
            "--negative_prompt has no effect",
        ),
        ("--dataset_name=ms_coco --prompt=a --guidance_type=cg", "does not take guidance_type 'cg'"),
        ("--dataset_name=cifar10 --prompt=a", "cifar10 is not a text-to-image network"),
        ("--dataset_name=cifar10 --guidance_rate=2", "guidance_rate 2 has no effect"),
        ("--dataset_name=cifar10 --dtype=fp16", "--dtype=fp16 is for pipelines"),
        ("--dataset_name=cifar10 --candidates=2 --verifier=classifier", "there is no classifier for this network"),
        ("--dataset_name=cifar10 --candidates=2 --verifier=classifier:none.safetensors", "no such file"),
        ("--dataset_name=cifar10 --candidates=2 --verifier=clip", "has no prompts to compare images with"),
        ("--dataset_name=cifar10 --candidates=2 --verifier=clasifier", "choose classifier[:FILE], clip"),
        ("--dataset_name=refusion", "refusion restores images: give --images"),
        ("--dataset_name=cifar10 --images=photos", "--images: this network does not restore images"),
        (f"--dataset_name=refusion {OBSERVED}", "--observe: this network restores images"),
        (f"--dataset_name=ms_coco --prompt=a {OBSERVED}", "ms_coco samples latents"),
        (f"--dataset_name=cifar10 --seeds=1-2 {OBSERVED}", "file number 2 does not exist"),
        (f"--dataset_name=cifar10 --quantize=int8 {OBSERVED}", "--quantize needs noise as its start"),
        ("--dataset_name=cifar10 --quantize=int8 --amp=bf16", "--quantize replaces --amp"),
        ("--dataset_name=ms_coco --quantize=int8 --prompt=captions.txt", "one prompt for all images"),
        (
            "--predictor_path=digits-span-4 --search=quota --budget=9 --candidates=2 --verifier=classifier",
            "--search=quota works from noise, without predictor",
        ),
        ("--predictor_path=digits-span-4 --solver=heun", "--solver: the span solver has its own solver"),
        ("--predictor_path=digits-span-4 --schedule_rho=3", "--schedule_rho: the span solver has its own"),
        ("--predictor_path=digits-amed-5 --num_steps=9", "--num_steps=9: the predictor was trained with num_steps="),
        ("--predictor_path=digits-amed-5 --schedule_type=discrete", "the predictor was trained with schedule_type="),
        ("--predictor_path=digits-amed-5 --schedule_rho=2", "the predictor was trained with schedule_rho="),
        ("--predictor_path=digits-amed-5 --solver=ipndm", "--solver=ipndm: the predictor was trained with solver=amed"),
        ("--dataset_name=cifar10 --fid_ref=none.npz", "none.npz"),
        ("--dataset_name=cifar10 --fid_ref=digits --fid_json=captions.txt/x.json", "--fid_json=captions.txt/x.json"),
        ("--dataset_name=cifar10 --outdir=captions.txt", "--outdir=captions.txt is a file"),
    ],
)
def test_sample(flags, message, here):
    refused(sample_cli.main, f"--device=cpu {flags}", message)


@pytest.mark.parametrize(
    "command, flags, message",
    [
        (train_cli, "--dataset_name=ms_coco --sampler_stu=dpmpp", "ms_coco needs texts: give --prompt_path"),
        (train_cli, "--dataset_name=diffusers --model_path=pipeline --sampler_stu=dpmpp", "needs texts"),
        (
            train_cli,
            "--dataset_name=cifar10 --sampler_stu=amed --prompt_path=captions.txt",
            "not a text-to-image network",
        ),
        (train_cli, "--dataset_name=cifar10 --sampler_stu=amed --guidance_type=cfg", "guidance_type 'cfg'"),
        (compare_cli, "--dataset_name=ms_coco --num=4", "ms_coco needs a text: give --prompt"),
        (compare_cli, "--dataset_name=cifar10 --ref=none.npz --num=4", "none.npz"),
        (compare_cli, "--dataset_name=custom --model_path=a:b --detector=none.pt --num=4", "none.pt"),
        (optimize_cli, "--dataset_name=ms_coco --dest=x.json", "ms_coco needs a text: give --prompt"),
        (optimize_cli, "--dataset_name=cifar10 --class=3 --dest=x.json", "cifar10 is unconditional"),
    ],
)
def test_others(command, flags, message, here):
    refused(command.main, f"--device=cpu {flags}", message)
    assert not (here / "exps").exists() and not (here / "x.json").exists()


def test_share(here):
    refused(share.main, "text.safetensors --to=packed", "give --prompt, or --images=0")
