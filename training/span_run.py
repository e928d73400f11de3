"""A run that trains a span solver: its start, its teacher pairs, its folder."""

import copy
import math
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from models.denoiser import member, shifted_layers
from models.inputs import draw_condition, draw_inputs
from solvers.span_heads import SHIFTS
from solvers.span_table import SpanSolver
from torch_utils import distributed
from torch_utils.distributed import on_main
from torch_utils.errors import UserError
from torch_utils.memory import AUTO, explained_oom
from torch_utils.progress import progress_bar
from training.checkpoint import save_predictor
from training.options import SpanOptions, grid_sigmas
from training.run import (
    Run,
    check_state,
    fitting_batch_gpu,
    hash_of_pool,
    iterations_of,
    numbers,
    prepare,
    provenance_of,
    restore,
    working_folder,
)
from training.run_folder import newest_state
from training.sample_loss import PairLoss
from training.span_trainer import PATIENCE, STATISTICS, SpanTrainer, measure
from training.teacher import TeacherSet, file_of, identity_of, teacher_set
from training.trainer import NotFinite

FINALISTS = 3  # starts that are trained briefly before one is chosen


def head_sizes(net, options: SpanOptions) -> dict:
    """The sizes of the heads that depend on the network."""
    heads, width = options.head_names(), None
    if not heads:
        return {}
    if set(heads) & set(SHIFTS):
        width = sum(layer.out_features for layer in shifted_layers(net, "blocks" in heads))
    return {"img_channels": net.img_channels, "embedding_width": width}


def probe_memory(net, options: SpanOptions, ends: tuple, prompts, device, batch_gpu: int) -> None:
    """Uses the memory of an iteration for one network call, without learning."""
    shape = [net.img_channels, net.img_resolution, net.img_resolution]
    student = options.make_student(*ends, **head_sizes(net, options), image_shape=shape)
    student.heads.to(device)
    latents, cond = draw_inputs(net, range(batch_gpu), prompts, device=device)
    x = student.run(net, latents, cond, checkpointing=options.checkpointing)
    PairLoss(options.loss, net, options.feature_sigma)(x, latents, cond).sum().backward()


def choose_start(net, options: SpanOptions, pairs: TeacherSet, ends: tuple, chunk: int, total: int, say) -> SpanSolver:
    """The untrained solver to start from.

    Picks the ``options.starts`` with the least loss on the first init_pairs pairs, and of these the
    one that is best after a short training (``try_finalists``).

    total: iterations of the run.
    say: function that receives the scores as text.
    """
    pair_loss = PairLoss(options.loss, net, options.feature_sigma)
    starts, indices = options.starts(), pairs.train[: options.init_pairs]
    gaussian = _data_gaussian(net, options, ends, pairs.prompts, chunk)
    results = []
    bar = progress_bar(len(starts), unit="start", disable=len(starts) == 1 or None, leave=False)
    for base, grid in starts:
        bar.update()
        more = {"image_shape": list(gaussian["mean"].shape)} if gaussian else {}
        more |= head_sizes(net, options)
        if base is not None:
            more["base"] = base
        if grid is not None:
            more["sigmas"] = grid_sigmas(grid, options.num_steps, *ends, net)
        try:
            student = options.make_student(*ends, **more)
        except UserError:
            if len(starts) == 1:
                raise
            continue  # for example, two levels of this grid coincide
        student.load_state_dict(gaussian, strict=False)
        student.heads.to(pairs.device)
        loss = measure(net, student, pairs, indices, pair_loss, chunk)[0] if len(starts) > 1 else 0.0
        results.append((loss, len(results), f"{base or 'preset'}@{grid or 'given'}", student))
    bar.close()
    if not results:
        raise UserError(f"--init={options.init}: none of its starts is possible with num_steps={options.num_steps}")
    results.sort(key=lambda result: result[:2])
    if not math.isfinite(results[0][0]):
        raise UserError("no start of the student has a finite loss: check the network, or --amp=none")
    if len(results) > 1:
        say("starts: " + ", ".join(f"{name} {loss:.4g}" for loss, _, name, _ in results))
    finalists = [(name, student) for loss, _, name, student in results[:FINALISTS] if math.isfinite(loss)]
    if len(finalists) == 1 or not options.init_trial:
        return finalists[0][1]
    return try_finalists(net, options, pairs, finalists, math.ceil(options.init_trial * total), say)


