"""Packing a predictor for others, and using what was packed."""

import json
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from PIL import Image

from solvers.span_table import SpanSolver
from tools.share import main
from training.checkpoint import load_predictor, save_predictor
from training.predictor import AMEDPredictor

ROWS = {"rows": [{"method": "span", "nfe": 4, "fid": 1.25, "fid_ci95": 0.1, "images": 5000}], "facts": {}}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    student = SpanSolver.preset("full", num_steps=5, first_step="zero", dataset_name="digits")
    save_predictor(student, folder / "predictor-000010.safetensors", {"network": "digits-edm.safetensors", "kimg": 10})
    (folder / "training_options.json").write_text('{"outdir": "/home/someone"}')
    (tmp_path / "results.json").write_text(json.dumps(ROWS))
    return folder


def share(*arguments, code=0):
    result = CliRunner().invoke(main, [str(value) for value in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_a_folder(run, tmp_path):
    """Four files and nothing else; the card's metadata are those of the hub's library."""
    target = tmp_path / "shared" / "fast-digits"
    options = [f"--figures={tmp_path / 'results.json'}", "--license=apache-2.0", "--device=cpu"]
    assert share(run, f"--to={target}", "--images=4", *options).endswith(f"images.png -> {target}\n")
    names = sorted(path.name for path in target.iterdir())
    assert names == ["README.md", "images.png", "predictor.json", "predictor.safetensors"]
    assert Image.open(target / "images.png").size == (66, 66)
    card = (target / "README.md").read_text()
    assert f"python sample.py --predictor_path={target} --seeds=0-15" in card
    assert "| span | 4 | 1.25 ± 0.1 | 5000 |" in card and "/home/someone" not in card
    assert load_predictor(target / "predictor.safetensors").provenance["kimg"] == 10
    details = json.loads((target / "predictor.json").read_text())
    assert details["config"]["dataset_name"] == "digits" and len(details["table"]["sigmas"]) == 5
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard.load(target / "README.md").data
    assert data.license == "apache-2.0" and data.library_name == "amed-solver" and data.model_name == "fast-digits"
    assert data.eval_results[0].metric_value == 1.25 and "NFE 4" in data.eval_results[0].metric_name
    share(run, f"--to={target}", "--images=0")  # again: its own files are replaced
    assert not (target / "images.png").exists() and "Nothing was measured" in (target / "README.md").read_text()


def test_the_printed_commands_work(run, tmp_path, monkeypatch):
    """The Python of the card gives the images of the command of the card."""
    import torch

    from models import create_model
    from solvers import sample

    monkeypatch.chdir(tmp_path)
    share(run, "--to=fast", "--images=0")
    code = (tmp_path / "fast/README.md").read_text().split("```python\n")[1].split("```")[0]
    net, latents = create_model("digits"), torch.randn(2, 1, 32, 32)
    scope = {"net": net, "latents": latents}
    exec(code, scope)
    expected = sample(net, latents, solver="span", predictor=load_predictor("fast/predictor.safetensors"))
    assert torch.allclose(scope["x"], expected, atol=1e-4)


def test_a_card_for_pipelines(tmp_path):
    """It says how to use the predictor in a pipeline and in ComfyUI."""
    predictor = AMEDPredictor(dataset_name="diffusers", guidance_type="cfg", guidance_rate=7.5, num_steps=4)
    save_predictor(predictor, tmp_path / "predictor-000001.safetensors")
    share(tmp_path, f"--to={tmp_path / 'sd'}", "--images=0", "--base_model=owner/sd")
    card = (tmp_path / "sd/README.md").read_text()
    assert "--model_path=owner/sd --prompt=" in card and "AMEDScheduler.from_predictor(" in card and "ComfyUI" in card
    assert 'base_model_relation: "adapter"' in card and '"text-to-image"' in card


def test_upload(run, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    calls = []

    class Api:
        def create_repo(self, repo, private, exist_ok):
            calls.append((repo, private))

        def upload_folder(self, folder_path, repo_id, allow_patterns, commit_message):
            calls.append((sorted(path.name for path in folder_path.iterdir()), sorted(allow_patterns)))
            if repo_id == "owner/full":
                raise OSError("no space")
            return SimpleNamespace()

    monkeypatch.setattr(hub, "HfApi", Api)
    assert share(run, "--to=hf:owner/fast", "--images=0", "--private").endswith("-> hf:owner/fast\n")
    names = ["README.md", "predictor.json", "predictor.safetensors"]
    assert calls == [("owner/fast", True), (names, sorted([*names, "images.png"]))]
    assert "hf:owner/full: the upload failed (no space)" in share(run, "--to=hf:owner/full", "--images=0", code=2)


def test_mistakes(run, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    for options, message in (
        ((f"--to={tmp_path / 'other'}", "--images=0"), "is not empty (notes.txt): choose another folder"),
        (("--to=https://host/x",), "--to=https://host/x: give a folder, or hf:owner/name"),
        (("--to=hf:owner/x", "--offline"), "an upload needs the network"),
        (("--to=x", f"--figures={run / 'training_options.json'}"), "is not a results.json of compare.py or"),
    ):
        assert message in share(run, *options, code=2)
    assert (tmp_path / "other/notes.txt").read_text() == "mine"
