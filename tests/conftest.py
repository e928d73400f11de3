"""What all tests share."""

import pytest

from solvers import SOLVERS


@pytest.fixture(autouse=True)
def registered_solvers():
    """Tests may register and remove solvers: the table, its order included, is afterwards what it was."""
    before = dict(SOLVERS)
    yield
    SOLVERS.clear()
    SOLVERS.update(before)
