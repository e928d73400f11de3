"""Precision, memory format and compilation: one graph, the same results, the bottleneck too."""

import pytest
import torch
from latent_nets import relative_error, tiny_case

from models import build_denoiser, create_model
from models.compile import CompiledForward, prepare_network
from models.denoiser import Denoiser, call_shifted, member, read_bottleneck, shifted_layers
from solvers import sample
from torch_utils.errors import UserError
from torch_utils.seeds import SeededGenerators
from training.loss import DistillationLoss
from training.predictor import AMEDPredictor

CASES = {
    "edm_song_uncond": ("edm", None),
    "edm_song_cond": ("edm", None),
    "edm_dhariwal_cond": ("edm", None),
    "cm_classcond": ("cm", None),
    "adm_guided": ("adm", None),
    "ldm_uncond_vq": ("ldm", None),
    "sd_cfg_kl": ("sd", "cfg"),
}


def tiny_network(case, guidance=None):
    """(network, condition for two images, recorded inputs and outputs)"""
    facts, weights, io = tiny_case(case)
    family, own_guidance = CASES[case]
    config = facts.get("init_kwargs")
    if family == "adm":
        config = {"model": facts["init_kwargs_model"], "classifier": facts["init_kwargs_classifier"]}
    net = build_denoiser(family, config, weights, guidance or own_guidance)
    cond = {}
    if family == "sd":
        cond = {"condition": io["context"], "unconditional_condition": io["context_uncond"]}
    elif net.label_dim:
        cond = net.make_cond(labels=torch.tensor([0, 2]))
    elif family == "adm":
        cond = {"class_labels": torch.tensor([0, 2])}
    return net, cond, io


