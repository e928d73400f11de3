"""The custom-node folder in a stand-in of ComfyUI; and the export of tables."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import fake_comfy
import pytest
import torch
from click.testing import CliRunner
from test_k_sampler import SD_RANGE, amed, noise, span
from toy import ToyNet

from solvers import sample
from tools.export import main as export
from training.checkpoint import save_predictor

ROOT = Path(__file__).parents[1]


@pytest.fixture
def nodes(tmp_path):
    """The folder's classes, as ComfyUI sees them, with two predictors in models/predictors."""
    (tmp_path / "models" / "predictors").mkdir(parents=True)
    paths = {}
    folder_paths = types.ModuleType("folder_paths")
    folder_paths.models_dir = str(tmp_path / "models")
    folder_paths.add_model_folder_path = lambda name, path: paths.update({name: Path(path)})
    folder_paths.get_filename_list = lambda name: sorted(path.name for path in paths[name].iterdir())
    folder_paths.get_full_path_or_raise = lambda name, file: str(paths[name] / file)
    before = set(sys.modules)
    fake_comfy.install()
    sys.modules["folder_paths"] = folder_paths
    save_predictor(amed(sigma_min=None, sigma_max=None), tmp_path / "models/predictors/amed.safetensors")
    save_predictor(span(), tmp_path / "models/predictors/span.safetensors")
    folder = ROOT / "integrations" / "comfyui"
    name = str(folder)  # ComfyUI's name of the module
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield {key: kind() for key, kind in module.NODE_CLASS_MAPPINGS.items()}
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("comfy", "folder_paths") or name.startswith(str(folder)):
            del sys.modules[name]


class Patcher(fake_comfy.ModelPatcher):
    """With the parts of ComfyUI's that replace an object in a copy."""

    def clone(self):
        twin = Patcher(self.model)
        twin.patches = dict(getattr(self, "patches", {}))
        return twin

    def add_object_patch(self, name, value):
        self.patches[name] = value

    def get_model_object(self, name):
        return getattr(self, "patches", {}).get(name) or super().get_model_object(name)


def test_interface(nodes):
    """What ComfyUI reads of a node."""
    assert set(nodes) == {"AMEDLoadPredictor", "AMEDLearnedSampler", "AMEDLearnedSigmas", "AMEDExactTimes"}
    for node in nodes.values():
        inputs = node.INPUT_TYPES()["required"]
        names = node.build.__code__.co_varnames if hasattr(node, "build") else inputs
        assert isinstance(node.RETURN_TYPES, tuple) and node.CATEGORY.startswith("sampling/")
        assert callable(getattr(node, node.FUNCTION)) and set(inputs) <= set(names)
    files = nodes["AMEDLoadPredictor"].INPUT_TYPES()["required"]["file"][0]
    assert files == ["amed.safetensors", "span.safetensors"]


@pytest.mark.parametrize("file", ["amed.safetensors", "span.safetensors"])
def test_a_workflow(nodes, file):
    """Loaded and run in inference mode, as in ComfyUI; with whole and with exact time steps."""
    with torch.inference_mode():
        (predictor,) = nodes["AMEDLoadPredictor"].load(file)
        assert not next(predictor.parameters()).is_inference()
        model = Patcher(fake_comfy.toy_model("eps").model)
        (sampler,) = nodes["AMEDLearnedSampler"].build(predictor)
        (sigmas,) = nodes["AMEDLearnedSigmas"].build(model, predictor, 1.0)
        assert sigmas.dtype == torch.float32 and sigmas[-1] == 0 and sigmas[0] == pytest.approx(14.6146, rel=1e-4)
        (exact,) = nodes["AMEDExactTimes"].patch(model)
        latent = torch.zeros(2, 4, 8, 8)
        told = []
        for patcher in (model, exact):
            patcher.model.model_sampling, kept = patcher.get_model_object("model_sampling"), model.model.model_sampling
            patcher.model.diffusion_model.calls.clear()
            result = fake_comfy.run(patcher, sampler, sigmas, latent)
            patcher.model.model_sampling = kept
            told.append([times[0] for _, times, _ in patcher.model.diffusion_model.calls])
            assert result.isfinite().all()
        (flow,) = nodes["AMEDExactTimes"].patch(Patcher(fake_comfy.toy_model("flow").model))
        assert not hasattr(flow, "patches")
    whole, fractional = told
    assert all(time == int(time) for time in whole) and any(time != int(time) for time in fractional)
    assert max(abs(a - b) for a, b in zip(whole, fractional, strict=True)) <= 0.51


