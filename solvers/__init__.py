"""Schedules, step rules and the sampling loop. Every module of this package is imported, so that a rule registers itself."""

import importlib
import pkgutil

from solvers.sampler import SampleInfo, Sampler, State, integrate, resolve_sigmas, sample
from solvers.schedules import SCHEDULES, check_sigmas, get_schedule, refine
from solvers.solver import SOLVERS, Option, Solver, make_solver

__all__ = [
    "SCHEDULES",
    "SOLVERS",
    "Option",
    "Solver",
    "SampleInfo",
    "Sampler",
    "State",
    "check_sigmas",
    "get_schedule",
    "integrate",
    "make_solver",
    "refine",
    "resolve_sigmas",
    "sample",
]

for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")