def watched(net):
    """Compiles ``net`` without code generation; the list gets each new graph's node count."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    net.compiled = CompiledForward(net, backend=backend)
    return graphs


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    "case",
    [case if case == "sd_cfg_kl" else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
def test_one_graph_serves_every_form_of_the_noise_level_and_returns_the_bottleneck(case):
    plain, cond, io = tiny_network(case)
    net, _, _ = tiny_network(case)
    graphs = watched(net)
    hooks, x = len(net.bottleneck._forward_hooks), io["x__2"]
    with torch.no_grad(), read_bottleneck(plain) as expected, read_bottleneck(net) as found:
        for sigma in (
            io["sigmas"][2],
            float(io["sigmas"][3]),
            io["sigma__vec"][:2],
            io["sigma__vec"][:2, None, None, None],
        ):
            difference = relative_error(net(x, sigma, **cond), plain(x, sigma, **cond))
            assert difference < 3e-5
            assert relative_error(found.read(2), expected.read(2)) < 3e-5
        one = {name: value[:1] for name, value in cond.items()}
        assert relative_error(net(x[:1], 2.0, **one), plain(x[:1], 2.0, **one)) < 3e-5  # filled up to two
        assert found.read(1).shape == (1, 8, 8)
        net(x.contiguous(memory_format=torch.channels_last), 2.0, **cond)
        assert len(net.bottleneck._forward_hooks) == hooks
    with torch.no_grad():
        net(x, 2.0, **cond)  # nobody reads
    assert found.read(2).shape == (2, 8, 8)
    with pytest.raises(RuntimeError, match="not run"):
        found.read(2)
    assert len(graphs) == 1 and graphs[0] > 50


@pytest.mark.parametrize("case", CASES)
def test_a_shift_of_the_noise_embedding_is_a_shift_of_the_bias_that_puts_it_out(case):
    """For every family, compiled or not, one shift for the batch or one per image."""
    net, cond, io = tiny_network(case)
    x, layer = io["x__2"], net.noise_embedding
    shifts = torch.randn(2, layer.out_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, expected = net(x, 2.0, **cond), []
        for shift in shifts:
            layer.bias.add_(shift)
            expected.append(net(x, 2.0, **cond))
            layer.bias.sub_(shift)
        each = torch.cat([expected[0][:1], expected[1][1:]])
        sigma = torch.full((2,), 2.0)
        assert relative_error(expected[0], before) > 1e-3
        assert relative_error(call_shifted(net, shifts[:1], x, 2.0, **cond), expected[0]) < 1e-4
        assert relative_error(call_shifted(net, shifts, x, sigma, **cond), each) < 1e-4
        assert relative_error(net(x, 2.0, **cond), before) < 1e-4 and not layer._forward_hooks
        if case == "sd_cfg_kl":
            graphs = watched(net)
            assert relative_error(call_shifted(net, shifts[:1], x, 2.0, **cond), expected[0]) < 1e-4
            assert relative_error(net(x, 2.0, **cond), before) < 1e-4 and len(graphs) == 2
            assert relative_error(call_shifted(net, shifts, x, sigma, **cond), each) < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_shifts_of_blocks_are_shifts_of_their_biases(case):
    """For every family: offsets of the noise embedding and of what each block makes of it."""
    net, cond, io = tiny_network(case)
    x, layers = io["x__2"], shifted_layers(net, True)
    assert len(layers) > 4 and len(set(map(id, layers))) == len(layers)
    widths, generator = [layer.out_features for layer in layers], torch.Generator().manual_seed(0)
    shifts = torch.randn(2, sum(widths), generator=generator)
    with torch.no_grad():
        before, expected = net(x, 2.0, **cond), []
        for shift in shifts:
            for sign in (1, -1):
                for layer, part in zip(layers, shift.split(widths), strict=True):
                    layer.bias.add_(sign * part)
                expected += [net(x, 2.0, **cond)] if sign == 1 else []
        each = torch.cat([expected[0][:1], expected[1][1:]])
        assert relative_error(call_shifted(net, shifts[:1], x, 2.0, **cond), expected[0]) < 1e-4
        assert relative_error(call_shifted(net, shifts, x, torch.full((2,), 2.0), **cond), each) < 1e-4
        first = call_shifted(net, shifts[:1, : widths[0]], x, 2.0, **cond)  # of the noise embedding alone
        assert relative_error(expected[0], first) > 1e-3 and relative_error(first, before) > 1e-3
        assert relative_error(net(x, 2.0, **cond), before) < 1e-4 and not any(layer._forward_hooks for layer in layers)
        if case == "sd_cfg_kl":
            watched(net)
            assert relative_error(call_shifted(net, shifts[:1], x, 2.0, **cond), expected[0]) < 1e-4


@pytest.mark.slow
def test_classifier_guidance_is_refused_in_one_line():
    net, cond, io = tiny_network("adm_guided", "cg")
    watched(net)
    with pytest.raises(UserError, match="torch.compile failed .* leave --compile out"):
        net(io["x__2"], 1.0, **cond)


def test_distillation_and_sampling_with_a_predictor():
    """Gradients pass the compiled network; any batch size uses the first graphs."""
    plain, net = create_model("digits"), create_model("digits")
    graphs = watched(net)
    gradients = []
    for network in (plain, net):
        torch.manual_seed(0)
        predictor = AMEDPredictor(num_steps=3, scale_dir=0.1, scale_time=0.1)
        loss = DistillationLoss(network, predictor.config)
        x = SeededGenerators(range(4)).randn([1, 32, 32]) * loss.sigma_max
        targets = loss.teacher_trajectory(x)
        for step in range(2):
            error, x = loss.student_step(predictor, x, step, targets[step])
            error.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in predictor.parameters()]))
    assert relative_error(gradients[1], gradients[0]) < 1e-3 and gradients[0].abs().max() > 0
    assert len(graphs) == 2  # without and with gradients

    def images(network, batch):
        parts = []
        for start in range(0, 4, batch):
            noise = SeededGenerators(range(start, min(start + batch, 4))).randn([1, 32, 32])
            parts.append(sample(network, noise, solver="amed", num_steps=3, predictor=predictor))
        return torch.cat(parts)

    expected = images(plain, 4)
    assert all(relative_error(images(net, batch), expected) < 1e-3 for batch in (4, 3, 1))
    assert len(graphs) == 2


def test_memory_format():
    net = create_model("digits")

    def weight():
        return net.model.enc["32x32_block0"].conv0.weight

    assert weight().is_contiguous(memory_format=torch.channels_last) and not weight().is_contiguous()
    before = weight().clone()
    prepare_network(net, channels_last=False)
    assert weight().is_contiguous() and torch.equal(weight(), before)
    prepare_network(net)  # the CPU's default
    assert weight().is_contiguous(memory_format=torch.channels_last) and not weight().is_contiguous()
    prepare_network(net, amp="bf16")
    assert weight().is_contiguous()


@pytest.mark.parametrize("case", CASES)
def test_memory_formats_agree(case):
    net, cond, io = tiny_network(case)
    with torch.no_grad():
        results = [prepare_network(net, channels_last=choice)(io["x__2"], 1.0, **cond) for choice in (False, True)]
    assert relative_error(*results) < 3e-5


@pytest.mark.parametrize("case", ["edm_song_uncond", "adm_guided", "ldm_uncond_vq"])
def test_amp_surrounds_the_network_only(case):
    net, cond, io = tiny_network(case)
    prepare_network(net)
    with torch.no_grad():
        exact = net(io["x__2"], 1.0, **cond)
        mixed = prepare_network(net, amp="bf16")(io["x__2"], 1.0, **cond)
        assert mixed.dtype == torch.float32 and 1e-4 < relative_error(mixed, exact) < 0.1
        assert torch.equal(prepare_network(net)(io["x__2"], 1.0, **cond), exact)


class OwnNetwork(Denoiser):
    """A user's network without mixed precision: the posterior mean of N(0, 1)."""

    img_channels, img_resolution = 1, 4

    def forward(self, x, sigma):
        return x / (1 + torch.as_tensor(sigma, dtype=x.dtype) ** 2)


