"""The console commands: ``amed-sample`` is ``python sample.py``, and so on."""

import importlib.util
from pathlib import Path

from amed import ROOT

SCRIPTS = ("sample", "train", "compare", "fid", "clip_score", "optimize_schedule")
MODULES = ("doctor", "demo", "dataset_tool", "train_denoiser")


def script(name: str) -> Path:
    """The file of a command line: at the root of a checkout, or beside this one if installed."""
    checkout = ROOT / f"{name}.py"
    return checkout if checkout.is_file() else Path(__file__).with_name("scripts") / f"{name}.py"


def _run(name: str):
    program = f"amed-{name.replace('_', '-')}"

    def main() -> None:
        from torch_utils.usage import check_usage

        place = name if name in SCRIPTS else f"tools.{name}"
        check_usage(place, program)
        if name in SCRIPTS:
            spec = importlib.util.spec_from_file_location(name, script(name))
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        module.main(prog_name=program)

    return main


def __getattr__(name: str):
    """The function behind the entry point ``amed.commands:NAME``."""
    if name in (*SCRIPTS, *MODULES):
        return _run(name)
    raise AttributeError(f"unknown command '{name}'")
