"""train.py and sample.py on a miniature official checkpoint of every family, and refusals."""

import importlib.util
import itertools
import json
import re
import shlex
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers_pipelines import pipeline_folder
from latent_nets import tiny_case
from PIL import Image
from safetensors.torch import save_file
from small_world import adm_config, describe, write_adm, write_cm, write_latent, write_tokenizer

import compare as compare_cli
import optimize_schedule as optimize_cli
import sample as sample_cli
import train as train_cli
from evaluation.detectors import ConvClassifier, save_classifier
from evaluation.fid import calculate_fid
from evaluation.frechet import Reference
from models import create_model
from models.adm import load_adm
from models.cm import load_cm
from models.ldm import load_ldm
from models.sd import StableDiffusionDenoiser, load_sd
from solvers import sample
from solvers.schedule_file import load_schedule
from tools import compare_run as comparison
from tools import report as comparison_report
from torch_utils import distributed
from torch_utils.errors import UserError
from torch_utils.files import sha256_of
from torch_utils.images import to_uint8
from torch_utils.seeds import SeededGenerators
from training import run, span_search, trainer
from training.amed_trainer import Distiller
from training.checkpoint import load_predictor
from training.predictor import DEFAULTS
from training.run_folder import load_newest_state

TEXT = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs the package transformers")
SETTINGS = {  # dataset_name -> (solver, flags of the network, flags of the schedule, evaluations per call)
    "lsun_bedroom": ("ipndm", [], [], 1),
    "imagenet256": ("amed", ["--guidance_type=cg", "--guidance_rate=2"], [], 1),
    "lsun_bedroom_ldm": ("dpmpp", ["--guidance_type=uncond", "--guidance_rate=1"], ["discrete", "1"], 1),
    "ms_coco": ("dpmpp", ["--guidance_type=cfg"], ["discrete", "1"], 2),
}
EACH = [pytest.param(name, marks=TEXT if name == "ms_coco" else ()) for name in SETTINGS]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """dataset_name -> checkpoint with its description; also "tokenizer", "captions" and "table"."""
    folder = tmp_path_factory.mktemp("checkpoints")
    files = {
        "lsun_bedroom": folder / "edm_bedroom256_ema.pt",
        "imagenet256": folder / "adm" / "mine_diffusion.pt",
        "lsun_bedroom_ldm": folder / "model.ckpt",
        "ms_coco": folder / "v1-5-pruned-emaonly.ckpt",
        "tokenizer": folder / "tokenizer",
        "captions": folder / "captions.txt",
        "table": folder / "captions.csv",
    }
    (folder / "adm").mkdir()
    write_cm(files["lsun_bedroom"])
    write_adm(files["imagenet256"], "256x256_classifier.pt")
    write_latent(files["lsun_bedroom_ldm"], "ldm_uncond_vq", "ldm")
    write_latent(files["ms_coco"], "sd_cfg_kl", "sd")
    write_tokenizer(files["tokenizer"])
    files["captions"].write_text("a b\nc d\ne\na\n")
    files["table"].write_text("seed,caption\n5,a b\n7,c d\n")
    return files


def call(command, *arguments, ok=True) -> str:
    done = CliRunner().invoke(command, ["--device=cpu", *map(str, arguments)])
    if ok:
        assert done.exit_code == 0, done.output
        return done.output
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit), (done.output, done.exception)
    lines = done.output.strip().splitlines()
    assert lines[-1].startswith("Error: ") and sum("Error" in line for line in lines) == 1
    return lines[-1]


def network_flags(files, name: str, use: str) -> list:
    text = ["--prompt" if use == "sample" else "--prompt_path", files["captions"], "--tokenizer_path"]
    text = [*text, files["tokenizer"]] if name == "ms_coco" else []
    return [f"--model_path={files[name]}", *text]


def schedule_flags(name: str) -> list[str]:
    return [f"--schedule_{key}={value}" for key, value in zip(("type", "rho"), SETTINGS[name][2], strict=False)]


