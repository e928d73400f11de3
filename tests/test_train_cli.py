"""train.py through the real command line, on a tiny network."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from test_training_loop import write_tiny

from train import main
from training.amed_trainer import train_predictor
from training.checkpoint import load_predictor
from training.run_folder import load_newest_state

ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny("edm_song_uncond", tmp_path_factory.mktemp("net") / "tiny.safetensors")


def command(*arguments, processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, str(ROOT / "train.py"), *map(str, arguments)]


def run_train(*arguments, processes: int = 1, cwd=ROOT) -> subprocess.CompletedProcess:
    line = command(*arguments, processes=processes)
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=ENV, timeout=400)


def usual(tiny, outdir) -> list[str]:
    return [
        "--dataset_name=custom",
        f"--model_path={tiny}",
        "--num_steps=3",
        "--batch=4",
        "--seed=7",
        "--device=cpu",
        f"--outdir={outdir}",
    ]


def invoke(*arguments):
    """The same command inside this process, which saves its start."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def trained(output: str) -> Path:
    """The file that the last line names; it is printed once."""
    (path,) = re.findall(r"trained (\S+) NFE=\d+ in \d+\.\d s\n", output)
    return Path(path)


def weights(path: Path) -> torch.Tensor:
    return torch.cat([value.flatten() for _, value in sorted(load_predictor(path).state_dict().items())])


def test_two_processes_give_the_predictor_of_one(tiny, tmp_path):
    """The same seeds, 20 iterations."""
    settings = [*usual(tiny, tmp_path), "--total_kimg=0.08", "--scale_time=0.1", "--sampler_stu=ipndm"]
    two = run_train(*settings, "--sampler_tea=ipndm", "--tick=0.02", processes=2)
    assert two.returncode == 0, two.stderr
    path = trained(two.stdout)
    options = load_newest_state(path.parent)["options"]
    assert load_newest_state(path.parent)["iteration"] == 20
    one = train_predictor({**options, "outdir": str(tmp_path / "one")})
    difference = (weights(path) - weights(one)).norm() / weights(one).norm()
    assert difference < 1e-4
    losses = [
        [json.loads(line)["loss"] for line in (run.parent / "stats.jsonl").read_text().splitlines()]
        for run in (path, one)
    ]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=0)


