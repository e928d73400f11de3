"""Nothing lost, nothing hangs: real commands with real faults (table: docs/reliability.md).

The short versions always run; the long ones, with their numbers of repetitions, under ``-m slow``.
"""

import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import test_download
import torch
from fault_tools import ROOT, launcher
from PIL import Image

import torch_utils.progress as progress
from models.edm import EDMDenoiser, save_edm_safetensors
from tools.train_denoiser import ARCHITECTURES
from torch_utils.distributed import Peers
from torch_utils.files import atomic_path, remove_leftovers
from torch_utils.images import is_whole_png
from training.checkpoint import load_predictor
from training.run_folder import load_newest_state

TRAIN = ("--dataset_name=custom", "--num_steps=3", "--batch=4", "--seed=7", "--device=cpu", "--nosubdir")
SAMPLE = ("--dataset_name=custom", "--solver=euler", "--num_steps=3", "--batch=1", "--device=cpu")
STOP_S = 60  # in which all processes have to end after one has died


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> Path:
    """A network of 8x8 grey pixels with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("net") / "tiny.safetensors"
    config = {"model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    model = EDMDenoiser(img_resolution=8, img_channels=1, **ARCHITECTURES["ddpmpp"], **config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)  # the last layer is zero when it is made
    save_edm_safetensors(model, path)
    return path


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    with launcher(tmp_path_factory.mktemp("output")) as started:
        yield started


@pytest.fixture
def train(programs, net):
    """Starts train.py on the tiny network: train(folder, iterations, more flags)."""

    def start(folder, iterations, *more, ranks=1, **options):
        flags = [*TRAIN, f"--model_path={net}", f"--outdir={folder}", f"--total_kimg={iterations * 4 / 1000}", *more]
        return programs.start("train", *flags, ranks=ranks, **options)

    return start


@pytest.fixture
def sample(programs, net):
    def start(folder, seeds, *more, ranks=1, **options):
        flags = [*SAMPLE, f"--model_path={net}", f"--outdir={folder}", f"--seeds={seeds}", *more]
        return programs.start("sample", *flags, ranks=ranks, **options)

    return start


def finished(group) -> str:
    codes = group.wait()
    assert codes == [0] * len(codes), group.texts()
    return group.out()


def stops(group) -> list[int]:
    """Exit codes of a run that must fail as a whole."""
    codes = group.wait()
    assert 0 not in codes and "Traceback" not in group.texts(), (codes, group.texts())
    return codes


# --------------------------------------------------------------------------------------------------
# 1. train.py is killed


def weights(folder: Path) -> torch.Tensor:
    (path,) = folder.glob("predictor-*.safetensors")
    return torch.cat([value.flatten() for _, value in sorted(load_predictor(path).state_dict().items())])


def losses(folder: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    return [(row["iteration"], *row["loss"]) for row in rows]


def assert_run_is_sound(folder: Path) -> None:
    """Every file that has a final name can be read."""
    for path in folder.glob("*") if folder.is_dir() else []:
        if path.name.startswith("training-state"):
            assert torch.load(path, weights_only=True)["iteration"] >= 0
        elif path.name.startswith("predictor"):
            load_predictor(path)
        elif path.name == "training_options.json":
            json.loads(path.read_text())
        elif not path.name.startswith("."):
            assert path.name in ("log.txt", "stats.jsonl")


def assert_same_training(folder: Path, whole: Path) -> None:
    assert_run_is_sound(folder)
    assert torch.equal(weights(folder), weights(whole))
    first, second = load_newest_state(folder), load_newest_state(whole)
    assert first["iteration"] == second["iteration"]
    for key, moments in first["optimizer"]["state"].items():
        assert all(torch.equal(value, second["optimizer"]["state"][key][name]) for name, value in moments.items())
    assert losses(folder) == losses(whole)  # each row once, none missing


def continued(train, programs, folder: Path, iterations: int, **options):
    """The run of a folder again: from its state, or from the start if it has no run yet."""
    if (folder / "training_options.json").exists():
        return programs.start("train", f"--resume={folder}", "--device=cpu", f"--outdir={folder}", **options)
    return train(folder, iterations, "--tick=0.012", **options)


def kill_training(train, programs, tmp_path: Path, iterations: int, kills: int) -> int:
    """Kills runs at random moments, ``kills`` times in all; returns how many runs that took."""
    whole, clock = tmp_path / "whole", time.monotonic()
    finished(train(whole, iterations, "--tick=0.012"))
    length = time.monotonic() - clock
    draw, done, runs = random.Random(0), 0, 0
    while done < kills:
        folder = tmp_path / f"run{runs}"
        runs += 1
        while True:
            group = continued(train, programs, folder, iterations)
            if done < kills:
                time.sleep(draw.uniform(0.05, 0.5) * length)
                group.kill()
            code = group.wait()[0]
            assert_run_is_sound(folder)
            if code == 0:
                break
            assert code == -9, group.texts()
            done += 1
        assert_same_training(folder, whole)
    return runs


def test_training_killed_at_random_moments_ends_as_if_unbroken(train, programs, tmp_path):
    kill_training(train, programs, tmp_path, iterations=12, kills=3)


@pytest.mark.slow
def test_training_killed_twenty_times(train, programs, tmp_path):
    runs = kill_training(train, programs, tmp_path, iterations=60, kills=20)
    print(f"20 kills in {runs} runs")


def test_training_killed_while_it_writes_its_state(train, programs, tmp_path):
    finished(train(tmp_path / "whole", 9, "--tick=0.012"))
    folder = tmp_path / "run"
    for write in (1, 2):  # before there is any state, and before the second of a continued run
        group = continued(train, programs, folder, 9, fault={"kill_in_write": write})
        assert group.wait() == [-9]
        assert_run_is_sound(folder)
        assert len(list(folder.glob(".training-state*.part"))) == write  # what was cut off never had the name
    finished(continued(train, programs, folder, 9))
    assert_same_training(folder, tmp_path / "whole")


def test_resume_means_the_newest_run_even_if_it_has_no_state_yet(train, programs, net, tmp_path):
    flags = [flag for flag in TRAIN if flag != "--nosubdir"] + [f"--model_path={net}", f"--outdir={tmp_path}"]
    finished(programs.start("train", *flags, "--total_kimg=0.004"))
    group = programs.start("train", *flags, "--total_kimg=0.008", fault={"kill_in_write": 1})
    assert group.wait() == [-9]
    said = finished(programs.start("train", "--resume=True", f"--outdir={tmp_path}", "--device=cpu"))
    assert "Continuing in" in said and "00001-custom" in said and "from iteration 0" in said
    (second,) = tmp_path.glob("00001-*")
    assert load_newest_state(second)["iteration"] == 2


# --------------------------------------------------------------------------------------------------
# 2. sample.py is killed


def images(folder: Path) -> dict[int, tuple]:
    """By seed: pixels, and what changes when the file is written again."""
    found = {}
    for path in folder.glob("0*/*.png"):
        with Image.open(path) as image:
            image.load()  # fails where it is broken off
            found[int(path.stem)] = (np.asarray(image).tobytes(), path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def pixels(folder: Path) -> dict[int, bytes]:
    return {seed: entry[0] for seed, entry in images(folder).items()}


def kill_sampling(sample, tmp_path: Path, count: int, kills: int, ranks: int = 2) -> None:
    """Kills one rank or all at random moments; each rerun makes only the missing images."""
    seeds, whole, clock = f"0-{count - 1}", tmp_path / "whole", time.monotonic()
    finished(sample(whole, seeds, ranks=ranks))
    length, clean, draw, done = time.monotonic() - clock, pixels(whole), random.Random(0), 0
    folders = (tmp_path / f"run{number}" for number in itertools.count())
    folder = next(folders)
    while True:
        before = images(folder)
        group = sample(folder, seeds, ranks=ranks)
        if done < kills:
            time.sleep(draw.uniform(0.2, 0.8) * length)
            group.kill(*draw.choice([(), (0,), (1,)]))
            codes = group.wait(STOP_S)
        else:
            codes = group.wait()
        after = images(folder)
        assert all(after[seed] == entry for seed, entry in before.items())  # not touched
        assert all(clean[seed] == entry[0] for seed, entry in after.items())
        record = folder / "sampling.json"
        assert not after or json.loads(record.read_text())["seeds"] == seeds
        if codes == [0] * ranks:
            made = f"sampled {count - len(before)} images ({len(before)} skipped)"
            assert made in group.out() and after.keys() == clean.keys()
            if done >= kills:
                return
            folder = next(folders)  # it was too fast for the kill, or is whole now
        else:
            assert -9 in codes, group.texts()
            assert 0 not in codes or after.keys() == clean.keys()  # a rank may end well if all was done before the kill
            done += 1


def test_sampling_killed_at_random_moments(sample, tmp_path):
    kill_sampling(sample, tmp_path, count=150, kills=2)
    refused = sample(tmp_path / "whole", "0-3", "--num_steps=4")
    assert stops(refused) == [2]
    assert "holds images made with other settings (" in refused.err() and "choose another --outdir" in refused.err()


@pytest.mark.slow
def test_sampling_killed_twenty_times(sample, tmp_path):
    kill_sampling(sample, tmp_path, count=400, kills=20)


def test_an_image_broken_off_by_a_power_cut_is_made_again(sample, tmp_path):
    finished(sample(tmp_path, "0-5"))
    clean = pixels(tmp_path)
    files = [tmp_path / "000000" / f"{seed:06d}.png" for seed in range(6)]
    files[2].write_bytes(files[2].read_bytes()[:-20])
    files[4].write_bytes(b"")
    assert [is_whole_png(file) for file in files] == [True, True, False, True, False, True]
    assert "sampled 2 images (4 skipped)" in finished(sample(tmp_path, "0-5"))
    assert pixels(tmp_path) == clean


def test_leftovers_of_killed_programs_go_after_an_hour(tmp_path):
    for name, age in ((".a.png-0123456789ab.part", 4000), (".b.png-0123456789ab.part", 10), ("net.pkl.part", 4000)):
        (tmp_path / name).write_bytes(b"half")
        then = time.time() - age
        os.utime(tmp_path / name, (then, then))
    assert remove_leftovers(tmp_path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.png-0123456789ab.part", "net.pkl.part"]


# --------------------------------------------------------------------------------------------------
# 3. One of several processes fails


def some_images(folder: Path, count: int = 1):
    return lambda: len(list(folder.glob("0*/*.png"))) >= count


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others(sample, train, tmp_path, victim):
    """Without torchrun, which would end the others by itself."""
    survivor = 1 - victim
    reason = f"Error [rank {survivor}]: stopped because rank {victim} failed: it died without a word"
    for name, start in (
        ("sample", lambda f: sample(f, "0-99999", ranks=2)),
        ("train", lambda f: train(f, 10**6, ranks=2)),
    ):
        folder = tmp_path / name
        group = start(folder)
        group.wait_until(some_images(folder) if name == "sample" else (folder / "training_options.json").exists)
        time.sleep(0.3)
        group.kill(victim)
        assert group.wait(STOP_S)[victim] == -9 and stops(group)[survivor] == 2
        assert reason in group.err(survivor), group.texts()


def test_an_error_on_one_rank_is_told_by_all(sample, tmp_path):
    group = sample(tmp_path, "0-99999", ranks=2, fault={"boom": 20, "rank": 1})
    assert 0 not in group.wait()
    assert "ZeroDivisionError: boom" in group.err(1)  # with its traceback
    assert group.err(0) == "Error [rank 0]: stopped because rank 1 failed: boom\n"
    assert 0 < len(pixels(tmp_path)) < 1000  # nobody went on with his share


def test_a_rank_that_hangs_is_ended_by_force(sample, tmp_path):
    """Rank 0 stands in a call that never ends, as in a collective whose other side is gone."""
    group = sample(tmp_path, "0-99", ranks=2, fault={"hang": 9, "rank": 0, "grace": 1.0})
    group.wait_until(lambda: "hanging" in group.out() and some_images(tmp_path)())
    group.kill(1)
    assert group.wait(STOP_S) == [2, -9]
    assert "Error [rank 0]: stopped because rank 1 failed: it died without a word" in group.err(0)


def test_what_one_rank_cannot_read_ends_all_before_anything_is_written(sample, train, tmp_path):
    own = {1: ("--model_path=/nowhere/net.safetensors",)}
    for name, start in (
        ("sample", lambda f: sample(f, "0-9", ranks=2, own=own)),
        ("train", lambda f: train(f, 5, ranks=2, own=own)),
    ):
        group = start(tmp_path / name)
        assert stops(group) == [2, 2]
        for rank in (0, 1):
            assert "/nowhere/net.safetensors" in group.err(rank) and group.err(rank).count("\n") == 1, group.texts()
        assert not (tmp_path / name).exists()


def test_a_slow_rank_is_waited_for(programs, sample, tmp_path):
    """A meeting has no timeout: the fast process is done long before the slow one."""
    finished(sample(tmp_path, "0-9", ranks=2, fault={"slow": 0.15, "rank": 1}))
    assert len(pixels(tmp_path)) == 10


def test_the_star_of_connections_refuses_strangers():
    with pytest.raises(TypeError):
        Peers.join()  # takes the rank and the number of processes
    import socket

    peers = Peers(0, 2)
    listener = socket.create_server(("127.0.0.1", 0))
    strangers = [b"nonsense\n", b'{"token": "guess", "rank": 1}\n', b"[]\n", b""]

    def visit():
        for words in [*strangers, b'{"token": "right", "rank": 1}\n']:
            link = socket.create_connection(listener.getsockname())
            link.sendall(words)
            if not words:
                link.close()
            held.append(link)

    held: list = []
    visitor = threading.Thread(target=visit)
    visitor.start()
    peers._accept(listener, "right")
    visitor.join()
    assert list(peers._links) == [1] and peers._links[1].getpeername() == held[-1].getsockname()
    for link in [*held, *peers._links.values(), listener]:
        link.close()


def _worker(launcher_pid: int, rank: int) -> int | None:
    """The process of a rank that a torchrun has started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):  # it has just ended
            continue
        if parent == launcher_pid and f"RANK={rank}".encode() in environment:
            return int(folder.name)
    return None


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
@pytest.mark.parametrize("program", ["sample.py", "train.py", "fid.py", "compare.py", "tools/train_denoiser.py"])
def test_under_torchrun(program, net, tmp_path):
    """The real launcher; the second process is killed in the middle of the work."""
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, [60_000 if program == "fid.py" else 50, 32, 32], np.uint8)
    for number, image in enumerate(noise):
        Image.fromarray(image).save(tmp_path / "images" / f"{number:05d}.png", compress_level=0)
    flags = {
        "sample.py": [*SAMPLE, f"--model_path={net}", f"--outdir={tmp_path / 'out'}", "--seeds=0-99999"],
        "train.py": [*TRAIN, f"--model_path={net}", f"--outdir={tmp_path / 'out'}", "--total_kimg=1000"],
        "fid.py": [
            "ref",
            f"--data={tmp_path / 'images'}",
            f"--dest={tmp_path / 'r.npz'}",
            "--detector=digits",
            "--batch=2",
        ],
        "compare.py": ["--dataset_name=digits", "--solvers=euler", "--nfe=5", f"--outdir={tmp_path / 'out'}"],
        "tools/train_denoiser.py": [f"--data={tmp_path / 'images'}", f"--outdir={tmp_path / 'out'}", *DENOISER],
    }[program]
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        program,
        "--device=cpu",
    ]
    if program == "fid.py":
        start, flags = start[:-1], [*flags, "--device=cpu"]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    process = subprocess.Popen(
        [*start, *flags], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 300
        while (worker := _worker(process.pid, 1)) is None or _cpu_seconds(worker) < 12:  # imports take about 6
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.1)
        os.kill(worker, signal.SIGKILL)
        out, err = process.communicate(timeout=STOP_S)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "stopped because rank 1 failed: it died without a word" in err, err


