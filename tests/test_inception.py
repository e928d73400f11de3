"""Inception-v3 against other features, formulas by hand and the published parameter count."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.inception import FEATURE_DIM, BlockE, InceptionV3, canonical_key, load_inception, load_state, resize_tf1
from torch_utils.errors import UserError

GOLDEN = Path(__file__).parent / "golden" / "inception" / "artificial-weights.npz"


def artificial_state() -> dict[str, torch.Tensor]:
    """Weights from a formula, whose values never change, that keep activations of order one."""
    state = {}
    with torch.device("meta"):
        names = InceptionV3().state_dict()
    for place, (key, value) in enumerate(names.items()):
        if key.endswith("num_batches_tracked"):
            continue
        wave = torch.sin(torch.arange(value.numel(), dtype=torch.float64) * (12.9898 + place) + place) * 43758.5453
        uniform = wave - wave.floor()
        if key.endswith("conv.weight") or key == "fc.weight":
            numbers = (uniform - 0.5) * (24 / value[0].numel()) ** 0.5
        elif key.endswith(("running_var", "bn.weight")):
            numbers = 0.5 + uniform
        else:
            numbers = (uniform - 0.5) * 0.4
        state[key] = numbers.reshape(value.shape).float()
    return state


@pytest.fixture(scope="module")
def state():
    return artificial_state()


@pytest.fixture(scope="module")
def network(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    model = load_inception(path)
    path.unlink()
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    return model


def test_features_equal_those_of_torch_fidelity(network):
    golden = np.load(GOLDEN, allow_pickle=False)  # made once with torch-fidelity 0.4.0 and artificial_state()
    maps = {}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: maps.update({name: tuple(out.shape[1:])}))
        for name, module in network.named_children()
    ]
    features = network(torch.from_numpy(golden["images"]))  # 32 x 45 pixels: the resizing is part of it
    for hook in hooks:
        hook.remove()
    assert features.dtype == torch.float32 and features.shape == (2, FEATURE_DIM)
    np.testing.assert_allclose(features.numpy(), golden["features"], rtol=1e-4, atol=1e-4 * golden["features"].max())
    # The sizes of table 1 of Szegedy et al. 2016, as in the published graph.
    assert maps["Conv2d_1a_3x3"] == (32, 149, 149) and maps["Conv2d_2a_3x3"] == (32, 147, 147)
    assert maps["Conv2d_2b_3x3"] == (64, 147, 147) and maps["Conv2d_3b_1x1"] == (80, 73, 73)
    assert maps["Conv2d_4a_3x3"] == (192, 71, 71)
    assert [maps[f"Mixed_5{x}"] for x in "bcd"] == [(256, 35, 35), (288, 35, 35), (288, 35, 35)]
    assert {maps[f"Mixed_6{x}"] for x in "abcde"} == {(768, 17, 17)}
    assert [maps[f"Mixed_7{x}"] for x in "abc"] == [(1280, 8, 8), (2048, 8, 8), (2048, 8, 8)]


def test_number_of_parameters():
    with torch.device("meta"):
        model = InceptionV3()
    # Keras documents 23,851,784 numbers for InceptionV3 with 1000 classes, 34,432 of them moving
    # means and variances. It has no scale in its batch normalisation, this graph does (17,216
    # channels); and there are 1008 classes.
    statistics = sum(b.numel() for n, b in model.named_buffers() if not n.endswith("num_batches_tracked"))
    assert statistics == 34_432
    found = sum(p.numel() for p in model.parameters())
    assert found == 23_851_784 - 34_432 + 17_216 + 8 * (2048 + 1)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) == 94
    assert all(m.eps == 0.001 for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))


def resize_by_hand(image: np.ndarray, size: int) -> np.ndarray:
    """TensorFlow 1's rule, pixel by pixel, for [H,W]."""
    height, width = image.shape
    out = np.empty([size, size])
    for i in range(size):
        y = i * height / size
        top, bottom = int(y), min(int(y) + 1, height - 1)
        for j in range(size):
            x = j * width / size
            left, right = int(x), min(int(x) + 1, width - 1)
            above = image[top, left] * (1 - (x - left)) + image[top, right] * (x - left)
            below = image[bottom, left] * (1 - (x - left)) + image[bottom, right] * (x - left)
            out[i, j] = above * (1 - (y - top)) + below * (y - top)
    return out


