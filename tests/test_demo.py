"""The demo: its first picture, and its page, without training."""

import json

from click.testing import CliRunner
from PIL import Image

import sample as sample_cli
import train as train_cli
from tools import demo
from training.checkpoint import find_predictor


def test_the_demo_from_the_first_picture_to_the_page(tmp_path, monkeypatch):
    def run(script, *arguments, **more):
        assert script == "sample.py"
        done = CliRunner().invoke(sample_cli.main, [*map(str, arguments), "--device=cpu"])
        assert done.exit_code == 0, done.output
        return 1.0

    monkeypatch.setattr(demo, "run", run)
    monkeypatch.setattr(demo, "SHORT", demo.Scale(("digits",), 3, 2, frozenset()))
    monkeypatch.setattr(demo, "FIRST_SEEDS", range(2))
    monkeypatch.setattr(demo, "REFERENCE", {**demo.REFERENCE, "num_steps": 4})
    out = tmp_path / "demo"
    done = CliRunner().invoke(demo.main, [f"--outdir={out}"])
    assert done.exit_code == 0, done.output
    assert done.output.index("first.png") < done.output.index("sampling Euler")
    with Image.open(out / "first.png") as picture:
        assert picture.width > 400 and picture.height > 400
    rows = json.loads((out / "table.json").read_text())["networks"]["digits"]
    assert [row["method"] for row in rows] == [*demo.PLAIN, *demo.LEARNED, "Reference"]
    assert all(row["nfe"] == demo.NFE for row in rows[:-1]) and rows[-1]["distance"] == 0
    page = (out / "index.html").read_text()
    assert all(word in page for word in (*demo.LEARNED, "Each column starts from the same noise", "viewport"))
    assert page.count("data:image/png") == 1 + len(rows) and "python sample.py --predictor_path=digits-span-5" in page
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
