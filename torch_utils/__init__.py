"""Plumbing that knows nothing about diffusion: processes, seeds, files, safe loading, images."""
