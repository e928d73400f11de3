"""Sampling: settings, images from seeds, the folder they lie in, one run."""

import amed  # noqa: F401 (its docstring says why)
