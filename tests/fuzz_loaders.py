"""Damaged and hostile files through every loader, in processes with limits.

    python tests/fuzz_loaders.py --count=20000 --workers=2 --keep=found

A file either loads or is refused with a UserError, within limits of CPU time and memory. Nothing in
it is executed. Failures are: another exception, a process that dies or takes too long, a file
written, a program started, a connection opened. Case number i of a seed is always the same.
--keep: folder for the files that failed. Files that once failed are kept in tests/golden/fuzz and
run first.
"""

import argparse
import collections
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "golden" / "fuzz"
sys.path[:0] = [str(HERE.parent), str(HERE)]

from fuzz_mutations import MARKER, mutate  # noqa: E402  (after the path is set)

MEMORY_GIB = 1.0  # address space beyond what the imports take
LARGEST = 1 << 26  # bytes of a file, damaged or written
CPU_SECONDS = 10  # per file; the usual is a few thousandths
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class", "socket.")


@dataclass(frozen=True)
class Target:
    """A kind of file to damage.

    file: name of a good file in the folder of ``make_files``.
    kind: how to damage it (see ``mutate``).
    load: the function that has to cope with it.
    """

    file: str
    kind: str
    load: Callable


# --------------------------------------------------------------------------------------------------
# What reads the files. Whatever a command line would do next, short of computing, belongs to it.


def load_network(path):
    from models.edm import load_edm_network

    load_edm_network(path)


def load_learned(path):
    import torch

    from sampling.settings import Settings, settings_of
    from solvers.span_table import SpanSolver
    from training.checkpoint import load_predictor

    class Net:
        sigma_min, sigma_max = 0.002, 80.0

    predictor = load_predictor(path)
    settings = settings_of(predictor, Settings())
    settings.evaluations(Net(), predictor)
    if isinstance(predictor, SpanSolver):
        predictor.table()
    else:
        predictor(torch.zeros(1, 8, 8), torch.tensor(80.0), torch.tensor(1.0))


def load_content(path):
    from torch_utils.safe_pickle import safe_load

    safe_load(path)


def load_weights(path):
    from torch_utils.tensor_file import read_weights

    read_weights(path)


def load_reference(path):
    from evaluation.frechet import Reference

    Reference.load(path)


def load_image_arrays(path):
    from tools.dataset_tool import ArraySource

    source = ArraySource(path)
    source.read(len(source) - 1)


def load_noise_levels(path):
    from solvers.schedule_file import load_schedule

    load_schedule(path)


def load_images(path):
    from torch_utils.images import ImageSource, load_array

    source = ImageSource(path)
    load_array(source)
    source.fingerprint(0)


def load_judge(path):
    from evaluation.detectors import load_classifier

    load_classifier(path)


def load_model_statistics(path):
    from solvers.dpm_solver_v3 import load_statistics

    load_statistics(path)


def load_state(path):
    from training.options import AMEDOptions
    from training.run_folder import load_newest_state

    state = load_newest_state(path.parent)
    AMEDOptions.from_dict(state["options"]).check(1)


def load_captions(path):
    from torch_utils.prompts import read_prompts

    read_prompts(path)


def load_description(path):
    from models import build_denoiser, zoo

    described = zoo.read_sidecar(path.with_name(path.name.removesuffix(".json")))
    if described is not None:
        build_denoiser(*described, {})


def load_record(path):
    from sampling.folder import Folder

    Folder(path.parent, True, False).record()


TARGETS = (
    Target("network.pkl", "pickle", load_network),
    Target("network.safetensors", "safetensors", load_network),
    Target("predictor.pkl", "pickle", load_learned),
    Target("predictor.pt", "zip", load_learned),
    Target("predictor.safetensors", "safetensors", load_learned),
    Target("student.safetensors", "safetensors", load_learned),
    Target("content.pt", "zip", load_content),
    Target("legacy.pt", "pickle", load_content),
    Target("weights.ckpt", "zip", load_weights),
    Target("legacy.ckpt", "pickle", load_weights),
    Target("weights.safetensors", "safetensors", load_weights),
    Target("reference.npz", "zip", load_reference),
    Target("images.npz", "zip", load_image_arrays),
    Target("schedule.json", "json", load_noise_levels),
    Target("dataset.zip", "zip", load_images),
    Target("classifier.safetensors", "safetensors", load_judge),
    Target("statistics.safetensors", "safetensors", load_model_statistics),
    Target("training-state-000001.pt", "zip", load_state),
    Target("captions.csv", "bytes", load_captions),
    Target("net.pkl.json", "json", load_description),
    Target("sampling.json", "json", load_record),
)


