"""AMED-Solver under a name of its own.

    import amed
    net = amed.wrap(my_network, "epsilon", noise="ddpm", shape=(3, 32))
    predictor = amed.distill(net, num_steps=5)
    images = predictor.sample(net, latents)

The packages of this code have plain names: solvers, models, training, torch_utils. Other code has
packages of these names too, above all the checkout of EDM. Every package of ours imports this one
first, which sees to it that the plain names mean ours, wherever they stand on the path. Modules
that only the other code has, such as torch_utils.persistence, are found as well.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time the packages are imported when a name is first used
    from models import build_denoiser as build_denoiser
    from models import create_model as create_model
    from models import wrap as wrap
    from solvers import SOLVERS as SOLVERS
    from solvers import get_schedule as get_schedule
    from solvers import sample as sample
    from tools.compare_models import compare as compare
    from training.checkpoint import find_predictor as find_predictor
    from training.checkpoint import load_predictor as load_predictor
    from training.checkpoint import save_predictor as save_predictor
    from training.distill import distill as distill
    from training.schedule_search import optimize_schedule as optimize_schedule

__version__ = "0.1.0"

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("torch_utils", "models", "evaluation", "solvers", "training", "sampling", "tools")
_EXPORTS = {  # name here -> module that has it
    "wrap": "models",
    "create_model": "models",
    "build_denoiser": "models",
    "sample": "solvers",
    "get_schedule": "solvers",
    "SOLVERS": "solvers",
    "distill": "training.distill",
    "load_predictor": "training.checkpoint",
    "save_predictor": "training.checkpoint",
    "find_predictor": "training.checkpoint",
    "optimize_schedule": "training.schedule_search",
    "compare": "tools.compare_models",
}
__all__ = ["__version__", *_EXPORTS, *ROOMS]


def __getattr__(name: str) -> Any:
    if name in ROOMS:
        return importlib.import_module(name)
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'amed' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds our packages under their plain names, and under amed.NAME as the same modules."""

    def find_spec(self, name, path=None, target=None):
        room = name.removeprefix("amed.").partition(".")[0]
        if room not in ROOMS:
            return None
        if name.startswith("amed."):
            return importlib.machinery.ModuleSpec(name, self)
        if name != room:
            return None  # a module of a package, which its __path__ finds
        folder = ROOT / room
        places = [str(folder), *_others(room)]
        return importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=places)

    def create_module(self, spec):
        module = importlib.import_module(spec.name.removeprefix("amed."))
        self._spec = module.__spec__  # importlib is about to replace it
        return module

    def exec_module(self, module):
        module.__spec__ = self._spec


def _others(room: str) -> list[str]:
    """Folders of other packages of this name on the path."""
    folders = (Path(entry or ".").absolute() / room for entry in sys.path)
    return [str(folder) for folder in folders if folder.is_dir() and folder.resolve() != ROOT / room]


def _refuse_foreign() -> None:
    for room in ROOMS:
        module = sys.modules.get(room)
        places = [] if module is None else [Path(place).resolve() for place in getattr(module, "__path__", ())]
        if module is not None and ROOT / room not in places:
            where = next(iter(places), getattr(module, "__file__", "elsewhere"))
            raise ImportError(f"'{room}' was imported from {where}, so that of amed cannot be: import amed before it")


_refuse_foreign()
sys.meta_path.insert(0, _Finder())
