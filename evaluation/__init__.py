"""Measuring images: Frechet distance, CLIP score, precision and recall, and the networks behind them."""