@pytest.mark.parametrize(("height", "width", "size"), [(5, 8, 13), (20, 7, 9), (11, 11, 11), (1, 3, 4)])
def test_resize_is_that_of_tensorflow_1(height, width, size):
    image = np.random.default_rng(height).uniform(0, 255, [height, width])
    found = resize_tf1(torch.from_numpy(image)[None, None], size)
    np.testing.assert_allclose(found[0, 0].numpy(), resize_by_hand(image, size), rtol=0, atol=1e-10)
    single = resize_tf1(torch.from_numpy(image)[None, None].float(), size)
    np.testing.assert_allclose(single[0, 0].numpy(), resize_by_hand(image, size), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("block", ["Mixed_5b", "Mixed_6b", "Mixed_7b", "Mixed_7c"])
def test_pooling_at_the_border(network, block):
    """A map of ones stays one if the mean leaves out the padding; the last block takes the max."""
    module = getattr(network, block)
    size = 4
    channels = module.branch_pool.conv.in_channels
    seen = []
    hook = module.branch_pool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ones = torch.ones(1, channels, size, size)
    spike = ones.clone()
    spike[:, :, 0, 0] = 10
    module(ones)
    module(spike)
    hook.remove()
    torch.testing.assert_close(seen[0], ones)
    expected = 10.0 if block == "Mixed_7c" else (10 + 3) / 4  # four pixels of the window are inside
    torch.testing.assert_close(seen[1][0, :, 0, 0], torch.full([channels], expected))
    assert isinstance(module, BlockE) == block.startswith("Mixed_7")


def wrapper_key(key: str) -> str:
    """The name of a layer in the module list of pytorch-fid, written out independently."""
    blocks = [
        ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"],
        ["Conv2d_3b_1x1", "Conv2d_4a_3x3"],
        ["Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"],
        ["Mixed_7a", "Mixed_7b", "Mixed_7c"],
    ]
    layer, rest = key.split(".", 1)
    for number, layers in enumerate(blocks):
        if layer in layers:
            return f"blocks.{number}.{layers.index(layer)}.{rest}"
    raise KeyError(key)


def test_layouts_of_the_file(state, network):
    layouts = {
        "plain": state,
        "prefixed": {f"module.{key}": value for key, value in state.items()},
        "wrapper": {wrapper_key(key): value for key, value in state.items() if not key.startswith("fc.")},
    }
    for name, layout in layouts.items():
        back = {canonical_key(key): value for key, value in layout.items()}
        assert back.keys() == {key for key in state if name != "wrapper" or not key.startswith("fc.")}
        assert all(value is state[key] for key, value in back.items())
    model = copy.deepcopy(network)
    for value in model.state_dict().values():
        value.zero_()
    load_state(model, layouts["wrapper"], "wrapper")
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items() if not key.startswith("fc."))
    assert not loaded["fc.weight"].any()


class Dangerous:
    def __reduce__(self):
        return (Path.touch, (Path("inception-was-here"),))


def test_other_files_are_refused(state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    key = "Mixed_6a.branch3x3.bn.bias"
    few = {name: value for name, value in state.items() if value.numel() < 2000}
    cases = {
        "text.pth": (b"hello", "not a readable pickle"),
        "list.pth": ([1, 2], "holds no weights"),
        "few.pth": (few, "missing Conv2d_2a_3x3.conv.weight"),
        "object.pth": (Dangerous(), "it calls something that is not a builder"),
    }
    for name, (content, message) in cases.items():
        if isinstance(content, bytes):
            Path(name).write_bytes(content)
        else:
            torch.save(content, name)
        with pytest.raises(UserError, match=message) as caught:
            load_inception(name)
        assert name in str(caught.value) and len(str(caught.value)) < 300
    assert not Path("inception-was-here").exists()
    with torch.device("meta"):
        model = InceptionV3()
    with pytest.raises(UserError, match="unknown AuxLogits"):
        load_state(model, {**state, "AuxLogits.fc.weight": torch.zeros(1)}, "aux.pth")
    with pytest.raises(UserError, match=r"Mixed_6a.branch3x3.bn.bias is \[3\], expected \[384\]"):
        load_state(model, {**state, key: torch.zeros(3)}, "shape.pth")