# --------------------------------------------------------------------------------------------------
# 3b. SIGTERM

DENOISER = ("--model_channels=8", "--channel_mult=1", "--attn=", "--batch=8", "--grid=False", "--total_kimg=1000")


def terminated(group, number: int = signal.SIGTERM) -> str:
    group.kill(number=number)
    codes = group.wait(STOP_S)
    assert codes == [128 + number] * len(codes) and "Traceback" not in group.texts(), (codes, group.texts())
    return group.err()


@pytest.mark.parametrize(("ranks", "number"), [(1, signal.SIGTERM), (2, signal.SIGTERM), (1, signal.SIGINT)])
def test_a_signal_ends_sampling_with_whole_images(sample, tmp_path, ranks, number):
    group = sample(tmp_path, "0-99999", ranks=ranks)
    group.wait_until(some_images(tmp_path, 3))
    if ranks == 2:
        group.kill(number=number)
        assert 0 not in group.wait(STOP_S) and "Traceback" not in group.texts()
        assert re.search("nterrupted by SIGTERM", group.texts())
    else:
        said = terminated(group, number)
        assert said == f"Interrupted by {number.name}: finished images are kept; repeat the command to continue\n"
    assert len(pixels(tmp_path)) >= 3 and not list(tmp_path.rglob("*.part"))


