"""The demo: its first picture, and its page, without training."""

import json

import torch
from click.testing import CliRunner
from PIL import Image

import train as train_cli
from tools import demo
from training.checkpoint import find_predictor


def test_the_demo_from_the_first_picture_to_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SHORT", demo.Scale(("digits",), 6, 4, frozenset()))
    monkeypatch.setattr(demo, "FIRST_SEEDS", range(2))
    monkeypatch.setattr(demo, "REFERENCE_STEPS", 3)
    monkeypatch.setattr(demo, "pick_device", lambda: torch.device("cpu"))
    out = tmp_path / "demo"
    done = CliRunner().invoke(demo.main, [f"--outdir={out}"])
    assert done.exit_code == 0, done.output
    assert done.output.index("first.png") < done.output.index("comparing 5 solvers and 3 predictors")
    with Image.open(out / "first.png") as picture:
        assert picture.width > 400 and picture.height > 400
    rows = json.loads((out / "digits" / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [*demo.PLAIN, "AMED-Solver", "AMED-Plugin(ipndm)", "span(full)"]
    assert all(row["nfe"] == demo.NFE and row["reference_images"] == 4 for row in rows)
    page = (out / "index.html").read_text()
    assert all(word in page for word in ("span(full)", "Each column starts from the same noise", "viewport"))
    assert page.count("data:image/png") == 1 + len(rows) + 1  # the first picture, and the converged solution
    assert "python sample.py --dataset_name=digits --predictor_path=" in page and "digits-span-5" in page
    again = CliRunner().invoke(demo.main, [f"--outdir={tmp_path}"])
    assert "is not an earlier demo" in again.output


def test_the_full_demo_trains_every_method(tmp_path, monkeypatch):
    """With its own recipes, only shorter; sampling finds the results."""

    def run(script, *arguments, **more):
        small = ["--total_kimg=0.004", "--batch=4", "--device=cpu"]
        if "--sampler_stu=span" in arguments:
            small += ["--pairs=4", "--val_pairs=4", "--num_steps_tea=8", "--init=preset"]
        done = CliRunner().invoke(train_cli.main, [*map(str, arguments), *small])
        assert script == "train.py" and done.exit_code == 0, done.output
        return 1.0

    monkeypatch.setattr(demo, "run", run)
    found = demo.train_all("digits", demo.FULL, tmp_path, {"amp": "none"})
    assert set(found) == set(demo.LEARNED)
    for folder, seconds, command in found.values():
        assert (
            find_predictor(folder).is_file() and seconds == 1 and command.startswith("python train.py --dataset_name")
        )
