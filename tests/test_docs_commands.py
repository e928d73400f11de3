"""Every command printed in README.md and docs/ is run, on a small scale, or listed with a reason.

A page's commands are run in their order, in a folder with small stand-ins for the files that they
expect (small_world.py). SMALL and SUBSTITUTES shrink them. test_adding_a_solver.py does the same
for that page, whose commands need the solver that it adds.
"""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import small_world
import torch
from click.testing import CliRunner
from test_clip_score import write_clip
from torch.distributed.run import get_args_parser

import amed
from tools import make_docs, report
from torch_utils import usage
from torch_utils.errors import UserError
from training import checkpoint

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").glob("*.md")) if p.stem != "adding_a_solver")]
CONSOLE = {f"amed-{name.replace('_', '-')}": name for name in ("sample", "train", "compare", "fid", "clip_score")}
LISTED = set(make_docs.SCRIPTS.values())

# Beginnings of commands that are not run here, and why.
NOT_RUN = {
    "git clone": "needs the network",
    "pip install": "needs the network; test_installing.py builds and uses the wheel",
    "./launch.sh": "installs an environment; test_launch runs it with a stand-in for Python",
    "CPU=1 ./launch.sh": "installs an environment",
    "hf auth login": "needs an account",
    "head=$(scontrol": "needs SLURM",
    "pytest tests/test_faults.py": "is a part of this suite",
    "python tests/fuzz_loaders.py": "takes minutes; test_fuzz.py runs it with fewer files",
    "python -m benchmarks.scaling": "takes minutes and several processes",
    "python -m benchmarks.learned_solvers": "takes hours; test_learned_solvers.py runs its parts",
    "python -m benchmarks.demo_settings": "takes hours",
    "python -m benchmarks.score_agreement": "takes minutes",
    "python -m benchmarks.make_predictors": "takes an hour",
    "python -m benchmarks.kernels": "needs a GPU",
    "python -m benchmarks.recommend": "rewrites files of the repository; test_recommended.py compares them",
    "python -m benchmarks.report_shipped": "rewrites files of the repository; test_docs.py compares them",
    "python -m benchmarks.report_learned_solvers": "rewrites files of the repository; test_docs.py compares them",
    "python -m tools.demo": "takes minutes; test_demo.py runs its parts",
    "python -m benchmarks.sfd": "takes hours; test_sfd.py runs its parts",
    "python -m benchmarks.path_search": "takes minutes",
    "tensorboard --logdir": "is a program of its own, which serves a page",
    "python -m tools.draw_pages": "takes minutes and diffusers; it draws figures of docs/",
}

# What makes the commands small.
SMALL = {
    "sample": ["--seeds=0-1", "--device=cpu"],
    "train": ["--total_kimg=0.008", "--batch=4", "--device=cpu"],
    "compare": ["--num=6", "--groups=2", "--num_reference=4", "--reference_steps=3", "--batch=6", "--device=cpu"],
    "optimize_schedule": ["--num_steps_tea=12", "--num_warmup=4", "--device=cpu"],
    "fid calc": ["--device=cpu"],
    "fid ref": ["--device=cpu"],
    "clip_score calc": ["--model=clip", "--device=cpu"],
    "tools.share": ["--images=1", "--device=cpu"],
    "tools.model_statistics": [
        "--nodes=3",
        "--samples=2",
        "--batch=2",
        "--dest=statistics.safetensors",
        "--device=cpu",
    ],
    "tools.make_docs": ["--check"],
    "tools.draw_architecture": ["--dest=architecture.png"],
    "tools.train_classifier": ["--epochs=1", "--batch=6", "--width=4", "--device=cpu"],
    "tools.train_denoiser": ["--minutes=0", "--total_kimg=0.008", "--batch=4", "--model_channels=32", "--device=cpu"]
    + ["--channel_mult=1", "--num_blocks=1", "--attn=", "--grid=False", "--compile=False"],
    "benchmarks.frechet_speed": ["--dim=16", "--count=64"],
}
SPAN = ["--num_steps_tea=8", "--pairs=8", "--val_pairs=4", "--init=preset"]
TEXT = ["--tokenizer_path=tokenizer", "--prompt=a b"]

