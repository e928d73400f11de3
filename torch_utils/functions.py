"""Functions of the user's own code, given as "module:function" on a command line."""

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

from torch_utils.errors import UserError


def names_function(text: str) -> bool:
    """Whether a text has the form "package.module:function", unlike addresses and Windows files.

    So has "folder/module.py:function", which ``find_function`` explains.
    """
    return re.fullmatch(r"[A-Za-z_]\w+(\.\w+)*:[A-Za-z_]\w*|[^:]+\.py:[A-Za-z_]\w*", text) is not None


def find_function(text: str, flag: str, choices: str) -> tuple[Callable, str | None]:
    """The function at "module:function", and the file of its module (None if it is built in).

    text: "module:function", written by the user. Importing runs the code, so never pass a text from
        a file. The module may be in the current folder.
    flag: --flag, for messages.
    choices: what the user can write instead.

    Raises UserError if there is no such function.
    """
    module_name, _, name = text.partition(":")
    if not module_name or not name.isidentifier():
        raise UserError(f"{flag}={text}: choose {choices}")
    if module_name.endswith(".py"):
        raise UserError(f"{flag}={text}: write the module, not its file: {_of_module(Path(module_name), flag, name)}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{flag}={text}: cannot import the module '{module_name}' ({error}); choose {choices}"
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{flag}={text}: the module '{module_name}' has no function '{name}'; choose {choices}")
    return function, getattr(module, "__file__", None)


def _of_module(file: Path, flag: str, name: str) -> str:
    """What to write instead of "file.py:name", and where, if not in the current folder."""
    try:
        parts = file.resolve().relative_to(Path.cwd().resolve()).with_suffix("").parts
    except ValueError:
        parts = ()
    if parts and all(part.isidentifier() for part in parts):
        return f"{flag}={'.'.join(parts)}:{name}"
    return f"{flag}={file.stem}:{name}, in the folder {file.parent}"
