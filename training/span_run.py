"""A run that trains a span solver: its start, its teacher pairs, its folder."""

import shlex
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from models.denoiser import member
from solvers.span_table import SpanSolver
from torch_utils import distributed
from torch_utils.distributed import on_main
from torch_utils.errors import UserError
from torch_utils.files import write_json
from torch_utils.memory import AUTO, explained_oom
from torch_utils.tensor_file import write_state
from training.checkpoint import save_predictor
from training.options import SpanOptions, has_features
from training.run import (
    Run,
    check_state,
    date,
    fitting_batch_gpu,
    hash_of_pool,
    iterations_of,
    numbers,
    prepare,
    provenance_of,
    restore,
    resume_command,
    working_folder,
)
from training.run_folder import OPTIONS_FILE, RunLog, newest_state, read_state
from training.sample_loss import SampleScore
from training.span_search import RESERVE, STATE_FILE, Clock, Search, batches, choose_start, probe
from training.span_trainer import PATIENCE, STATISTICS, SpanTrainer
from training.teacher import TeacherSet, file_of, identity_of, teacher_set
from training.trainer import NotFinite


class SpanRun(Run):
    """The training of a span solver in a folder.

    plain: the best plain solver, which has to be beaten: name, score, config, state. Default None.
    """

    columns = STATISTICS

    def __init__(self, trainer, options, folder, provenance, elapsed=0.0, plain: dict | None = None):
        super().__init__(trainer, options, folder, provenance, elapsed)
        self.plain, self._first_iteration = plain, trainer.iteration

    def result(self) -> SpanSolver:
        """The best solver: the trained one, or the plain one if training has not beaten it."""
        if self.beaten:
            return self.trainer.best_student()
        assert self.plain is not None
        student = SpanSolver(**self.plain["config"])
        student.load_state_dict(self.plain["state"])
        return student

    @property
    def beaten(self) -> bool:
        """Whether the trained solver is better than the best plain one, or there is none."""
        return self.plain is None or self.trainer.best["value"] < self.plain["score"]

    def sample(self, latents, cond):
        return self.result().sample(self.trainer.net, latents, cond=cond)

    def after_iteration(self, stopping: bool) -> None:
        if self.options.minutes is not None and self.trainer.iteration % self.options.val_every == 0:
            self._keep_time()
        super().after_iteration(stopping)

    def _keep_time(self) -> None:
        """Changes the number of iterations so that the run ends in time."""
        trainer, elapsed = self.trainer, self.elapsed
        pace = (elapsed - self._elapsed_before) / (trainer.iteration - self._first_iteration)
        more = int((60 * self.options.minutes * (1 - RESERVE / 2) - elapsed) / pace)
        trainer.total = self.total = trainer.iteration + distributed.broadcast_object(max(more, 0))
        self.options.total_kimg = self.total * self.options.batch / 1000

    def show(self, bar, statistics, seconds) -> None:
        bar.total = self.total
        super().show(bar, statistics, seconds)

    def more_state(self) -> dict:
        return {"plain": self.plain, "search": self.provenance.get("search")}

    def statistics(self) -> dict:
        return {"sigma": self.trainer.student.sigmas().tolist()}

    def save_result(self, progress: dict) -> None:
        trainer = self.trainer
        values = {"first": trainer.first[0], "best": trainer.best["value"], "best_iteration": trainer.best["iteration"]}
        if self.plain is not None:
            values |= {"plain": self.plain["score"], "saved": "trained" if self.beaten else self.plain["name"]}
        provenance = {**self.provenance, **progress, "validation": values}
        on_main(save_predictor, self.result(), self.result_path, provenance)

    def failure_text(self, error: NotFinite) -> str:
        return (
            f"no finite gradient in {PATIENCE} iterations in a row, up to iteration {self.trainer.iteration + 1} "
            f"({self.kimg:g} kimg); the last good state is kept in {self.folder}: check the network, or start "
            "again with smaller --lrs or --amp=none"
        )

    def on_failure(self, error: NotFinite) -> None:
        if self.plain is None:
            super().on_failure(error)
        self.log.say(f"Warning: {self.failure_text(error)}")
        self.save_result({"kimg": self.kimg, "iteration": self.trainer.iteration, "date": date()})

    def progress_text(self, latest: torch.Tensor) -> str:
        loss, (val, rms) = float(latest[0, 0]), self.trainer.validation  # validation is not smoothed, since it is rare
        return f"loss {loss:.4g} val {val:.4g} (first {self.trainer.first[0]:.4g}) rms {rms:.4g}"

    def describe(self, net) -> list[str]:
        options, trainer, world = self.options, self.trainer, distributed.world_size()
        config = trainer.student.config
        by_score = [] if self.plain is None else ["val: score, the mean distance to the teacher that compares solvers"]
        return [
            f"span solver ({options.preset}, base {config['base']}), teacher {options.sampler_tea}, on "
            f"{options.dataset_name} ({Path(net.source_path).name}), {config['num_steps']} time steps, "
            f"NFE {trainer.evaluations}, {_size(trainer.student)}",
            f"noise levels {numbers(trainer.student.sigmas().detach())}; seed {options.seed}",
            f"loss {options.loss}, {options.pairs} pairs, batch {options.batch} ({trainer.chunk} per call, {world} "
            f"processes), {self.total} iterations, {trainer.device}",
            f"rms: root mean square difference to the teacher per {'latent' if member(net, 'latent') else 'pixel'} value",
            *by_score,
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
    clock = None if options.minutes is None else Clock(options.minutes)
    options, net, prompts = prepare(options, device, net)
    chosen = options.to_choose()
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
    world = distributed.world_size()
    if options.batch_gpu == AUTO:
        share = (max(batches(world)) if "batch" in chosen else options.batch) // world
        options.batch_gpu = fitting_batch_gpu(partial(probe, net, options, ends, prompts, device), share, device)
    names = ("seed", "batch", "amp", "tf32", "dtype", "objective", "loss", "sampler_tea", "num_steps_tea", "pairs")
    lines: list[str] = []
    plain, elapsed, more = None, 0.0, {}
    if state is None and clock is not None:
        search = Search(net, replace(options, open=sorted(chosen)), ends, prompts, device, clock)
        folder, trainer = _search(search, folder, resume, locks)
        options, more = search.options, {"search": search.record()}
        best = search.plain[0]
        plain = {"name": best.name, "score": best.value, "config": dict(best.student.config)}
        plain["state"] = best.student.state_dict()
        elapsed = clock.elapsed()
    else:
        pairs = _pairs(net, options, ends, prompts, device, run_dir if resume else None)
        chunk, total = min(options.batch_gpu or options.batch, options.batch // world), iterations_of(options)
        score = None
        if state is None:
            with explained_oom(device, f"lower --batch-gpu (now {chunk})"):
                student = choose_start(net, options, pairs, ends, chunk, total, lines.append)
        else:
            student, plain, more = _student_of(state, run_dir), state.get("plain"), {"search": state.get("search")}
            if plain is not None:
                score = SampleScore(net, has_features(net, options.feature_sigma, prompts, device))
        trainer = SpanTrainer(net, student, pairs, options, total, device, score)
    provenance = provenance_of(net, options, names) | {name: value for name, value in more.items() if value is not None}
    if state is not None:
        elapsed = restore(trainer, options, state, net, run_dir)
    if folder is None:
        folder = locks.enter_context(working_folder(options, net, run_dir))
    run = SpanRun(trainer, options, folder, provenance, elapsed, plain)
    trainer.report = run.log.say
    path = run.train(net, resume, lines)
    first, best = trainer.first[0], trainer.best
    run.log.say(f"validation {first:.4g} before, {best['value']:.4g} in the best state (iteration {best['iteration']})")
    if plain is not None:
        text = f"the best plain solver, {plain['name']}, has {plain['score']:.4g}"
        if not run.beaten:
            text += ": training has not beaten it, so the file holds this plain solver, as a table"
        run.log.say(text)
        run.log.say(f"next: python sample.py --predictor_path={shlex.quote(str(path.parent))} --seeds=0-63 --grid")
    return path


def _search(search: Search, folder: Path | None, resume: bool, locks: ExitStack) -> tuple[Path, SpanTrainer]:
    """Chooses the settings. Returns the folder and the trainer for the rest of the time.

    folder: of the run. None: it is made as soon as the plan is possible.
    resume: the search may have begun earlier, in this folder.
    """
    clock, net = search.clock, search.net
    state = on_main(_search_state, folder) if resume else None
    if state is None:
        search.make_plan()
    else:
        clock.spent = state["elapsed"]
        search.load_plan(state)
    options = search.options
    if folder is None:
        folder = locks.enter_context(working_folder(options, net, None))
    log = RunLog(folder)
    log.say(search.describe_plan())
    record = {**options.to_dict(), "provenance": {"network_hash": net.weights_hash}}
    on_main(write_json, folder / OPTIONS_FILE, record)

    def save() -> None:
        on_main(write_state, folder / STATE_FILE, search.state())

    try:
        with explained_oom(search.device, f"lower --batch-gpu (now {options.batch_gpu or options.batch})"):
            pairs = _pairs(net, options, search.ends, search.prompts, search.device, folder if resume else None)
            if state is not None and state["plain"]:
                search.load_state(state, pairs)
            else:
                search.screen(pairs)
                save()
            shown = ", ".join(f"{one.name} {one.value:.4g}" for one in search.plain[:3])
            nfe = search.calls * member(net, "evals_per_call")
            log.say(f"best plain solvers with {nfe} evaluations, by score: {shown}")
            search.trials(pairs, save)
            for line in [*(search.table() if search.round else []), f"chosen: {search.why()}"]:
                log.say(line)
            return folder, search.finish(pairs)
    except KeyboardInterrupt:
        log.say(f"Interrupted; continue with: {resume_command(folder)}")
        raise


def _search_state(folder: Path) -> dict | None:
    """The state of an unfinished search; None if there is none."""
    path = Path(folder) / STATE_FILE
    return read_state(path, {"plan", "plain", "contenders", "elapsed"}) if path.is_file() else None


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
