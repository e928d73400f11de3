<<<<<<< HEAD
"""Training of learned solvers: the AMED predictor and the span solver."""
=======
"""The AMED predictor and its distillation."""

import amed  # noqa: F401 (its docstring says why)
>>>>>>> main
