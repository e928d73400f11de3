"""Solvers, schedules and the sampling loop. Importing a solver's file registers it: add it here."""

import amed
import solvers.deis
import solvers.dpm_solver_v3
import solvers.edm
import solvers.evodiff
import solvers.ipndm_v
import solvers.pfdiff
import solvers.sde
import solvers.span
import solvers.unipc
from solvers.recommended import recommended
from solvers.sampler import SampleInfo, Sampler, State, integrate, resolve_sigmas, sample
from solvers.schedules import SCHEDULES, check_sigmas, get_schedule, refine
from solvers.solver import SOLVERS, Option, Point, Solver, make_solver

__all__ = [
    "SCHEDULES",
    "SOLVERS",
    "Option",
    "Point",
    "Solver",
    "SampleInfo",
    "Sampler",
    "State",
    "check_sigmas",
    "get_schedule",
    "integrate",
    "make_solver",
    "recommended",
    "refine",
    "resolve_sigmas",
    "sample",
]