def make_files(folder: Path) -> None:
    """Writes a good file of every target."""
    import numpy as np
    import torch
    from PIL import Image

    from evaluation.detectors import ConvClassifier, save_classifier
    from evaluation.frechet import Reference
    from models.edm import load_edm_network, save_edm_safetensors
    from solvers.dpm_solver_v3 import Statistics, save_statistics
    from solvers.span_table import SpanSolver
    from training.checkpoint import save_predictor
    from training.options import AMEDOptions
    from training.predictor import AMEDPredictor

    torch.manual_seed(0)
    fixtures, rng = HERE / "golden" / "pickle_fixtures", np.random.default_rng(0)
    (folder / "network.pkl").write_bytes((fixtures / "edm_song_ema.pkl").read_bytes())
    (folder / "predictor.pkl").write_bytes((fixtures / "amed_cifar10_amed.pkl").read_bytes())
    save_edm_safetensors(load_edm_network(folder / "network.pkl"), folder / "network.safetensors")
    predictor = AMEDPredictor(dataset_name="digits", num_steps=4, afs=True, scale_dir=0.01, max_order=3, hidden_dim=16)
    save_predictor(predictor, folder / "predictor.safetensors", {"network_hash": "0" * 64})
    structure = {"dataset_name": "digits", "image_shape": [1, 2, 2], "heads": ["sample", "spatial", "time"]}
    student = SpanSolver(**structure, parallel=2, num_steps=4, img_channels=1, embedding_width=8)
    save_predictor(student, folder / "student.safetensors", {"network_hash": "0" * 64})
    _pack_snapshot(folder / "predictor.pkl", folder / "predictor.pt")
    weights = {"a.weight": torch.randn(4, 4), "a.bias": torch.randn(4).half(), "step": torch.tensor(3)}
    content = {"state_dict": weights, "epoch": 3, "text": "x", "hparams": torch.nn.Sigmoid()}
    for name, value in (("content.pt", {"list": [1, 2.5], **weights}), ("legacy.pt", {"shared": [weights, weights]})):
        torch.save(value, folder / name, _use_new_zipfile_serialization=not name.startswith("legacy"))
    torch.save(content, folder / "weights.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old format asks for the source of every class
        torch.save(content, folder / "legacy.ckpt", _use_new_zipfile_serialization=False)
    from safetensors.torch import save_file

    save_file(weights, folder / "weights.safetensors", {"format": "pt"})
    Reference(rng.normal(size=4), np.eye(4), "digits", "0" * 64, 100).save(folder / "reference.npz")
    images = rng.integers(0, 256, (3, 6, 5), dtype=np.uint8)
    np.savez_compressed(folder / "images.npz", images=images, labels=np.arange(3))
    schedule = {
        "format": "amed-schedule-1",
        "sigmas": [80.0, 9.0, 0.002],
        "sigmas_cond": [80, 8, 0.01],
        "solver": "ipndm",
    }
    schedule |= {"solver_options": {"max_order": 3}, "afs": "data", "method": "gits", "settings": {"coeff": 1.15}}
    schedule |= {
        "network": "digits",
        "network_hash": "0" * 64,
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "evaluations": 640,
    }
    (folder / "schedule.json").write_text(json.dumps(schedule | {"seconds": 1.5, "versions": {"torch": "2"}}))
    with zipfile.ZipFile(folder / "dataset.zip", "w") as archive:
        for number, image in enumerate(images):
            with archive.open(f"00000/img{number:08d}.{'jpg' if number == 2 else 'png'}", "w") as file:
                Image.fromarray(image).save(file, "jpeg" if number == 2 else "png")
        names = [info.filename for info in archive.infolist()]
        archive.writestr("dataset.json", json.dumps({"labels": [[name, 1] for name in names]}))
    save_classifier(ConvClassifier(1, 32, 10, feature_dim=4, width=2), folder / "classifier.safetensors", seed=0)
    curves = [torch.rand(3, 1, 2, 2) for _ in range(3)]
    sigmas = torch.tensor([80.0, 1.0, 0.002], dtype=torch.float64)
    save_statistics(Statistics(sigmas, *curves, {"nodes": 3}), folder / "statistics.safetensors")
    options = AMEDOptions(dataset_name="digits", seed=0).to_dict()
    state = {"predictor": weights, "optimizer": {"state": {0: weights}}, "iteration": 3, "options": options}
    torch.save(state, folder / "training-state-000001.pt")
    (folder / "captions.csv").write_text('seed,caption\n0,"a fox, red"\n5,naïve\n7,"two\nlines"\n', encoding="utf-8")
    config = {"img_resolution": 16, "img_channels": 3, "model_type": "SongUNet", "model_channels": 8}
    described = {
        "family": "edm",
        "config": {**config, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8]},
    }
    (folder / "net.pkl.json").write_text(json.dumps(described))
    (folder / "net.pkl").write_bytes(b"")
    record = {"seeds": "0-3,7", "settings": {"solver": "euler", "subdirs": True}, "nfe": 5}
    (folder / "sampling.json").write_text(json.dumps(record))


