"""Measurements of the documents; each is run with ``python -m benchmarks.NAME``."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
