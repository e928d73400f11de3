"""Runs and their folders: commands in parallel, mixed settings, folders from strangers."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from toy import ToyNet

import clip_score
import compare
import fid
import optimize_schedule
import sample as cli
import train
from models import zoo
from sampling import run as run_module
from sampling.folder import _difference
from solvers import SOLVERS, sample
from solvers.schedule_file import Schedule
from solvers.schedules import check_sigmas, get_schedule
from solvers.search.problem import Problem
from tools import dataset_tool, demo, doctor, make_docs, model_statistics, train_classifier, train_denoiser
from torch_utils.cli import PathText
from torch_utils.errors import UserError
from torch_utils.locks import held, is_held, locked
from torch_utils.seeds import among, parse_ranges
from training.checkpoint import save_predictor
from training.options import AMEDOptions
from training.predictor import AMEDPredictor
from training.run_folder import RunLog
from training.schedule_search import optimize

PROGRAMS = {
    "sample": cli.main,
    "train": train.main,
    "fid": fid.main,
    "clip_score": clip_score.main,
    "compare": compare.main,
    "optimize_schedule": optimize_schedule.main,
    "dataset_tool": dataset_tool.main,
    "demo": demo.main,
    "make_docs": make_docs.main,
    "model_statistics": model_statistics.main,
    "train_classifier": train_classifier.main,
    "train_denoiser": train_denoiser.main,
    "doctor": doctor.main,
    "zoo": zoo.main,
}
EULER = ("--dataset_name=digits", "--solver=euler", "--device=cpu")


def commands():
    """(name, command) of all programs and their subcommands."""
    for name, program in PROGRAMS.items():
        yield from program.commands.items() if isinstance(program, click.Group) else [(name, program)]


def call(program, *arguments, code=0):
    done = CliRunner().invoke(PROGRAMS[program], [*map(str, arguments)])
    assert done.exit_code == code, done.output
    if code:
        (line,) = [line for line in done.output.splitlines() if line.startswith("Error")]
        return line
    return done


def seeds_of(folder: Path) -> set[int]:
    return {int(path.stem) for path in folder.rglob("[0-9]*.png")}


# --------------------------------------------------------------------------------------------------
# Noise levels


def noise(dtype=torch.float32):
    return torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("solver", [name for name, solver in SOLVERS.items() if not solver.needs_predictor])
@pytest.mark.parametrize("below", [9.999999999, 9.99999])
def test_noise_levels_that_float32_cannot_tell_apart(solver, below):
    """They gave NaN and images of 1e5: multistep solvers divide by their distance."""
    with pytest.raises(UserError, match="10.0 and 9.99999.* nearly coincide: float32"):
        sample(ToyNet(torch.float32), noise(), solver=solver, sigmas=[80, 10, below, 0.5, 0.002])


def test_precision_is_that_of_the_latents():
    sigmas = [80, 10, 9.99999, 0.5, 0.002]
    assert sample(ToyNet(), noise(torch.float64), solver="dpmpp", sigmas=sigmas).isfinite().all()
    with pytest.raises(UserError, match="nearly coincide: bfloat16"):
        sample(ToyNet(torch.bfloat16), noise(torch.bfloat16), solver="euler", sigmas=[80, 10, 9.99, 0.002])
    with pytest.raises(UserError, match="float32 cannot represent"):
        check_sigmas([1e39, 1.0])
    with pytest.raises(UserError, match="nearly coincide"):  # by the ends of the range
        sample(ToyNet(torch.float32), noise(), solver="dpmpp", num_steps=4, sigma_max=10, sigma_min=9.9999999)
    assert len(get_schedule(4, 9.9999999, 10)) == 4  # computed in float64


def test_every_entry_refuses_them(tmp_path):
    close = [80, 10, 9.999999999, 0.002]
    with pytest.raises(UserError, match="nearly coincide"):
        Schedule(close, "euler", "hand", 0.002, 80)
    predictor = AMEDPredictor(sigmas=close)
    with pytest.raises(UserError, match="nearly coincide"):
        sample(ToyNet(torch.float32), noise(), solver="amed", sigmas=predictor.config["sigmas"], predictor=predictor)
    text = ",".join(map(repr, close))
    assert "nearly coincide" in call("sample", *EULER, f"--sigmas={text}", f"--outdir={tmp_path / 'o'}", code=2)
    train_flags = ("--dataset_name=digits", f"--sigmas={text}", f"--outdir={tmp_path / 'o'}", "--device=cpu")
    assert "nearly coincide" in call("train", *train_flags, code=2)
    flags = ("--method=dmn", "--num_steps=4", "--sigma_max=10", "--sigma_min=9.9999999", f"--dest={tmp_path / 'o'}")
    assert "nearly coincide" in call("optimize_schedule", *EULER, *flags, code=2)
    assert not (tmp_path / "o").exists()


class Broken(ToyNet):
    def forward(self, x, sigma, **cond):
        return super().forward(x, sigma) * torch.nan


@pytest.mark.parametrize(
    ("method", "options"),
    [("gits", {"num_warmup": 2, "num_steps_tea": 5}), ("dmn", {})],
)
def test_searches_notice_a_network_that_breaks_down(method, options):
    assert optimize(Problem(ToyNet(), "euler", 4), "dmn").evaluations == 0  # what dmn needs of a network
    with pytest.raises(UserError, match="is not finite"):
        optimize(Problem(Broken(), "euler", 4), method, options)


# --------------------------------------------------------------------------------------------------
# Predictors

CALL = {"solver": "ipndm", "num_steps": 4, "max_order": 2, "afs": True, "schedule_type": "logsnr"}
TRAINED = {"sampler_stu": "ipndm", **{name: value for name, value in CALL.items() if name != "solver"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"max_order": None}, None),  # that of the training
        ({"num_steps": None, "sigmas": get_schedule(4, 0.002, 80, "logsnr").tolist(), "schedule_type": "x"}, None),
        ({"sigma_max": 80.0}, None),  # the network's
        ({"solver": "euler", "max_order": None}, "solver=euler: .* trained with solver=ipndm"),
        ({"num_steps": 5}, "num_steps=5: .* num_steps=4"),
        ({"max_order": 3}, "max_order=3: .* max_order=2"),
        ({"afs": False}, "afs=False: .* afs=True"),
        ({"schedule_type": "polynomial"}, "schedule_type=polynomial: .* schedule_type=logsnr"),
        ({"sigma_max": 70.0}, "sigma_max=70.0: .* sigma_max=None"),
        ({"num_steps": None, "sigmas": [80, 3, 1, 0.002]}, "sigmas=.80.0, 3.0"),
    ],
)
def test_a_predictor_is_used_as_it_was_trained(change, message):
    settings = CALL | change
    predictor = AMEDPredictor(**TRAINED, sigma_max=None)
    if message is None:
        own = sample(ToyNet(torch.float32), noise(), predictor=predictor, **CALL)
        assert torch.allclose(sample(ToyNet(torch.float32), noise(), predictor=predictor, **settings), own)
    else:
        with pytest.raises(UserError, match=message):
            sample(ToyNet(torch.float32), noise(), predictor=predictor, **settings)


def test_other_options_of_the_solver_count_too():
    predictor = AMEDPredictor(sampler_stu="dpm", num_steps=3)
    sample(ToyNet(torch.float32), noise(), solver="dpm", num_steps=3, predictor=predictor)
    trained = AMEDPredictor(sampler_stu="dpmpp", num_steps=3, thresholding=False)
    with pytest.raises(UserError, match="thresholding=True: .* thresholding=False"):
        sample(ToyNet(torch.float32), noise(), solver="dpmpp", num_steps=3, thresholding=True, predictor=trained)
    own = sample(ToyNet(torch.float32), noise(), solver="dpmpp", num_steps=3, predictor=trained)  # left out
    same = sample(ToyNet(torch.float32), noise(), solver="dpmpp", num_steps=3, thresholding=False, predictor=trained)
    assert torch.equal(own, same)
    sample(ToyNet(torch.float32), noise(), solver="euler", num_steps=9, predictor=AMEDPredictor())  # states nothing


# --------------------------------------------------------------------------------------------------
# One output folder


def test_locks(tmp_path):
    path = tmp_path / "a" / "x.lock"
    with held(path, "in use"):
        assert is_held(path)
        with pytest.raises(UserError, match="in use"), held(path, "in use"):
            pass
    assert not path.exists()
    path.write_bytes(b"")  # what a killed program leaves
    assert not is_held(path) and not path.exists()
    with locked(path, "waiting"):
        assert is_held(path)


def test_a_killed_holder_stops_nobody(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from torch_utils.locks import held\n"
        "with held(Path(sys.argv[1]), ''): print('held', flush=True); time.sleep(60)"
    )
    path = tmp_path / "x.lock"
    root = Path(__file__).resolve().parents[1]
    with subprocess.Popen([sys.executable, "-c", code, path], cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        assert is_held(path)
        process.kill()
        process.wait()
    assert path.exists() and not is_held(path)


@pytest.fixture
def during(monkeypatch):
    """during(action): calls it once while sample.py writes its images."""

    def install(action):
        write = run_module.write_images
        pending = [action]

        def write_images(*arguments, **named):
            if pending:
                pending.pop()()
            return write(*arguments, **named)

        monkeypatch.setattr(run_module, "write_images", write_images)

    return install


def test_two_commands_with_different_settings(tmp_path, during):
    flags = (*EULER, f"--outdir={tmp_path}")
    said = []
    during(lambda: said.append(call("sample", *flags, "--num_steps=4", "--seeds=4-5", "--overwrite=True", code=2)))
    call("sample", *flags, "--num_steps=3", "--seeds=0-3")
    assert "another command is writing images with other settings" in said[0] and "num_steps: 3 there, 4 now" in said[0]
    assert seeds_of(tmp_path) == {0, 1, 2, 3}
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["000000", "sampling.json"]


def test_two_commands_with_the_same_settings_and_different_seeds(tmp_path, during):
    flags = (*EULER, f"--outdir={tmp_path}")
    during(lambda: call("sample", *flags, "--num_steps=3", "--seeds=4-5"))
    call("sample", *flags, "--num_steps=3", "--seeds=0-1")
    assert seeds_of(tmp_path) == {0, 1, 4, 5}
    assert json.loads((tmp_path / "sampling.json").read_text())["seeds"] == "0-1,4-5"
    line = call("sample", *flags, "--num_steps=4", "--seeds=0-1", "--overwrite=True", code=2)
    assert "also holds seeds 4-5" in line  # no foreign images are left behind
    call("sample", *flags, "--num_steps=4", "--seeds=0-1,4-5", "--overwrite=True")
    assert seeds_of(tmp_path) == {0, 1, 4, 5}


def test_two_searches_in_one_folder_keep_all_choices(tmp_path, during):
    flags = (*EULER, f"--outdir={tmp_path}", "--num_steps=3", "--candidates=2", "--verifier=classifier")
    during(lambda: call("sample", *flags, "--seeds=1"))
    call("sample", *flags, "--seeds=0")
    lines = (tmp_path / "candidates.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["seed", "0", "1"]
    assert not list(tmp_path.glob("candidates.csv.*"))


def test_default_folders_of_different_images_are_distinct(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {"dataset_name": "digits", "num_steps": 3, "sampler_stu": "ipndm", "max_order": 4, "guidance_rate": 0.0}
    torch.manual_seed(0)
    save_predictor(AMEDPredictor(**config), "p.safetensors")
    runs = [
        ("--dataset_name=digits", "--solver=ipndm", "--num_steps=5"),
        ("--predictor_path=p.safetensors",),
        ("--dataset_name=digits", "--solver=ipndm", "--num_steps=5", "--schedule_type=logsnr"),
    ]
    folders = []
    for flags in runs:
        done = call("sample", *flags, "--seeds=0", "--device=cpu")
        folders.append(done.stdout.split("-> ")[1].strip())
        if len(folders) == 3:  # named after the settings, as the usual folder is taken
            assert 'schedule_type: "polynomial" there, "logsnr" now' in done.stderr and folders[2] in done.stderr
    assert folders[:2] == [str(Path(f"samples/digits/ipndm{kind}_nfe4")) for kind in ("", "-plugin")]
    assert len(set(folders)) == 3
    for flags, folder in zip(runs, folders, strict=True):  # the same command continues there
        done = call("sample", *flags, "--seeds=0", "--device=cpu")
        assert done.stdout.startswith("sampled 0 images (1 skipped) NFE=4 ") and done.stdout.endswith(f" -> {folder}\n")
    line = call("sample", *runs[1], f"--outdir={folders[0]}", "--seeds=0", "--device=cpu", code=2)
    assert "without a predictor there, with one now" in line


@pytest.mark.parametrize("change", [{"guidance_rate": 0.0}, {"guidance_type": "none"}, {"sigma_max": 80.0}])
def test_settings_without_effect_are_no_difference(change):
    old = {"sigmas": [80.0, 1.0], "guidance_rate": None, "guidance_type": None, "sigma_max": None, "solver": "euler"}
    assert _difference(old, old | change) == ""
    assert _difference(old, old | change | {"solver": "ipndm"}) == 'solver: "euler" there, "ipndm" now'
    assert _difference(old, old | {"sigmas": [70.0, 1.0], "sigma_max": 70.0}).startswith("sigma_max: null there, 70")


def test_a_record_of_many_seeds_is_bounded(tmp_path):
    started = time.perf_counter()
    call("sample", *EULER, f"--outdir={tmp_path}", "--seeds=0", "--num_steps=2")
    record = json.loads((tmp_path / "sampling.json").read_text())
    for seeds in ("0-99999999", ",".join(f"{k}00000000-{k}99999999" for k in range(1, 9))):
        (tmp_path / "sampling.json").write_text(json.dumps(record | {"seeds": seeds}))
        line = call("sample", *EULER, f"--outdir={tmp_path}", "--seeds=0", "--num_steps=2", code=2)
        assert "is not a record of sample.py" in line
    (tmp_path / "sampling.json").write_text(json.dumps(record | {"seeds": "0-9999999"}))  # only what is there counts
    call("sample", *EULER, f"--outdir={tmp_path}", "--seeds=0", "--num_steps=2")
    assert json.loads((tmp_path / "sampling.json").read_text())["seeds"] == "0"
    assert time.perf_counter() - started < 60
    with pytest.raises(UserError, match="more than 10000000 seeds"):
        parse_ranges("0-99999999")
    assert among([0, 3, 4, 9, 11], parse_ranges("9-10,0,2-3")) == [0, 3, 9]


def test_schedule_files_are_bounded():
    levels = get_schedule(20_000, 0.002, 80, "logsnr").tolist()
    with pytest.raises(UserError, match="sigmas has 20000 noise levels; at most 1000"):
        Schedule(levels, "euler", "hand", 0.002, 80)
    with pytest.raises(UserError) as refused:
        check_sigmas([*levels, 1.0])
    assert len(str(refused.value)) < 400


# --------------------------------------------------------------------------------------------------
# Other folders


@pytest.mark.parametrize(
    ("program", "flags", "lock"),
    [
        ("train", ("--dataset_name=digits", "--nosubdir", "--num_steps=3", "--batch=2", "--outdir={}"), ".lock"),
        ("optimize_schedule", (*EULER, "--method=dmn", "--num_steps=4", "--dest={}/s.json"), ".s.json.lock"),
    ],
)
def test_other_programs_hold_their_folder_too(tmp_path, program, flags, lock):
    with held(tmp_path / lock, ""):
        line = call(program, *(flag.format(tmp_path) for flag in flags), code=2)
        assert "another command" in line and "choose another" in line
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# Runs of strangers


def stranger(folder: Path, **options) -> Path:
    """A run folder as another person may send it."""
    folder.mkdir()
    record = {"dataset_name": "digits", "num_steps": 3, "batch": 2, "total_kimg": 0.004, **options}
    (folder / "training_options.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_path": "owner/pipeline", "dataset_name": "diffusers"}, "names model_path=owner/pipeline"),
        ({"tokenizer_path": "owner/tokenizer"}, "names tokenizer_path=owner/tokenizer"),
        ({"prompt_path": "coco30k", "dataset_name": "ms_coco"}, "names prompt_path=coco30k"),
        (
            {"objective": "final", "sampler_stu": "span", "loss": "huber", "teacher_set": "{}/evil"},
            "names teacher_set=",
        ),
        ({"dataset_name": "cifar10"}, "--resume without --dataset_name"),
    ],
)
def test_resume_obeys_no_addresses_of_the_folder(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    filled = {name: value.format(tmp_path) for name, value in options.items()}
    folder = stranger(tmp_path / "run", **filled)
    line = call("train", f"--resume={folder}", "--device=cpu", code=2)
    assert message in line
    assert not (tmp_path / "evil").exists()


def test_resume_writes_only_where_it_may(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = stranger(tmp_path / "run", outdir=str(tmp_path / "evil"))
    seen = []
    trained = {AMEDOptions: lambda options, *arguments, **more: seen.append(options.outdir)}
    monkeypatch.setattr(train, "TRAINERS", trained)
    call("train", f"--resume={folder}", "--device=cpu")
    call("train", f"--resume={folder}", "--device=cpu", f"--outdir={tmp_path / 'mine'}")
    assert seen == ["./exps", str(tmp_path / "mine")]
    (tmp_path / "precious").write_text("mine\n")
    (folder / "log.txt").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="is a link"):
        RunLog(folder).note("line")
    assert (tmp_path / "precious").read_text() == "mine\n"


def test_statistics_of_strangers_are_read_line_by_line(tmp_path):
    lines = ['{"iteration": 1}', "[" * 100_000, '{"iteration": 1' + "0" * 5000 + "}", '{"iteration": 3}', '{"itera']
    (tmp_path / "stats.jsonl").write_text("\n".join(lines))
    RunLog(tmp_path).rewind("iteration", 2)
    assert (tmp_path / "stats.jsonl").read_text() == '{"iteration": 1}\n'


# --------------------------------------------------------------------------------------------------
# All programs


@pytest.fixture
def interruptible():
    """A process that a shell has started in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("name", "command"), [pytest.param(*entry, id=entry[0]) for entry in commands()])
def test_ctrl_c_is_130_and_paths_may_begin_at_home(name, command, monkeypatch, interruptible):
    given = {}

    def interrupted(*arguments, **values):
        given.update(values)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(command, "callback", interrupted)
    monkeypatch.setenv("HOME", "/home/someone")
    paths = [param for param in command.params if is_path(param)]
    plain = [param for param in paths if param.name not in ("schedule", "path")]  # these are opened while parsing
    for param in command.params:
        monkeypatch.setattr(param, "required", False)
    flags = [f"{param.opts[0]}=~/x" for param in plain]
    done = CliRunner().invoke(command, flags)
    assert done.exit_code == 130, done.output
    assert "Interrupted by SIGINT" in done.output and "Traceback" not in done.output
    for param in plain:
        assert isinstance(param.type, PathText), param.name
        if param.name in given and given[param.name] is not None:
            assert "/home/someone/x" in str(given[param.name]), param.name


def is_path(param) -> bool:
    words = set(str(param.metavar or "").replace("|", ",").split(","))
    named = param.name in ("outdir", "dest", "data") or param.name.endswith("_path")
    return bool(words & {"DIR", "FILE", "PATH", "NPZ", "ZIP"}) or named