def _pack_snapshot(source: Path, dest: Path) -> None:
    """A pickled predictor of the original code with tensors: data.pkl of a torch.save file."""
    with zipfile.ZipFile(dest, "w") as archive:
        archive.writestr("archive/data.pkl", source.read_bytes())
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")


# --------------------------------------------------------------------------------------------------
# A worker: one process that tries case after case and dies of whatever goes beyond its limits


def damaged(good: dict[str, bytes], seed: int, number: int) -> tuple[Target, bytes]:
    chance = random.Random(f"{seed}:{number}")
    target = TARGETS[number % len(TARGETS)]
    return target, mutate(good[target.file], target.kind, chance)


class Watch:
    """Notes the audit events that no loader may cause."""

    def __init__(self):
        self.seen: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event, arguments):
        if event.startswith(FORBIDDEN):
            self.seen.append(f"{event} {str(arguments)[:200]}")


def attempt(target: Target, data: bytes, folder: Path, watch: Watch) -> dict:
    """Loads a file in ``folder``, the working directory; {"result": loaded|refused|failed, ...}."""
    from torch_utils.errors import UserError

    path = folder / target.file
    path.write_bytes(data[:LARGEST])
    before, watch.seen[:] = set(os.listdir(folder)), []
    outcome = {"result": "loaded"}
    try:
        target.load(path)
    except UserError as error:
        outcome = {"result": "refused"}
        if "\n" in str(error) or len(str(error)) > 3000:
            outcome = {"result": "failed", "why": f"a message of {len(str(error))} characters: {str(error)[:200]}"}
    except BaseException as error:  # this is what is looked for
        lines = traceback.format_exception(error)[-6:]
        outcome = {
            "result": "failed",
            "why": f"{type(error).__name__}: {str(error)[:200]}",
            "trace": "".join(lines)[-1500:],
        }
    made = set(os.listdir(folder)) - before
    if made or watch.seen or Path(f"/tmp/{MARKER}").exists() or (folder.parent / MARKER).exists():
        outcome = {"result": "failed", "why": f"it had effects: {sorted(made)} {watch.seen[:3]}"}
    return outcome


def limit(cpu_seconds: int) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (spent + cpu_seconds + 1, resource.RLIM_INFINITY))


