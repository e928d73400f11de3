"""Measuring images: Frechet distance, CLIP score, precision and recall, and the networks behind them."""

import amed  # noqa: F401 (its docstring says why)
