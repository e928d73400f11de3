"""Checks the types of settings from files, which may hold values of any kind and size."""

import types
import typing
from dataclasses import MISSING, fields

from torch_utils.errors import UserError, brief

MOST_STEPS = 1000  # time steps, or calls of the network in a trajectory; few-step solvers have about ten


def fits(value, kind) -> bool:
    """Whether a value is of a kind: a type, a union of types, or a list of one.

    An int is also a float. True and False are not numbers, nor are NaN, infinity and numbers beyond
    float64.
    """
    if isinstance(kind, types.UnionType):
        return any(fits(value, part) for part in kind.__args__)
    if typing.get_origin(kind) is list:
        return isinstance(value, list | tuple) and all(fits(part, kind.__args__[0]) for part in value)
    if kind in (int, float):
        number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        return number and -1e300 < value < 1e300
    return isinstance(value, kind)


def check_kinds(config: dict, kinds: dict) -> None:
    """Raises UserError with the name of a setting whose value is not of its kind in ``kinds``."""
    for name, value in config.items():
        if not fits(value, kinds.get(name, object)):
            wanted = getattr(kinds[name], "__name__", str(kinds[name]))
            raise UserError(f"{name}={brief(value)} is of the wrong kind: it must be {wanted}")


def kinds_of(cls) -> dict:
    """The types of a dataclass's fields by name, for ``check_kinds``."""
    return {field.name: field.type for field in fields(cls)}


def defaults_of(cls) -> dict:
    """The defaults of a dataclass's fields by name; lists are new."""
    return {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(cls)}


def check_steps(config: dict, *names: str) -> None:
    """Raises UserError if one of these settings, a number or a list, has too many steps."""
    for name in names:
        value = config[name]
        count = len(value) if isinstance(value, list | tuple) else value or 0
        if count > MOST_STEPS:
            raise UserError(f"{name}: {count} is too much, must be at most {MOST_STEPS}")
