"""Programs beside the command lines: doctor, demo, data sets, training of small networks."""

import amed  # noqa: F401 (its docstring says why)
