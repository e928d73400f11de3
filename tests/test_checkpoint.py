"""Predictor files: written, read back, converted from the original code, and found by number."""

import json
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_safe_pickle import make_original_predictor

from torch_utils.errors import UserError
from torch_utils.safe_pickle import UnsafePickleError
from training.checkpoint import find_predictor, load_predictor, save_predictor
from training.predictor import AMEDPredictor

FIXTURES = Path(__file__).parent / "golden" / "pickle_fixtures"
AMED = json.loads((FIXTURES / "amed_expected.json").read_text())
CONFIG = {
    **{"dataset_name": "digits", "img_resolution": 32, "num_steps": 4, "sampler_stu": "ipndm", "sampler_tea": "heun"},
    **{"M": 2, "schedule_type": "polynomial", "schedule_rho": 5.0, "afs": True, "scale_dir": 0.02, "scale_time": 0.2},
    **{"max_order": 3, "sigma_min": 0.003, "sigma_max": 60.0},
}


def make_predictor(**changes):
    torch.manual_seed(1)
    return AMEDPredictor(**{**CONFIG, **changes}).eval()


def outputs(predictor):
    generator = torch.Generator().manual_seed(5)
    bottleneck = torch.randn(3, 8, 8, generator=generator)
    with torch.no_grad():
        return torch.cat([x.reshape(-1) for x in predictor(bottleneck, torch.tensor(20.0), torch.tensor(3.0))])