def pictures(folder) -> dict[int, np.ndarray]:
    found = {}
    for path in Path(folder).glob("*/*.png"):
        with Image.open(path) as image:
            found[int(path.stem)] = np.asarray(image).astype(int)
    return found


def train_flags(files, name: str, outdir) -> list:
    solver, guidance, _, _ = SETTINGS[name]
    teacher = "heun" if solver == "amed" else solver
    flags = [f"--dataset_name={name}", *network_flags(files, name, "train"), *guidance, *schedule_flags(name)]
    flags += ["--num_steps=2", "--M=1", "--batch=2", "--total_kimg=0.002", "--seed=0", f"--outdir={outdir}"]
    return [*flags, f"--sampler_stu={solver}", f"--sampler_tea={teacher}", "--scale_time=0.1"]


@pytest.mark.parametrize("name", EACH)
def test_train_then_sample(name, files, tmp_path):
    out = call(train_cli.main, *train_flags(files, name, tmp_path / "exps"))
    ((path, nfe),) = re.findall(r"trained (\S+) NFE=(\d+)", out)
    assert int(nfe) == SETTINGS[name][3] and f"-{name}-2-{nfe}-" in Path(path).parent.name  # AFS leaves one call
    config = load_predictor(path).config
    guidance = {"imagenet256": ("cg", 2), "ms_coco": ("cfg", 7.5), "lsun_bedroom_ldm": ("uncond", 1)}
    assert (config["guidance_type"], config["guidance_rate"]) == guidance.get(name, (None, 0))
    options = json.loads((Path(path).parent / "training_options.json").read_text())
    assert options["guidance_rate"] == config["guidance_rate"] and Path(options["model_path"]) == files[name].resolve()
    more = network_flags(files, name, "sample")
    out = call(
        sample_cli.main, f"--predictor_path={path}", *more, "--seeds=0-2", "--batch=2", "--outdir", tmp_path / "o"
    )
    assert f"sampled 3 images (0 skipped) NFE={nfe} " in out
    made = pictures(tmp_path / "o")
    size = {"lsun_bedroom_ldm": 64, "ms_coco": 128}.get(name, 16)
    assert sorted(made) == [0, 1, 2] and all(image.shape == (size, size, 3) for image in made.values())
    assert (made[0] != made[1]).any()


def direct(name: str, files):
    """The same network, opened by the family's own loader."""
    cases = {"lsun_bedroom": "cm_lsun", "lsun_bedroom_ldm": "ldm_uncond_vq", "ms_coco": "sd_cfg_kl"}
    if name == "imagenet256":
        config = adm_config(tiny_case("adm_guided")[0])
        classifier = files[name].parent / "256x256_classifier.pt"
        return load_adm(files[name], classifier, config=config, guidance_type="cg", guidance_rate=2)
    config = tiny_case(cases[name])[0]["init_kwargs"]
    if name == "ms_coco":
        return load_sd(files[name], config=config, tokenizer=files["tokenizer"])
    return (load_cm if name == "lsun_bedroom" else load_ldm)(files[name], config=config)


@pytest.mark.parametrize("name", EACH)
def test_images_are_those_of_the_network_and_the_seed(name, files, tmp_path):
    """Against the solver on the network of the family's own loader, with each seed's condition."""
    flags = [f"--dataset_name={name}", *network_flags(files, name, "sample"), *SETTINGS[name][1]]
    flags += ["--solver=euler", "--num_steps=3", "--seeds=1,3", "--batch=1", "--channels_last=False"]
    call(sample_cli.main, *flags, "--outdir", tmp_path)
    net = direct(name, files)
    generators = SeededGenerators([1, 3])
    latents = generators.randn((net.img_channels, net.img_resolution, net.img_resolution))
    cond = net.make_cond(generators, prompts=["c d", "a"]) if name == "ms_coco" else net.make_cond(generators)
    with torch.no_grad():
        expected = to_uint8(net.decode(sample(net, latents, solver="euler", num_steps=3, cond=cond)))
    made = pictures(tmp_path)
    for row, seed in enumerate((1, 3)):
        difference = np.abs(made[seed] - expected[row])
        assert difference.max() <= 1 and difference.mean() < 0.01