def test_sigterm_saves_the_training_of_a_denoiser(programs, sample, tmp_path):
    finished(sample(tmp_path / "images", "0-15"))
    flags = [f"--data={tmp_path / 'images'}", f"--outdir={tmp_path / 'run'}", "--device=cpu", *DENOISER]
    group = programs.start("denoiser", *flags, ranks=2)
    group.wait_until((tmp_path / "run" / "stats.jsonl").exists)
    assert "repeat the command with --resume=True" in terminated(group)
    done = torch.load(tmp_path / "run" / "training-state.pt", weights_only=True)["it"]
    again = f"--total_kimg={(done + 2) * 8 / 1000}"
    finished(programs.start("denoiser", *flags, "--resume=True", again))
    assert torch.load(tmp_path / "run" / "training-state.pt", weights_only=True)["it"] == done + 2


def test_sigterm_leaves_nothing_half_done(programs, tmp_path):
    """compare.py, which ends at once."""
    flags = ["--dataset_name=digits", "--solvers=euler", "--nfe=9", "--num=4000", "--device=cpu", "--num_reference=0"]
    group = programs.start("compare", *flags, "--groups=500", f"--outdir={tmp_path / 'compare'}")
    group.wait_until(lambda: any((tmp_path / "compare").glob("cache/*-group*.npz")))  # in the middle of its work
    assert terminated(group) == "Interrupted by SIGTERM\n"
    assert not list(tmp_path.rglob("*.part"))


