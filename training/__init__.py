"""The AMED predictor and its distillation."""

import amed  # noqa: F401 (its docstring says why)