def test_amp_is_refused_for_a_network_that_cannot_do_it():
    net = prepare_network(OwnNetwork())  # create_model does this before the command lines do
    with pytest.raises(UserError, match="--amp=bf16 is not available for this network; use --amp=none"):
        prepare_network(net, amp="bf16")
    net.dataset_name = "mine"
    with pytest.raises(UserError, match="--amp=fp16 is not available for mine"):
        prepare_network(net, amp="fp16")


@pytest.mark.parametrize("case", CASES)
def test_every_network_has_the_members_of_the_interface(case):
    net, _, _ = tiny_network(case)
    assert all(hasattr(net, name) for name in Denoiser.__annotations__)
    assert net.can_autocast and net.autocast is None and net.dataset_name is None
    assert net.takes_prompts == (case == "sd_cfg_kl")


def test_any_callable_is_a_network():
    """A plain function lacks all members: it gets the interface's defaults, and samples."""

    def net(x, sigma):
        return x / (1 + sigma**2)

    assert member(net, "evals_per_call") == 1 and member(net, "weights_hash") is None
    assert member(net, "make_cond")(None) == {} and member(net, "takes_prompts") is False
    assert member(net, "noise_embedding") is None and member(net, "decode")(3) == 3
    latents = torch.ones(1, 1, 4, 4, dtype=torch.float64)
    sigmas = torch.logspace(1, -2, 400, dtype=torch.float64)
    x, info = sample(net, latents, solver="heun", sigmas=sigmas, return_info=True)
    exact = 10 * ((1 + 0.01**2) / (1 + 10**2)) ** 0.5  # the flow of N(0, 1) scales x by sqrt(1 + sigma^2)
    assert info.nfe == 2 * 399 and torch.allclose(x, torch.full_like(x, exact), rtol=1e-4)


@pytest.mark.parametrize(("case", "std"), [("edm_song_uncond", 0.5), ("cm_classcond", 0.5), ("adm_guided", None)])
def test_scalings_give_the_network_inputs_and_targets_of_unit_variance(case, std):
    """Karras et al. 2022, App. B.6, eq. 113 and 119. std of the data; None: the target is noise."""
    net, _, _ = tiny_network(case)
    sigma = torch.logspace(-2, 1.5, 20).reshape(-1, 1, 1, 1)
    c_skip, c_out, c_in, _ = net.scalings(sigma)
    variance = 1 if std is None else std**2
    torch.testing.assert_close(c_in**2 * (variance + sigma**2), torch.ones_like(sigma))
    if std is None:  # D = x - sigma noise is the image, for x = image + sigma noise
        assert c_skip == 1 and torch.equal(c_out, -sigma)
    else:
        target = ((1 - c_skip) ** 2 * variance + c_skip**2 * sigma**2) / c_out**2
        torch.testing.assert_close(target, torch.ones_like(sigma))


def test_classes_may_be_given_by_position():
    for case in ("edm_song_cond", "cm_classcond", "adm_guided"):
        net, cond, io = tiny_network(case)
        with torch.no_grad():
            assert torch.equal(net(io["x__2"], 1.0, cond["class_labels"]), net(io["x__2"], 1.0, **cond))


@pytest.mark.parametrize(
    ("options", "message"), [({"amp": "fp8"}, "amp=fp8"), ({"compile_mode": "fast"}, "compile=fast")]
)
def test_refused(options, message):
    with pytest.raises(UserError, match=message):
        prepare_network(create_model("digits"), **options)


@pytest.mark.slow
def test_generated_code_agrees_with_the_network():
    """With the real compiler: minutes on a slow core."""
    net, plain = prepare_network(create_model("digits"), compile_mode="default"), create_model("digits")
    x = SeededGenerators(range(4)).randn([1, 32, 32])
    with torch.no_grad(), read_bottleneck(net) as found, read_bottleneck(plain) as expected:
        assert relative_error(net(x, 1.0), plain(x, 1.0)) < 1e-4
        assert relative_error(found.read(4), expected.read(4)) < 1e-4