def test_class_of_all_images(files, tmp_path):
    flags = ["--dataset_name=imagenet256", f"--model_path={files['imagenet256']}", "--solver=euler", "--num_steps=2"]
    for name, more in (("drawn", []), ("one", ["--class=1"]), ("two", ["--class=2"])):
        call(sample_cli.main, *flags, *more, "--seeds=0-1", "--outdir", tmp_path / name)
    drawn, one, two = (pictures(tmp_path / name) for name in ("drawn", "one", "two"))
    assert (one[0] != two[0]).any() and (drawn[0] != drawn[1]).any()
    assert json.loads((tmp_path / "one" / "sampling.json").read_text())["settings"]["class"] == 1
    again = call(sample_cli.main, *flags, "--class=2", "--outdir", tmp_path / "one", ok=False)
    assert "class: 1 there, 2 now" in again


# --------------------------------------------------------------------------------------------------
# Prompts


def sd_flags(files, *more) -> list:
    flags = ["--dataset_name=ms_coco", f"--model_path={files['ms_coco']}", f"--tokenizer_path={files['tokenizer']}"]
    return [*flags, "--solver=euler", "--num_steps=2", *more]


@TEXT
def test_prompts_and_their_record(files, tmp_path):
    """A caption belongs to its seed, whatever the other seeds; the record names the texts."""
    call(sample_cli.main, *sd_flags(files, "--prompt", files["table"]), "--seeds=5,7", "--outdir", tmp_path / "table")
    call(sample_cli.main, *sd_flags(files, "--prompt=c d"), "--seeds=5-7", "--batch=2", "--outdir", tmp_path / "text")
    table, text = pictures(tmp_path / "table"), pictures(tmp_path / "text")
    assert np.abs(table[7] - text[7]).max() <= 1 and np.abs(table[5] - text[5]).max() > 1
    settings = {name: json.loads((tmp_path / name / "sampling.json").read_text()) for name in ("table", "text")}
    settings = {name: record["settings"] for name, record in settings.items()}
    assert settings["table"]["prompt"] == {"file": "captions.csv", "sha256": sha256_of(files["table"])}
    assert settings["text"]["prompt"] == "c d" and "negative_prompt" not in settings["text"]
    assert settings["text"]["guidance_rate"] == 7.5
    other = call(sample_cli.main, *sd_flags(files, "--prompt=e"), "--outdir", tmp_path / "text", ok=False)
    assert 'prompt: "c d" there, "e" now' in other
    more = sd_flags(files, "--prompt=c d", "--negative_prompt=e", "--seeds=7")
    call(sample_cli.main, *more, "--outdir", tmp_path / "negative")
    assert np.abs(pictures(tmp_path / "negative")[7] - text[7]).max() > 1
    assert json.loads((tmp_path / "negative" / "sampling.json").read_text())["settings"]["negative_prompt"] == "e"


