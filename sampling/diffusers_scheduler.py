"""AMEDScheduler: a trained predictor inside a pipeline of the diffusers library.

    from sampling.diffusers_scheduler import AMEDScheduler
    scheduler = AMEDScheduler.from_predictor("exps/00007-...", pipe.scheduler.config, pipe.unet)
    pipe.scheduler = scheduler
    image = pipe(prompt, num_inference_steps=len(scheduler), guidance_scale=7.5).images[0]

The solver is the one that ``sample`` runs. Its step yields the points where it needs the network;
here the pipeline calls the network there, and the step receives the answer. Any solver that can
learn works.

diffusers is optional: it is imported when ``AMEDScheduler`` is first used (``__getattr__`` below).
"""

import functools
from contextlib import ExitStack
from types import SimpleNamespace

import torch

from models.denoiser import BOTTLENECK_SIZE, add_shift, read_bottleneck
from solvers.sampler import Sampler, resolve_sigmas
from solvers.schedules import check_sigmas
from solvers.solver import SOLVERS, State, make_solver
from torch_utils.errors import UserError


class _NoBottleneck:
    """The reader of the time-only mode: zeros, for all samples together."""

    def read(self, batch):
        return torch.zeros(1, BOTTLENECK_SIZE, BOTTLENECK_SIZE)


class _Walk:
    """A run of a solver in which the caller evaluates the network.

    run: the ``Sampler``.
    x: noise [B,...] at its first noise level.

    ``point`` is the ``Point`` where the network is needed next. At the end of the schedule it is
    None, and ``state`` is the result.
    """

    def __init__(self, run: Sampler, x):
        self.run = run
        self._begin(State(x), 0)
        self._proceed()

    def _begin(self, state: State, i: int) -> None:
        """Starts the step from schedule point i."""
        self.state, self.interval = state, i
        self._step = self.run.solver.step(self.run, state, i)

    def _proceed(self, d=None) -> None:
        """Goes to the next point. d: direction [B,...] at the current one."""
        self.point = None
        while self.interval < self.run.intervals:
            try:
                request = self._step.send(d)
            except StopIteration as finished:
                self._begin(finished.value, self.interval + self.run.solver.stride(self.interval, self.run.intervals))
                d = None
                continue
            self._listed = isinstance(request, list)
            point = request[0] if self._listed else request  # one only: solvers of parallel points are refused
            d = self.run.known_direction(point)
            if d is None:
                self.point = point
                return

    @property
    def inside(self) -> bool:
        """Whether ``point`` lies inside an interval, not at its start."""
        return self.point.index is None

    def answer(self, denoised: torch.Tensor) -> None:
        """Goes to the next point. denoised: the denoised image [B,...] at the current one."""
        d = (self.point.x - denoised) / self.point.sigma
        self._proceed([d] if self._listed else d)

    def change(self, x) -> None:
        """Starts the current step again from another state [B,...]."""
        self._begin(State(x, self.state.history, self.state.updates), self.interval)
        self._proceed()


class _Network(SimpleNamespace):
    """What a ``Sampler`` needs from a network: noise range, map from time to noise level."""

    def __init__(self, process):
        super().__init__(
            sigma_min=process.sigma_min,
            sigma_max=process.sigma_max,
            sigma=lambda t: process.sigma(torch.as_tensor(t)),
            sigma_inv=lambda sigma: process.sigma_inv(torch.as_tensor(sigma)),
        )


def _solver_of(predictor):
    """The solver of a predictor. Raises UserError if a pipeline cannot run it."""
    settings, solver = predictor.config, getattr(predictor, "solver", None)
    if solver is not None:  # a SpanSolver
        if settings["parallel"] > 1:
            raise UserError("a pipeline evaluates one point at a time: only span solvers with parallel=1 can be used")
        return make_solver(solver)
    if settings["sampler_stu"] not in SOLVERS:
        raise UserError(f"the predictor was trained for an unknown solver '{settings['sampler_stu']}'")
    if settings["afs"] == "data":
        raise UserError("a predictor with afs='data' needs the statistics of the data, which a pipeline does not have")
    options = {name: settings[name] for name in SOLVERS[settings["sampler_stu"]].options if name in settings}
    return make_solver(settings["sampler_stu"], {k: v for k, v in options.items() if v is not None})


