"""Metrics of images: FID, CLIP score, precision and recall, and the networks they need."""

import amed  # noqa: F401 (its docstring says why)
