"""Imports between the rooms of the code run one way, without circles; solvers import fast."""

import ast
import subprocess
import sys
import warnings
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from torch_utils.moved import MOVED

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (  # a room may import from those below it, and from itself
    ("torch_utils",),
    ("models",),
    ("evaluation", "solvers"),
    ("training",),
    ("sampling",),
    ("tools",),
)
LEVELS = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for room in LEVELS
    for path in sorted((ROOT / room).rglob("*.py"))
}


def imports(module: str) -> set[tuple[str, bool]]:
    """(module of ours, whether importing this file imports it) for every import statement."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    at_once = {id(node) for node in tree.body}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [name if name in MODULES else node.module for name in names]
        elif isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            continue
        found |= {(target, id(node) in at_once) for target in targets if target.split(".")[0] in LEVELS}
    return found


@pytest.mark.parametrize("module", MODULES)
def test_arrows_run_one_way(module):
    room = module.split(".")[0]
    for target, _ in imports(module):
        other = target.split(".")[0]
        assert other == room or LEVELS[other] < LEVELS[room], f"{module} imports {target}"


def test_there_are_no_circles():
    graph = {module: {target for target, at_once in imports(module) if at_once} - {module} for module in MODULES}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_solvers_are_light_to_import():
    code = "import sys, solvers; print([name for name in ('click', 'requests', 'PIL', 'diffusers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("old", MOVED)
def test_former_names_of_modules_work(old):
    assert old not in MODULES and MOVED[old] in MODULES
    sys.modules.pop(old, None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        module = __import__(old, fromlist=["x"])
    assert module is sys.modules[MOVED[old]] and module.__spec__.name == MOVED[old] == module.__name__
    assert [str(entry.message) for entry in said if "is now" in str(entry.message)] == [
        f"the module {old} is now {MOVED[old]}; import it from there"
    ]


def test_a_former_name_can_be_run():
    command = [sys.executable, "-m", "torch_utils.doctor", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Usage" in done.stdout
