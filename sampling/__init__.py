"""Sampling: settings, images from seeds, the folder they lie in, one run."""