@TEXT
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt=PLACE/none.csv"], "none.csv: no such file"),
        (
            ["--prompt=PLACE/odd.csv"],
            "odd.csv: there is no column 'prompt', 'caption' or 'text'; its header has 'a', 'b'",
        ),
        (["--prompt=PLACE/captions.txt", "--seeds=2-6"], "has no caption for seeds 4-6; it has them for --seeds=0-3"),
        (["--prompt=a", "--class=3"], "this network takes prompts, not classes"),
        (["--prompt=a", "--guidance_type=cg"], "does not take guidance_type 'cg'; use cfg or none"),
        (["--prompt=a", "--guidance_type=none", "--guidance_rate=3"], "guidance_rate 3 has no effect"),
        (["--prompt=a", "--guidance_type=none", "--negative_prompt=b"], "--negative_prompt has no effect without"),
        (["--prompt=a", "--tokenizer_path=PLACE/adm"], "it has neither tokenizer.json nor vocab.json"),
        ([], "ms_coco needs a text: give --prompt=TEXT, or --prompt=FILE"),
    ],
)
def test_mistakes_about_prompts(flags, message, files, tmp_path):
    place = files["captions"].parent
    (place / "odd.csv").write_text("a,b\n1,2\n")
    flags = [flag.replace("PLACE", str(place)) for flag in flags]
    assert message in call(sample_cli.main, *sd_flags(files, *flags), f"--outdir={tmp_path / 'o'}", ok=False)
    assert not (tmp_path / "o").exists()


@pytest.fixture(scope="module")
def judged(files):
    """Flags that let compare.py judge the images of the text network."""
    folder = files["captions"].parent
    torch.manual_seed(0)
    save_classifier(ConvClassifier(3, 128, 10, feature_dim=4, width=4).eval(), folder / "detector.safetensors")
    Reference(np.zeros(4), np.eye(4)).save(folder / "ref.npz")
    flags = ["--dataset_name=ms_coco", f"--model_path={files['ms_coco']}", f"--tokenizer_path={files['tokenizer']}"]
    flags += [f"--detector={folder / 'detector.safetensors'}", f"--ref={folder / 'ref.npz'}", "--solvers=euler"]
    return [*flags, "--nfe=2", "--num=4", "--groups=2", "--num_reference=2", "--reference_steps=1"]


@TEXT
def test_compare_with_prompts(files, judged, tmp_path, monkeypatch):
    """The row's command makes its images from the seeds' captions. Other texts, other results."""
    monkeypatch.setattr(comparison_report, "plots_html", lambda rows: "")

    def row(name, *flags):
        call(compare_cli.main, *judged, *flags, "--outdir", tmp_path / name)
        content = json.loads((tmp_path / name / "results.json").read_text())
        return content["rows"][0], content["facts"]

    one, facts = row("a", "--prompt", files["captions"], "--negative_prompt=e")
    assert (
        facts["prompt"] == f"captions.txt, SHA-256 {sha256_of(files['captions'])}" and facts["negative_prompt"] == "e"
    )
    command = shlex.split(one["command"].removeprefix("python sample.py "))
    call(sample_cli.main, *command, "--outdir", tmp_path / "images")
    place = files["captions"].parent
    found = calculate_fid(tmp_path / "images", str(place / "ref.npz"), detector=str(place / "detector.safetensors"))
    assert one["fid"] == pytest.approx(found.fid, rel=1e-3) and one["nfe"] == 2 and one["pixel"] > 0
    record = json.loads((tmp_path / "images" / "sampling.json").read_text())["settings"]
    assert record["prompt"]["file"] == "captions.txt" and record["negative_prompt"] == "e"

    made, generate = [], comparison.generate_images
    monkeypatch.setattr(comparison, "generate_images", lambda *a, **k: made.append(k["prompts"]) or generate(*a, **k))
    again, _ = row("a", "--prompt", files["captions"], "--negative_prompt=e")
    assert not made and again == one
    texts = dict(enumerate(["a b", "c d", "e", "a"]))
    other, _ = row("a", "--prompt", files["captions"], "--num_reference=0")  # without the negative prompt
    assert other["key"] != one["key"] and other["fid"] != one["fid"]
    assert made and all(text == texts for text in made)


