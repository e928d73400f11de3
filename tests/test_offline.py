"""No connection is opened where all files are local, nor under --offline where one is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from torch_utils.download import download_file, no_network, offline
from torch_utils.errors import UserError

REPO = Path(__file__).resolve().parents[1]
# Prints every connection that Python opens, every name that it looks up and every datagram.
# (urllib3 makes a socket when it is imported, to see whether this machine has IPv6; it is connected
# to nothing.)
SPY = """
import importlib, sys
TALK = ("socket.connect", "socket.get", "socket.send")
sys.addaudithook(lambda event, args: print("OPENED", event, args[1:3]) if event.startswith(TALK) else None)
for line in sys.argv[1].splitlines():
    module, *arguments = line.split()
    command = importlib.import_module(module).main
    try:
        command(arguments, prog_name=module)
    except SystemExit as stop:
        print("EXIT", module, stop.code)
"""


def spy(folder, *commands, **environment):
    command = [sys.executable, "-c", SPY, "\n".join(commands)]
    clean = {name: value for name, value in os.environ.items() if name not in ("AMED_OFFLINE", "HF_HUB_OFFLINE")}
    environment = (
        clean | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "AMED_CACHE": str(folder / "cache")} | environment
    )
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def opened(done):
    return [line for line in done.stdout.splitlines() if line.startswith("OPENED")]


def exits(done):
    return [int(line.split()[2]) for line in done.stdout.splitlines() if line.startswith("EXIT")]


LOCAL = [
    "sample --dataset_name=digits --solver=euler --num_steps=2 --seeds=0-3 --outdir=out",
    "fid calc --images=out --ref=digits",
    "train --dataset_name=digits --num_steps=3 --total_kimg=0.002 --batch=2 --seed=0",
    "sample --predictor_path=0 --seeds=0-1 --outdir=out2",
    "compare --dataset_name=digits --solvers=euler --nfe=2 --num=4 --groups=2 --num_reference=2 --reference_steps=2",
    "optimize_schedule --method=dmn --dataset_name=digits --num_steps=4 --dest=s.json",
    "tools.doctor",
]


def test_local_files_need_no_network(tmp_path):
    done = spy(tmp_path, *LOCAL)
    assert exits(done) == [0] * len(LOCAL), done.stderr
    assert opened(done) == []


MISSING = [
    "sample --dataset_name=cifar10 --solver=euler --num_steps=2 --seeds=0",
    "train --dataset_name=ffhq --seed=0",
    "fid calc --images=images --ref=cifar10",
    "fid ref --data=images --dest=new.npz",
    "compare --dataset_name=cifar10 --solvers=euler",
    "optimize_schedule --dataset_name=cifar10 --dest=s.json",
    "tools.model_statistics --dataset_name=cifar10 --dest=s.safetensors",
    "clip_score calc --images=images --prompts=captions.csv --model=nobody/nothing",
]


@pytest.fixture
def place(tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.new("RGB", (32, 32)).save(tmp_path / "images" / f"{number:06d}.png")
    (tmp_path / "captions.csv").write_text("caption\n" + "a fox\n" * 3)
    return tmp_path


def test_offline_opens_nothing_and_says_what_is_missing(place):
    pytest.importorskip("transformers")
    by_flag = spy(place, *(f"{line} --offline" for line in MISSING))
    assert exits(by_flag) == [2] * len(MISSING) and opened(by_flag) == []
    errors = [line for line in by_flag.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == len(MISSING)
    assert all("--offline was given" in line for line in errors[:-1]) and "nobody/nothing" in errors[-1]


def test_the_spy_sees_connections(place):
    """Without --offline the same command looks a name up: the tests above could fail."""
    nowhere = {name: "http://127.0.0.1:9" for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")}
    done = spy(place, "fid calc --images=images --ref=http://127.0.0.1:9/x.npz", NO_PROXY="", **nowhere)
    assert exits(done) == [2] and opened(done)


def test_the_flag_holds_for_one_command_only(tmp_path, monkeypatch):
    monkeypatch.delenv("AMED_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with no_network("--offline"):
        assert offline() and os.environ["HF_HUB_OFFLINE"] == "1"
        with pytest.raises(UserError, match="--offline was given"):
            download_file(["http://127.0.0.1:9/x"], tmp_path / "x")
    assert not offline() and os.environ["HF_HUB_OFFLINE"] == "0" and "AMED_OFFLINE" not in os.environ


def test_the_flag_ends_with_the_command(monkeypatch):
    """Also where the command never begins, as its other flags are wrong."""
    monkeypatch.delenv("AMED_OFFLINE", raising=False)
    from click.testing import CliRunner

    import sample

    for flags in (["--help"], ["--num_steps=x"], ["--solver=nothing", "--dataset_name=digits"]):
        CliRunner().invoke(sample.main, ["--offline", *flags])
        assert "AMED_OFFLINE" not in os.environ
