"""Every option of every command line, given wrongly: one line that names it, and exit code 2.

Nothing may be written. The options come from click itself. A new one has to be entered below: in
``SHARED`` if it means the same in all commands, else in the table of its command. The entry is a
list of wrong uses, each a value (``--option=value``) or a tuple of whole arguments. ``GOOD``
completes a command, so that only the option in question is wrong. Values of the wrong type, empty
and missing ones are tried for all.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from tools.make_docs import SCRIPTS
from training.checkpoint import save_predictor
from training.predictor import AMEDPredictor

REPO = Path(__file__).resolve().parents[1]

# What is wrong for a kind of option, besides what ``by_type`` finds.
COUNT = ["0", "-1", "1.5"]
NATURAL = ["-1", "1.5"]
POSITIVE = ["0", "-1", "nan", "inf"]
NUMBER = ["nan", "inf"]
ANY_TEXT = ["column", "model", "licence", "base_model"]  # too long is no mistake of its own
BOOL = CHOICE = []  # all there is to do wrong is of the wrong type
FLAG = []
FILE = ["missing.file", "empty"]  # "empty" is a folder
TEXT_ONLY = ["captions.csv"]  # fine in itself, but digits is not a text-to-image network
SIGMAS = ["1,2", "80", "1,x", "80,nan", "80,0", "80,-1", "inf,1", "1,1", "1e9,1", ",", "80,1e-9"]
GUIDANCE = ["cfg", "nope"]
SEED = [*NATURAL, str(1 << 80)]


def along(name, values, *with_them):
    """Wrong values of an option that only has a meaning beside other arguments."""
    return [(*with_them, f"--{name}={value}") for value in values]


def final(name, values):
    """The same for an option of the span solver; with another solver any value is refused."""
    return along(name, values, "--sampler_stu=span")


def sfd(name, values):
    """The same for an option of a few-step network."""
    return along(name, values, "--objective=sfd")


def search(method, name, values):
    return along(name, values, f"--method={method}")


SHARED = {
    "device": ["nope", "cuda:x", "cuda:99", "meta", "cpu:7:7"],
    "offline": FLAG,
    "batch": COUNT,
    "dataset_name": ["nope", "custom", "diffusers"],
    "model_path": [*FILE, "broken.pkl", "broken.npz", "text.txt"],
    "guidance_type": GUIDANCE,
    "guidance_rate": [*NUMBER, "3"],
    "tokenizer_path": ["empty"],
    "prompt": [*TEXT_ONLY, "a fox", "missing.csv"],
    "negative_prompt": ["a fox"],
    "amp": CHOICE,
    "dtype": CHOICE,
    "tf32": BOOL,
    "bench": BOOL,
    "compile": CHOICE,
    "checkpointing": BOOL,
    "channels_last": BOOL,
    "schedule_type": ["discrete"],
    "schedule_rho": POSITIVE,
    "sigma_min": [*POSITIVE, "100", "1e-9"],
    "sigma_max": [*POSITIVE, "1e-3", "1e9"],
    "sigmas": [*SIGMAS, ("--sigma_max=80", "--sigmas=80,1")],
    "afs": ["maybe", "2"],
    "schedule": [*FILE, "broken.json", "text.txt", "broken.npz", ("--schedule=schedule.json", "--sigmas=80,1")],
    "num_steps": ["1", *COUNT, "99999999999999999999"],
    "seed": SEED,
    "class_idx": [*NATURAL, "3"],  # digits knows no classes
    "trust": BOOL,
    "ref": ["missing.npz", "empty", "broken.npz", "text.txt", "ftp://host/x.npz", "notfid.npz"],
    "detector": ["nope", "text.txt", "broken.pt", "broken.safetensors", "broken.pth", "cifar10-small"],
    "num": ["0", "1.5", "-2", "1000"],
    "json_path": ["empty", "text.txt/x.json"],
    "overwrite": BOOL,
    # of the solvers
    "max_order": ["0", "9", "1.5"],
    "predict_x0": BOOL,
    "lower_order_final": BOOL,
    "thresholding": BOOL,
    "midpoint": BOOL,
    "r": [("--solver=dpm", "--r=0"), ("--solver=dpm", "--r=1.5"), ("--solver=dpm", "--r=nan")],
    "deis_mode": CHOICE,
    "original_code": BOOL,
    "statistics": [
        ("--solver=dpm_v3", "--schedule_type=logsnr", f"--statistics={file}")
        for file in ("missing.file", "empty", "text.txt", "broken.safetensors")
    ],
    "corrector": CHOICE,
    "pseudo": CHOICE,
    "S_churn": [("--solver=edm", f"--S_churn={value}") for value in ("-1", "nan", "inf")],
    "S_min": [("--solver=edm", f"--S_min={value}") for value in ("-1", "nan")],
    "S_max": [("--solver=edm", f"--S_max={value}") for value in ("-1", "nan")],
    "S_noise": [("--solver=edm", f"--S_noise={value}") for value in ("-1", "nan", "inf")],
    "pfdiff_k": [("--solver=pfdiff", f"--pfdiff_k={value}") for value in ("0", "-1", "99")],
    "pfdiff_h": [("--solver=pfdiff", f"--pfdiff_h={value}") for value in ("0", "-1", "99")],
    "variant": CHOICE,
    "direction_sigma": CHOICE,
    # of some command lines
    "nfe": [],
    "list": FLAG,
    "presets": CHOICE,
}

OWN = {
    "train": {
        "sampler_stu": ["heun"],
        "sampler_tea": ["amed"],
        "M": NATURAL,
        "guidance_type": GUIDANCE,
        "afs": ["maybe", "2"],
        "r": along("r", ["0", "1.5", "nan"], "--sampler_tea=dpm"),
        "scale_dir": ["1", "-0.1", "nan"],
        "scale_time": ["1", "-0.1", "nan"],
        "schedule_type": ["discrete"],
        "prompt_path": TEXT_ONLY,
        "images": ["images"],  # digits does not restore images
        "total_kimg": POSITIVE,
        "batch_gpu": [*COUNT, ("--batch=3", "--batch_gpu=2")],
        "lr": POSITIVE,
        "seed": [*SEED],
        "outdir": ["text.txt", "text.txt/exps"],
        "desc": ["a/b", "../x", "x\ny", "x" * 300],
        "nosubdir": FLAG,
        "tick": POSITIVE,
        "snap": COUNT,
        "dump": COUNT,
        "tensorboard": BOOL,
        "resume": ["99", "missing", "true", "empty"],
        "dry_run": FLAG,
        "model_path": [*FILE, "broken.pkl", "text.txt"],
        "interval_loss": ["cubed"],
        "teacher_cache": [*COUNT, ("--batch=2", "--teacher_cache=3"), ("--batch=2", "--teacher_cache=1")],
        "objective": [
            "nope",
            ("--sampler_stu=amed", "--objective=final"),
            ("--sampler_stu=span", "--objective=per_step"),
            ("--sampler_stu=span", "--objective=sfd"),
            ("--objective=sfd", "--num_steps=2"),
            ("--objective=sfd", "--compile"),
        ],
        "preset": ["ld3"],
        "heads": ["sample", *final("heads", ["nope", "sample,sample", ","])],
        "parallel": ["2", *final("parallel", COUNT)],
        "sigma_scale_bound": ["0.3", *final("sigma_scale_bound", POSITIVE)],
        "init": [
            "preset",
            *final("init", ["nope", "@", "ab@nope", "ab@polynomial:x", "ab@polynomial:0", "ab,", "ipndm:5", "ab:x"]),
        ],
        "init_pairs": ["4", *final("init_pairs", COUNT)],
        "init_trial": ["0.1", *final("init_trial", ["-0.1", "1.1", "nan"])],
        "teacher": ["text.txt", *sfd("teacher", [*FILE, "text.txt", "broken.safetensors"])],
        "rank": ["4", *sfd("rank", COUNT)],
        "dropout": ["0.1", *sfd("dropout", ["1", "-0.1", "nan"])],
        "loss": [
            *sfd("loss", ["nope", "0*l2"]),
            "l2",
            *final("loss", ["nope", "0*l2", "-1*l2", "x*l2", "l2+l2", "l2+", "nan*l2"]),
        ],
        "feature_sigma": ["0.2", *final("feature_sigma", POSITIVE)],
        "w_dist": ["1", *final("w_dist", ["-1", "nan", "inf"])],
        "w_anchor": ["1", *final("w_anchor", ["-1", "nan", "inf"])],
        "anchor": ["0.2", *final("anchor", ["-0.1", "1.1", "nan"])],
        "w_delta": ["1", *final("w_delta", ["-1", "nan", "inf"])],
        "num_steps_tea": ["31", *final("num_steps_tea", ["2", "1.5"])],
        "schedule_tea": ["logsnr"],
        "rho_tea": ["7", *final("rho_tea", POSITIVE)],
        "pairs": ["4", *final("pairs", COUNT), ("--sampler_stu=span", "--batch=8", "--pairs=4")],
        "val_pairs": ["4", *final("val_pairs", COUNT), ("--sampler_stu=span", "--w_dist=1", "--val_pairs=1")],
        "teacher_set": ["x.safetensors"],
        "lrs": ["knots=1", *final("lrs", ["nope=1", "knots", "knots=x", "knots=-1", "knots=nan"])],
        "minutes": [
            "2",
            *final("minutes", POSITIVE),
            ("--sampler_stu=span", "--minutes=1e-6"),
            ("--sampler_stu=span", "--minutes=1", "--total_kimg=1"),
            ("--objective=sfd", "--minutes=1"),
        ],
        "lr_factor": ["2", *final("lr_factor", POSITIVE)],
        "lr_final": ["0.1", *final("lr_final", ["-0.1", "1.1", "nan"])],
        "warmup": ["1", *final("warmup", NATURAL)],
        "clip": ["1", *final("clip", POSITIVE)],
        "ema": ["0.5", *final("ema", ["1", "-0.1", "nan"])],
        "val_every": ["1", *final("val_every", COUNT)],
        "phases": ["all:1", *final("phases", ["all", "nope:1", "all:0", "all:x", "all:nan", ",", "all:1,"])],
        "phase_rounds": ["2", *final("phase_rounds", COUNT)],
    },
    "sample": {
        "predictor_path": [
            "99",
            *FILE,
            "broken.safetensors",
            "broken.pkl",
            ("--predictor_path=p.safetensors", "--r=0.5"),
        ],
        "solver": ["nope", "amed"],
        "denoise_to_zero": BOOL,
        "seeds": ["x", "3-1", "1,1", "-1", "0-99999999999", "1,,2", "4294967296"],
        "outdir": ["text.txt", "text.txt/out"],
        "subdirs": BOOL,
        "grid": BOOL,
        "return_inters": BOOL,
        "use_fp16": [("--use_fp16=True", "--amp=bf16")],
        "candidates": [*COUNT, "2", ("--verifier=classifier", "--candidates=0")],
        "verifier": [
            "classifier",
            *along(
                "verifier", ["nope", "clip", "missing_module:f", "os:nope", "classifier:text.txt"], "--candidates=2"
            ),
        ],
        "fid_ref": ["missing.npz", "empty", "broken.npz", "text.txt", "notfid.npz"],
        "metrics": ["nope", ",", "kid", ("--solver=euler", "--metrics=fid", "--fid_ref=missing")],
        "fid_detector": ["digits", ("--fid_ref=digits", "--fid_detector=nope")],
        "fid_json": ["x.json", ("--fid_ref=digits", "--fid_detector=digits", "--fid_json=text.txt/x.json")],
        "save_images": ["False"],
        "quantize": CHOICE,
        "images": ["missing", "empty", "text.txt", "broken.zip", "images"],
        "observe": ["sr:2", *along("observe", ["zoom", "sr:1.5", "os:nope"], "--observations=images")],
        "observations": ["images", *along("observations", ["missing", "empty", "text.txt"], "--observe=sr:2")],
        "noise_level": ["0.1", *along("noise_level", ["-1", "nan"], "--observe=sr:2", "--observations=images")],
        "jacobian": ["True"],
        "search": ["rollover", ("--budget=9", "--search=quota")],
        "budget": [*COUNT, "9"],
    },
    "fid calc": {
        "images": ["missing", "empty", "text.txt", "broken.zip", "mixed"],
        "feature_cache": ["broken.npz", "text.txt/cache.npz", "empty"],
        "workers": NATURAL,
        "metrics": ["nope", ",", "kid"],
    },
    "fid pairs": {
        "images": ["missing", "empty", "text.txt", "broken.zip"],
        "ref": ["missing", "empty", "text.txt", "broken.zip"],
        "metrics": ["nope", ","],
        "channels": CHOICE,
        "crop": NATURAL,
    },
    "fid inspect": {"images": ["missing", "empty", "text.txt", "broken.zip"]},
    "fid ref": {
        "data": ["missing", "empty", "text.txt", "broken.zip", "mixed"],
        "dest": ["x.txt", "empty", "text.txt/x.npz", "folder.npz"],
        # Without the last one of SHARED, which takes grey images as RGB.
        "detector": ["nope", "text.txt", "broken.pt", "broken.safetensors", "broken.pth"],
    },
    "clip_score calc": {
        "images": ["missing", "empty", "text.txt", "broken.zip"],
        "prompts": ["missing.csv", "empty", "broken.csv", "text.json"],
        "column": ["nope"],
        "model": ["empty", "text.txt"],
        "amp": BOOL,
        "num": ["0", "1.5", "-2", "1000"],
    },
    "compare": {
        "dataset_name": ["nope", *along("dataset_name", ["custom", "diffusers"], "--num_reference=4")],
        "solvers": ["nope", "amed", "euler:nope=1", "euler:afs", "dpmpp:max_order=x", "none", "ipndm:max_order=9", ","],
        "nfe": ["0", "x", "1,,2", "-3", "1e9", "1.5"],
        "predictor_path": ["99", "missing.file", "broken.safetensors", "empty"],
        "groups": ["1", "1000"],
        "num_reference": ["-1", "1000", "1"],
        "reference_steps": COUNT,
        "baseline": ["nope"],
        "outdir": ["text.txt", "text.txt/out"],
        "num": ["0", "1.5", "-2", "3"],
    },
    "optimize_schedule": {
        "method": CHOICE,
        "solver": ["nope", "amed"],
        "solver_tea": ["nope", "amed"],
        "num_steps_tea": ["0", "-1", "1", "2"],
        "metric": CHOICE,
        "coeff": [*NUMBER, "-1"],
        "num_warmup": COUNT,
        "kind": search("dmn", "kind", ["nope"]),
        "trajectories": ["noised"],
        "spread": ["1", *search("ofs", "spread", ["-1", "nan"])],
        "objective": ["fid"],
        "finalists": ["1", *search("evolution", "finalists", ["-1"])],
        "num_samples": ["4", *search("evolution", "num_samples", ["0"])],
        "fid_samples": ["4", *search("evolution", "fid_samples", ["1"])],
        "grid_points": ["4", *search("evolution", "grid_points", ["0", "2"])],
        "population": ["4", *search("evolution", "population", ["1"])],
        "generations": ["4", *search("evolution", "generations", ["-1"])],
        "elites": ["4", *search("evolution", "elites", ["0"])],
        "mutation": ["0.5", *search("evolution", "mutation", ["0", "1.5", "nan"])],
        "reach": ["4", *search("evolution", "reach", ["-1"])],
        "init": ["auto", *search("ld3", "init", [*FILE, "text.txt", "broken.json"])],
        "mode": ["time"],
        "loss": ["l2", *search("ld3", "loss", ["lpip", "l2*l2", "0*l2", "nope:f"])],
        "feature_sigma": ["0.2", *search("ld3", "feature_sigma", ["0", "-1", "nan", "90"])],
        "num_train": ["4", *search("ld3", "num_train", ["0"])],
        "num_valid": ["4", *search("ld3", "num_valid", ["0"])],
        "update_batch": ["4", *search("ld3", "update_batch", ["0"])],
        "rounds": ["4", *search("ld3", "rounds", ["0"])],
        "rounds_grid": ["4", *search("ld3", "rounds_grid", ["-1"])],
        "valid_every": ["4", *search("ld3", "valid_every", ["0"])],
        "patience": ["4", *search("ld3", "patience", ["0"])],
        "lr": ["1", *search("ld3", "lr", ["-1", "nan"])],
        "lr_net": ["1", *search("ld3", "lr_net", ["-1", "nan"])],
        "win_rate": ["0.5", *search("ld3", "win_rate", ["-1", "0.6", "nan"])],
        "radius": ["1", *search("ld3", "radius", ["-1", "nan"])],
        "checkpointing": ["True"],
        "dest": ["empty", "text.txt/x.json", "text.txt"],
        "schedule_rho": [*POSITIVE],
    },
    "tools.dataset_tool": {
        "source": ["missing", "empty", "text.txt", "broken.npz", "broken.zip", "mixed"],
        "dest": ["x.txt", "images.zip", "text.txt/x.zip"],
        "resolution": ["0", "x", "3x", "99999999999", "16"],
        "transform": ["pad"],
        "pad": ["True", ("--pad=True", "--transform=center-crop")],
        "max_images": COUNT,
        "renumber": BOOL,
    },
    "tools.train_denoiser": {
        "data": ["missing", "empty", "text.txt", "broken.zip", "mixed"],
        "condition": ["missing", "empty", "text.txt", "broken.zip", "images"],
        "outdir": ["text.txt", "text.txt/out"],
        "arch": CHOICE,
        "model_channels": ["7", "1.5", "9"],
        "channel_mult": ["0", "x", ",", "1,-1", "1,1,1,1,1,1,1,1"],
        "num_blocks": COUNT,
        "attn": ["x", "0", "-8"],
        "dropout": ["1", "-0.1", "nan"],
        "total_kimg": POSITIVE,
        "minutes": ["-1", "nan", "inf"],
        "lr": POSITIVE,
        "warmup_kimg": ["-1", "nan", "inf"],
        "ema_kimg": ["-1", "nan", "inf"],
        "p_mean": NUMBER,
        "p_std": POSITIVE,
        "compile": BOOL,
        "xflip": BOOL,
        "cond": ["True"],  # images has no labels
        "extra_dims": NATURAL,
        "snap": ["-1", "nan", "inf"],
        "grid": BOOL,
        "tensorboard": BOOL,
        "resume": ["True"],
        "init": [*FILE, "text.txt", "broken.pkl", "broken.safetensors"],
    },
    "tools.train_classifier": {
        "data": ["missing", "empty", "text.txt", "images"],
        "test": ["missing", "empty", "text.txt", "images"],
        "arch": ["vgg", ""],
        "dest": ["x.txt", "text.txt/x.safetensors", "folder.safetensors"],
        "epochs": COUNT,
        "batch": ["1", "-1", "1000"],
        "lr": POSITIVE,
        "width": COUNT,
        "feature_dim": COUNT,
        "shift": NATURAL,
        "flip": BOOL,
    },
    "tools.model_statistics": {
        "dest": ["x.txt", "text.txt/x.safetensors", "folder.safetensors"],
        "nodes": ["2", "1.5"],
        "samples": ["1", "1.5"],
        "derivatives": CHOICE,
    },
    "tools.demo": {
        "outdir": ["text.txt", "images"],
        "only": CHOICE,
        "images": ["1", "1.5"],
        "full": FLAG,
    },
    "models.zoo list": {},
    "models.zoo verify": {"name": [("nope",)]},
    "tools.doctor": {},
    "tools.export": {
        "predictor_path": ["99", "missing.file", "broken.safetensors", "empty"],
        "schedule_path": ["missing.file", "text.txt", "broken.json"],
        "num_steps": ["1", "1.5"],
        "schedule_type": CHOICE,
        "schedule_rho": POSITIVE,
        "sigma_min": [*POSITIVE, "100"],
        "sigma_max": [*POSITIVE, "1e-3"],
        "kind": CHOICE,
        "flow": FLAG,
        "outfile": ["text.txt/x.json"],
    },
    "tools.share": {
        "run": [],
        "target": [("p.safetensors", "--to=hf:owner"), ("p.safetensors", "--to=text.txt")],
        "figures": [("p.safetensors", "--to=new", f"--figures={file}") for file in ("missing.json", "broken.json")],
        "images": [("p.safetensors", "--to=new", f"--images={number}") for number in ("-1", "65", "1.5")],
        "prompt": ["a fox"],
        "model_path": ["missing.file", "text.txt"],
        "licence": [],
        "base_model": [],
        "private": FLAG,
    },
    "tools.make_docs": {"check": FLAG, "path": ["missing.md", "text.txt", "empty"]},
}

DIGITS = ["--dataset_name=digits"]
GOOD = {
    "train": [*DIGITS, "--num_steps=3", "--total_kimg=0.001", "--batch=1", "--seed=0"],
    "sample": [*DIGITS, "--solver=euler", "--num_steps=2", "--seeds=0-1"],
    "fid calc": ["--images=images", "--ref=digits", "--detector=digits"],
    "fid pairs": ["--images=images", "--ref=images"],
    "fid ref": ["--data=images", "--dest=ref.npz", "--detector=digits"],
    "clip_score calc": ["--images=images", "--prompts=captions.csv", "--model=empty", "--offline"],
    "compare": [*DIGITS, "--solvers=euler", "--nfe=2", "--num=4", "--groups=2", "--num_reference=0"],
    "optimize_schedule": [*DIGITS, "--dest=found.json", "--num_steps=3", "--num_steps_tea=4"],
    "tools.dataset_tool": ["--source=images", "--dest=new.zip"],
    "tools.train_denoiser": ["--data=images", "--outdir=net", "--total_kimg=0.001", "--batch=1", "--grid=False"],
    "tools.train_classifier": [
        "--data=labelled",
        "--test=labelled",
        "--dest=new.safetensors",
        "--batch=2",
        "--epochs=1",
    ],
    "tools.export": ["--num_steps=4", "--sigma_min=0.01", "--sigma_max=80"],
    "tools.share": ["p.safetensors", "--to=new", "--images=0"],
    "tools.model_statistics": [*DIGITS, "--dest=new.safetensors", "--nodes=3", "--samples=2"],
}
REMEDY = re.compile(
    r"\b(choose|use|should be|give|pass|leave|write|must|expected|needs?|remove|make|set|put|try|delete|lower|install|"
    r"is not (a|one|in|among)|no such|does not exist|only|holds?|cannot (write|read|make|be)|not a|no network|takes?|"
    r"add|name|save|list|skips|supports|too|outside|there is no|requires|lacks|below|above)\b",
    re.IGNORECASE,
)


def commands():
    """Command name -> click command, subcommands spelled out."""
    found = {}
    for module in [*SCRIPTS.values(), "tools.make_docs"]:
        command = importlib.import_module(module).main
        for name, one in (getattr(command, "commands", None) or {"": command}).items():
            found[f"{module} {name}".strip()] = one
    return found


COMMANDS = commands()


def entry(command, param):
    return OWN[command].get(param.name, SHARED.get(param.name))


def by_type(param, may_be_empty):
    """Wrong uses that follow from what click knows of an option, and the missing value."""
    flag = max(param.opts, key=len)
    if param.is_flag:
        return [(f"{flag}=yes",)]
    alone = isinstance(param.flag_value, str) or param.type is click.BOOL  # --compile alone has a meaning
    wrong = [] if alone else [(flag,)]
    if not isinstance(param.type, click.types.StringParamType | click.Path):
        return [*wrong, (f"{flag}=nonsense",), (f"{flag}=",)]
    wrong += [] if param.name in may_be_empty else [(f"{flag}=",)]
    return [*wrong, *([] if param.name in ANY_TEXT else [(f"{flag}={'x' * 5000}",)])]


def wrong_uses():
    for command, click_command in COMMANDS.items():
        for param in click_command.params:
            listed = entry(command, param) if command in OWN else None
            uses = by_type(param, click_command.may_be_empty) if isinstance(param, click.Option) else []
            for use in listed or []:
                uses.append(use if isinstance(use, tuple) else (f"{param.opts[0]}={use}",))
            yield command, param, uses


CASES = list(wrong_uses())


def test_every_option_is_entered():
    missing = [
        f"{command}: '{param.name}'"
        for command, click_command in COMMANDS.items()
        for param in click_command.params
        if command not in OWN or entry(command, param) is None
    ]
    assert not missing, f"enter them in SHARED or OWN of {Path(__file__).name}, with wrong values: {missing}"


def test_no_entry_is_left_over():
    known = {command: {param.name for param in one.params} for command, one in COMMANDS.items()}
    assert set(OWN) == set(known)
    assert not {f"{c}: {name}" for c, names in OWN.items() for name in names if name not in known[c]}
    assert not set(SHARED) - set().union(*known.values())


# --------------------------------------------------------------------------------------------------
# The place where they run


def write_images(folder, count=4, labels=False, size=32):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (size, size), dtype=np.uint8)).save(folder / f"{number:06d}.png")
    if labels:
        table = [[f"{number:06d}.png", number % 2] for number in range(count)]
        (folder / "dataset.json").write_text(json.dumps({"labels": table}))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    for name in ("empty", "folder.npz", "folder.safetensors"):
        (folder / name).mkdir()
    write_images(folder / "images")
    write_images(folder / "labelled", labels=True)
    write_images(folder / "mixed", 2)
    Image.new("L", (16, 16)).save(folder / "mixed" / "000009.png")
    for name in ("pkl", "npz", "zip", "json", "pt", "pth", "safetensors", "csv"):
        (folder / f"broken.{name}").write_bytes(b"\x93damaged \xff\xfe\x00" * 10)
    (folder / "text.txt").write_text("hello\n")
    (folder / "text.json").write_text("{}\n")
    (folder / "images.zip").write_bytes(b"PK\x05\x06" + bytes(18))
    (folder / "captions.csv").write_text("seed,caption\n" + "".join(f"{i},a fox\n" for i in range(4)))
    np.savez(folder / "notfid.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    torch.manual_seed(0)
    config = {"dataset_name": "digits", "num_steps": 3, "afs": True}
    save_predictor(AMEDPredictor(**config), folder / "p.safetensors")
    schedule = {"format": "amed-schedule-1", "sigmas": [80.0, 1.0, 0.002], "sigmas_cond": None, "solver": "euler"}
    schedule |= {"solver_options": {}, "afs": False, "method": "hand", "settings": {}, "network": None, "versions": {}}
    schedule |= {"network_hash": None, "sigma_min": 0.002, "sigma_max": 80.0, "evaluations": 0, "seconds": 0.0}
    (folder / "schedule.json").write_text(json.dumps(schedule))
    return folder


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mtime_ns if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("AMED_CACHE", str(place / "cache"))
    before = contents(place)
    yield place
    assert contents(place) == before, "something was written"


def complete(command, param, use):
    """The arguments: GOOD without the option in question, then the wrong use."""
    own = {flag for flag in param.opts} if isinstance(param, click.Option) else set()
    named = {argument.partition("=")[0] for argument in use} | own
    _, _, sub = command.partition(" ")
    return [*([sub] if sub else []), *(a for a in GOOD.get(command, []) if a.partition("=")[0] not in named), *use]


def check(exit_code, stderr, param, use):
    # Remarks that hold anyway, and the bar of work that found what is wrong.
    lines = [line for line in stderr.split("\n") if line and not re.match(r"Note:|Warning:|.*\d+%\|", line)]
    assert exit_code == 2, stderr
    assert len(lines) == 1 and lines[0].startswith("Error: "), stderr
    names = {param.name, *(flag.lstrip("-") for flag in param.opts)} | {use[-1].lstrip("-").partition("=")[0]}
    value = use[-1].partition("=")[2]
    named = any(re.search(rf"(?<![a-z]){re.escape(name)}(?![a-z])", lines[0]) for name in names)
    assert named or (value and value[:40] in lines[0]), f"names neither {names} nor its value: {lines[0]}"
    assert REMEDY.search(lines[0].replace("; '", "\0").partition("\0")[0]), f"says not what to do: {lines[0]}"


@pytest.mark.parametrize("command, param, uses", CASES, ids=[f"{c.replace(' ', '_')}-{p.name}" for c, p, _ in CASES])
def test_a_wrong_option_is_named_in_one_line(command, param, uses, here):
    if param.name == "model":  # of clip_score.py, which needs it first
        pytest.importorskip("transformers")
    module = importlib.import_module(command.partition(" ")[0])
    for use in uses:
        result = CliRunner().invoke(module.main, complete(command, param, use))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        check(result.exit_code, result.stderr, param, use)


@pytest.mark.parametrize(
    "command, message",
    [
        (["sample.py", "--dataset_name=digits", "--solver=euler", "--batch=0"], "'--batch': 0"),
        (["-m", "tools.dataset_tool", "--source=missing", "--dest=new.zip"], "--source=missing: no such"),
        (["fid.py", "cal"], "No such command 'cal'"),
    ],
)
def test_the_same_from_a_shell(command, message, here):
    script, *rest = command
    start = [script, rest.pop(0)] if script == "-m" else [str(REPO / script)]
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *start, *rest], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_good_command_is_good(here):
    """The rest of the command is right, so it is not the reason for the refusal."""
    for command, arguments in GOOD.items():
        module, _, sub = command.partition(" ")
        if command == "clip_score calc":  # needs a network of its own
            continue
        context = importlib.import_module(module).main
        context = context.commands[sub] if sub else context
        context.make_context(command, list(arguments)).close()