@TEXT
def test_mistakes_about_prompts_in_comparisons(files, judged, tmp_path):
    for flags, message in (
        ([], "ms_coco needs a text: give --prompt=TEXT, or --prompt=FILE"),
        ([f"--prompt={files['captions']}", "--num=6"], "has no caption for seeds 4-5"),
        (
            ["--prompt=a", "--guidance_type=none", "--negative_prompt=b"],
            "has no effect without classifier-free guidance",
        ),
    ):
        assert message in call(compare_cli.main, *judged, *flags, f"--outdir={tmp_path / 'o'}", ok=False)
    digits = ["--dataset_name=digits", "--prompt=a"]
    assert "digits is not a text-to-image network" in call(
        compare_cli.main, *digits, "--num=10", f"--outdir={tmp_path / 'o'}", ok=False
    )
    assert "digits is not a text-to-image network" in call(
        optimize_cli.main, *digits, f"--dest={tmp_path / 'o'}", ok=False
    )
    assert not (tmp_path / "o").exists()


@TEXT
def test_optimized_schedules_with_prompts(files, tmp_path, monkeypatch):
    """Every sample draws a caption by its seed alone; the file names the texts."""
    asked, make_cond = {}, StableDiffusionDenoiser.make_cond

    def noting(self, generator=None, labels=None, prompts=None, negative_prompt=""):
        if generator.seeds != [0]:  # that one only tries out whether the texts can be encoded
            for seed, text in zip(generator.seeds, prompts, strict=True):
                assert asked.setdefault(seed, (text, negative_prompt)) == (text, negative_prompt)
        return make_cond(self, generator, labels, prompts, negative_prompt)

    monkeypatch.setattr(StableDiffusionDenoiser, "make_cond", noting)
    flags = ["--dataset_name=ms_coco", f"--model_path={files['ms_coco']}", f"--tokenizer_path={files['tokenizer']}"]
    flags += ["--method=gits", "--solver=euler", "--num_steps=3", "--num_steps_tea=4", "--solver_tea=euler"]
    flags += ["--num_warmup=5", f"--prompt={files['captions']}", "--negative_prompt=d"]
    found = {}
    for name, more in (("a", ["--batch=5"]), ("b", ["--batch=3"])):
        call(optimize_cli.main, *flags, *more, f"--dest={tmp_path / name}")
        found[name] = load_schedule(tmp_path / name)
    # The seeds of both runs are the same five.
    assert len(asked) == 5 and {text for _, text in asked.values()} == {"d"}
    assert {text for text, _ in asked.values()} <= {"a b", "c d", "e", "a"} and len(set(asked.values())) > 1
    assert found["a"].sigmas == found["b"].sigmas and found["a"].evaluations == 5 * 3 * 2  # guided: two a call
    texts = found["a"].settings["prompt"]
    assert texts["captions"] == 4 and len(texts["sha256"]) == 64 and found["a"].settings["negative_prompt"] == "d"
    asked.clear()
    call(optimize_cli.main, *flags[:-2], "--num_warmup=1", "--prompt=c d", f"--dest={tmp_path / 'c'}")
    assert load_schedule(tmp_path / "c").settings["prompt"] == "c d"
    error = call(optimize_cli.main, *flags[:-2], f"--dest={tmp_path / 'd'}", ok=False)
    assert "ms_coco needs a text" in error and not (tmp_path / "d").exists()


@TEXT
def test_training_on_prompts_continues_with_the_same_prompts(files, tmp_path):
    captions = shutil.copy(files["captions"], tmp_path / "captions.txt")
    flags = [flag if flag != files["captions"] else captions for flag in train_flags(files, "ms_coco", tmp_path / "e")]
    dry = call(train_cli.main, *flags, "-n")
    assert json.loads(dry[: dry.rindex("}") + 1])["guidance_rate"] is None and "00000-ms_coco-2-2-dpmpp" in dry
    call(train_cli.main, *flags)
    (folder,) = (tmp_path / "e").iterdir()
    record = json.loads((folder / "training_options.json").read_text())
    assert record["provenance"]["prompts_sha256"] == sha256_of(captions)
    call(train_cli.main, f"--resume={folder}", "--total_kimg=0.004")
    assert load_newest_state(folder)["iteration"] == 2
    Path(captions).write_text("b\n")
    error = call(train_cli.main, f"--resume={folder}", "--total_kimg=0.006", ok=False)
    assert f"{captions} does not hold the prompts that {folder} was trained on" in error


