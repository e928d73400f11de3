"""Memory, precision and processes on devices: what is recognised, refused and converted."""

import json
import threading
from contextlib import nullcontext

import pytest
import torch
import torch._inductor.cudagraph_trees  # noqa: F401  torch.compiler.reset() fails if it is the first to import it
import torch.distributed as dist
from pretend_device import OnDevice, PretendedDevice
from test_execution import tiny_network, watched

from models import create_model
from models.compile import choose_backends, choose_dtype, prepare_network
from models.denoiser import Denoiser, read_bottleneck
from models.diffusers import _first_stage_dtype
from sampling.generate import generate_fitting
from solvers.sampler import Sampler, sample
from solvers.solver import Point, make_solver
from solvers.span_table import SpanSolver
from tools.model_statistics import Derivative
from torch_utils import distributed
from torch_utils.errors import UserError
from torch_utils.memory import is_out_of_memory
from torch_utils.transfer import one_ahead
from training.amed_trainer import Distiller
from training.predictor import AMEDPredictor
from training.sample_loss import PairLoss
from training.trainer import loss_scale_of


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", True),
        ("MPS backend out of memory (MPS allocated: 17.9 GB)", True),
        ("Invalid buffer size: 24.00 GiB", True),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`", False),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_which_errors_say_that_memory_is_full(text, expected):
    assert is_out_of_memory(RuntimeError(text)) == expected


def test_two_processes_on_one_gpu_are_refused_before_they_exchange_anything():
    store, errors = dist.HashStore(), {}

    def process(rank, place):
        try:
            distributed.check_own_device(store, rank, 3, place)
        except UserError as error:
            errors[rank] = str(error)

    threads = [threading.Thread(target=process, args=(rank, place)) for rank, place in enumerate(("a/1", "b/1", "a/1"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert set(errors) == {0, 1, 2} and len(set(errors.values())) == 1
    assert errors[0].startswith("the processes 0 and 2 share one GPU of a:")


def test_precision_that_a_network_or_a_gpu_does_not_have_is_refused(monkeypatch):
    class Own(Denoiser):
        def forward(self, x, sigma):
            return x

    with pytest.raises(UserError, match="--amp=bf16 is not available"):
        prepare_network(Own(), "bf16")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(UserError, match="Tesla T4 cannot compute in bf16"):
        choose_dtype("bf16", torch.device("cuda"))
    assert choose_dtype("auto", torch.device("cuda")) == torch.float16
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    with pytest.raises(UserError, match="use --amp=fp16"):
        create_model("digits", dtype="fp16")


def test_a_first_stage_is_half_only_if_it_says_that_it_can_be(tmp_path):
    for content, expected in (
        ({"force_upcast": False}, torch.float16),
        ({"force_upcast": True}, torch.float32),
        ({}, torch.float32),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert _first_stage_dtype(tmp_path, torch.float16) == expected


def test_tf32_and_the_choice_of_algorithms_are_set():
    flags = (torch.backends.cuda.matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32")
    before = [getattr(*flag) for flag in flags], torch.backends.cudnn.benchmark
    try:
        for tf32, bench in ((True, False), (False, True)):
            choose_backends(tf32, bench)
            assert [getattr(*flag) for flag in flags] == [tf32, tf32]
            assert torch.backends.cudnn.benchmark == bench
    finally:
        choose_backends(before[0][0], before[1])
        torch.backends.cudnn.allow_tf32 = before[0][1]


class Conversions(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts conversions of weights, [O,I,...] or [O] on the CPU."""

    def __init__(self, weights):
        super().__init__()
        self.storages, self.count = {weight.untyped_storage().data_ptr() for weight in weights}, 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function is torch.ops.aten._to_copy.default:
            self.count += arguments[0].untyped_storage().data_ptr() in self.storages
        return function(*arguments, **(named or {}))


@torch.no_grad()
def test_mixed_precision_converts_weights_once():
    net = create_model("cifar10-small")
    x, sigma = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor(3.0)
    full = net(x, sigma)
    expected = dict(net.state_dict())
    net.autocast = torch.bfloat16  # what autocast does by itself
    wanted = net(x, sigma)
    prepare_network(net, "bf16", channels_last=True)
    with Conversions(net.parameters()) as seen:
        found = net(x, sigma)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert seen.count == 0
    norms = [name for name, value in net.named_parameters() if "norm" in name and value.dtype != torch.float32]
    assert not norms
    prepare_network(net)
    torch.testing.assert_close(net(x, sigma), full, rtol=0, atol=0)
    assert all(torch.equal(value, expected[name]) for name, value in net.state_dict().items())


class HalfConv(torch.nn.Module):
    img_channels, img_resolution = 3, 256

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.dtype = torch.nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False).to(dtype), dtype

    def forward(self, x):
        return self.conv(x.to(self.dtype)).float()


def test_the_gradient_of_a_mean_over_pixels_survives_float16():
    noise = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    target = torch.rand(noise.shape, generator=torch.Generator().manual_seed(2)) - 0.5

    def gradient(dtype, scaled):
        net, a = HalfConv(dtype), torch.tensor(0.3, requires_grad=True)
        scale = loss_scale_of(net) if scaled else 1.0
        loss = PairLoss("l2", None)(0.1 * net(a * noise) + 0.1 * target, 0.1 * target, {})
        (loss.sum() * scale).backward()
        return float(a.grad) / scale

    exact = gradient(torch.float32, False)
    assert gradient(torch.float32, True) == pytest.approx(exact, rel=1e-6)
    assert abs(gradient(torch.float16, True) / exact - 1) < 0.01
    assert abs(gradient(torch.float16, False) / exact - 1) > 0.05


def test_a_compiled_network_has_a_size_for_each_number_of_points():
    """Single calls of a solver with parallel points keep their number of rows."""
    net, _, io = tiny_network("edm_song_uncond")
    watched(net)
    rows = []
    net.compiled.graph = lambda x, *rest: rows.append(len(x)) or (x, torch.zeros(len(x), 8, 8))
    run = Sampler(net, make_solver("euler"), torch.tensor([80.0, 1.0, 0.1], dtype=torch.float64))
    x, sigma = io["x__2"], torch.tensor(2.0)
    with torch.no_grad():
        run.evaluate([Point(x, sigma), Point(x, sigma / 2)])
        run.evaluate(Point(x, sigma))
        run.evaluate(Point(x[:1], sigma))
    assert rows == [4, 2, 2]


@torch.no_grad()
def test_the_search_for_a_batch_forgets_compiled_sizes(monkeypatch):
    net, _, _ = tiny_network("edm_song_uncond")
    watched(net)
    own, rows = type(net).forward, []

    def forward(self, x, *rest, **named):
        rows.append(len(x))
        if len(x) > 2:
            raise RuntimeError("CUDA error: out of memory")
        return own(self, x, *rest, **named)

    def compiled(x, sigma, cond, shift):
        return forward(net, x, sigma, **cond), torch.zeros(len(x), 8, 8)

    monkeypatch.setattr(type(net.compiled), "_compile", lambda self: setattr(self, "graph", compiled))
    net.compiled._compile()
    settings = {"solver": "euler", "num_steps": 3, "sigma_min": net.sigma_min, "sigma_max": net.sigma_max}
    batches = list(generate_fitting(net, range(5), device=torch.device("cpu"), **settings))
    assert [len(batch.seeds) for batch in batches] == [2, 2, 1] and max(rows) == 5


class Recorded:
    """What a CUDA graph does: its results lie in the same memory in every call."""

    def __init__(self, function):
        self.function, self.memory, self.inputs = function, {}, set()

    def __call__(self, *inputs):
        leaves = torch.utils._pytree.tree_leaves(inputs)
        assert all(isinstance(value, OnDevice) for value in leaves if value is not None)
        self.inputs.add(
            tuple((tuple(value.shape), value.stride(), value.dtype) for value in leaves if value is not None)
        )
        found = self.function(*inputs)
        kept = self.memory.setdefault(len(inputs[0]), [value.clone() for value in found])
        return tuple(memory.copy_(value) for memory, value in zip(kept, found, strict=True))

    def begin(self):
        """A new step: what earlier ones have returned is lost."""
        for value in sum(self.memory.values(), []):
            value.fill_(float("nan"))


GRAPHS = {
    "ipndm": lambda: {"solver": "ipndm", "num_steps": 6},
    "unipc": lambda: {"solver": "unipc", "num_steps": 6},
    "amed": lambda: {"predictor": AMEDPredictor(num_steps=4, scale_dir=0.2, scale_time=0.2)},
    "span": lambda: {"predictor": SpanSolver.preset("full", num_steps=5, first_step="zero")},
    "span parallel": lambda: {"predictor": SpanSolver.preset("full", num_steps=4, first_step="zero", parallel=2)},
}


def arguments_of(case):
    torch.manual_seed(0)
    return GRAPHS[case]()


@pytest.mark.parametrize("case", GRAPHS)
@torch.no_grad()
def test_solvers_run_on_cuda_graphs(case, monkeypatch):
    """Solvers remember evaluations, and the next replay of a graph overwrites its results."""
    plain = tiny_network("edm_song_uncond")[0]
    noise = torch.randn(3, 3, plain.img_resolution, plain.img_resolution, generator=torch.Generator().manual_seed(0))
    expected = sample(plain, noise, **arguments_of(case))
    with PretendedDevice("cuda") as gpu:
        net = prepare_network(tiny_network("edm_song_uncond")[0].to("cuda"), compile_mode="reduce-overhead")
        net.compiled.graph = graph = Recorded(net.compiled._both)
        monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", graph.begin)
        arguments = arguments_of(case)
        if "predictor" in arguments:
            arguments["predictor"].to("cuda")
        gpu.clear()
        found = sample(net, noise.to("cuda"), **arguments)
        sample(net, noise.flip(0).to("cuda"), **arguments)  # the next batch, which is started before this one is read
        assert len(graph.inputs) == len(graph.memory) <= 2  # a graph for each number of points, and no other
        found = found.cpu()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_images_and_bottlenecks_of_cuda_graphs_are_kept(monkeypatch):
    plain, _, io = tiny_network("edm_song_uncond")
    results = []
    with PretendedDevice("cuda"):
        net = prepare_network(tiny_network("edm_song_uncond")[0].to("cuda"), compile_mode="reduce-overhead")
        net.compiled.graph = graph = Recorded(net.compiled._both)
        monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", graph.begin)
        for network, kind in ((plain, "cpu"), (net, "cuda")):
            x = io["x__2"].to(kind)
            with read_bottleneck(network) as reader:
                kept = [(network(x, torch.tensor(sigma)), reader.read(len(x))) for sigma in (2.0, 0.5)]
            results.append([value.cpu() for pair in kept for value in pair])
        assert len(graph.inputs) == 1  # whatever the noise level is
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["cpu", "mps"])
def test_cuda_graphs_are_refused_elsewhere(kind):
    with PretendedDevice("mps") if kind == "mps" else nullcontext():
        net = tiny_network("edm_song_uncond")[0].to(kind)
        with pytest.raises(UserError, match=f"records CUDA graphs, and the device is {kind}: use --compile=default"):
            prepare_network(net, compile_mode="reduce-overhead")
        assert net.compiled is None


def test_compilation_does_not_change_the_loss_of_features():
    plain, _, io = tiny_network("edm_song_uncond")
    net, _, _ = tiny_network("edm_song_uncond")
    watched(net)
    x = io["x__2"]
    expected, found = (PairLoss("features", network)(x, x.flip(0), {}) for network in (plain, net))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_forward_mode_works_with_fused_attention():
    net = prepare_network(create_model("cifar10-small"), channels_last=False)  # as on a GPU
    x, tangent = torch.randn(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    derivative, sigma = Derivative(net, "auto", "cuda"), torch.tensor(2.0)
    with torch.no_grad():
        found = derivative(x, sigma, tangent, torch.tensor(0.1), {})
        expected = Derivative(net, "finite", "cpu")(x, sigma, tangent, torch.tensor(0.1), {})
    assert derivative.used == "auto"
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.002)


def test_cached_trajectories_of_the_teacher_are_kept_on_the_host():
    config = {"sampler_stu": "amed", "sampler_tea": "heun", "num_steps": 3, "scale_dir": 0.01}
    results = []
    for cache in (None, 2):
        with PretendedDevice("cuda") as device:
            net = tiny_network("edm_song_uncond")[0].to("cuda")
            distiller = Distiller(net, config, batch=2, batch_gpu=1, seed=1, teacher_cache=cache, device="cuda")
            results.append(distiller.iterate().clone())
            tensors = torch.utils._pytree.tree_leaves(list(distiller._cached.values()))
            tensors = [value for value in tensors if isinstance(value, torch.Tensor)]
            assert bool(tensors) == bool(cache)
            assert not any(isinstance(value, OnDevice) for value in tensors)
            assert all(value.is_pinned() for value in tensors)
            device.clear()
            distiller.iterate()
            assert sum(device.waits.values()) <= 2
    torch.testing.assert_close(results[0], results[1])


def test_an_item_follows_when_the_next_one_is_made():
    made = []

    def items():
        for number in range(3):
            made.append(number)
            yield number
        raise UserError("the end")

    seen = []
    with pytest.raises(UserError):
        for item in one_ahead(items()):
            seen.append((item, len(made)))
    assert seen == [(0, 2), (1, 3), (2, 3)]