def peak_memory() -> int:
    """Peak of the resident memory of this process, in KiB.

    From /proc where there is one: ru_maxrss also counts what the parent had when it forked.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text(encoding="utf-8"))[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def work(folder: Path, seed: int, first: int, end: int, step: int) -> None:
    """Cases first, first + step, ... below end; a line of JSON when a case begins and ends."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    good = {target.file: (folder / target.file).read_bytes() for target in TARGETS}
    place = Path(tempfile.mkdtemp(prefix="case-", dir=folder))
    os.chdir(place)
    (place / "net.pkl").write_bytes(b"")
    for target in TARGETS:  # good files have to load; what that imports is watched no more
        (place / target.file).write_bytes(good[target.file])
        if target.file != "net.pkl.json":  # a description without its weights
            target.load(place / target.file)
    watch = Watch()
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        most = pages * resource.getpagesize() + int(MEMORY_GIB * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, LARGEST))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in range(first, end, step):
        target, data = damaged(good, seed, number)
        print(json.dumps({"begun": number}), flush=True)
        limit(CPU_SECONDS)
        print(json.dumps({"number": number, "file": target.file} | attempt(target, data, place, watch)), flush=True)
    peak = peak_memory()
    print(json.dumps({"peak_mib": peak // 1024}), flush=True)


# --------------------------------------------------------------------------------------------------
# The parent


def run_share(folder: Path, seed: int, first: int, end: int, step: int) -> list[dict]:
    """Outcomes of a worker's cases. A worker that dies fails its case and is replaced."""
    outcomes = []
    while first < end:
        command = [sys.executable, __file__, f"--folder={folder}", f"--seed={seed}", "--work"]
        command += [f"--first={first}", f"--count={end}", f"--workers={step}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as worker:
            begun = None
            for line in worker.stdout:
                sigma_cond = json.loads(line)
                begun = sigma_cond.get("begun", begun)
                if "begun" not in sigma_cond:
                    outcomes.append(sigma_cond)
        if worker.returncode == 0:
            break
        if begun is None:
            raise RuntimeError("a worker ended before its first case")
        target = TARGETS[begun % len(TARGETS)]
        why = (
            f"the process died (signal {-worker.returncode})" if worker.returncode < 0 else f"exit {worker.returncode}"
        )
        if outcomes and outcomes[-1].get("number") == begun:
            raise RuntimeError(f"a worker ended between two cases: {why}")
        outcomes.append({"number": begun, "file": target.file, "result": "failed", "why": why})
        first = begun + step
    return outcomes


def run(count: int, seed: int, workers: int, keep: Path | None = None) -> tuple[collections.Counter, list[dict], int]:
    """(how many files of each kind came to what, the failures, the peak of memory in MiB)."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder).resolve()
        make_files(folder)
        with ThreadPoolExecutor(workers) as pool:
            shares = list(pool.map(lambda first: run_share(folder, seed, first, count, workers), range(workers)))
        outcomes = [outcome for share in shares for outcome in share]
        failures = [outcome for outcome in outcomes if outcome.get("result") == "failed"]
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            good = {target.file: (folder / target.file).read_bytes() for target in TARGETS}
            for failure in failures:
                target, data = damaged(good, seed, failure["number"])
                (keep / f"{seed}-{failure['number']}-{target.file}").write_bytes(data)
    peak = max((outcome.get("peak_mib", 0) for outcome in outcomes), default=0)
    counts = collections.Counter((outcome["file"], outcome["result"]) for outcome in outcomes if "number" in outcome)
    return counts, failures, peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("count", 20_000), ("seed", 0), ("workers", 2), ("first", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.folder, options.seed, options.first, options.count, options.workers)
        return 0
    counts, failures, peak = run(options.count, options.seed, options.workers, options.keep)
    for target in TARGETS:
        found = {result: counts[target.file, result] for result in ("loaded", "refused", "failed")}
        print(f"{target.file:<28}" + "".join(f"{result} {number:>6}   " for result, number in found.items()))
    print(f"{sum(counts.values())} files, {len(failures)} failures, at most {peak} MiB in a process")
    for failure in failures[:40]:
        print(f"\n{failure['number']} {failure['file']}: {failure['why']}\n{failure.get('trace', '')}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
