"""Schedules, step rules and the sampling loop."""

from solvers.loop import SampleInfo, Solver, State, resolve_sigmas, sample
from solvers.rules import SOLVERS, Rule, make_rule
from solvers.schedules import SCHEDULES, check_sigmas, get_schedule, refine

__all__ = [
    "SCHEDULES",
    "SOLVERS",
    "Rule",
    "SampleInfo",
    "Solver",
    "State",
    "check_sigmas",
    "get_schedule",
    "make_rule",
    "refine",
    "resolve_sigmas",
    "sample",
]
