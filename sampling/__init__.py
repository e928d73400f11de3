"""Sampling: settings, images from seeds, the output folder, one run."""