def try_finalists(net, options: SpanOptions, pairs: TeacherSet, finalists: list, iterations: int, say) -> SpanSolver:
    """The untrained start that is best in validation after a short training.

    finalists: (name, solver) pairs.
    iterations: length of the training.

    Solvers with equal errors before training may differ much after it, and a few iterations show
    this.
    """
    short = replace(options, warmup=min(options.warmup, iterations // 4))
    results = []
    for name, student in finalists:
        trainer = SpanTrainer(net, copy.deepcopy(student), pairs, short, iterations, pairs.device)
        if trainer.distribution is None:  # it would need features of the untrained solver
            trainer.first = (math.nan, math.nan)  # skips the first validation
        try:
            for _ in range(iterations):
                trainer.iterate()
        except NotFinite:
            trainer.best["value"] = math.inf
        results.append((trainer.best["value"], len(results), name, student))
    results.sort(key=lambda result: result[:2])
    say(f"after {iterations} iterations: " + ", ".join(f"{name} {value:.4g}" for value, _, name, _ in results))
    return results[0][-1]


def _data_gaussian(net, options: SpanOptions, ends: tuple, prompts, batch: int) -> dict:
    """Mean and variance of the data for the first step, measured by one process; {}: not needed."""
    student = options.make_student(*ends)
    if student.config["first_step"] != "gaussian":
        return {}

    def measured():
        make_cond = partial(draw_condition, net, prompts=prompts)
        student.measure_gaussian(net, batch=batch, make_cond=make_cond)
        return {name: student.state_dict()[name].cpu() for name in ("mean", "variance")}

    return on_main(measured)


class SpanRun(Run):
    """The training of a span solver in a folder."""

    columns = STATISTICS

    def sample(self, latents, cond):
        return self.trainer.best_student().sample(self.trainer.net, latents, cond=cond)

    def statistics(self) -> dict:
        return {"sigma": self.trainer.student.sigmas().tolist()}

    def save_result(self, progress: dict) -> None:
        trainer = self.trainer
        values = {"first": trainer.first[0], "best": trainer.best["value"], "best_iteration": trainer.best["iteration"]}
        provenance = {**self.provenance, **progress, "validation": values}
        on_main(save_predictor, trainer.best_student(), self.result_path, provenance)

    def failure_text(self, error: NotFinite) -> str:
        return (
            f"no finite gradient in {PATIENCE} iterations in a row, up to iteration {self.trainer.iteration + 1} "
            f"({self.kimg:g} kimg); the last good state is kept in {self.folder}: check the network, or start "
            "again with smaller --lrs or --amp=none"
        )

    def progress_text(self, latest: torch.Tensor) -> str:
        loss, (val, rms) = float(latest[0, 0]), self.trainer.validation  # validation is not smoothed, since it is rare
        return f"loss {loss:.4g} val {val:.4g} (first {self.trainer.first[0]:.4g}) rms {rms:.4g}"

    def describe(self, net) -> list[str]:
        options, trainer, world = self.options, self.trainer, distributed.world_size()
        config = trainer.student.config
        return [
            f"span solver ({options.preset}, base {config['base']}), teacher {options.sampler_tea}, on "
            f"{options.dataset_name} ({Path(net.source_path).name}), {config['num_steps']} time steps, "
            f"NFE {trainer.evaluations}, {_size(trainer.student)}",
            f"noise levels {numbers(trainer.student.sigmas().detach())}; seed {options.seed}",
            f"loss {options.loss}, {options.pairs} pairs, batch {options.batch} ({trainer.chunk} per call, {world} "
            f"processes), {self.total} iterations, {trainer.device}",
            f"rms: root mean square difference to the teacher per {'latent' if member(net, 'latent') else 'pixel'} value",
        ]


def train_span(options: SpanOptions | dict, device="cpu", run_dir=None, resume: bool = False, net=None) -> Path:
    """Trains a span solver. Returns its file, ``<folder>/predictor-<kimg>.safetensors``.

    The file holds the state with the best validation. Arguments and errors are those of
    ``train_predictor``.
    """
    with ExitStack() as locks:
        return _train_span(options, device, run_dir, resume, locks, net)


def _train_span(options: SpanOptions | dict, device, run_dir, resume: bool, locks: ExitStack, net) -> Path:
    """``train_span``; ``locks`` holds the lock of the folder."""
    device = torch.device(device)
    options = SpanOptions.from_dict(options) if isinstance(options, dict) else options
    options, net, prompts = prepare(options, device, net)
    options = options.resolved(net, prompts, device)
    ends = tuple(
        float(getattr(net, name) if getattr(options, name) is None else getattr(options, name))
        for name in ("sigma_min", "sigma_max")
    )
    if options.sigmas is not None:
        ends = (options.sigmas[-1], options.sigmas[0])
    options.make_student(*ends)  # checks the noise levels
    own_place = run_dir is not None or options.nosubdir  # check early that it is free
    folder = locks.enter_context(working_folder(options, net, run_dir, resume)) if own_place else None
    state = on_main(newest_state, run_dir) if resume else None  # None: killed before its first state
    if state is not None:
        check_state(options, state, net, run_dir)
    if options.batch_gpu == AUTO:
        share = options.batch // distributed.world_size()
        options.batch_gpu = fitting_batch_gpu(partial(probe_memory, net, options, ends, prompts, device), share, device)
    pairs = _pairs(net, options, ends, prompts, device, run_dir if resume else None)
    chunk = min(options.batch_gpu or options.batch, options.batch // distributed.world_size())
    total = iterations_of(options)
    lines: list[str] = []
    if state is None:
        with explained_oom(device, f"lower --batch-gpu (now {chunk})"):
            student = choose_start(net, options, pairs, ends, chunk, total, lines.append)
    else:
        student = _student_of(state, run_dir)
    trainer = SpanTrainer(net, student, pairs, options, total, device)
    names = ("seed", "batch", "amp", "tf32", "dtype", "objective", "loss", "sampler_tea", "num_steps_tea", "pairs")
    provenance = provenance_of(net, options, names)
    elapsed = 0.0
    if state is not None:
        elapsed = restore(trainer, options, state, net, run_dir)
    if folder is None:
        folder = locks.enter_context(working_folder(options, net, run_dir))
    run = SpanRun(trainer, options, folder, provenance, elapsed)
    trainer.report = run.log.say
    path = run.train(net, resume, lines)
    first, best = trainer.first[0], trainer.best
    run.log.say(f"validation {first:.4g} before, {best['value']:.4g} in the best state (iteration {best['iteration']})")
    return path


def _pairs(net, options: SpanOptions, ends, prompts, device, run_dir=None) -> TeacherSet:
    """The teacher pairs. run_dir: folder of a resumed run; a set beside it is used, too."""
    settings = options.teacher(*ends)
    more = {name: getattr(options, name) for name in ("guidance_type", "guidance_rate", "amp")}
    changed = {"tf32": options.tf32 or None, "dtype": None if options.dtype == "fp32" else options.dtype}
    more |= {name: value for name, value in changed.items() if value is not None}
    more |= hash_of_pool(options)
    path = options.teacher_set
    if path is None:
        places = [options.outdir, *([] if run_dir is None else [Path(run_dir).parent])]
        files = [file_of(Path(place) / "teacher-sets", identity_of(net, settings, more)) for place in places]
        path = next((file for file in files if file.is_file()), files[0])
    batch = options.batch_gpu or max(options.batch // distributed.world_size(), 1)
    return teacher_set(
        net, settings, path, more=more, prompts=prompts, batch=batch, device=device, log=distributed.print0
    )


def _student_of(state: dict, folder) -> SpanSolver:
    """The solver of a training state."""
    try:
        student = SpanSolver(**state["student_config"])
        student.load_state_dict(state["predictor"])
    except (TypeError, ValueError, ArithmeticError, KeyError, RuntimeError) as error:
        raise UserError(f"the training state in {folder} is not that of a span solver ({str(error)[:120]})") from None
    return student


def _size(student: SpanSolver) -> str:
    heads = sum(parameter.numel() for parameter in student.head_parameters())
    return f"{student.scalars()} scalars" + (f" and {heads} weights of heads" if heads else "")