def test_denoise_and_changed_files(nodes, tmp_path):
    load = nodes["AMEDLoadPredictor"]
    (predictor,) = load.load("span.safetensors")
    model = Patcher(fake_comfy.toy_model("eps").model)
    lengths = [len(nodes["AMEDLearnedSigmas"].build(model, predictor, share)[0]) for share in (1, 0.5, 0.25, 0)]
    assert lengths == [5, 3, 2, 0]
    before = load.IS_CHANGED("span.safetensors")
    assert load.IS_CHANGED("span.safetensors") == before
    save_predictor(span(num_steps=7), tmp_path / "models/predictors/span.safetensors")
    assert load.IS_CHANGED("span.safetensors") != before


def test_a_package_of_the_same_name_is_pointed_out(nodes, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "training"]:
        monkeypatch.delitem(sys.modules, name)
    other = types.ModuleType("training")
    other.__path__, other.__file__ = [], "/elsewhere/training/__init__.py"
    monkeypatch.setitem(sys.modules, "training", other)
    # An editable installation finds its modules whatever the parent package is.
    monkeypatch.setattr(sys, "meta_path", [one for one in sys.meta_path if "ditable" not in repr(one)])
    with pytest.raises(RuntimeError, match="another package is called training .*elsewhere.*pip install"):
        nodes["AMEDLoadPredictor"].load("span.safetensors")


# Export


def exported(*arguments, code=0):
    result = CliRunner().invoke(export, list(arguments))
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize("preset", ["full", "amed-table", "epd", "gs"])
def test_the_exported_function_is_the_solver(preset, tmp_path):
    student = span(preset, num_steps=4, first_step="none" if preset == "gs" else "zero")
    save_predictor(student, tmp_path / "predictor-000001.safetensors")
    exported(f"--predictor_path={tmp_path}", "--format=k-diffusion", f"--outfile={tmp_path / 'sampler.py'}")
    code, net, seen = {}, ToyNet(), []
    exec((tmp_path / "sampler.py").read_text(), code)
    x = code["sample_learned"](net, noise() * code["SIGMAS"][0], callback=seen.append)
    assert torch.allclose(x, sample(net, noise(), solver="span", predictor=student), rtol=1e-9, atol=1e-9)
    assert len(seen) == (3 if preset == "gs" else 2)


def test_exported_numbers(tmp_path):
    save_predictor(span(), tmp_path / "predictor-000001.safetensors")
    content = json.loads(exported(f"--predictor_path={tmp_path}"))
    assert content["kind"] == "span" and content["sigmas"][0] == SD_RANGE["sigma_max"] and content["evaluations"] == 3
    line = exported(f"--predictor_path={tmp_path}", "--format=comfyui")
    values = [float(value) for value in line.split(",")]
    assert values[-1] == 0 and values[:-1] == pytest.approx(content["sigmas"][:-1], rel=1e-5)
    times = json.loads(exported(f"--predictor_path={tmp_path}", "--flow"))["sigmas"]
    assert times[0] == pytest.approx(14.6146 / 15.6146)
    schedule = ["--num_steps=4", "--sigma_min=0.1", "--sigma_max=10", "--schedule_type=logsnr"]
    code = {}
    exec(exported(*schedule, "--format=k-diffusion"), code)
    assert torch.allclose(code["SIGMAS"], torch.tensor([10, 10 ** (1 / 3), 10 ** (-1 / 3), 0.1]))
    save_predictor(amed(sigma_min=None), tmp_path / "amed.safetensors")
    path = f"--predictor_path={tmp_path / 'amed.safetensors'}"
    assert "give --sigma_min and --sigma_max" in exported(path, code=2)
    assert json.loads(exported(path, "--sigma_min=0.1"))["sigmas"][-1] == pytest.approx(0.1)
    assert "is a network, not a table" in exported(path, "--sigma_min=0.1", "--format=k-diffusion", code=2)
    assert "give one of" in exported(code=2)
