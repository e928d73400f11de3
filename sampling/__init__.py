"""Sampling: settings, images from seeds, the output folder, one run."""

import amed  # noqa: F401 (its docstring says why)
