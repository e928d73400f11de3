"""Searches for noise levels that need no gradients."""
