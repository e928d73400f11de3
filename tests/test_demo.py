"""The demo: its first picture, and its page, without training."""

import json

from click.testing import CliRunner
from PIL import Image

import sample as sample_cli
from tools import demo


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
