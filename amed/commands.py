"""The console commands: ``amed-sample`` is ``python sample.py``, and so on."""

import runpy
import sys
from pathlib import Path

from amed import ROOT

SCRIPTS = ("sample", "train", "compare", "fid", "clip_score", "optimize_schedule")
MODULES = ("doctor", "demo", "dataset_tool", "train_denoiser")


def script(name: str) -> Path:
    """The file of a command line: at the root of a checkout, or beside this one if installed."""
    checkout = ROOT / f"{name}.py"
    return checkout if checkout.is_file() else Path(__file__).with_name("scripts") / f"{name}.py"


def _run(name: str):
    def main() -> None:
        if name in SCRIPTS:
            runpy.run_path(str(script(name)), run_name="__main__")
        else:
            runpy.run_module(f"tools.{name}", run_name="__main__", alter_sys=True)

    return main


def __getattr__(name: str):
    """The function behind the entry point ``amed.commands:NAME``."""
    if name in (*SCRIPTS, *MODULES):
        return _run(name)
    raise AttributeError(f"there is no command '{name}'")


if __name__ == "__main__":  # python -m amed.commands sample --help
    sys.argv.pop(0)
    _run(Path(sys.argv[0]).name)()
