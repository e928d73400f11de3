"""EDM networks beyond the recorded ones: NCSN++ and the ends of the noise range."""

import math

import pytest
import torch

from models.edm import EDMDenoiser

NCSNPP = {
    "model_type": "SongUNet",
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
    **{"model_channels": 8, "channel_mult": [1, 2, 2], "num_blocks": 1, "attn_resolutions": [], "dropout": 0.0},
}


def outputs_of(net, names, *arguments):
    """(outputs, first inputs) of the encoder's modules of these names during one call."""
    outputs, inputs = {}, {}

    def keep(name):
        def hook(module, given, output):
            inputs[name], outputs[name] = given[0], output

        return hook

    handles = [net.model.enc[name].register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        net(*arguments)
    for handle in handles:
        handle.remove()
    return outputs, inputs


def test_residual_input_of_ncsnpp_keeps_the_variance():
    """Song et al. 2021 rescale the sum of two branches by 1 / sqrt 2; the next begins there."""
    torch.manual_seed(0)
    net = EDMDenoiser(16, 3, **NCSNPP).eval()
    names = [name for name in net.model.enc if "down" in name or "aux" in name or "block" in name]
    outputs, inputs = outputs_of(net, names, torch.randn(2, 3, 16, 16), torch.tensor(1.0))
    for size in (8, 4):
        main, side = outputs[f"{size}x{size}_down"], outputs[f"{size}x{size}_aux_residual"]
        joined = inputs[f"{size}x{size}_block0"]
        torch.testing.assert_close(joined * math.sqrt(2), main + side, rtol=1e-5, atol=1e-6)
        assert float(side.std()) > 1e-3
    assert torch.equal(inputs["4x4_aux_residual"], inputs["8x8_block0"])


@pytest.mark.parametrize(
    ("given", "used"), [((0.0, float("inf")), (0.002, 80.0)), ((0.0, 1e4), (0.002, 80.0)), ((0.1, 40.0), (0.1, 40.0))]
)
def test_the_noise_range_lies_within_that_of_the_published_samplers(given, used):
    """Official files state 0 .. infinity."""
    sizes = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    net = EDMDenoiser(8, 1, model_type="SongUNet", sigma_min=given[0], sigma_max=given[1], **sizes)
    assert (net.sigma_min, net.sigma_max) == used