class CaptionNet(torch.nn.Module):
    """Notes the captions that it is asked for."""

    img_channels, img_resolution, label_dim, sigma_min, sigma_max = 1, 4, 0, 0.002, 80.0

    def make_cond(self, generator=None, labels=None, prompts=None):
        return {"condition": list(prompts)}


def test_captions_are_drawn_by_the_sample_alone(monkeypatch):
    """Which caption a sample gets does not depend on processes and micro-batches."""
    prompts = [f"caption {number}" for number in range(50)]

    def drawn(world: int, rank: int, batch_gpu: int) -> list[str]:
        monkeypatch.setattr(distributed, "world_size", lambda: world)
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        config = {**DEFAULTS, "sampler_stu": "euler", "sampler_tea": "euler", "num_steps": 3}
        distiller = Distiller(CaptionNet(), config, batch=16, batch_gpu=batch_gpu, seed=3, prompts=prompts)
        texts = []
        for distiller.iteration in range(3):
            texts.append([text for _, cond in distiller.draw() for text in cond["condition"]])
        return texts

    whole = drawn(1, 0, 16)
    assert len({text for texts in whole for text in texts}) > 15  # a sixth of the 48 repeats, at chance
    assert drawn(1, 0, 4) == whole
    halves = [drawn(2, rank, 8) for rank in range(2)]
    assert [first + second for first, second in zip(*halves, strict=True)] == whole


# --------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    "name, model, flags, message",
    [
        ("imagenet256", "imagenet256", ["--class=10"], "class 10 is out of range: this network has classes 0..9"),
        ("imagenet256", "imagenet256", ["--guidance_type=cfg"], "does not take guidance_type 'cfg'; use none or cg"),
        ("imagenet256", "alone/net.pt", ["--guidance_type=cg"], "put 256x256_classifier.pt beside"),
        (
            "lsun_bedroom",
            "lsun_bedroom",
            ["--guidance_type=cg"],
            "does not take guidance_type 'cg'; use none or uncond",
        ),
        ("lsun_bedroom", "lsun_bedroom", ["--class=0"], "this network is unconditional"),
        ("lsun_bedroom", "lsun_bedroom", ["--prompt=a"], "--prompt: lsun_bedroom is not a text-to-image network"),
        (
            "lsun_bedroom",
            "lsun_bedroom",
            ["--tokenizer_path=a"],
            "--tokenizer_path: lsun_bedroom is not a text-to-image",
        ),
        ("lsun_cat", "bare/adm.pt", [], "is not a U-Net of consistency models: it looks like a network of guided-diff"),
        ("imagenet256", "bare/cm.pt", [], "(ADM): it looks like a U-Net of consistency models"),
        ("ffhq_ldm", "bare/cm.pt", [], "is not a latent diffusion model: it looks like a U-Net of consistency models"),
        ("cifar10", "bare/cm.pt", [], "is not an EDM network"),
        ("lsun_bedroom_ldm", "bare/short.ckpt", [], "short.ckpt is truncated: it lacks its end; download it again"),
        (
            "imagenet256",
            "lsun_bedroom",
            [],
            "names the network family 'cm': dataset_name 'imagenet256' has family 'adm'",
        ),
        ("custom", "bare/odd.pt", [], "names the network family 'gan': choose from edm, cm, adm, ldm, sd, mr"),
        ("custom", "bare/bad.pt", [], 'bad.pt: it should read {"family": "...", "config": {...}}'),
        ("diffusers", None, [], "needs --model_path, the folder or the hub id of a pipeline"),
    ],
)
def test_mistakes_take_one_line(name, model, flags, message, files, tmp_path):
    bare, alone = tmp_path / "bare", tmp_path / "alone"
    bare.mkdir()
    alone.mkdir()
    shutil.copy(files["lsun_bedroom"], bare / "cm.pt")
    shutil.copy(files["imagenet256"], bare / "adm.pt")
    shutil.copy(files["imagenet256"], alone / "net.pt")
    (bare / "short.ckpt").write_bytes(files["lsun_bedroom_ldm"].read_bytes()[:-200])
    describe(bare / "odd.pt", "gan", {})
    (bare / "odd.pt").write_bytes(b"weights")
    (bare / "bad.pt").write_bytes(b"weights")
    (bare / "bad.pt.json").write_text('["family"]')
    path = None if model is None else files.get(model, tmp_path / model)
    arguments = [f"--dataset_name={name}", "--solver=euler", "--num_steps=2", *flags, f"--outdir={tmp_path / 'o'}"]
    error = call(sample_cli.main, *arguments, *([f"--model_path={path}"] if path else []), ok=False)
    assert message in error and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dataset_name=ms_coco"], "ms_coco needs texts: give --prompt_path"),
        (["--dataset_name=digits", "--prompt_path=a.txt"], "--prompt_path: digits is not a text-to-image network"),
        (["--dataset_name=ms_coco", "--prompt_path=none.csv"], "none.csv: no such file"),
        (["--dataset_name=diffusers"], "needs --model_path"),
    ],
)
def test_mistakes_in_training(flags, message, tmp_path):
    assert message in call(train_cli.main, *flags, f"--outdir={tmp_path / 'e'}", ok=False)
    assert not (tmp_path / "e").exists()