# --------------------------------------------------------------------------------------------------
# 4. No room, no right to write

UNSHARE = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """(launcher with file systems of its own, folder of 1 MiB, read-only folder)."""
    folder = tmp_path_factory.mktemp("disk")
    small, protected = folder / "small", folder / "protected"
    small.mkdir(), protected.mkdir()
    mounts = f"mount -t tmpfs -o size=1m none {small} && mount -t tmpfs -o ro none {protected}"
    if shutil.which("unshare") is None or subprocess.run([*UNSHARE, mounts], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount file systems")
    with launcher(folder, (*UNSHARE, f'{mounts} && exec "$@"', "sh")) as started:
        inside = Path(f"/proc/{started.pid}/root")  # how we, outside, look in
        yield started, inside, small, protected


def leave_room(folder: Path, free: int) -> Path:
    """Fills a file system but for so many bytes."""
    ballast = folder / "ballast"
    statistics = shutil.disk_usage(folder)
    ballast.write_bytes(bytes(max(statistics.free - free, 0)))
    return ballast


def one_line(group) -> str:
    assert stops(group) == [2]
    (line,) = [line for line in group.err().splitlines() if line.startswith("Error")]
    assert group.err().rstrip().endswith(line)
    return line


def test_training_on_a_disk_that_fills_up(small_disk, net, train, tmp_path):
    programs, inside, small, _ = small_disk
    finished(train(tmp_path / "whole", 9, "--tick=0.012"))
    size = max(path.stat().st_size for path in (tmp_path / "whole").glob("training-state-*"))
    ballast = leave_room(inside / small.relative_to("/"), int(1.5 * size))
    flags = [*TRAIN, f"--model_path={net}", f"--outdir={small / 'run'}", "--total_kimg=0.036", "--tick=0.012"]
    said = one_line(programs.start("train", *flags))
    assert re.search("cannot write .*(No space left|disk full)", said)
    run = inside / small.relative_to("/") / "run"
    assert_run_is_sound(run)
    assert not list(run.glob(".*.part"))
    ballast.unlink()
    finished(programs.start("train", f"--resume={small / 'run'}", "--device=cpu"))
    assert_same_training(run, tmp_path / "whole")
    shutil.rmtree(run)


def test_sampling_on_a_disk_that_fills_up(small_disk, net, sample, tmp_path):
    programs, inside, small, _ = small_disk
    finished(sample(tmp_path, "0-19"))
    root = inside / small.relative_to("/")
    ballast = leave_room(root, 10 * 4096)  # the folders and the record take some of it
    flags = [*SAMPLE, f"--model_path={net}", f"--outdir={small / 'out'}", "--seeds=0-19"]
    assert "No space left on device" in one_line(programs.start("sample", *flags))
    assert 0 < len(pixels(root / "out")) < 20 and not list((root / "out").rglob("*.part"))
    ballast.unlink()
    finished(programs.start("sample", *flags))
    assert pixels(root / "out") == pixels(tmp_path)
    shutil.rmtree(root / "out")


def test_a_folder_that_is_read_only(small_disk, net):
    programs, _, _, protected = small_disk
    for program, flags in (("train", [*TRAIN, "--total_kimg=0.008"]), ("sample", [*SAMPLE, "--seeds=0-3"])):
        group = programs.start(program, *flags, f"--model_path={net}", f"--outdir={protected / 'out'}")
        assert "Read-only file system" in one_line(group) and str(protected) in group.err()


def test_files_that_may_not_get_so_large(train, programs, tmp_path):
    """A limit of the operating system in place of a full disk: needs no right to mount anything."""
    finished(train(tmp_path / "whole", 6, "--tick=0.012"))
    size = max(path.stat().st_size for path in (tmp_path / "whole").glob("training-state-*"))
    group = train(tmp_path / "run", 6, "--tick=0.012", fault={"file_limit": size // 2})
    assert re.search(r"cannot write \S+/(training-state|predictor)-\d+", one_line(group))
    assert_run_is_sound(tmp_path / "run")
    finished(continued(train, programs, tmp_path / "run", 6))
    assert_same_training(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("number", [28, 122, 27, 30, 5])
def test_errors_of_the_disk_take_one_line_whatever_writes(tmp_path, number):
    (tmp_path / "file").write_text("old")
    with pytest.raises(ValueError, match="cannot write .*file: "), atomic_path(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise OSError(number, "the disk")
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "file"):  # an error of what is read is no error here
        Path("/nowhere").read_text()
    assert (tmp_path / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


# --------------------------------------------------------------------------------------------------
# 5. Not a number


def test_nan_in_training_on_one_rank(train, programs, tmp_path):
    """All ranks end in the same iteration, with the state before it; then the run goes on."""
    finished(train(tmp_path / "whole", 8, "--tick=0.012"))
    group = train(tmp_path / "run", 8, "--tick=0.012", ranks=2, fault={"nan": 40, "rank": 1})
    assert stops(group) == [2, 2]
    for rank in (0, 1):
        found = re.search(
            r"not finite in iteration (\d+) \(\S+ kimg\), interval \d \(sigma \S+ -> \S+\), rank (\S+);",
            group.err(rank),
        )
        assert found and found[2] == "1", group.texts()
    state = load_newest_state(tmp_path / "run")
    assert state["iteration"] == int(found[1]) - 1 > 0
    assert all(value.isfinite().all() for value in state["predictor"].values())
    finished(continued(train, programs, tmp_path / "run", 8, ranks=2))
    torch.testing.assert_close(weights(tmp_path / "run"), weights(tmp_path / "whole"), rtol=1e-3, atol=1e-5)


def test_nan_in_sampling_names_the_seeds(sample, tmp_path):
    """Row 0 of every later batch: the other images are written, a rerun makes the missing one."""
    group = sample(tmp_path, "0-9", "--batch=4", fault={"nan": 3})
    assert "not finite (NaN or infinite) for seeds 4: not written" in one_line(group)
    assert sorted(pixels(tmp_path)) == [0, 1, 2, 3, 5, 6, 7]
    assert "sampled 3 images (7 skipped)" in finished(sample(tmp_path, "0-9", "--batch=4"))


# --------------------------------------------------------------------------------------------------
# 6. Out of memory


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_batches_that_do_not_fit(sample, tmp_path, kind):
    fault = {"oom": 5, "oom_kind": kind}
    refused = one_line(sample(tmp_path, "0-9", "--batch=8", fault=fault))
    assert refused == "Error: cpu is out of memory: lower --batch (now 8), or --batch=auto"
    group = sample(tmp_path, "0-19", "--batch=auto", fault=fault)
    assert "sampled 20 images" in finished(group)
    assert group.err() == "Note: --batch=auto: 5 images at once fit into the memory of cpu\n"  # 20, 10, 5
    finished(sample(tmp_path / "other", "0-19", "--batch=5"))
    assert pixels(tmp_path) == pixels(tmp_path / "other")
    hopeless = one_line(sample(tmp_path / "third", "0-9", "--batch=auto", fault={"oom": 0}))
    assert "out of memory even with --batch=1" in hopeless


def test_micro_batches_that_fit(train, tmp_path):
    assert "lower --batch-gpu (now 4)" in one_line(train(tmp_path / "no", 3, fault={"oom": 3}))
    said = finished(train(tmp_path / "auto", 3, "--batch-gpu=auto", fault={"oom": 3}))
    assert "4 samples at once do not fit into the memory of cpu" in said and "batch 4 (2 x 2 on each" in said
    finished(train(tmp_path / "two", 3, "--batch-gpu=2"))
    assert torch.equal(weights(tmp_path / "auto"), weights(tmp_path / "two"))
    assert load_newest_state(tmp_path / "auto")["options"]["batch_gpu"] == 2


# --------------------------------------------------------------------------------------------------
# 7. Downloads (the servers that misbehave in other ways are in test_download.py)


class Stalling(test_download.Handler):
    """Sends two thirds of the file, and no more until ``go`` is set."""

    def do_GET(self):
        go = self.server.go
        if go.is_set():
            return super().do_GET()
        self.server.log.append((self.path, self.headers["Range"]))
        self.answer(
            200,
            test_download.DATA,
            sent=len(test_download.DATA) // 3 * 2,
            ETag='"one"',
            Content_Length=len(test_download.DATA),
        )
        self.wfile.flush()
        go.wait(600)


@pytest.fixture
def stalling(monkeypatch):
    monkeypatch.setattr(test_download, "Handler", Stalling)
    server = test_download.Server()
    server.go = threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.go.set()
    server.shutdown()
    server.server_close()


def test_downloads_killed_and_shared(stalling, programs, tmp_path):
    """Of two processes the downloading one is killed: the other continues; no half file is seen."""
    dest, url = tmp_path / "net.pkl", stalling.url("plain")
    part = tmp_path / "net.pkl.part"
    first = programs.start("download", url, dest)
    first.wait_until(lambda: part.exists() and part.stat().st_size > 500_000)
    second = programs.start("download", url, dest, hashlib.sha256(test_download.DATA).hexdigest())
    second.wait_until(lambda: "another process is downloading" in second.err())
    assert not dest.exists() and len(stalling.log) == 1
    first.kill()
    assert first.wait() == [-9]
    stalling.go.set()
    finished(second)
    test_download.assert_clean(dest)
    assert re.fullmatch(r"bytes=\d{6,}-", stalling.log[1][1])  # continued, not started again


# --------------------------------------------------------------------------------------------------
# 8. Long runs


WRITERS = 4  # threads that write images, each one at a time


def assert_flat(readings: Path, folder: Path, mebibytes: float, in_flight: int) -> tuple[float, int]:
    """The last third of the network's calls needs hardly more than the second; returns the growth.

    readings: file of ``fault_tools.usage``. in_flight: files below ``folder`` that may be open at a
    call, whenever it happens: they are being written by threads, so their number depends on the
    moment. All other open files are counted.
    """
    lines = [json.loads(line) for line in readings.read_text().splitlines()]
    inside = f"{folder}{os.sep}"  # the lock of the folder is open all the time
    within = [
        [name for name in line["opened"] if name.startswith(inside) and not name.endswith(".lock")] for line in lines
    ]
    assert max(map(len, within)) <= in_flight, max(within, key=len)
    files = [len(line["opened"]) - len(own) for line, own in zip(lines, within, strict=True)]
    memory, third = [line["mebibytes"] for line in lines], len(lines) // 3
    assert third > 5
    growth, more = (max(values[2 * third :]) - max(values[third : 2 * third]) for values in (memory, files))
    assert growth < mebibytes and more <= 2, (growth, more)
    return growth, more


def assert_quiet(text: str) -> None:
    """A run below 30 seconds prints no progress, a longer one a line now and then."""
    assert "\r" not in text and text.count("\n") <= 20


def sample_for_long(sample, tmp_path, count: int) -> tuple[float, int]:
    readings = tmp_path.with_suffix(".usage")
    group = sample(tmp_path, f"0-{count - 1}", "--batch=20", fault={"usage": str(readings)})
    finished(group)
    assert_quiet(group.err())
    assert sum(1 for _ in tmp_path.rglob("*.png")) == count
    return assert_flat(readings, tmp_path, 8, WRITERS)


def train_for_long(train, tmp_path, iterations: int) -> tuple[float, int]:
    readings = tmp_path.with_suffix(".usage")
    group = train(tmp_path, iterations, f"--tick={iterations / 10 * 4 / 1000}", fault={"usage": str(readings)})
    finished(group)
    assert_quiet(group.err())
    assert len((tmp_path / "stats.jsonl").read_text().splitlines()) == 10  # by ticks, not by iterations
    assert len((tmp_path / "log.txt").read_text().splitlines()) < 20
    assert len(list(tmp_path.glob("training-state-*"))) <= 2
    return assert_flat(readings, tmp_path, 8, 0)


def test_a_run_stays_small(sample, train, tmp_path):
    sample_for_long(sample, tmp_path / "images", 400)
    train_for_long(train, tmp_path / "run", 40)


@pytest.mark.slow
def test_long_runs_stay_small(sample, train, tmp_path):
    print("10,000 images: growth in MiB, files:", *sample_for_long(sample, tmp_path / "images", 10_000))
    print("500 iterations: growth in MiB, files:", *train_for_long(train, tmp_path / "run", 500))


def test_progress_is_quiet_in_files(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.progress_bar(1000, unit="img", desc="digits") as bar:
        for _ in range(100):  # 100 seconds
            clock[0] += 1
            bar.set_postfix_str("loss 0.1")
            bar.update(10)
            bar.refresh()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("digits:") for line in lines)  # after 30, 60, 90 and 100 seconds
    assert "290/1000" in lines[0] and "1000/1000" in lines[-1]
    with progress.progress_bar(10) as bar:
        bar.update(10)
    assert capsys.readouterr().err == ""
    own = (path for path in ROOT.glob("**/*.py") if not {".venv", "benchmarks"} & set(path.parts))
    uses = [path for path in own if "import tqdm" in path.read_text()]
    assert {path.name for path in uses} <= {
        "progress.py",
        "problem.py",
        "run.py",
        "trainer.py",
        "k_sampler.py",
        Path(__file__).name,
    }
