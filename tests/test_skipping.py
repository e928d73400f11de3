"""Leaving out residual and attention blocks of a U-Net."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from systems_golden import arrays, assert_relative, cases

from models import build_denoiser, create_model
from models.compile import skippable_layers, skipping
from torch_utils.errors import UserError


def test_adm_equals_the_published_code():
    info, data = cases("skip/skip"), arrays("skip/skip")
    folder = Path(__file__).parent / "golden" / "nets" / "tiny" / info["weights"]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with np.load(folder / "weights.npz") as file:
        weights = {name: torch.as_tensor(file[name]) for name in file.files}
    parts = {"model": config["init_kwargs_model"], "classifier": config["init_kwargs_classifier"]}
    net = build_denoiser("adm", parts, weights, guidance_type="none")
    names = {module: name for name, module in net.model.named_modules()}
    layers = {str(number): names[block] for number, (block, _) in enumerate(skippable_layers(net.model))}
    assert layers == info["layers"]
    for i, chosen in enumerate(info["skip_lists"]):
        with skipping(net, chosen):
            assert_relative(net.model(data["x"], data["t"], y=data["y"]), data[f"F__{i}"], 1e-4)
    assert_relative(net.model(data["x"], data["t"], y=data["y"]), data["F__0"], 1e-4)


def test_edm_blocks_count_their_attention_apart():
    net = create_model("digits")
    layers, x = skippable_layers(net), torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    attention = [number for number, (_, part) in enumerate(layers) if part == "attention"]
    assert attention and len(attention) < len(layers) / 2
    plain = net(x, 1.0)
    with skipping(net, attention[:1]):
        without = net(x, 1.0)
    with skipping(net, range(len(layers))):
        assert net(x, 1.0).isfinite().all()
    assert not torch.equal(without, plain)
    assert torch.equal(net(x, 1.0), plain)


def test_unknown_layers_are_refused():
    net = create_model("digits")
    with pytest.raises(UserError, match=f"layers 0..{len(skippable_layers(net)) - 1}"), skipping(net, [1000]):
        pass