# Words of the documents that stand for something of the reader's, or are downloaded.
SUBSTITUTES = {
    "--dataset_name=NAME": "--dataset_name=digits",
    "--model_path=google/ddpm-celebahq-256": "--model_path=ddpm",
    "--model_path=FOLDER_OR_HUB_ID": "--model_path=ddpm",
    "--source=...": "--source=photos",
}


@dataclass(frozen=True)
class Shown:
    """A command of a document.

    text: as it is printed, in one line.
    name: of its module, with the subcommand; None: it is not ours.
    arguments: what follows the name.
    torchrun: the arguments of torchrun, if it starts the command.
    mention: it only names a command with some of its flags.
    """

    text: str
    name: str | None = None
    arguments: tuple[str, ...] = ()
    torchrun: tuple[str, ...] = ()
    mention: bool = False

    @property
    def reason(self) -> str | None:
        """Why it is not run."""
        return next((reason for start, reason in NOT_RUN.items() if self.text.startswith(start)), None)


_CODE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```|(?<!`)`([^`]+)`(?!`)", re.MULTILINE | re.DOTALL)
_OURS = re.compile(r"(?:srun )?(?:torchrun((?: --\S+)*)|\S*python\d?) (?:-m )?(\S+)(.*)")
_STARTS = re.compile(r"(?:srun |CPU=1 )?(?:torchrun|python|pip|git|hf|pytest|\./launch\.sh|[\w/]+\.py|amed-[\w-]+) ")


def blocks(path: Path) -> list[tuple[str, str]]:
    """(language, text) of every block of code."""
    return [found[:2] for found in _CODE.findall(path.read_text(encoding="utf-8")) if not found[2]]


def understand(line: str, inline: bool) -> Shown:
    """A line of a block, or code within a sentence, as a command."""
    program, _, rest = line.partition(" ")
    match, torchrun = _OURS.match(f"{line} "), ""
    if match:
        torchrun, program, rest = match[1] or "", *match.groups()[1:]
    name = CONSOLE.get(program, program.removesuffix(".py").replace("/", "."))
    arguments = shlex.split(rest.partition(" #")[0].partition(";")[0])
    known = name in LISTED or (match and line.startswith("python -m "))
    if not known:
        return Shown(line)
    own = ("--dataset_name=", "--predictor_path=") if match else ("--dataset_name=",)
    of_network = name in ("sample", "train", "compare", "optimize_schedule") or not match
    of_network = of_network and not any(word.startswith(own) for word in arguments)
    mention = inline and (of_network or name in LISTED and lacks_options(name, arguments))
    if name in ("fid", "clip_score", "models.zoo") and arguments and not arguments[0].startswith("-"):
        name, *arguments = f"{name} {arguments[0]}", *arguments[1:]
    return Shown(line, name, tuple(arguments), tuple(shlex.split(torchrun)), mention)


def commands(path: Path) -> list[Shown]:
    """The commands of a document in their order."""
    found = []
    for language, text, inline in _CODE.findall(path.read_text(encoding="utf-8")):
        lines = [" ".join(inline.split())] if inline else []
        if language in ("", "sh", "bash") and not text.startswith("@"):
            lines += [" ".join(line.split()) for line in text.replace("\\\n", " ").splitlines()]
        for line in lines:
            plain = re.sub(r"(^| )#.*", "", line).strip()
            if plain and (not inline or _STARTS.match(plain)):
                found.append(understand(plain, bool(inline)))
    return found


def described(name: str) -> dict:
    return json.loads(usage.FILE.read_text(encoding="utf-8"))[name]