def test_roundtrip(tmp_path):
    predictor = make_predictor()
    provenance = {"network": "digits", "seed": 3, "kimg": 1.5, "note": "µ"}
    path = tmp_path / "new" / "predictor-000001.safetensors"
    save_predictor(predictor, path, provenance)
    loaded = load_predictor(str(path))
    assert loaded.config == predictor.config and loaded.config.items() >= CONFIG.items()
    assert loaded.provenance == provenance and not loaded.training
    assert list(loaded.state_dict()) == list(predictor.state_dict())
    assert torch.equal(outputs(loaded), outputs(predictor))
    with safe_open(path, "pt") as file:  # readable without this project
        metadata = file.metadata()
        assert metadata["format"] == "amed-predictor" and json.loads(metadata["config"])["schedule_rho"] == 5.0
    save_predictor(loaded, path)  # keeps the provenance it carries, replaces the file, leaves nothing else
    assert load_predictor(path).provenance == provenance
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "predictor-000001.safetensors"
    save_predictor(make_predictor(), path)
    before = path.read_bytes()

    def broken(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(UserError, match="No space left"):
        save_predictor(make_predictor(num_steps=5), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", AMED)
def test_original_snapshot_equals_golden(name, tmp_path):
    expected, golden = AMED[name], np.load(FIXTURES / f"{name}.expected.npz")
    predictor = load_predictor(FIXTURES / name)
    wanted = {**expected["init_kwargs"], "sigma_min": 0.002, "sigma_max": 80.0}
    assert {key: predictor.config[key] for key in wanted} == wanted and not predictor.training
    save_predictor(predictor, tmp_path / "converted.safetensors")
    converted = load_predictor(tmp_path / "converted.safetensors")
    bottleneck = torch.from_numpy(golden["bottleneck"])
    for model in (predictor, converted):
        for i in range(5):
            times = [torch.tensor(golden[key][i]) for key in ("t_cur", "t_next")]
            for suffix, feature in (("", bottleneck), ("_zero_bottleneck", torch.zeros_like(bottleneck))):
                result = model(feature, *times)
                for output, value in zip(("r", "scale_dir", "scale_time"), result, strict=True):
                    want = golden[f"{output}{suffix}__{i}"] if output in expected["outputs"] else np.ones((3, 1))
                    np.testing.assert_allclose(value.detach().numpy().reshape(3, 1), want, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("zip_format", [True, False])
def test_torch_save_snapshot(zip_format, tmp_path, monkeypatch):
    content, weights = make_original_predictor(monkeypatch)
    for index, value in enumerate((content, content["model"])):
        path = tmp_path / f"network-snapshot-{index:06d}.pt"
        torch.save(value, path, _use_new_zipfile_serialization=zip_format)
        predictor = load_predictor(path)
        assert all(torch.equal(value, weights[key]) for key, value in predictor.state_dict().items())
        assert predictor.config["sampler_stu"] == "ipndm" and predictor.config["M"] == 2
    torch.save(content, path)
    predictor = load_predictor(path)
    assert (predictor.config["sigma_min"], predictor.config["sigma_max"]) == (0.004, 70.0)
    assert predictor.provenance == {"converted_from": path.name}


OTHER_SETTINGS = {  # none as in the files of the original code above
    **{"dataset_name": "ffhq", "img_resolution": 64, "num_steps": 7, "M": 3, "sampler_stu": "dpmpp"},
    **{"sampler_tea": "dpm", "guidance_type": "cg", "guidance_rate": 2.5, "schedule_type": "logsnr"},
    **{"schedule_rho": 3.0, "afs": False, "scale_dir": 0.05, "scale_time": 0.1, "max_order": 2},
    **{"predict_x0": False, "lower_order_final": False},
    **{"hidden_dim": 96, "bottleneck_output_dim": 6, "noise_channels": 10},
}


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("by_name", [True, False])
def test_every_setting_of_an_original_snapshot_is_read(by_name, tmp_path, monkeypatch):
    """Arguments that were given by name are stored as such, others are attributes only."""
    content, _ = make_original_predictor(monkeypatch)
    model, path = content["model"], tmp_path / "p.pt"
    make = type(model.map_layer0)
    model.map_layer0, model.enc_layer0, model.enc_layer1 = make(10, 10), make(64, 96), make(96, 6)
    model.fc_r, model.fc_scale_dir, model.fc_scale_time = make(26, 1), make(26, 1), make(26, 1)
    model._init_kwargs = OTHER_SETTINGS if by_name else {}
    if not by_name:
        model.__dict__.update(OTHER_SETTINGS)
    for ends in ({"sigma_min": 0.02}, {"sigma_max": 60.0}):
        content["loss_fn"].__dict__ = ends
        torch.save(content, path)
        config = load_predictor(path).config
        wanted = {"sigma_min": None, "sigma_max": None, **OTHER_SETTINGS, **ends}
        assert {name: config[name] for name in wanted} == wanted
    for name, value in (("output_dim", 2), ("bottleneck_input_dim", 16), ("embedding_type", "fourier")):
        model._init_kwargs = {**OTHER_SETTINGS, name: value}
        torch.save(content, path)
        with pytest.raises(UserError, match=f"another '{name}' than"):
            load_predictor(path)


def test_snapshots_that_cannot_be_rebuilt(tmp_path, monkeypatch):
    for key, value, message in (
        ("bottleneck_input_dim", 16, "bottleneck_input_dim"),
        ("hidden_dim", 64, "hidden_dim"),
        ("hidden_dim", 10**12, "hidden_dim"),
        ("schedule_rho", math.nan, "schedule_rho"),
        ("num_steps", [4], "num_steps"),
    ):
        content, _ = make_original_predictor(monkeypatch)
        content["model"]._init_kwargs[key] = value
        torch.save(content, tmp_path / "p.pt")
        with pytest.raises(UserError, match=message):
            load_predictor(tmp_path / "p.pt")


def test_other_files_are_described(tmp_path):
    with pytest.raises(UserError, match=r"found ema \(EDMPrecond\)"):
        load_predictor(FIXTURES / "edm_song_ema.pkl")
    with pytest.raises(UnsafePickleError, match="'os.system'"):
        load_predictor(FIXTURES / "malicious" / "os_system.pkl")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps([1]))
    with pytest.raises(UserError, match="found list"):
        load_predictor(tmp_path / "x.pkl")
    with pytest.raises(UserError, match="does not exist"):
        load_predictor(tmp_path / "none.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"not a file of this kind")
    with pytest.raises(UserError, match="x.safetensors"):
        load_predictor(tmp_path / "x.safetensors")


def test_damaged_predictor_files(tmp_path):
    path = tmp_path / "p.safetensors"
    predictor = make_predictor()
    weights = {key: value.clone() for key, value in predictor.state_dict().items()}

    def refuse(tensors, message, **metadata):
        save_file(tensors, path, {"format": "amed-predictor", **metadata} if metadata else None)
        with pytest.raises(UserError, match=message):
            load_predictor(path)

    good = json.dumps(predictor.config)
    refuse(weights, "not a predictor")
    refuse(weights, "no 'config'", provenance="{}")
    refuse(weights, "not a JSON object", config="{")
    refuse(weights, "surprise", config=json.dumps({**predictor.config, "surprise": 1}))
    refuse({"fc_r.weight": weights["fc_r.weight"]}, "do(es)? not", config=good)
    refuse({**weights, "extra": torch.ones(1)}, "extra", config=good)
    save_predictor(predictor, path)
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    with pytest.raises(UserError, match="not a readable safetensors"):
        load_predictor(path)


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_find_predictor(tmp_path, monkeypatch):
    exps = tmp_path / "exps"
    seven, original = (
        exps / "00007-digits-4-5-amed-heun-1-polynomial-afs",
        exps / "00012-cifar10-4-5-ipndm-heun-2-logsnr",
    )
    touch(*(seven / f"predictor-{kimg:06d}.safetensors" for kimg in (9, 10, 2)))
    touch(seven / "training-state-000099.pt", seven / "predictor-000050.safetensors.tmp", seven / "log.txt")
    touch(original / "network-snapshot-000005.pkl", original / "network-snapshot-000010.pkl")
    newest = seven / "predictor-000010.safetensors"
    for text in ("7", 7, "00007", seven, str(seven), seven.name, newest):
        assert find_predictor(text, exps) == newest
    assert find_predictor(seven / "predictor-000002.safetensors", exps).name == "predictor-000002.safetensors"
    assert find_predictor("12", exps).name == "network-snapshot-000010.pkl"
    touch(original / "predictor-000010.safetensors")  # the converted file is preferred
    assert find_predictor("12", exps).name == "predictor-000010.safetensors"
    monkeypatch.chdir(tmp_path)
    assert find_predictor("7") == Path("exps") / seven.name / newest.name


def test_find_predictor_mistakes(tmp_path):
    exps = tmp_path / "exps"
    with pytest.raises(UserError, match="no experiment 3 in .*no experiments"):
        find_predictor("3", exps)
    touch(exps / "00001-a" / "predictor-000001.safetensors", exps / "00001-b" / "predictor-000001.safetensors")
    (exps / "00002-c").mkdir()
    with pytest.raises(UserError, match="no experiment 3 in .*00001-a, 00001-b, 00002-c"):
        find_predictor("3", exps)
    with pytest.raises(UserError, match="ambiguous: 00001-a, 00001-b"):
        find_predictor("1", exps)
    with pytest.raises(UserError, match="00002-c holds no predictor yet"):
        find_predictor("2", exps)
    with pytest.raises(UserError, match="no predictor at nowhere"):
        find_predictor("nowhere", exps)
    with pytest.raises(UserError, match="empty"):
        find_predictor(" ", exps)
