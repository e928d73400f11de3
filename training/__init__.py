"""Training of learned solvers: the AMED predictor and the span solver."""

import amed  # noqa: F401 (its docstring says why)