def check(name: str, arguments: list[str]) -> None:
    """Raises UserError for flags that a command line does not have. "...": some are left out."""
    try:
        known = [word for word in arguments if word != "..."]
        usage.build(described(name)).main(known, name, standalone_mode=False)
    except UserError as error:
        if "..." not in arguments or "Missing option" not in str(error):
            raise


def check_names(name: str, arguments: Sequence[str]) -> None:
    """The same for flags that are named without their values, of any subcommand."""
    parts = described(name).get("commands", {"": described(name)}).values()
    flags = {flag for part in parts for option in part["options"] for flag in option["names"]}
    unknown = [word for word in arguments if word.startswith("--") and word.partition("=")[0] not in flags]
    if unknown:
        raise UserError(f"No such option {unknown[0]} of {name}")


def lacks_options(name: str, arguments: list[str]) -> bool:
    """Whether a command only names a program with some flags, since it could not run like this."""
    if "commands" in described(name) and (not arguments or arguments[0].startswith("-")):
        return True
    try:
        check(name, arguments)
    except UserError as error:
        return "Missing" in str(error) or "needs a value" in str(error)
    return name in ("sample", "train", "compare") and not arguments


def run(name: str, arguments: list[str]) -> None:
    module, _, part = name.partition(" ")
    main = importlib.import_module(module).main
    with torch.enable_grad():  # what a program changes for itself does not reach the next one
        done = CliRunner().invoke(main, [*part.split(), *arguments], standalone_mode=False)
    if done.exception is not None:
        raise AssertionError(f"{name} {shlex.join(arguments)}: {done.exception}\n{done.output}") from done.exception


def shrink(shown: Shown) -> list[str]:
    """Arguments with which a command takes a moment, and finds its files here."""
    words = [SUBSTITUTES.get(word, word) for word in shown.arguments if word != "..."]
    if shown.name == "train":  # would take its time; test_span_search.py runs it
        words = [word for word in words if not word.startswith("--minutes=")]
    small, text = list(SMALL.get(shown.name, ())), shlex.join(words)
    if shown.name == "train":
        small += SPAN if "--sampler_stu=span" in text else []
        small += [] if re.search("--(sampler_stu|objective)=", text) else ["--sampler_stu=amed"]
        small += ["--num_steps=3"] if not re.search("--(nfe|schedule)=", text + shlex.join(small)) else []
    if shown.name == "sample" and not any(word in text for word in ("--dataset_name", "--predictor_path", "--list")):
        small.append("--predictor_path=0")
    if shown.name == "sample" and re.search("--(metrics|outdir)=", text):  # some metrics compare five neighbours
        small.append("--seeds=0-11")
    if "--dataset_name=ms_coco" in text:
        small += TEXT
    for index, word in enumerate(words):  # the result of a shorter training has another number
        if re.match(r"--model_path=exps/\d+-.*-\d+\.safetensors$", word):
            (found,) = Path("exps").glob(re.sub(r".*exps/(\d+)-.*/(\w+)-\d+(\.\w+)$", r"\1-*/\2-*\3", word))
            words[index] = f"--model_path={found}"
    if shown.name == "fid calc" and "--images=..." in words:  # "after each": the folder of the command before
        newest = max(Path("samples").glob("*/*/sampling.json"), key=lambda path: path.stat().st_mtime_ns)
        words[words.index("--images=...")] = f"--images={newest.parent}"
    if shown.name.startswith("fid") and ("--metrics" in text or shown.name == "fid ref") and "--detector" not in text:
        small.append("--detector=cifar10-small")
    if "--dataset_name=imagenet256" in text:  # the small network has ten classes
        small.append("--class=7")
    if "--model_path=my_net:make_net" in words and shown.name == "compare":
        small = SMALL["compare"][:1] + SMALL["compare"][3:]
    return [*words, *small]


