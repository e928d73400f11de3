"""AMEDScheduler: a trained predictor inside a pipeline of the diffusers library.

    from sampling.diffusers_scheduler import AMEDScheduler
    pipe.scheduler = AMEDScheduler.from_predictor("exps/00007-...", pipe.scheduler.config, pipe.unet)
    image = pipe(prompt, num_inference_steps=len(pipe.scheduler), guidance_scale=7.5).images[0]

The arithmetic is that of the sampling loop itself. The loop asks the network; here the pipeline does. So each interval is
computed by ``Solver.advance`` up to the evaluation that is not known yet; when the pipeline brings it, the interval is
computed again, one evaluation further. The rules cost nothing next to the network, and any rule that can learn works.

diffusers is optional: it is imported when ``AMEDScheduler`` is first asked for (Python calls ``__getattr__`` below).
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


class _Question(Exception):
    """The loop needs an evaluation that is not known yet: D(x; sigma)."""

    def __init__(self, x, sigma):
        super().__init__()
        self.x, self.sigma = x, sigma


class _Replay(Sampler):
    """A ``Sampler`` that is told the network's answers one at a time.

    reader: of the bottleneck, or None for the time-only mode, in which the predictor sees zeros and its outputs are the
    same for every sample.
    """

    def __init__(self, *arguments, reader=None, **options):
        super().__init__(*arguments, **options)
        self.reader = reader
        self.state: State | None = None
        self.interval = 0
        self._answers: list[torch.Tensor] = []  # of the current interval
        self._used = 0
        self._prediction: tuple | None = None  # of the current interval

    def denoise(self, x, sigma, copies=1, shift=None):  # one point per call; a hook on the network does the shift
        if self._used == len(self._answers):
            raise _Question(x, sigma)
        self._used += 1
        return self._answers[self._used - 1]

    def predict(self, x, i):
        if self._prediction is None:
            if self.reader is None or (i == 0 and self.afs):
                feature = x.new_zeros(1, BOTTLENECK_SIZE, BOTTLENECK_SIZE)
            else:
                feature = self.reader.read(len(x))
            outputs = self.predictor(feature, self.sigma(i, x), self.sigma(i + 1, x))
            # Some pipelines have packed latents, with less dimensions than images.
            self._prediction = tuple(value.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) for value in outputs)
        return self._prediction

    def proceed(self) -> _Question | None:
        """To the next evaluation that is needed; None at the end of the schedule, where ``state`` is the result."""
        while self.interval < self.intervals:
            self._used = 0
            try:
                self.state = self.advance(self.state, self.interval)
            except _Question as question:
                return question
            self.interval += self.solver.stride(self.interval, self.intervals)
            self._answers, self._prediction = [], None
        return None

    def start(self, x) -> _Question | None:
        """From the beginning, at the noise x; again where a pipeline asks twice for the input of its first call."""
        self.state, self.interval, self._answers, self._prediction = State(x), 0, [], None
        return self.proceed()

    @property
    def inside(self) -> bool:
        """Whether the evaluation that is asked for lies inside an interval, not at its start."""
        return bool(self._answers) or self._prediction is not None

    def answer(self, denoised: torch.Tensor) -> _Question | None:
        self._answers.append(denoised)
        return self.proceed()


class _Network(SimpleNamespace):
    """What the loop wants to know of a network: the noise levels it supports and those of its time steps."""

    def __init__(self, process):
        super().__init__(
            sigma_min=process.sigma_min,
            sigma_max=process.sigma_max,
            sigma=lambda t: process.sigma(torch.as_tensor(t)),
            sigma_inv=lambda sigma: process.sigma_inv(torch.as_tensor(sigma)),
        )


def _solver_of(predictor):
    """The rule that a predictor is for; UserError where a pipeline cannot run it."""
    settings, solver = predictor.config, getattr(predictor, "solver", None)
    if solver is not None:  # a student with a rule of its own
        if settings["parallel"] > 1:
            raise UserError("a pipeline asks the network for one point at a time: students with parallel=1 only")
        return make_solver(solver)
    if settings["sampler_stu"] not in SOLVERS:
        raise UserError(f"the predictor was trained for an unknown solver '{settings['sampler_stu']}'")
    if settings["afs"] == "data":
        raise UserError("a predictor with afs='data' needs the statistics of the data, which a pipeline does not have")
    options = {name: settings[name] for name in SOLVERS[settings["sampler_stu"]].options if name in settings}
    return make_solver(settings["sampler_stu"], {k: v for k, v in options.items() if v is not None})


class _AMEDScheduler:
    """Drop-in scheduler for diffusers pipelines that samples with a trained AMED predictor or span student.

    predictor: an AMEDPredictor; its configuration says which rule (AMED-Plugin on dpmpp, euler, ipndm, or amed), which
    noise levels and whether AFS. Or a SpanSolver with one call per stage; it needs no network, but for its head "time".
    config: that of the pipeline's own scheduler, which describes the network. network: the pipeline's U-Net for the
    per-sample mode, in which the predictor sees the bottleneck (see ``attach``); without it the predictor sees zeros
    (time-only mode). Raises UserError where these do not go together.

    The latents between the steps are those of the variance-preserving process, x / sqrt(1 + sigma^2), or of the flow,
    x / (1 + sigma), at the noise level that the network will be told; after the last step they are x itself. The
    arithmetic is in float64 (float32 on MPS), whatever the precision of the pipeline.
    """

    order = 1  # one call of the network per step

    def __init__(self, predictor, config, network=None):
        super().__init__()
        self.solver = _solver_of(predictor)
        self.predictor = predictor
        # Some pipelines look for their scheduler's settings; with use_flow_sigmas they leave the noise levels to it.
        flow = "base_image_seq_len" in config or bool(config.get("use_flow_sigmas"))
        self.register_to_config(**{**config, "use_flow_sigmas": flow})
        self._hooks: ExitStack | None = None
        self._reader = None
        self._own_call = False  # whether the network's latest call was for this scheduler
        self._run: _Replay | None = None
        self._sigmas: torch.Tensor | None = None
        self._question: _Question | None = None
        self.timesteps = None
        self.num_inference_steps = None
        if not config.get("use_dynamic_shifting"):  # else it takes the size of the image, which set_timesteps is told
            self._plan(None, "cpu")
        if network is not None:
            self.attach(network)

    @classmethod
    def from_predictor(cls, path, config, network=None):
        """The scheduler of a predictor file, folder or experiment number; the other arguments as for the constructor."""
        from training.checkpoint import find_predictor, load_predictor  # training is built on solvers

        return cls(load_predictor(find_predictor(path)), config, network)

    # Hooks on the network

    def attach(self, network) -> None:
        """Per-sample mode: the predictor reads the U-Net's bottleneck, and the U-Net gets the times of every sample.

        A pipeline passes one time for the whole batch. A hook puts the times of the samples in its place, so that batches
        are sampled exactly; ``timesteps`` then shows their mean. The hook also makes AFS possible in pipelines that do not
        call scale_model_input, which is its only effect on networks without bottleneck (transformers): they stay in the
        time-only mode. A student's head "time" shifts the embedding of the noise level. ``detach`` takes the hooks away.
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
        """Back to the time-only mode; takes effect with the next set_timesteps."""
        if self._hooks is not None:
            self._hooks.close()
        self._hooks = self._reader = self._run = None

    @torch.no_grad()
    def _before_call(self, module, arguments, named):
        """The hook: replaces the input of the first call under AFS, and the times of later calls in the per-sample mode."""
        self._own_call = False
        if self._run is None:
            return None
        place = "timestep" if "timestep" in named else 1
        given = float(torch.as_tensor(named[place] if place in named else arguments[1]).flatten()[0])
        # The planned time is what a pipeline passes that has copied ``timesteps``.
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
        """Evaluations of the network: the only number of inference steps that the predictor was trained for."""
        return self.predictor.evaluations()

    @property
    def init_noise_sigma(self) -> float:
        """What pipelines multiply unit-variance noise with."""
        if self._sigmas is None:
            self.set_timesteps()
        return float(self._sigmas[0] * self.process.scale(self._sigmas[0]))

    def _start(self, device) -> _Replay:
        settings, network = self.predictor.config, _Network(self.process)
        if self.solver.own_schedule:
            own = self.predictor.brings()
            return _Replay(
                network, self.solver, check_sigmas(own.pop("sigmas").detach(), device), predictor=self.predictor, **own
            )
        names = ("num_steps", "schedule_type", "schedule_rho", "sigma_min", "sigma_max", "sigmas")
        sigmas = resolve_sigmas(
            network,
            **{name: settings[name] for name in names},
            device=device,
            original_code=bool(settings.get("original_code")),
        )
        predictor = self.predictor.to(device)
        return _Replay(network, self.solver, sigmas, afs=settings["afs"], predictor=predictor, reader=self._reader)

    @torch.no_grad()
    def _plan(self, mu, device) -> None:
        """The times of the network's calls, with zeros for the bottleneck; exact in the time-only mode."""
        from models.diffusers import noise_process

        self.process = noise_process(self.config, mu=mu)
        run = self._start(device)
        run.reader = None
        config = self.predictor.config
        shape = config.get("image_shape") or (config.get("img_channels") or 1, 1, 1)  # what a span student is made for
        times, question = [], run.start(run.sigmas.new_ones(1, *shape))
        while question is not None:
            times.append(self.process.time(question.sigma.to(torch.float32)).flatten()[0])
            question = run.answer(torch.zeros_like(question.x))
        self.timesteps = torch.stack(times)
        self.num_inference_steps = len(times)
        self._planned = self.timesteps.tolist()
        self._run = self._start(device)
        self._sigmas = self._run.sigmas
        self._question = None
        self._times = self.timesteps[:1]
        self._index = 0
        self._prepared: str | None = None  # who has put AFS's first step before the network
        self._returned = None

    def set_timesteps(self, num_inference_steps: int | None = None, device=None, mu: float | None = None) -> None:
        """Starts a new batch. num_inference_steps has to be ``len(scheduler)`` (or None); mu: the shift of flow models whose
        pipeline computes one. Raises UserError for other numbers of steps."""
        if num_inference_steps not in (None, len(self)):
            raise UserError(
                f"the predictor was trained for {len(self)} evaluations: pass num_inference_steps={len(self)}, "
                f"not {num_inference_steps}"
            )
        self._plan(mu, device or "cpu")

    def set_begin_index(self, begin_index: int = 0) -> None:
        if begin_index:
            raise UserError("AMEDScheduler runs its whole schedule: pipelines that start inside it cannot use it")

    def _begin(self, sample: torch.Tensor) -> _Question:
        """The first evaluation for these latents."""
        dtype = torch.float32 if sample.device.type == "mps" else torch.float64  # MPS has no float64
        # Some pipelines do not say their device in set_timesteps.
        self._run.sigmas = self._run.sigmas.to(sample.device, dtype)
        self.predictor.to(sample.device)
        return self._run.start(sample.to(dtype) / self.process.scale(self._run.sigmas[0]))

    def _first_input(self, sample: torch.Tensor) -> torch.Tensor:
        question = self._begin(sample)
        return (question.x * self.process.scale(question.sigma)).to(sample.dtype)

    @torch.no_grad()
    def scale_model_input(self, sample: torch.Tensor, timestep=None) -> torch.Tensor:
        """The network's input [B,...] for the current latents: themselves, but at the first step under AFS, which has
        taken a step without the network by then."""
        self._require_run()
        if self._index > 0:
            return sample
        self._prepared = "by the pipeline"
        return self._first_input(sample)

    @torch.no_grad()
    def step(self, model_output, timestep, sample, generator=None, return_dict: bool = True):
        """The latents [B,...] of the next call of the network from its output and the current ones.

        Returns a SchedulerOutput, or the tuple (prev_sample,). generator is not used: nothing here is random. Raises
        UserError if the latents were changed from outside in the middle of an interval.
        """
        self._require_run()
        run = self._run
        if self._index == 0:
            if self._shifts and self._hooks is None:
                raise UserError(
                    "the student's head 'time' acts inside the network: give it to the scheduler as well (network=pipe.unet)"
                )
            if run.afs and self._prepared is None:
                raise UserError(
                    "the predictor was trained with AFS, and this pipeline does not call scale_model_input: give the "
                    "scheduler the pipeline's network as well (network=pipe.unet or pipe.transformer)"
                )
            self._question = self._begin(sample)
        elif sample is not self._returned and not torch.equal(sample, self._returned):
            if run.inside:
                raise UserError(
                    "the latents were changed between two steps of an interval: AMEDScheduler cannot do that"
                )
            state = run.state
            x = sample.to(state.x.dtype) / self.process.scale(self._question.sigma)
            run.state = State(x, state.history, state.updates)
            self._question = run.proceed()
        question = self._question
        denoised = self.process.denoised(question.x, question.sigma, model_output.to(question.x.dtype))
        self._question = question = run.answer(denoised)
        self._index += 1
        if question is None:
            result = run.state.x
            self._run = None
        else:
            result = question.x * self.process.scale(question.sigma)
            self._times = self.process.time(question.sigma.to(torch.float32)).flatten()
            if self._reader is not None:
                # The times that a pipeline iterates over are views of this tensor: it sees the new value.
                self.timesteps[self._index] = self._times.mean()
        self._returned = result = result.to(sample.dtype)
        if not return_dict:
            return (result,)
        return self.output_class(prev_sample=result)

    def add_noise(self, original_samples, noise, timesteps) -> torch.Tensor:
        """Clean latents [B,...] with noise at these times [B]."""
        times = timesteps.to(original_samples.device, torch.float32)
        sigma = self.process.sigma_of_time(times).reshape(-1, *[1] * (original_samples.ndim - 1))
        return (self.process.scale(sigma) * (original_samples + sigma * noise)).to(original_samples.dtype)

    def _require_run(self) -> None:
        if self._run is None:
            raise UserError("AMEDScheduler: call set_timesteps before every batch")


def _replaced(arguments: tuple, named: dict, place, change) -> tuple[tuple, dict]:
    """The arguments of a call with one of them, given by its number or name, changed."""
    if isinstance(place, int):
        return (*arguments[:place], change(arguments[place]), *arguments[place + 1 :]), named
    return arguments, {**named, place: change(named[place])}


@functools.cache
def _with_diffusers() -> type:
    """The class that pipelines accept: the one above with the base classes of diffusers."""
    from models.diffusers import import_diffusers

    diffusers = import_diffusers("AMEDScheduler")
    from diffusers.schedulers.scheduling_utils import SchedulerOutput

    content = {"__module__": __name__, "__doc__": _AMEDScheduler.__doc__, "output_class": SchedulerOutput}
    return type("AMEDScheduler", (_AMEDScheduler, diffusers.SchedulerMixin, diffusers.ConfigMixin), content)


def __getattr__(name):
    if name == "AMEDScheduler":
        return _with_diffusers()
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