def test_ctrl_c_and_continuing(tiny, tmp_path):
    line = command(*usual(tiny, "exps"), "--total_kimg=1000", "--tick=0.004")
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=ENV, process_group=0
    )
    folder = tmp_path / "exps" / "00000-custom-3-3-amed-heun-1-polynomial-afs"
    try:
        for _ in range(1800):
            if (folder / "stats.jsonl").is_file():
                break
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    (said,) = re.findall(r"python train.py --resume=(\S+)", out)
    assert (tmp_path / said).resolve() == folder
    done = load_newest_state(folder)["iteration"]
    assert done >= 1 and (folder / f"predictor-000000.{4 * done:03d}.safetensors").is_file()
    total = (done + 2) * 4 / 1000
    again = run_train(f"--resume={said}", f"--total_kimg={total}", "--seed=7", "--device=cpu", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    path = trained(again.stdout)
    assert load_newest_state(folder)["iteration"] == done + 2
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        options = load_newest_state(folder)["options"]
        straight = train_predictor({**options, "outdir": str(tmp_path / "straight")})
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(weights(tmp_path / path), weights(straight))
    conflict = invoke(f"--resume={folder}", "--lr=0.1", "--total_kimg=99")
    assert conflict.exit_code == 2
    assert "Error: --resume: this run has lr=0.005, not 0.1; leave --lr out" in conflict.output


def test_dry_run_shows_the_defaults_of_the_original(tmp_path):
    done = invoke("--dataset_name=cifar10", f"--outdir={tmp_path / 'exps'}", "-n")
    assert done.exit_code == 0, done.output
    options = json.loads(done.output[: done.output.rindex("}") + 1])
    expected = {
        "total_kimg": 10,
        "num_steps": 4,
        "sampler_stu": "amed",
        "sampler_tea": "heun",
        "M": 1,
        "guidance_type": None,
        "guidance_rate": 0,
        "schedule_type": "polynomial",
        "schedule_rho": 7,
        "afs": True,
        "scale_dir": 0.01,
        "scale_time": 0,
        "max_order": 3,
        "predict_x0": True,
        "lower_order_final": True,
        "batch": 512,
        "lr": 5e-3,
        "bench": True,
        "nosubdir": False,
        "seed": None,
    }
    assert expected.items() <= options.items()
    assert "00000-cifar10-4-5-amed-heun-1-polynomial-afs" in done.output
    assert not list(tmp_path.iterdir())


def test_every_way_of_writing_and_every_flag_reaches_the_run(tiny, tmp_path):
    flags = {
        "total_kimg": 0.008,
        "sampler_stu": "dpmpp",
        "sampler_tea": "dpmpp",
        "M": 2,
        "guidance_type": "none",
        "scale_dir": 0.05,
        "scale_time": 0.2,
        "max_order": 2,
        "predict_x0": False,
        "lower_order_final": False,
        "afs": False,
        "lr": 0.001,
        "bench": False,
        "tick": 0.004,
        "dump": 2,
        "amp": "bf16",
        "channels_last": False,
        "sigmas": "80,5,0.5,0.002",
    }
    arguments = [argument for argument in usual(tiny, tmp_path) if "num_steps" not in argument]
    written = [f"--{key}={value}" for key, value in flags.items()]
    done = invoke(*arguments, *written, "--batch-gpu=2", "--snap", 1, "--nosubdir")
    assert done.exit_code == 0, done.output
    path = trained(done.output)
    assert path.parent == tmp_path  # --nosubdir
    config = load_predictor(path).config
    assert config["sigmas"] == [80, 5, 0.5, 0.002] and config["num_steps"] == 4 and config["afs"] is False
    assert config["max_order"] == 2 and config["predict_x0"] is False and config["lower_order_final"] is False
    recorded = json.loads((tmp_path / "training_options.json").read_text())
    for key, value in {**flags, "sigmas": [80, 5, 0.5, 0.002], "guidance_type": None}.items():
        assert recorded[key] == value
    assert recorded["batch_gpu"] == 2 and recorded["snap"] == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--dataset_name is missing"),
        (["--dataset_name=nothing"], "dataset_name 'nothing' is unknown"),
        (["--dataset_name=ms_coco"], "needs texts: give --prompt_path"),
        (["--dataset_name=custom"], "needs --model_path"),
        (["--dataset_name=custom", "--model_path=/nowhere/net.pkl"], "--model_path=/nowhere/net.pkl is not a file"),
        (["--dataset_name=digits", "--sampler_stu=heun"], "'--sampler_stu'"),
        (["--dataset_name=digits", "--sampler_tea=amed"], "'--sampler_tea'"),
        (["--dataset_name=digits", "--M=-1"], "'--M'"),
        (["--dataset_name=digits", "--num_steps=1"], "'--num_steps'"),
        (["--dataset_name=digits", "--afs=maybe"], "choose True, False or data, not 'maybe'"),
        (["--dataset_name=digits", "--sampler_stu=dpmpp", "--max_order=4"], "max_order=4: dpmpp supports 1..3"),
        (["--dataset_name=digits", "--max_order=5"], "'--max_order'"),
        (["--dataset_name=digits", "--batch=6", "--batch-gpu=4"], "batch_gpu=4 must divide"),
        (["--dataset_name=digits", "--sigmas=1,2"], "strictly decreasing"),
        (["--dataset_name=digits", "--sigmas=2,1", "--schedule_type=logsnr"], "--sigmas replaces --schedule_type"),
        (["--dataset_name=digits", "--prompt_path=p.csv"], "not a text-to-image network"),
        (["--dataset_name=digits", "--device=tpu"], "--device=tpu"),
        (["--resume=12"], "no such run"),
    ],
)
def test_mistakes_get_one_line(arguments, message, tmp_path):
    exps = tmp_path / "exps"
    done = invoke(*arguments, f"--outdir={exps}")
    assert done.exit_code == 2 and message in done.output.strip().splitlines()[-1], done.output
    assert not exps.exists()


def test_a_mistake_in_the_real_process(tiny, tmp_path):
    done = run_train(*usual(tiny, tmp_path), "--sampler_stu=dpmpp", "--max_order=4")
    assert done.returncode == 2 and done.stderr == "Error: max_order=4: dpmpp supports 1..3\n"
    assert not list(tmp_path.iterdir())


def test_a_flag_that_does_nothing_is_pointed_out(tiny, tmp_path):
    done = invoke(*usual(tiny, tmp_path), "--predict_x0=False", "--schedule_rho=3", "-n")
    assert done.exit_code == 0
    assert done.output.count("has no effect") == 1
    assert "Note: --predict_x0 has no effect with the other settings\n" in done.output
