"""The input of a search for noise levels: network, solver, seeds and the state of the run."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from models.inputs import draw_inputs, draw_noise
from solvers.sampler import afs_direction, resolve_sigmas
from solvers.solver import EXPONENTIAL_OPTIONS, SOLVERS, Solver, make_solver
from torch_utils import distributed
from torch_utils.distributed import together
from torch_utils.errors import UserError
from torch_utils.progress import progress_bar
from torch_utils.safe_pickle import safe_load
from torch_utils.seeds import SeededGenerators, stream_seeds
from torch_utils.tensor_file import write_state

SHARED_OPTIONS = ("max_order", *EXPONENTIAL_OPTIONS)  # the teacher uses them too


@dataclass
class Found:
    """Result of a method.

    sigmas: noise levels [N], decreasing.
    sigmas_cond: noise levels [N] to condition the network on. Default: sigmas.
    """

    sigmas: torch.Tensor
    sigmas_cond: torch.Tensor | None = None


@dataclass
class Problem:
    """The network and solver that a schedule is wanted for.

    net: the denoiser.
    solver: name of the solver.
    num_steps: number of time steps of the schedule.
    options: options of the solver that were set. Default: none.
    sigma_min, sigma_max: ends of the schedule. Default: those of the network.
    afs: kind of the analytical first step. Default False.
    seed: of all random numbers. Default 0.
    batch: samples per network call. Default 64.
    labels: class of all samples. Default: None, drawn at random.
    prompts: of text-to-image networks; each sample draws one. Default None.
    negative_prompt: for the unconditional side. Default: that of the network.
    device: of the computation. Default: the CPU.
    state_path: file for the state of an interrupted method. Default: None, no file.
    make_fid_fn: function from (ref, detector, number of images) to a function from batches of
        decoded images [B,C,H,W] to their FID over all processes. Default: None, no FID.
    evaluations: network evaluations of this process, per sample, with those before a resume.
    seconds: time spent before a resume.
    identity: settings that a saved state must agree with, set by ``optimize``.
    """

    net: torch.nn.Module
    solver: str
    num_steps: int
    options: dict = field(default_factory=dict)
    sigma_min: float = None  # type: ignore[assignment]  # the network's, see below
    sigma_max: float = None  # type: ignore[assignment]
    afs: bool | str = False
    seed: int = 0
    batch: int = 64
    labels: int | None = None
    prompts: Sequence[str] | None = None
    negative_prompt: str | None = None
    device: torch.device | str = "cpu"
    state_path: Path | None = None
    make_fid_fn: Callable | None = None
    evaluations: int = 0
    seconds: float = 0.0
    identity: dict = field(default_factory=dict)

    def __post_init__(self):
        solver = self.make_solver()
        if solver.needs_predictor:
            raise UserError(f"the solver '{self.solver}' needs a trained predictor: choose a plain solver")
        if self.num_steps < 2:
            raise UserError(f"num_steps={self.num_steps}: a schedule needs at least 2 time steps")
        if self.batch < 1:
            raise UserError(f"batch={self.batch} must be at least 1")
        # The next calls give errors of the settings before anything is computed.
        if self.afs:
            afs_direction(
                self.net, torch.zeros(1, 1, 1, 1, device=self.device), torch.ones((), device=self.device), self.afs
            )
        self.sigma_min = self.net.sigma_min if self.sigma_min is None else self.sigma_min
        self.sigma_max = self.net.sigma_max if self.sigma_max is None else self.sigma_max
        sigmas = resolve_sigmas(self.net, 2, "logsnr", 1, self.sigma_min, self.sigma_max)
        if self.options:  # some of them name a file
            solver.setup(self.net, sigmas)
        self._started = time.perf_counter()

    def make_solver(self) -> Solver:
        """Make the solver with its options. Raises UserError for impossible ones."""
        return make_solver(self.solver, self.options)

    def shared_options(self, solver_tea: str) -> dict:
        """The options that a teacher takes from the solver."""
        teacher = SOLVERS[solver_tea]
        shared = {
            name: value for name, value in self.options.items() if name in SHARED_OPTIONS and name in teacher.options
        }
        if shared.get("max_order") is not None:
            shared["max_order"] = min(shared["max_order"], teacher.highest_order)
        return shared

    def batches(self, samples: int) -> list[list[int]]:
        """The seeds of ``samples`` samples, batch by batch.

        They differ from those of ``sample.py``, so that a schedule is not fitted to the images that
        evaluate it.
        """
        seeds = stream_seeds(self.seed, 0, samples)
        return [seeds[start : start + self.batch] for start in range(0, samples, self.batch)]

    def noise(self, seeds: list[int]) -> tuple[torch.Tensor, dict]:
        """Unit-variance noise [B,C,H,W] and cond of these seeds, float64 if the device has it."""
        dtype = torch.float32 if torch.device(self.device).type == "mps" else torch.float64
        more: dict[str, Any] = {"labels": self.labels, "negative_prompt": self.negative_prompt}
        latents, cond = draw_inputs(self.net, seeds, self.prompts, **more)
        return latents.to(self.device, dtype), cond

    def texts(self) -> dict:
        """The record of the prompts: the prompt, or the number of captions and their SHA-256."""
        if self.prompts is None:
            return {}
        digest = hashlib.sha256(json.dumps(list(self.prompts)).encode()).hexdigest()
        many = {"captions": len(self.prompts), "sha256": digest}
        return {"prompt": self.prompts[0] if len(self.prompts) == 1 else many, "negative_prompt": self.negative_prompt}

    def fresh_noise(self, seeds: list[int]) -> Callable[[], torch.Tensor]:
        """A source of noise [B,C,H,W] that depends on the seeds only and differs from ``noise``."""
        generators = SeededGenerators([stream_seeds(seed, 0, 1)[0] for seed in seeds])
        return lambda: draw_noise(self.net, generators)

    def teacher(self, solver_tea, num_steps_tea, schedule_type, schedule_rho, **more) -> dict:
        """Keywords of ``sample`` for a teacher, with this range and the SHARED_OPTIONS."""
        return {
            "solver": solver_tea,
            "num_steps": num_steps_tea,
            "schedule_type": schedule_type,
            "schedule_rho": schedule_rho,
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
            **more,
            **self.shared_options(solver_tea),
        }

    def mean_cost(self, samples: int, size: int, cost_of: Callable) -> torch.Tensor:
        """The mean of a cost over samples, float64 [size,size].

        samples: number of samples.
        size: rows and columns of the cost.
        cost_of: function from the seeds of a batch to its mean cost.

        The processes of torchrun share the batches. An interrupted run resumes after its last
        batch.
        """
        mine = self.batches(samples)[distributed.rank() :: distributed.world_size()]
        with together():
            state = self.load_state() or {"rounds": 0, "cost": torch.zeros(size, size, dtype=torch.float64)}
            total, done = state["cost"], state["rounds"]
            with self.progress(len(mine), "batch", done) as bar:
                for seeds in mine[done:]:
                    total, done = total + len(seeds) * cost_of(seeds), done + 1
                    self.save_state({"rounds": done, "cost": total})
                    bar.update()
        return torch.stack(distributed.gather_objects(total)).sum(0) / samples

    def progress(self, total: int, unit: str, done: int = 0) -> tqdm:
        return progress_bar(total, initial=done, unit=unit)

    # A long method saves its state and resumes from it. Every process of torchrun has its own.

    def load_state(self) -> dict | None:
        """The last state that ``save_state`` wrote in an interrupted run, or None."""
        path = self._state_file()
        if path is None or not path.exists():
            return None
        try:
            content = safe_load(path)
            identity, state = content["identity"], content["state"]
            evaluations, seconds = int(content["evaluations"]), float(content["seconds"])
        except (UserError, LookupError, TypeError, ValueError):
            raise UserError(f"cannot read {path}, the state of an interrupted run: delete it to start again") from None
        if identity != self.identity:
            name = next(n for n in (*self.identity, *identity) if identity.get(n) != self.identity.get(n))
            raise UserError(
                f"{path} is the state of an interrupted run with another {name} ({identity.get(name)} there,"
                f" {self.identity.get(name)} now): repeat that command, or delete the file to start again"
            )
        self.evaluations += evaluations
        self.seconds += seconds
        return state

    def save_state(self, state: dict) -> None:
        """Save a dict of tensors, numbers and strings for ``load_state``."""
        path = self._state_file()
        if path is None:
            return
        spent = {"evaluations": self.evaluations, "seconds": self.elapsed()}
        write_state(path, {"identity": self.identity, "state": state, **spent})

    def drop_state(self) -> None:
        path = self._state_file()
        if path is not None:
            path.unlink(missing_ok=True)

    def elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self._started

    def _state_file(self) -> Path | None:
        path = self.state_path
        return None if path is None else Path(path).with_name(f"{Path(path).name}.{distributed.rank()}")