def run_page(path: Path) -> None:
    for shown in commands(path):
        if shown.torchrun:  # of which one process is run here; test_distributed.py runs several
            get_args_parser().parse_args([*shown.torchrun, "script.py"])
        if shown.mention:
            check_names(shown.name.split()[0], shown.arguments)
        elif not shown.mention and shown.name is not None and shown.reason is None:
            run(shown.name, shrink(shown))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    small_world.write_inputs(folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    return tmp_path


def place_inputs(inputs: Path, here: Path, page: str) -> None:
    for entry in inputs.iterdir():
        if entry.name in ("samples", "exps"):  # the commands add to these
            if entry.name == "samples" or "train.py" not in page.partition("--predictor_path=0")[0]:
                shutil.copytree(entry, here / entry.name)
        elif f"--outdir={entry.name} " not in page:  # else the commands make it
            (here / entry.name).symlink_to(entry)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_is_run(path, inputs, here, monkeypatch):
    page = path.read_text(encoding="utf-8")
    todo = [shown for shown in commands(path) if shown.name is not None and shown.reason is None]
    if path.stem == "own_model" or not todo:
        return  # it has a test of its own
    place_inputs(inputs, here, page)
    if "clip_score" in page:
        (here / "clip").mkdir()
        write_clip(here / "clip")
    if "--model_path=google/" in page or "FOLDER_OR_HUB_ID" in page:
        pytest.importorskip("diffusers")
        from diffusers_pipelines import pipeline_folder

        (here / "ddpm").symlink_to(pipeline_folder("ddpm"))
    monkeypatch.setattr(checkpoint, "fetch", lambda address, names: Path("fast-digits/predictor.safetensors"))
    monkeypatch.setattr(report, "plots_html", lambda rows: "")  # they take seconds; test_compare.py draws them
    run_page(path)


def test_what_is_not_run_is_listed():
    every = [shown for path in DOCUMENTS for shown in commands(path)]
    unknown = {shown.text for shown in every if shown.name is None and shown.reason is None}
    assert unknown == set(), "make the test run these, or add them to NOT_RUN with a reason"
    gone = [start for start in NOT_RUN if not any(shown.text.startswith(start) for shown in every)]
    assert gone == [], "these are in no document: remove them from NOT_RUN"
    for shown in every:  # the flags of what takes too long exist, too
        if shown.name is not None and shown.reason is not None and "..." not in shown.text:
            importlib.import_module(shown.name).main.make_context(shown.name, [*shown.arguments])


def test_commands_are_found():
    found = {str(path.relative_to(ROOT)): [shown.text for shown in commands(path)] for path in DOCUMENTS}
    assert len(found["README.md"]) > 15 and sum(map(len, found.values())) > 100
    assert "python train.py --dataset_name=cifar10 --sampler_stu=amed --nfe=5 --batch=128" in found["README.md"]
    assert "sample.py --dataset_name=ffhq --nfe=5" in found["docs/networks.md"]
    (several,) = [shown for shown in commands(ROOT / "docs" / "scaling.md") if shown.text.startswith("srun")]
    assert several.name == "sample" and several.torchrun[0] == "--nnodes=$SLURM_NNODES"
    assert Shown("python fuss.py").reason is None and Shown("pip install x").reason is not None
    with pytest.raises(UserError, match="No such option"):
        check("sample", ["--seed=1"])


# Writes down its arguments, and what train.py would leave.
STAND_IN = """#!/bin/sh
echo "$*" >> "$LOG"
for word in "$@"; do case $word in
    --outdir=*) folder=${word#--outdir=} ;;
    --total_kimg=*) kimg=${word#--total_kimg=} ;;
esac; done
if [ "$1" = train.py ]; then
    mkdir -p "$folder/00000-x"
    touch "$folder/00000-x/predictor-$(printf %06d "$kimg").safetensors"
fi
"""


def test_launch(tmp_path):
    """The recipes of launch.sh call commands of ours with flags that exist."""
    for name in ("launch.sh", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    program, log = tmp_path / "env" / "bin" / "python", tmp_path / "log"
    program.parent.mkdir(parents=True)
    program.write_text(STAND_IN)
    program.chmod(0o755)
    stamp = subprocess.run(
        "cat pyproject.toml requirements.lock | cksum", shell=True, cwd=tmp_path, capture_output=True
    )
    (tmp_path / "env" / ".installed").write_bytes(stamp.stdout)
    environment = os.environ | {"VENV": "env", "LOG": str(log), "NPROC": "1"}

    def launch(*arguments: str) -> list[list[str]]:
        log.unlink(missing_ok=True)
        subprocess.run(
            ["bash", "launch.sh", *arguments], cwd=tmp_path, env=environment, check=True, capture_output=True
        )
        return [line.split() for line in log.read_text().splitlines()]

    assert launch("demo", "--full", "--images=9") == [["-m", "tools.demo", "--full", "--images=9"]]
    recipes = re.findall(r"^([a-z]+\d*-[a-z]+)\) recipe", (ROOT / "launch.sh").read_text(), re.MULTILINE)
    assert len(recipes) == 9
    for recipe in recipes:
        done = launch(recipe)
        assert [words[0] for words in done] == ["train.py", "sample.py", "fid.py"]
        for program_name, *arguments in done:
            check(program_name.removesuffix(".py"), arguments)
    for shown in (shown for path in DOCUMENTS for shown in commands(path) if shown.text.startswith("./launch.sh ")):
        assert shown.text.split()[1] in (*recipes, "demo", "install"), shown.text


def test_commands_of_the_console_are_entry_points():
    text = (ROOT / "docs" / "installing.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(amed-[\w-]+)`", text))
    entries = set(re.findall(r"^(amed-[\w-]+) = ", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M))
    assert named == entries
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(project["optional-dependencies"]) == set(re.findall(r"^\| `(\w+)` \|", text, re.M))
    assert all(hasattr(amed, name) for name in re.findall(r"`(\w+)`", text.partition("`import amed`")[2])[:7])


def test_own_model(here):
    """Everything that docs/own_model.md prints is run in its order, on a small scale."""
    page = ROOT / "docs" / "own_model.md"
    first, *codes = [text for language, text in blocks(page) if language == "python"]
    (here / "my_net.py").write_text(first)
    small_world.write_images(here / "photos" / "cat", 4, (40, 48, 3), "jpg")
    small = {"distill(net,": "distill(net, total_kimg=0.016, batch=4, pairs=8, val_pairs=4, init='preset',"}
    small |= {"minutes=10, ": ""}
    small |= {"compare(net,": "compare(net, num=4, reference_steps=3,"}
    small |= {"optimize_schedule(net,": "optimize_schedule(net, num_steps_tea=12, num_warmup=4,"}
    for code in codes:
        for old, new in small.items():
            code = code.replace(old, new)
        names: dict = {}
        exec(compile(code, str(page), "exec"), names)
    assert names["images"].shape == (16, 3, 32, 32) and len(names["rows"]) == 5
    assert len(names["schedule"].sigmas) == 6
    run_page(page)
    assert (here / "samples" / "custom" / "ipndm_nfe8" / "grid.png").is_file()
    assert list((here / "runs" / "photos").glob("network-snapshot-*.safetensors"))


@pytest.mark.parametrize("name", ["README.md", "docs/sampling.md", "docs/inverse_problems.md", "docs/installing.md"])
def test_python_of_the_documents(name, here):
    path = ROOT / name
    codes = [text for language, text in blocks(path) if language == "python"]
    assert codes
    for code in codes:
        names: dict = {}
        exec(compile(code, str(path), "exec"), names)
        for value in (names.get("images"), names.get("restored")):
            assert value is None or (value.ndim == 4 and value.isfinite().all())
