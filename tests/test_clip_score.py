"""clip_score.py and the caption files, with a tiny random CLIP that is written to disk here."""

import fnmatch
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from pretend_device import PretendedDevice
from safetensors.torch import load_file, save_file
from two_processes import call_on_two

import clip_score
from evaluation import clip, reading
from evaluation.clip import ClipNetwork
from evaluation.clip_score import calculate_clip_score, image_similarities, pair_by_seed
from torch_utils.errors import MissingExtra, UserError
from torch_utils.images import ImageSource
from torch_utils.prompts import read_prompts, seed_of

ROOT = Path(__file__).parents[1]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
START, END = len(WORDS) - 2, len(WORDS) - 1
LENGTH, SIDE = 12, 16
CAPTIONS = ["a cat", "Two DOGS", "x", "the cat the cat the cat the cat", "no", "q z", "cat"]
SIZES = [(16, 16), (40, 23), (23, 41), (100, 100), (17, 16), (16, 33), (9, 9)]  # width, height


def write_clip(folder):
    """A folder as of transformers; large random weights give every pair its own score."""
    transformers = pytest.importorskip("transformers")
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": len(WORDS), "max_position_embeddings": LENGTH, "bos_token_id": START}
    config = transformers.CLIPConfig(
        text_config={**layers, **tokens, "eos_token_id": END, "pad_token_id": END},
        vision_config={**layers, "image_size": SIDE, "patch_size": 4},
        projection_dim=8,
    )
    generator = torch.Generator().manual_seed(0)
    network = transformers.CLIPModel(config)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if not name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
                value.normal_(0, 0.3, generator=generator)
    network.save_pretrained(folder)
    settings = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, "resample": 3}
    values = {"image_mean": [0.48, 0.45, 0.4], "image_std": [0.27, 0.26, 0.28], "rescale_factor": 1 / 255}
    steps = {f"do_{step}": True for step in ("resize", "center_crop", "rescale", "normalize", "convert_rgb")}
    kind = {"image_processor_type": "CLIPImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps({**kind, **settings, **values, **steps}))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    write_clip(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for seed, (width, height) in enumerate(SIZES):
        coarse = rng.integers(0, 256, [4, 4, 3], dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        (image.convert("L") if seed == 4 else image).save(folder / f"{seed:06d}.png")
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "captions.txt"
    path.write_text("\n".join(CAPTIONS) + "\n")
    return path


@pytest.fixture(scope="module")
def cosines(model, images):
    """Every image with every caption [7,7], computed by Pillow and the model's own functions."""
    import transformers

    network = transformers.CLIPModel.from_pretrained(model).eval()
    pixels = []
    for path in sorted(images.iterdir()):
        image = Image.open(path).convert("RGB")
        scale = SIDE / min(image.size)
        image = image.resize(tuple(int(edge * scale + 1e-9) for edge in image.size), Image.Resampling.BICUBIC)
        left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
        array = np.asarray(image.crop((left, top, left + SIDE, top + SIDE))) / 255
        pixels.append(((array - [0.48, 0.45, 0.4]) / [0.27, 0.26, 0.28]).transpose(2, 0, 1))
    tokens = []
    for caption in CAPTIONS:
        numbers = [START]
        for word in caption.lower().split():
            parts = ["cat</w>"] if word == "cat" else [*word[:-1], f"{word[-1]}</w>"]
            numbers += [WORDS.index(part) for part in parts]
        tokens.append([*numbers[: LENGTH - 1], END, *[END] * LENGTH][:LENGTH])
    with torch.no_grad():
        seen = network.get_image_features(torch.tensor(np.stack(pixels), dtype=torch.float32)).pooler_output.double()
        read = network.get_text_features(torch.tensor(tokens)).pooler_output.double()
    seen, read = seen.numpy(), read.numpy()
    return seen @ read.T / np.linalg.norm(seen, axis=1)[:, None] / np.linalg.norm(read, axis=1)


def run(*arguments) -> tuple[int, str, str]:
    result = CliRunner().invoke(clip_score.main, ["calc", "--device=cpu", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_score_is_the_mean_cosine(model, images, prompts, cosines, tmp_path):
    expected = np.diagonal(cosines)
    assert abs(cosines.mean(0) - expected).max() > 0.05 and expected.min() < 0 < expected.max()  # or nothing is tested
    out = tmp_path / "clip.json"
    code, stdout, stderr = run(f"--images={images}", f"--prompts={prompts}", f"--model={model}", f"--json={out}")
    assert code == 0, stderr
    result = json.loads(out.read_text())
    assert result["clip_score"] == pytest.approx(expected.mean(), abs=1e-6)
    assert result["clip_score_x100_clamped"] == pytest.approx(100 * np.maximum(expected, 0).mean(), abs=1e-4)
    assert result["standard_error"] == pytest.approx(expected.std(ddof=1) / 7**0.5, abs=1e-6)
    assert (result["images"], result["captions"], result["image_size"]) == (7, 7, [SIDE, SIDE])
    assert (result["precision"], result["model"], result["model_revision"]) == ("float32", str(model), None)
    assert result["preprocessing"]["image_mean"] == [0.48, 0.45, 0.4]
    assert result["preprocessing"]["size"]["shortest_edge"] == SIDE
    digest = result["weights_sha256"]
    assert stdout == f"CLIP score {expected.mean():.4f} images=7 model={model} weights={digest[:12]}\n"
    assert "Warning" not in stderr


def test_two_images_have_a_standard_error_and_one_has_none(model, images, prompts, cosines):
    two = calculate_clip_score(images, prompts, model=model, num=2, seed=3)
    chosen = np.random.default_rng(3).permutation(7)[:2]
    assert two.clip_score == pytest.approx(np.diagonal(cosines)[chosen].mean(), abs=1e-6)
    assert two.standard_error == pytest.approx(np.abs(np.diff(np.diagonal(cosines)[chosen]))[0] / 2, abs=1e-6)
    assert calculate_clip_score(images, prompts, model=model, num=1).standard_error is None


def test_batch_size_does_not_matter(model, images, prompts, cosines):
    scores = [calculate_clip_score(images, prompts, model=model, batch=batch).clip_score for batch in (1, 3, 7)]
    assert scores == pytest.approx([np.diagonal(cosines).mean()] * 3, abs=1e-6)
    network = ClipNetwork(model)
    alone, other = network.tokenize(["cat"]), network.tokenize(["cat", "the cat the cat"])
    assert torch.equal(alone[0], other[0]) and alone.shape == (1, LENGTH)


def check_part(path: Path, cosines: np.ndarray) -> None:
    chosen = np.sort(np.random.default_rng(0).permutation(7)[:5])
    result = json.loads(path.read_text())
    assert result["clip_score"] == pytest.approx(np.diagonal(cosines)[chosen].mean(), abs=1e-6)
    assert (result["images"], result["seed"]) == (5, 0)


def test_a_batch_waits_for_the_device_once(model, images, cosines, monkeypatch):
    """Images come from pinned memory, and the next batch is started before a result is read."""
    monkeypatch.setattr(reading, "choose_workers", lambda *_: 0)  # threads: processes do not know the pretended device
    source = ImageSource(images, uniform=False)
    with PretendedDevice("cuda", ROOT) as gpu:
        network = ClipNetwork(model, "cuda")
        own = network.start
        monkeypatch.setattr(network, "start", lambda *inputs: gpu.note("start") or own(*inputs))
        gpu.clear()
        found = image_similarities(source, range(7), CAPTIONS, network, 3)
    np.testing.assert_allclose(found, np.diag(cosines), atol=1e-4)
    assert sum(gpu.waits.values()) == 3, gpu.waits
    assert [what for what in gpu.order if what != "record"] == ["start", "start", "wait", "start", "wait", "wait"]


def test_images_are_prepared_in_other_processes(model, images):
    """What the workers get holds no network."""
    network = ClipNetwork(model)
    prepared = pickle.loads(pickle.dumps(network.prepare))
    picture = ImageSource(images, uniform=False).read(1)
    np.testing.assert_array_equal(prepared(picture), network.prepare(picture))
    assert len(pickle.dumps(prepared)) < 10_000


def test_two_processes_give_the_score_of_one(model, images, prompts, cosines, tmp_path):
    out = tmp_path / "clip.json"
    arguments = ["calc", "--device=cpu", f"--images={images}", f"--prompts={prompts}", f"--model={model}"]
    done = call_on_two(clip_score.main, *arguments, "--num=5", "--batch=2", f"--json={out}")
    assert done.codes == [0, 0] and "".join(done.outputs).count("CLIP score") == 1
    check_part(out, cosines)
    part = calculate_clip_score(images, prompts, model=model, num=5)
    assert json.loads(out.read_text())["clip_score"] == pytest.approx(part.clip_score, abs=1e-6)
    other = calculate_clip_score(images, prompts, model=model, num=5, seed=1)
    assert abs(other.clip_score - part.clip_score) > 1e-3
    one = tmp_path / "one.json"  # a rank without images
    assert call_on_two(clip_score.main, *arguments, "--num=1", f"--json={one}").codes == [0, 0]
    assert json.loads(one.read_text())["standard_error"] is None


def test_a_damaged_image_stops_both_processes(model, images, prompts, tmp_path):
    shutil.copytree(images, tmp_path / "damaged")
    (tmp_path / "damaged" / "000002.png").write_bytes(b"hello")
    arguments = [f"--images={tmp_path / 'damaged'}", f"--prompts={prompts}", f"--model={model}"]
    done = call_on_two(clip_score.main, "calc", "--device=cpu", *arguments)
    assert done.codes == [2, 2] and "CLIP score" not in "".join(done.outputs)


@pytest.mark.slow
def test_torchrun(model, images, prompts, cosines, tmp_path):
    out = tmp_path / "clip.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "clip_score.py", "calc"]
    arguments = [f"--images={images}", f"--prompts={prompts}", f"--model={model}", f"--json={out}"]
    done = subprocess.run(
        [sys.executable, *launcher, *arguments, "--device=cpu", "--num_images=5", "--batch=2"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("CLIP score") == 1
    check_part(out, cosines)


def test_captions_are_found_by_seed_number(model, images, cosines, tmp_path, capsys):
    """Subfolders, other seeds, captions in another order, images and captions without partner."""
    folder = tmp_path / "samples"
    given = {1005: 2, 7: 0, 40: 4, 41: 6, 300: 1}  # seed: image
    for seed, image in given.items():
        target = folder / f"{seed - seed % 1000:06d}" / f"{seed:06d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / f"{image:06d}.png", target)
    for name in ("grid.png", "inters/000007.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(images / "000003.png", folder / name)
    (folder / "sampling.json").write_text("{}")
    shutil.copy(images / "000003.png", folder / "cover.png")
    table = tmp_path / "captions.csv"
    table.write_text('seed,text\n41,"no"\n9999,extra\n7,a cat\n1005,"x"\n300,q z\n40,\n')
    result = calculate_clip_score(folder, table, model=model)
    expected = np.mean([cosines[6, 4], cosines[0, 0], cosines[2, 2], cosines[1, 5]])
    assert result.clip_score == pytest.approx(expected, abs=1e-6)
    assert (result.images, result.captions) == (4, 5)
    assert (result.images_without_caption, result.images_without_caption_first) == (1, ["000000/000040.png"])
    assert (result.images_without_number, result.images_without_number_first) == (1, ["cover.png"])
    warnings = capsys.readouterr().err
    assert "Warning: 1 of 6 images have no caption and are left out: 000000/000040.png\n" in warnings
    assert "Warning: 1 of 6 images are not named after a seed number and are left out: cover.png\n" in warnings
    with zipfile.ZipFile(tmp_path / "samples.zip", "w") as file:
        for path in folder.rglob("*.*"):
            file.write(path, path.relative_to(folder).as_posix())
    zipped = calculate_clip_score(tmp_path / "samples.zip", table, model=model)
    assert zipped.clip_score == result.clip_score and zipped.images == 4
    with pytest.raises(UserError, match="--num=5: only 4 images have a caption"):
        calculate_clip_score(folder, table, model=model, num=5)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_captions_are_found_by_the_name_of_the_image(model, images, cosines, tmp_path, kind):
    """As in the metadata of a Hugging Face imagefolder, whose rows may have any order."""
    import csv

    def write(rows, path=tmp_path / f"metadata.{kind}"):
        if kind == "csv":
            with path.open("w", newline="") as file:
                csv.writer(file).writerows([["file_name", "text"], *rows])
        else:
            path.write_text("".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows))
        return path

    order = [3, 0, 6, 1, 5, 2, 4]
    table = write([[f"{seed:06d}.png", CAPTIONS[seed]] for seed in order])
    result = calculate_clip_score(images, table, model=model)
    assert result.clip_score == pytest.approx(np.diag(cosines).mean(), abs=1e-6)
    assert list(read_prompts(table).items()) == [(seed, CAPTIONS[seed]) for seed in order]  # sample.py agrees
    named = {f"{'cats' if seed % 2 else '.'}/{'abcdefg'[seed]}.png": seed for seed in range(7)}
    for name, seed in named.items():
        (tmp_path / "named" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / f"{seed:06d}.png", tmp_path / "named" / name)
    rows = [
        [name.replace("/", "\\") if seed % 3 else name, CAPTIONS[seed]] for name, seed in named.items() if seed != 4
    ]
    result = calculate_clip_score(tmp_path / "named", write(rows[::-1]), model=model)
    kept = [0, 1, 2, 3, 5, 6]
    assert result.clip_score == pytest.approx(cosines[kept, kept].mean(), abs=1e-6)
    assert (result.images, result.images_without_caption_first) == (6, ["e.png"])
    with pytest.raises(
        UserError, match="none of the images has a caption: the captions have file names, such as cat.png;"
    ):
        calculate_clip_score(images, write([["cat.png", "a cat"], ["dog.png", "a dog"]]), model=model)
    with pytest.raises(UserError, match="the captions have file names, some of them more than once"):
        calculate_clip_score(images, write([["a.png", "a cat"], ["a.png", "a dog"]]), model=model)


def test_samples_of_two_runs_are_refused(model, images, prompts, tmp_path):
    for run_name, seed in (("a", 1), ("b", 2)):
        (tmp_path / run_name).mkdir()
        shutil.copy(images / f"{seed:06d}.png", tmp_path / run_name)
        (tmp_path / run_name / "sampling.json").write_text("{}")
    with pytest.raises(UserError, match="holds the samples of 2 runs"):
        calculate_clip_score(tmp_path, prompts, model=model)


def test_impossible_pairs_are_one_line(images, tmp_path):
    source = ImageSource(images, uniform=False)
    with pytest.raises(UserError, match="the images have the numbers 0 to 6, the captions 7 to 90"):
        pair_by_seed(source, {90: "a", 7: "b"})
    (tmp_path / "twice" / "x").mkdir(parents=True)
    for name in ("000001.png", "x/1.png"):
        shutil.copy(images / "000001.png", tmp_path / "twice" / name)
    with pytest.raises(UserError, match=r"000001.png and x/1.png have the same seed number"):
        pair_by_seed(ImageSource(tmp_path / "twice"), {1: "a"})
    (tmp_path / "named").mkdir()
    shutil.copy(images / "000001.png", tmp_path / "named" / "cat1.png")
    with pytest.raises(UserError, match="no image is named after its seed number.*cat1.png"):
        pair_by_seed(ImageSource(tmp_path / "named"), {1: "a"})


def test_preprocessing_is_that_of_transformers(model, images):
    import transformers

    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    processor = kind.from_pretrained(model)
    network, source = ClipNetwork(model), ImageSource(images, uniform=False)
    for index, name in enumerate(source.names):
        expected = processor(images=Image.open(images / name), return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(network.prepare(source.read(index)), expected, atol=1e-6)


def test_half_precision_is_close(model, images, prompts, tmp_path):
    out = tmp_path / "clip.json"
    arguments = (f"--images={images}", f"--prompts={prompts}", f"--model={model}", f"--json={out}")
    assert run(*arguments, "--amp=True")[0] == 0
    half, full = json.loads(out.read_text()), calculate_clip_score(images, prompts, model=model)
    assert half["precision"] == "bfloat16" and half["clip_score"] != full.clip_score
    assert half["clip_score"] == pytest.approx(full.clip_score, abs=0.03)


def damage(folder: Path, what: str) -> None:
    """One thing wrong with the model in ``folder``."""
    weights = folder / "model.safetensors"
    if what.endswith(("json", "merges.txt", ".safetensors")):
        (folder / what).unlink()
    elif what == "another type":
        (folder / "config.json").write_text('{"model_type": "siglip"}')
    elif what == "cut config":
        (folder / "config.json").write_text("{")
    elif what == "kernel":
        config = json.loads((folder / "config.json").read_text())
        config["text_config"] |= {"attn_implementation": "someone/kernel"}
        (folder / "config.json").write_text(json.dumps(config))
    elif what == "pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 605157884\n")
    elif what == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what in ("text half", "other sizes"):
        state = load_file(weights)
        if what == "text half":
            state = {name: value for name, value in state.items() if name.startswith("text")}
        else:
            state["visual_projection.weight"] = torch.zeros(3, 3)
        save_file(state, weights, metadata={"format": "pt"})
    elif what == "larger tokenizer":
        vocabulary = {**{word: number for number, word in enumerate(WORDS)}, "new": len(WORDS)}
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
    elif what == "damaged tokenizer":
        (folder / "vocab.json").write_text("{")
    elif what == "other images":
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        settings["crop_size"] = {"height": 12, "width": 12}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    elif what == "pickle":
        weights.unlink()
        torch.save({"code": os.getcwd}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("config.json", "config.json is missing"),
        ("preprocessor_config.json", "preprocessor_config.json is missing"),
        ("vocab.json", "neither tokenizer.json nor vocab.json and merges.txt"),
        ("model.safetensors", "it has no weights"),
        ("another type", "of the type 'siglip', expected 'clip'"),
        ("cut config", "its config.json cannot be used"),
        ("kernel", "'attn_implementation' in model/config.json can run or fetch code"),
        ("pointer", "its weights cannot be used .* a Git LFS pointer to a file of 605157884 bytes"),
        ("cut weights", "its weights cannot be used .* it is truncated"),
        ("text half", "those of another network .* missing, first logit_scale"),
        ("other sizes", "its weights cannot be used"),
        ("larger tokenizer", "tokenizer is not this network's .57 tokens"),
        ("damaged tokenizer", "its tokenizer cannot be used"),
        ("other images", "gives 12x12 pixels, the network takes 16x16"),
        ("pickle", "its weights cannot be used"),
    ],
)
def test_damaged_models_are_one_line(model, tmp_path, what, message):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    damage(folder, what)
    with pytest.raises(UserError, match=message) as caught:
        ClipNetwork(folder)
    assert "\n" not in str(caught.value) and f"--model={folder}: " in str(caught.value)


def test_model_of_the_hub(model, tmp_path, monkeypatch):
    """A repository without safetensors: one download of the settings, one of the older format."""
    import huggingface_hub

    repository = tmp_path / "repository"
    shutil.copytree(model, repository)
    torch.save(load_file(repository / "model.safetensors"), repository / "pytorch_model.bin")
    (repository / "model.safetensors").unlink()
    (repository / "open_clip_pytorch_model.bin").write_bytes(b"the same weights again")
    snapshot = tmp_path / "0123abcd"

    def download(name, revision, allow_patterns, local_files_only):
        assert name == "someone/clip" and revision is None and not local_files_only
        snapshot.mkdir(exist_ok=True)
        for path in repository.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, snapshot)
        return str(snapshot)

    monkeypatch.delenv("AMED_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    network, local = ClipNetwork("someone/clip"), ClipNetwork(model)
    assert (network.model, network.revision) == ("someone/clip", "0123abcd")
    assert not (snapshot / "open_clip_pytorch_model.bin").exists()
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    # Weights that lie elsewhere in memory may take another kernel, which rounds differently.
    found, expected = network.similarity(pixels, ["cat"]), local.similarity(pixels, ["cat"])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_model_that_cannot_be_had(images, prompts, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    import huggingface_hub

    arguments = (f"--images={images}", f"--prompts={prompts}")
    monkeypatch.setenv("AMED_OFFLINE", "1")
    for model in ("nobody/no-clip-of-this-name", tmp_path / "nowhere", "two words"):
        code, _, stderr = run(*arguments, f"--model={model}")
        (line,) = stderr.strip().splitlines()
        assert code == 2 and line.startswith(f"Error: --model={model}: no such folder, and"), stderr
    monkeypatch.setenv("AMED_OFFLINE", "0")

    def unreachable(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("Got: ConnectError\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    code, _, stderr = run(*arguments)
    assert code == 2 and f"--model={clip.DEFAULT_CLIP}: no such folder" in stderr and "(Got: ConnectError)" in stderr
    assert stderr.count("\n") == 1


def test_transformers_is_an_extra(images, prompts, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match="the CLIP score needs the package 'transformers'"):
        calculate_clip_score(images, prompts)


def test_too_large_a_batch_is_one_line(model, images, prompts, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(ClipNetwork, "start", full)
    code, _, stderr = run(f"--images={images}", f"--prompts={prompts}", f"--model={model}", "--batch=5")
    assert code == 2 and "Error: cpu is out of memory: lower --batch (now 5)" in stderr


def test_damaged_images_and_empty_folders_are_one_line(model, images, prompts, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copytree(images, tmp_path / "damaged")
    (tmp_path / "damaged" / "000002.png").write_bytes(b"hello")
    for name, message in [("empty", "holds no image"), ("damaged", "000002.png: not a readable image")]:
        code, stdout, stderr = run(f"--images={tmp_path / name}", f"--prompts={prompts}", f"--model={model}")
        assert code == 2 and message in stderr.strip().splitlines()[-1] and not stdout


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"one\r\n two, 2 \r\n\r\nfour", {0: "one", 1: "two, 2", 3: "four"}),
        ("a.TXT", b"\xef\xbb\xbfone\xe2\x80\xa8still one\ntwo\n", {0: "one\u2028still one", 1: "two"}),
        ("a.csv", b"caption\none\ntwo\n", {0: "one", 1: "two"}),
        ("a.csv", b'id, Text \n7,"one, ""1"""\n8,two\n', {0: 'one, "1"', 1: "two"}),
        ("a.csv", b'prompt,Seed\r\n"one\r\nmore",5\r\n\r\ntwo,3\r\n', {5: "one\nmore", 3: "two"}),
        ("a.csv", b"index,seed,prompt\n0,12,one\n1,11,two\n", {12: "one", 11: "two"}),
        ("a.csv", b"index,prompt\n4,\n5,\xc3\xa9t\xc3\xa9\n", {5: "\u00e9t\u00e9"}),
        ("a.csv", b"file_name,text\n000007.png,one\n./x/3.jpg,two\n", {7: "one", 3: "two"}),
        ("a.csv", b"index,image,text\n5,000007.png,one\n6,3.jpg,two\n", {7: "one", 3: "two"}),
        ("a.csv", b"seed,File_Name,text\n5,000007.png,one\n6,3.jpg,two\n", {5: "one", 6: "two"}),
        ("a.csv", b"file_name,text\ncat.png,one\n7.png,two\n", {0: "one", 1: "two"}),
        ("a.csv", b"file_name,text\n7.png,one\n7.png,two\n", {0: "one", 1: "two"}),
        ("a.jsonl", b'{"text": "one", "seed": 4}\n\n{"seed": 2, "text": "two", "x": [1]}\n', {4: "one", 2: "two"}),
        ("a.jsonl", b'{"text": "one"}\n{"text": null}\n{"text": "three"}', {0: "one", 2: "three"}),
    ],
)
def test_prompt_files(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    prompts = read_prompts(tmp_path / name)
    assert prompts == expected and list(prompts) == list(expected)


def test_prompt_column_by_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,caption,title\none,two,three\n")
    assert read_prompts(path, column="title") == {0: "three"} and read_prompts(path, "text") == {0: "one"}
    with pytest.raises(UserError, match="more than one column .*'text', 'caption', 'title'"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("a.csv", b"id,words\n1,one\n", None, "no column 'prompt', 'caption' or 'text'; its header has 'id', 'words'"),
        ("a.csv", b"prompt\none\n", "words", "no column 'words'; its header has 'prompt'"),
        ("a.csv", b"prompt\n", None, "holds no caption"),
        ("a.csv", b"", None, "the file is empty"),
        ("a.txt", b" \n\n", None, "the file is empty"),
        ("a.txt", b"one\n", "prompt", "a text file has no column 'prompt'"),
        ("a.txt", b"ok\n\xff\xfe", None, "not UTF-8 text .byte 3"),
        ("a.csv", "prompt\none\n".encode("utf-16-le"), None, "not UTF-8 text .it holds null bytes"),
        ("a.csv", b"seed,prompt\n1,one\n-2,two\n", None, "line 3 has the seed '-2'; expected an integer"),
        ("a.csv", b"seed,prompt\n1.0,one\n", None, "line 2 has the seed '1.0'"),
        ("a.csv", b"seed,prompt\n1,one\n01,two\n", None, "two rows have the seed number 1"),
        ("a.csv", b"id,prompt\n1,a cat, a dog\n", None, "line 2 has 3 columns, the header 2"),
        ("a.csv", b'prompt\n"one\ntwo\n', None, "not valid CSV"),
        ("a.json", b"{}", None, "expected captions in a .txt file"),
        ("a.csv", b"file_name,text\na.png,one\n,two\n", None, "line 3 has no file_name"),
        ("a.jsonl", b'{"text": "one"}\n{"text"}\n', None, "line 2 is not valid JSON"),
        ("a.jsonl", b'{"text": "one"}\n[]\n', None, "line 2 is not a JSON object"),
        ("a.jsonl", b"[" * 99999, None, "line 1 is not valid JSON"),
        ("a.jsonl", b'{"words": "one"}\n', None, "no column 'prompt', 'caption' or 'text'; its header has 'words'"),
        (None, b"", None, "no such file"),
    ],
)
def test_bad_prompt_files_are_one_line(tmp_path, name, content, column, message):
    path = tmp_path / (name or "missing.txt")
    if name is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(path, column)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_prompt_file_on_the_command_line(images, tmp_path):
    (tmp_path / "a.csv").write_text("id,words\n1,one\n")
    code, _, stderr = run(f"--images={images}", f"--prompts={tmp_path / 'a.csv'}", "--column=Words")
    assert code == 2 and stderr.count("\n") == 1 and "no column 'Words'" in stderr


def test_seed_number_of_a_name():
    assert [seed_of(name) for name in ("000123.png", "000000/000007.JPG", "0.png")] == [123, 7, 0]
    assert seed_of("1" * 5000 + ".png") is None
    assert [seed_of(name) for name in ("img00000123.png", "000123_1.png", "-3.png", "12/grid.png")] == [None] * 4