# --------------------------------------------------------------------------------------------------
# Networks of one's own


def test_a_description_makes_custom_a_network_of_any_family(files):
    net = create_model("custom", files["lsun_bedroom"])
    assert net.dataset_name == "custom" and (net.img_resolution, net.sigma_max) == (16, 80.0)
    assert create_model("custom", files["lsun_bedroom_ldm"], guidance_type="uncond").img_channels == 3


def test_an_edm_network_from_bare_weights(tmp_path):
    facts, weights, io = tiny_case("edm_song_uncond")
    path = tmp_path / "mine.safetensors"
    save_file(weights, path)
    with pytest.raises(UserError, match="mine.safetensors"):
        create_model("custom", path)
    describe(path, "edm", facts["init_kwargs"])
    net = create_model("custom", path)
    torch.testing.assert_close(net(io["x__2"], io["sigmas"][2]), io["D__2"], rtol=1e-4, atol=1e-4)


def test_everything_that_makes_the_network_is_in_its_hash(files, tmp_path):
    name = "imagenet256"
    folder = shutil.copytree(files[name].parent, tmp_path / "adm")
    path = folder / files[name].name

    def digest(**guidance):
        return create_model(name, path, **guidance).weights_hash

    guided = digest(guidance_type="cg")
    assert digest() != guided == digest(guidance_type="cg")
    classifier = torch.load(folder / "256x256_classifier.pt", weights_only=True)
    classifier["out.2.c_proj.bias"] += 1
    torch.save(classifier, folder / "256x256_classifier.pt")
    assert digest(guidance_type="cg") != guided
    plain = digest()
    description = json.loads(Path(f"{path}.json").read_text())
    description["config"]["noise_schedule"] = "cosine"
    Path(f"{path}.json").write_text(json.dumps(description))
    assert digest() != plain


