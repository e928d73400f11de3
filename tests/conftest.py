"""What all tests share."""

import functools
import inspect

import pytest
from click.testing import CliRunner, Result

from solvers import SOLVERS

if "mix_stderr" in inspect.signature(CliRunner).parameters:  # click 8.1: stderr apart and in output, as in newer ones
    CliRunner.__init__ = functools.partialmethod(CliRunner.__init__, mix_stderr=False)
    Result.output = property(lambda self: self.stdout + self.stderr)


@pytest.fixture(autouse=True)
def registered_solvers():
    """Tests may register and remove solvers: afterwards the table and its order are as before."""
    before = dict(SOLVERS)
    yield
    SOLVERS.clear()
    SOLVERS.update(before)