class _AMEDScheduler:
    """Scheduler for diffusers pipelines that samples with a trained AMED predictor or span solver.

    predictor: an AMEDPredictor, whose configuration gives the solver (AMED-Plugin on dpmpp, euler
        or ipndm, or amed), the noise levels and AFS; or a SpanSolver with parallel=1.
    config: configuration of the pipeline's own scheduler, which describes the network.
    network: the pipeline's U-Net or transformer, for the per-sample mode (see ``attach``). Default:
        None, the time-only mode, in which the predictor sees zeros instead of the bottleneck.

    Between the steps the latents are x / sqrt(1 + sigma^2) (variance-preserving process) or x / (1
    + sigma) (flow), at the noise level that the network is conditioned on next. After the last step
    they are x itself. The arithmetic is in float64 (float32 on MPS) for any precision of the
    pipeline. Raises UserError if the arguments do not go together.
    """

    order = 1  # one call of the network per step

    def __init__(self, predictor, config, network=None):
        super().__init__()
        self.solver = _solver_of(predictor)
        self.predictor = predictor
        # With use_flow_sigmas, a pipeline leaves the noise levels to its scheduler.
        flow = "base_image_seq_len" in config or bool(config.get("use_flow_sigmas"))
        self.register_to_config(**{**config, "use_flow_sigmas": flow})
        self._hooks: ExitStack | None = None
        self._reader = None
        self._own_call = False  # whether the network's latest call was for this scheduler
        self._run: Sampler | None = None
        self._sigmas: torch.Tensor | None = None
        self._walk: _Walk | None = None
        self.timesteps = None
        self.num_inference_steps = None
        if not config.get("use_dynamic_shifting"):  # otherwise the noise levels depend on the image size
            self._plan(None, "cpu")
        if network is not None:
            self.attach(network)

    @classmethod
    def from_predictor(cls, path, config, network=None):
        """The scheduler of a predictor.

        path: file, folder or experiment number.
        config, network: see ``AMEDScheduler``.
        """
        from training.checkpoint import find_predictor, load_predictor  # training is built on solvers

        return cls(load_predictor(find_predictor(path)), config, network)

    # Hooks on the network

    def attach(self, network) -> None:
        """Per-sample mode: the predictor reads the bottleneck, and every sample gets its own times.

        A pipeline passes one time for the whole batch. A hook on the network replaces it by the
        times of the samples; ``timesteps`` then shows their mean. The hook also makes AFS possible
        in pipelines that do not call scale_model_input. On networks without bottleneck
        (transformers) this is its only effect, and the mode stays time-only. The head "time" of a
        span solver adds to the embedding of the noise level. ``detach`` removes the hooks.

        network: the pipeline's U-Net or transformer.
        """
        if not isinstance(network, torch.nn.Module):
            raise UserError("AMEDScheduler: network has to be the pipeline's unet or transformer")
        self.detach()
        self._hooks = ExitStack()
        if getattr(network, "mid_block", None) is not None:
            self._reader = self._hooks.enter_context(read_bottleneck(SimpleNamespace(bottleneck=network.mid_block)))
        handles = [network.register_forward_pre_hook(self._before_call, with_kwargs=True)]
        if self._shifts:
            layer = getattr(getattr(network, "time_embedding", None), "linear_2", None)
            self.predictor.check_network(SimpleNamespace(noise_embedding=layer))
            handles.append(layer.register_forward_hook(self._add_shift))
        for handle in handles:
            self._hooks.callback(handle.remove)

    def detach(self) -> None:
        """Returns to the time-only mode, from the next set_timesteps on."""
        if self._hooks is not None:
            self._hooks.close()
        self._hooks = self._reader = self._run = None

    @torch.no_grad()
    def _before_call(self, module, arguments, named):
        """The hook: replaces the input of the first call with AFS, and the times of later calls."""
        self._own_call = False
        if self._run is None:
            return None
        place = "timestep" if "timestep" in named else 1
        given = float(torch.as_tensor(named[place] if place in named else arguments[1]).flatten()[0])
        # A pipeline that copied ``timesteps`` passes the planned time.
        self._own_call = given in (float(self.timesteps[self._index]), self._planned[self._index])
        if self._index == 0:
            if not self._run.afs or self._prepared == "by the pipeline":
                return None
            self._prepared = "by the hook"
            place = 0 if arguments else "sample" if "sample" in named else "hidden_states"
            return _replaced(arguments, named, place, self._first_input)
        if self._reader is None:
            return None
        x = arguments[0] if arguments else named["sample"]
        rows, batch = len(x), len(self._times)
        if not self._own_call or rows % batch:
            return None  # a call for something else
        times = self._times.to(x.device).repeat(rows // batch)  # under guidance the batch comes twice
        return _replaced(arguments, named, place, lambda _: times)

    @property
    def _shifts(self) -> bool:
        return "time" in getattr(self.predictor, "heads", {})

    def _add_shift(self, module, inputs, output):
        """The hook of the head "time"."""
        if self._run is None or not self._own_call:
            return output
        return add_shift(output, self.predictor.heads["time"](self._index, 1).to(output.device))

    # The protocol of diffusers

    def __len__(self) -> int:
        """Number of network evaluations, the only possible number of inference steps."""
        return self.predictor.evaluations()

    @property
    def init_noise_sigma(self) -> float:
        """Factor of the unit-variance noise that a pipeline starts from."""
        if self._sigmas is None:
            self.set_timesteps()
        return float(self._sigmas[0] * self.process.scale(self._sigmas[0]))

    def _make_run(self, device, reader) -> Sampler:
        settings, network = self.predictor.config, _Network(self.process)
        if self.solver.own_schedule:
            own = self.predictor.brings()
            sigmas = check_sigmas(own.pop("sigmas").detach(), device)
            return Sampler(network, self.solver, sigmas, predictor=self.predictor, **own)
        names = ("num_steps", "schedule_type", "schedule_rho", "sigma_min", "sigma_max", "sigmas")
        own = {name: settings[name] for name in names} | {"original_code": bool(settings.get("original_code"))}
        sigmas = resolve_sigmas(network, **own, device=device)
        run = Sampler(network, self.solver, sigmas, afs=settings["afs"], predictor=self.predictor.to(device))
        run.reader = reader or _NoBottleneck()
        return run

    @torch.no_grad()
    def _plan(self, mu, device) -> None:
        """Plans the times of the network's calls, with zeros for the bottleneck.

        They are exact in the time-only mode.
        """
        from models.diffusers import noise_process

        self.process = noise_process(self.config, mu=mu)
        run, config = self._make_run(device, None), self.predictor.config
        shape = config.get("image_shape") or (config.get("img_channels") or 1, 1, 1)  # of a span solver's images
        times, walk = [], _Walk(run, run.sigmas.new_ones(1, *shape))
        while walk.point is not None:
            times.append(self.process.timestep(walk.point.sigma_cond.to(torch.float32)).flatten()[0])
            walk.answer(torch.zeros_like(walk.point.x))
        self.timesteps = torch.stack(times)
        self.num_inference_steps = len(times)
        self._planned = self.timesteps.tolist()
        self._run = self._make_run(device, self._reader)
        self._sigmas = self._run.sigmas
        self._walk = None
        self._times = self.timesteps[:1]
        self._index = 0
        self._prepared: str | None = None  # who applied the first step of AFS to the network's input
        self._returned = None

    def set_timesteps(self, num_inference_steps: int | None = None, device=None, mu: float | None = None) -> None:
        """Starts a new batch.

        num_inference_steps: ``len(scheduler)`` or None; UserError for other numbers. Default None.
        device: where the pipeline samples. Default: the CPU.
        mu: shift of flow models whose pipeline computes one. Default None.
        """
        if num_inference_steps not in (None, len(self)):
            raise UserError(
                f"the predictor was trained for {len(self)} evaluations: pass num_inference_steps={len(self)}, "
                f"not {num_inference_steps}"
            )
        self._plan(mu, device or "cpu")

    def set_begin_index(self, begin_index: int = 0) -> None:
        if begin_index:
            raise UserError("AMEDScheduler runs its whole schedule: pipelines that start inside it cannot use it")

    def _begin(self, sample: torch.Tensor) -> None:
        """Goes to the first point for these latents."""
        dtype = torch.float32 if sample.device.type == "mps" else torch.float64  # MPS has no float64
        # Some pipelines do not pass their device to set_timesteps.
        self._run.sigmas = self._run.sigmas.to(sample.device, dtype)
        self.predictor.to(sample.device)
        self._walk = _Walk(self._run, sample.to(dtype) / self.process.scale(self._run.sigmas[0]))

    def _input(self) -> torch.Tensor:
        """The network's input [B,...] at the current point."""
        point = self._walk.point
        return point.x * self.process.scale(point.sigma_cond)

    def _first_input(self, sample: torch.Tensor) -> torch.Tensor:
        self._begin(sample)
        return self._input().to(sample.dtype)

    @torch.no_grad()
    def scale_model_input(self, sample: torch.Tensor, timestep=None) -> torch.Tensor:
        """The network's input [B,...] for the current latents.

        It equals the latents, except in the first call with AFS, which follows the analytical step.
        """
        self._require_run()
        if self._index > 0:
            return sample
        self._prepared = "by the pipeline"
        return self._first_input(sample)

    @torch.no_grad()
    def step(self, model_output, timestep, sample, generator=None, return_dict: bool = True):
        """The latents for the next call of the network.

        model_output: the network's output [B,...] for sample.
        timestep: not used.
        sample: the current latents [B,...].
        generator: not used, because nothing is random.
        return_dict: return a SchedulerOutput (default: True), else the tuple (prev_sample,).

        Raises UserError if the latents were changed from outside in the middle of an interval.
        """
        self._require_run()
        if self._index == 0:
            if self._shifts and self._hooks is None:
                raise UserError(
                    "the span solver's head 'time' acts inside the network: pass it to the scheduler (network=pipe.unet)"
                )
            if self._run.afs and self._prepared is None:
                raise UserError(
                    "the predictor was trained with AFS, and this pipeline does not call scale_model_input: pass the "
                    "pipeline's network to the scheduler (network=pipe.unet or pipe.transformer)"
                )
            self._begin(sample)
        elif sample is not self._returned and not torch.equal(sample, self._returned):
            if self._walk.inside:
                raise UserError(
                    "the latents were changed between two steps of an interval: AMEDScheduler cannot do that"
                )
            point = self._walk.point
            self._walk.change(sample.to(point.x.dtype) / self.process.scale(point.sigma_cond))
        walk = self._walk
        point = walk.point
        walk.answer(self.process.denoised(point.x, point.sigma_cond, model_output.to(point.x.dtype)))
        self._index += 1
        if walk.point is None:
            result = walk.state.x
            self._run = None
        else:
            result = self._input()
            self._times = self.process.timestep(walk.point.sigma_cond.to(torch.float32)).flatten()
            if self._reader is not None:
                # A pipeline iterates over views of this tensor, so it sees the new value.
                self.timesteps[self._index] = self._times.mean()
        self._returned = result = result.to(sample.dtype)
        if not return_dict:
            return (result,)
        return self.output_class(prev_sample=result)

    def add_noise(self, original_samples, noise, timesteps) -> torch.Tensor:
        """Clean latents [B,...] with noise [B,...] at the times timesteps [B]."""
        times = timesteps.to(original_samples.device, torch.float32)
        sigma = self.process.sigma_of_timestep(times).reshape(-1, *[1] * (original_samples.ndim - 1))
        return (self.process.scale(sigma) * (original_samples + sigma * noise)).to(original_samples.dtype)

    def _require_run(self) -> None:
        if self._run is None:
            raise UserError("AMEDScheduler: call set_timesteps before every batch")


def _replaced(arguments: tuple, named: dict, place, change) -> tuple[tuple, dict]:
    """The arguments of a call, with ``change`` applied to the one at ``place`` (number or name)."""
    if isinstance(place, int):
        return (*arguments[:place], change(arguments[place]), *arguments[place + 1 :]), named
    return arguments, {**named, place: change(named[place])}


@functools.cache
def _with_diffusers() -> type:
    """The class that pipelines accept: _AMEDScheduler with the base classes of diffusers."""
    from models.diffusers import import_diffusers

    diffusers = import_diffusers("AMEDScheduler")
    from diffusers.schedulers.scheduling_utils import SchedulerOutput

    content = {"__module__": __name__, "__doc__": _AMEDScheduler.__doc__, "output_class": SchedulerOutput}
    return type("AMEDScheduler", (_AMEDScheduler, diffusers.SchedulerMixin, diffusers.ConfigMixin), content)


def __getattr__(name):
    if name == "AMEDScheduler":
        return _with_diffusers()
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