def test_precision_of_a_pipeline(tmp_path):
    """Weights in bf16 give nearly the images of float32; auto is float32 on the CPU."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    flags = ["--dataset_name=diffusers", f"--model_path={pipeline_folder('sd')}", "--prompt=a b", "--solver=dpmpp"]
    flags += ["--thresholding=False", "--num_steps=4", "--seeds=0-1", "--device=cpu"]
    found = {}
    for dtype in ("fp32", "bf16", "auto"):
        call(sample_cli.main, *flags, f"--dtype={dtype}", "--outdir", tmp_path / dtype)
        found[dtype] = np.stack([image for _, image in sorted(pictures(tmp_path / dtype).items())])
        settings = json.loads((tmp_path / dtype / "sampling.json").read_text())["settings"]
        assert settings.get("dtype", "fp32") == dtype
    assert (found["auto"] == found["fp32"]).all()
    difference = abs(found["bf16"] - found["fp32"])
    assert 0 < difference.mean() < 0.05 * found["fp32"].std()
    assert "use --amp=bf16" in call(
        sample_cli.main, "--dataset_name=digits", "--solver=euler", "--dtype=bf16", ok=False
    )


def test_diffusers_pipelines(files, tmp_path):
    """An unconditional one and a Stable Diffusion one, through both command lines."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    plain, text = (f"--model_path={pipeline_folder(kind)}" for kind in ("ddpm", "sd"))
    size = ["--dataset_name=diffusers", "--num_steps=2", "--batch=2", "--total_kimg=0.002", "--seed=0"]
    captions = files["captions"]
    for model, flags, evaluations, expected in (
        (plain, ["--guidance_type=none"], 1, (None, 0)),
        (text, [f"--prompt_path={captions}"], 2, ("cfg", 7.5)),
    ):
        folder = tmp_path / str(evaluations)
        out = call(train_cli.main, *size, model, *flags, f"--outdir={folder}")
        ((path, nfe),) = re.findall(r"trained (\S+) NFE=(\d+)", out)
        config = load_predictor(path).config
        assert int(nfe) == evaluations and (config["guidance_type"], config["guidance_rate"]) == expected
        more = [f"--prompt={captions}"] if model is text else []
        call(sample_cli.main, f"--predictor_path={path}", model, *more, "--seeds=0-1", "--outdir", folder / "o")
        assert sorted(pictures(folder / "o")) == [0, 1]
    start = ["--dataset_name=diffusers", "--solver=euler"]
    for flags, message in (
        ([*start, plain, "--prompt=a"], "--prompt: diffusers is not a text-to-image network"),
        ([*start, text], "diffusers needs a text: give --prompt"),
        ([*start, text, "--prompt=a", "--tokenizer_path=b"], "has its own: leave --tokenizer_path out"),
        (["--dataset_name=cifar10", "--solver=euler", plain], "use it with --dataset_name=diffusers"),
    ):
        assert message in call(sample_cli.main, *flags, f"--outdir={tmp_path / 'none'}", ok=False)
    wrong = [(plain, [f"--prompt_path={captions}"], "is not a text-to-image"), (text, [], "diffusers needs texts")]
    for model, flags, message in wrong:
        assert message in call(train_cli.main, *size, model, *flags, f"--outdir={tmp_path / 'none'}", ok=False)
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["imagenet256", pytest.param("ms_coco", marks=TEXT)])
def test_a_span_solver_within_a_given_time(files, name, tmp_path, monkeypatch):
    """Guided by a classifier, and latent with prompts. The clock moves when it is read."""
    clock = SimpleNamespace(monotonic=partial(lambda ticks: 0.1 * next(ticks), itertools.count()))
    for module in (run, span_search, trainer):
        monkeypatch.setattr(module, "time", clock)
    network = [f"--dataset_name={name}", *network_flags(files, name, "train"), *SETTINGS[name][1]]
    sizes = ["--pairs=4", "--val_pairs=2", "--batch=2", "--num_steps_tea=4", "--minutes=0.5"]
    per_call = SETTINGS[name][3]
    call(train_cli.main, *network, *sizes, "--sampler_stu=span", f"--nfe={2 * per_call}", f"--outdir={tmp_path}")
    student = load_predictor(next(tmp_path.glob("0*/predictor-*.safetensors")))
    found = student.provenance["search"]
    assert student.evaluations() == 2 and student.config["guidance_type"] == SETTINGS[name][1][0].split("=")[1]
    assert len(found["trials"]) > 1 and student.provenance["validation"]["best"] <= found["trials"][0]["scores"][-1]
