"""Recommended settings of each network: ``models/recommended/*.json``."""

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "models" / "recommended"
NETWORKS = ("digits", "cifar10-small")
KINDS = ("amed", "plugin", "span")


def training_recipe(dataset_name: str, kind: str, nfe: int) -> dict:
    """Flags of train.py, by name, for a predictor that spends ``nfe`` evaluations."""
    recipe = dict(json.loads((FOLDER / f"{dataset_name}.json").read_text(encoding="utf-8"))["train"][kind])
    if kind == "span":
        return {**recipe, "num_steps": nfe + 2}
    if nfe % 2:
        return {**recipe, "num_steps": (nfe + 1) // 2 + 1, "afs": "data"}
    return {**recipe, "num_steps": nfe // 2 + 1, "afs": False}
