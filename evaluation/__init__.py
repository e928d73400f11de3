"""Metrics of images: FID, CLIP score, precision and recall, and the networks they need."""
