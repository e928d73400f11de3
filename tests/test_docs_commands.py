"""Commands in the documents: every one has flags that exist, those of the short pages are run."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import amed
from tools import make_docs
from torch_utils import usage
from torch_utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
# adding_a_solver.md has a test of its own: its commands need the solver that it adds.
DOCUMENTS = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").glob("*.md")) if p.stem != "adding_a_solver")]
CONSOLE = {f"amed-{name.replace('_', '-')}": name for name in ("sample", "train", "compare", "fid", "clip_score")}
_RUNS = re.compile(r"(?:torchrun(?:\s+--\S+)*|\S*python\d?)\s+(?:-m\s+)?(\S+)(.*)", re.DOTALL)


def blocks(path: Path) -> list[tuple[str, str]]:
    """(language, text) of every block of code."""
    return re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(path: Path) -> list[tuple[str, list[str]]]:
    """(name in commands.json, arguments) of every command of ours."""
    found = []
    for language, text in blocks(path):
        if language not in ("", "sh", "bash"):
            continue
        for line in text.replace("\\\n", " ").splitlines():
            match = _RUNS.match(line.strip())
            name = match[1].removesuffix(".py") if match else CONSOLE.get(line.partition(" ")[0])
            rest = match[2] if match else line.partition(" ")[2]
            if name in make_docs.SCRIPTS.values():
                found.append((name, shlex.split(rest.partition(" #")[0].partition(";")[0])))
    return found


def check(name: str, arguments: list[str]) -> None:
    described = json.loads(usage.FILE.read_text(encoding="utf-8"))[name]
    try:
        usage.build(described).main([word for word in arguments if word != "..."], name, standalone_mode=False)
    except UserError as error:
        if "..." not in arguments or "Missing option" not in str(error):
            raise


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_of_every_command_exist(path):
    for name, arguments in commands(path):
        check(name, arguments)


def test_commands_are_found():
    found = {str(path.relative_to(ROOT)): len(commands(path)) for path in DOCUMENTS}
    assert found["README.md"] >= 5 and found["docs/own_model.md"] == 8
    with pytest.raises(UserError, match="No such option"):
        check("sample", ["--seed=1"])


def test_commands_of_the_console_are_entry_points():
    text = (ROOT / "docs" / "installing.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(amed-[\w-]+)`", text))
    entries = set(re.findall(r"^(amed-[\w-]+) = ", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M))
    assert named == entries
    assert all(hasattr(amed, name) for name in re.findall(r"`(\w+)`", text.partition("`import amed`")[2])[:7])


# What makes the commands of docs/own_model.md small.
SMALL = {
    "sample": ["--seeds=0-3", "--device=cpu"],
    "train": ["--total_kimg=0.016", "--batch=4", "--pairs=8", "--val_pairs=4", "--init=preset", "--device=cpu"],
    "compare": ["--num=4", "--reference_steps=3", "--device=cpu"],
    "optimize_schedule": ["--num_steps_tea=12", "--num_warmup=4", "--device=cpu"],
    "tools.dataset_tool": [],
    "tools.train_denoiser": ["--minutes=0", "--total_kimg=0.008", "--batch=4", "--model_channels=32", "--device=cpu"]
    + ["--channel_mult=1", "--num_blocks=1", "--attn=", "--grid=False"],
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    return tmp_path


def run(name: str, arguments: list[str]) -> None:
    module = __import__(name, fromlist=["main"])
    done = CliRunner().invoke(module.main, arguments, standalone_mode=False)
    if done.exception is not None:
        raise done.exception


def test_own_model(here):
    """Everything that docs/own_model.md prints is run in its order, on a small scale."""
    page = ROOT / "docs" / "own_model.md"
    first, *codes = [text for language, text in blocks(page) if language == "python"]
    (here / "my_net.py").write_text(first)
    (here / "photos" / "cat").mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (40, 48), (60 * number, 90, 20)).save(here / "photos" / "cat" / f"{number}.jpg")
    small = {"distill(net,": "distill(net, total_kimg=0.016, batch=4, pairs=8, val_pairs=4, init='preset',"}
    small |= {"compare(net,": "compare(net, num=4, reference_steps=3,"}
    small |= {"optimize_schedule(net,": "optimize_schedule(net, num_steps_tea=12, num_warmup=4,"}
    for code in codes:
        for old, new in small.items():
            code = code.replace(old, new)
        names: dict = {}
        exec(compile(code, str(page), "exec"), names)
    assert names["images"].shape == (16, 3, 32, 32) and len(names["rows"]) == 5
    assert len(names["schedule"].sigmas) == 6
    for name, arguments in commands(page):
        run(name, [*arguments, *SMALL[name]])
    assert (here / "samples" / "custom" / "ipndm_nfe8" / "grid.png").is_file()
    assert list((here / "runs" / "photos").glob("network-snapshot-*.safetensors"))
