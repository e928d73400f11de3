"""Networks against the reference implementation's outputs, and the table that names them."""

import gzip
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from two_processes import on_two

from models import adm, build_denoiser, cm, create_model, ldm, mr, sd, zoo
from models.building import build_empty
from models.denoiser import read_bottleneck
from models.edm import EDMDenoiser
from torch_utils import distributed
from torch_utils.errors import UserError
from torch_utils.files import sha256_of
from torch_utils.prompts import read_prompts
from torch_utils.seeds import SeededGenerators

ROOT = Path(__file__).resolve().parents[1]
NETS = ROOT / "tests" / "golden" / "nets"
TINY = ("edm_song_uncond", "edm_song_cond", "edm_dhariwal_cond")
EDM = ("cifar10", "ffhq", "afhqv2", "imagenet64")


def load_npz(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def tiny_case(name: str) -> tuple[dict, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(constructor arguments, weights, inputs and outputs)."""
    config = json.loads((NETS / "tiny" / name / "config.json").read_text())["init_kwargs"]
    return config, load_npz(NETS / "tiny" / name / "weights.npz"), load_npz(NETS / "tiny" / name / "io.npz")


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape and found.dtype == torch.float32
    return ((found - expected).abs().max() / expected.abs().max()).item()


def manifest(name: str) -> dict:
    with gzip.open(NETS / "manifests" / f"{Path(zoo.CARDS[name].file).stem}.json.gz") as file:
        return json.load(file)


@pytest.mark.parametrize("name", TINY)
def test_outputs_of_the_reference(name):
    config, weights, io = tiny_case(name)
    net = build_denoiser("edm", config, weights)
    cond = {"class_labels": io["class_labels"]} if "class_labels" in io else {}
    checked = {}
    with torch.no_grad(), read_bottleneck(net) as reader:
        for i, sigma in enumerate(io["sigmas"]):
            x = io[f"x__{i}"]
            checked[f"D__{i}"] = net(x, sigma, **cond)
            checked[f"bottleneck_mean__{i}"] = reader.read(len(x))
            if f"D_aug__{i}" in io:
                checked[f"D_aug__{i}"] = net(x, sigma, augment_labels=io["augment_labels"], **cond)
        checked["D__vec"] = net(io["x__vec"], io["sigma__vec"], **cond)
        if "D_nolabel__2" in io:
            checked["D_nolabel__2"] = net(io["x__2"], io["sigmas"][2])
    named = [key for key in io if key.startswith(("D_", "bottleneck_mean_"))]
    assert sorted(checked) == sorted(named)  # nothing that the reference recorded is left out
    errors = {key: relative_error(checked[key], io[key]) for key in named}
    assert max(errors.values()) < 1e-5, errors


def test_labels_and_augmentation_matter():
    """The comparisons above would miss an input that neither side uses."""
    for name, plain, other in (("edm_song_uncond", "D__2", "D_aug__2"), ("edm_dhariwal_cond", "D__2", "D_nolabel__2")):
        _, _, io = tiny_case(name)
        assert relative_error(io[other], io[plain]) > 1e-3


@pytest.mark.parametrize("name", EDM)
def test_full_size_parameter_lists(name):
    """Names, order of names and shapes of every tensor of the official files."""
    facts = manifest(name)
    with torch.device("meta"):
        net = EDMDenoiser(**facts["init_kwargs"])
    expected = {key: shape for key, shape, _ in facts["tensors"]}
    found = {key: list(value.shape) for key, value in net.state_dict().items()}
    assert found == expected and len(found) == facts["n_tensors"]
    assert sum(value.numel() for value in net.state_dict().values()) == facts["n_values"]
    assert net.get_submodule(facts["bottleneck_module"]) is net.bottleneck
    net.load_state_dict({key: torch.empty(shape, device="meta") for key, shape in expected.items()}, strict=True)


@pytest.mark.parametrize("name", EDM)
def test_cards_agree_with_the_official_files(name):
    card, facts = zoo.CARDS[name], manifest(name)
    assert card.urls[0] == facts["official_file"]
    kwargs = facts["init_kwargs"]
    found = (card.resolution, card.channels, card.label_dim)
    assert found == (kwargs["img_resolution"], kwargs["img_channels"], kwargs["label_dim"])
    state = facts["wrapper_state"]
    assert (card.sigma_min, card.sigma_max) == (state["sigma_min_set_by_amed"], state["sigma_max_set_by_amed"])


def test_build_denoiser_copies_and_freezes():
    config, weights, io = tiny_case("edm_song_uncond")
    before = torch.get_rng_state()
    net = build_denoiser("edm", config, {name: value.double() for name, value in weights.items()})
    assert torch.equal(before, torch.get_rng_state())
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    net = build_denoiser("edm", config, weights)
    first = net(io["x__2"], io["sigmas"][2])
    for value in weights.values():
        value.zero_()
    assert torch.equal(net(io["x__2"], io["sigmas"][2]), first)


def without_first(weights: dict) -> dict:
    return dict(list(weights.items())[1:])


@pytest.mark.parametrize(
    "family, change, kwargs, message",
    [
        ("unet", None, {}, "network family 'unet' is unknown"),
        ("cm", None, {}, "not the arguments of a consistency-model U-Net"),
        ("edm", without_first, {}, r"1 missing \(model.map_augment.weight\)$"),
        ("edm", lambda w: {**w, "stray": torch.ones(1)}, {}, r"1 unexpected \(stray\)$"),
        (
            "edm",
            lambda w: {**w, "model.map_layer0.bias": torch.ones(3)},
            {},
            r"map_layer0.bias \[3\] instead of \[32\]",
        ),
        ("edm", lambda w: {}, {}, r"missing \(.*, \.\.\.\)$"),
        ("edm", None, {"guidance_type": "cfg", "guidance_rate": 7.5}, "does not take guidance_type 'cfg'"),
        ("edm", None, {"guidance_rate": 2.0}, "guidance_rate 2 has no effect"),
    ],
)
def test_build_denoiser_refuses(family, change, kwargs, message):
    config, weights, _ = tiny_case("edm_song_uncond")
    with pytest.raises(UserError, match=message):
        build_denoiser(family, config, change(weights) if change else weights, **kwargs)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "VisionNet"},
        {"depth": 3},
        {"encoder_type": "odd"},
        {"model_channels": "wide"},
        {"img_channels": -1},
    ],
)
def test_build_denoiser_refuses_arguments(change):
    config, weights, _ = tiny_case("edm_song_uncond")
    with pytest.raises(UserError, match="not the arguments of an EDM network"):
        build_denoiser("edm", {**config, **change}, weights)


def write_tiny(name: str, path: Path) -> Path:
    config, weights, _ = tiny_case(name)
    save_file(weights, path, metadata={"family": "edm", "config": json.dumps(config)})
    return path


def test_digits():
    """The embedded network denoises a picture better than the best constant factor."""
    net = create_model("digits", guidance_type="uncond", guidance_rate=1)
    path = zoo.resolve("digits")
    assert (net.dataset_name, Path(net.source_path)) == ("digits", path)
    assert net.weights_hash == sha256_of(path) and len(net.weights_hash) == 64
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert (net.sigma_min, net.sigma_max, net.img_channels, net.img_resolution) == (0.002, 80.0, 1, 32)
    generator = torch.Generator().manual_seed(0)
    clean = torch.full([1, 1, 32, 32], -1.0)
    clean[:, :, 8:24, 15:18] = 1.0  # a one
    sigma = 0.5
    noisy = clean + sigma * torch.randn([8, 1, 32, 32], generator=generator)
    with torch.no_grad():
        error = (net(noisy, sigma) - clean).square().mean()
    assert error < 0.1 * sigma**2


def test_custom_network(tmp_path):
    _, _, io = tiny_case("edm_song_cond")
    path = write_tiny("edm_song_cond", tmp_path / "mine.safetensors")
    net = create_model("custom", model_path=path)
    assert (net.dataset_name, net.source_path, net.weights_hash) == ("custom", str(path), sha256_of(path))
    assert relative_error(net(io["x__2"], io["sigmas"][2], class_labels=io["class_labels"]), io["D__2"]) < 1e-5
    for guidance in ("cfg", "uncond"):  # it has classes
        with pytest.raises(UserError, match=f"does not take guidance_type '{guidance}'; use none"):
            create_model("custom", path, guidance)


def test_a_file_that_is_another_network(tmp_path):
    path = write_tiny("edm_song_cond", tmp_path / "mine.safetensors")
    message = f"checkpoint {path} is 3x32x32 with 10 classes, but dataset_name '{{}}' expects {{}}"
    for name, shape in (("cifar10", "3x32x32 unconditional"), ("digits", "1x32x32 unconditional")):
        with pytest.raises(UserError) as error:
            create_model(name, model_path=path)
        assert str(error.value) == message.format(name, shape)


@pytest.mark.parametrize(
    "name, kwargs, message",
    [
        (
            "cifar",
            {},
            r"'cifar' is unknown; did you mean cifar10\? Choose from digits, .*imagenet64, .*ms_coco, custom",
        ),
        ("custom", {}, "needs --model_path"),
        ("diffusers", {}, "needs --model_path, the folder or the hub id"),
        ("digits", {"model_path": "nowhere.pkl"}, "--model_path=nowhere.pkl is not a file"),
        ("digits", {"model_path": "."}, "is not a file"),
        ("cifar10", {"guidance_type": "cg"}, "does not take guidance_type 'cg'; use none or uncond"),
        ("imagenet64", {"guidance_type": "uncond"}, "does not take guidance_type 'uncond'; use none"),
        ("lsun_cat", {"guidance_type": "cg"}, "does not take guidance_type 'cg'; use none or uncond"),
        ("imagenet512", {"guidance_type": "uncond"}, "does not take guidance_type 'uncond'; use none or cg"),
        ("ffhq_ldm", {"guidance_rate": 2}, "guidance_rate 2 has no effect with guidance_type 'none'"),
        ("ms_coco", {"guidance_type": "none", "guidance_rate": 2}, "guidance_rate 2 has no effect"),
        ("digits", {"guidance_type": "none", "guidance_rate": 7.5}, "guidance_rate 7.5 has no effect"),
    ],
)
def test_create_model_refuses(name, kwargs, message):
    with pytest.raises(UserError, match=message):
        create_model(name, **kwargs)


def test_offline_without_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AMED_OFFLINE", "1")
    with pytest.raises(UserError) as error:
        create_model("cifar10")
    file = "edm-cifar10-32x32-uncond-vp.pkl"
    assert str(error.value) == (
        f"could not download https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/{file} (AMED_OFFLINE is set): "
        f"put the file at src/cifar10/{file} or pass --model_path"
    )
    with pytest.raises(UserError, match="cifar10-32x32.npz .* or pass --ref"):
        zoo.resolve_fid_ref("cifar10")
    assert list(tmp_path.iterdir()) == []


def test_a_file_put_in_place_is_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AMED_OFFLINE", "1")
    place = Path("src/ffhq/edm-ffhq-64x64-uncond-vp.pkl")
    place.parent.mkdir(parents=True)
    place.write_bytes(b"weights")
    assert zoo.resolve("ffhq") == place


def test_only_the_first_process_downloads(tmp_path, monkeypatch):
    """Under torchrun all processes end up with the file and only the first of them fetches it."""

    def fake(_urls, dest, **_keywords):
        if not dest.exists():
            assert distributed.local_rank() == 0
            dest.parent.mkdir(parents=True)
            dest.write_bytes(b"weights")

    def work(_rank):
        assert zoo.resolve("cifar10").read_bytes() == b"weights"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zoo, "download_file", fake)
    assert on_two(work)[0] == {0: "fine", 1: "fine"}


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


def test_list_command():
    result = run([sys.executable, "-W", "error", "-m", "models.zoo", "list"], ROOT)
    assert result.returncode == 0, result.stderr
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line}
    for card in zoo.CARDS.values():
        assert card.licence in lines[card.name] and f"{card.channels}x{card.resolution}x" in lines[card.name]
        assert all(url in result.stdout for url in card.urls + card.fid_refs)
    assert "-> src/lsun_bedroom_ldm/model.ckpt ('model.ckpt' in it)" in " ".join(result.stdout.split())


@pytest.mark.parametrize("name", [name for name, card in zoo.CARDS.items() if card.family != "edm"])
def test_cards_agree_with_the_published_settings(name):
    """The space that is sampled, the classes and the range of noise, of networks without memory."""
    card = zoo.CARDS[name]
    presets = {
        "cm": cm.RELEASED_CONFIGS,
        "adm": adm.RELEASED_CONFIGS,
        "ldm": ldm.RELEASED_CONFIGS,
        "sd": {"ms_coco": sd.STABLE_DIFFUSION_1_5},
        "mr": mr.RELEASED_CONFIGS,
    }
    classes = {"cm": cm.CMDenoiser, "adm": adm.ADMDenoiser, "ldm": ldm.LDMDenoiser, "sd": sd.StableDiffusionDenoiser}
    classes["mr"] = mr.MRDenoiser
    net = build_empty(classes[card.family], presets[card.family][name], name)
    assert (net.img_channels, net.img_resolution, net.label_dim) == (card.channels, card.resolution, card.label_dim)
    assert np.allclose((net.sigma_min, net.sigma_max), (card.sigma_min, card.sigma_max), rtol=1e-5)
    assert net.takes_prompts == card.takes_prompts


def test_networks_of_the_original_code_are_there():
    names = {"cifar10", "ffhq", "afhqv2", "imagenet64", "lsun_bedroom", "lsun_cat", "imagenet256", "ms_coco"}
    assert {*names, "lsun_bedroom_ldm", "ffhq_ldm", "cifar10_cond"} <= zoo.CARDS.keys()
    for card in zoo.CARDS.values():
        assert card.licence and bool(card.fid_refs) == bool(card.fid_file and not card.embedded)
        assert all(url.rpartition("/")[2] == card.fid_file for url in card.fid_refs)
        assert all(url.rpartition("/")[2] in (card.file, "lsun_bedrooms.zip", "ffhq.zip") for url in card.urls)


# --------------------------------------------------------------------------------------------------
# Downloaded files


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A working directory without network; a function puts a file where a download would go."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AMED_OFFLINE", "1")

    def put(place: str, content: bytes) -> Path:
        path = Path("src", place)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    return put


def test_weights_out_of_an_archive(offline):
    archive = offline("ffhq_ldm/ffhq.zip", b"")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("model.ckpt", b"weights")
        file.writestr("config.yaml", b"not wanted")
    path = zoo.resolve("ffhq_ldm")
    assert path == Path("src/ffhq_ldm/model.ckpt") and path.read_bytes() == b"weights" and not archive.exists()
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.ckpt", "model.ckpt.sha256"]
    assert zoo.resolve("ffhq_ldm") == path


def test_the_other_form_of_stable_diffusion_is_found(offline):
    with pytest.raises(UserError, match="put the file at src/ms_coco/v1-5-pruned-emaonly.safetensors or pass"):
        zoo.resolve("ms_coco")
    old = offline("ms_coco/v1-5-pruned-emaonly.ckpt", b"weights")
    assert zoo.resolve("ms_coco") == old
    new = offline("ms_coco/v1-5-pruned-emaonly.safetensors", b"weights")
    assert zoo.resolve("ms_coco") == new


def test_the_classifier_of_a_guided_network(offline):
    with pytest.raises(UserError, match="256x256_classifier.pt or pass --model_path, with the classifier beside"):
        zoo.resolve_companion("imagenet256")
    assert zoo.resolve_companion("imagenet256", offline("x/256x256_classifier.pt", b"").with_name("my.pt")) == Path(
        "src/x/256x256_classifier.pt"
    )
    assert zoo.resolve_companion("cifar10") is None and zoo.resolve_companion("custom", "my.pt") is None


@pytest.mark.parametrize("name", ["ms_coco", "ffhq_ldm"])
def test_references_that_nobody_published(name):
    with pytest.raises(UserError, match=f"no FID reference statistics are published for {name}: make them .*--ref"):
        zoo.resolve_fid_ref(name)


def test_verify(offline):
    """What was there at the first use is recorded; verify says what has become of it."""
    place, verify = offline("ffhq/edm-ffhq-64x64-uncond-vp.pkl", b"weights"), CliRunner()

    def said(*arguments):
        done = verify.invoke(zoo.main, ["verify", *arguments])
        return done.exit_code, " ".join(done.output.split())

    assert said("ffhq") == (0, f"not recorded {place} 1 files of ffhq checked, 0 missing or different")
    assert said("cifar10") == (0, "0 files of cifar10 checked, 0 missing or different")
    zoo.resolve("ffhq")
    reference = offline("ffhq/ffhq-64x64.npz", b"statistics")
    zoo.resolve_fid_ref("ffhq")
    assert said() == (0, f"ok {place} ok {reference} 2 files of all networks checked, 0 missing or different")
    place.write_bytes(b"WEIGHTS")
    reference.unlink()
    code, text = said()
    assert code == 2 and text.startswith(f"differs {place} missing {reference} 2 files of all networks checked, 2 mi")
    with pytest.raises(UserError, match="has changed since its first use .*move it away to download it again"):
        zoo.resolve("ffhq")
    assert said("nothing")[0] == 2


def test_verify_looks_at_the_content(offline):
    """Size and time, which spare reading a file at every start, are not enough here."""
    place = offline("ffhq/edm-ffhq-64x64-uncond-vp.pkl", b"weights")
    zoo.resolve("ffhq")
    times = place.stat().st_atime_ns, place.stat().st_mtime_ns
    place.write_bytes(b"WEIGHTS")
    os.utime(place, ns=times)
    assert zoo.resolve("ffhq") == place
    assert [state for state, _ in zoo.verify(zoo.CARDS["ffhq"])] == ["differs"]


def test_list_command_refuses():
    result = run([sys.executable, "-m", "models.zoo", "lists"], ROOT)
    assert result.returncode == 2 and "Traceback" not in result.stderr and "No such command" in result.stderr


def test_classes_of_a_batch():
    """One for all or one for each; what does not fit is named."""
    net = build_denoiser("edm", *tiny_case("edm_song_cond")[:2])
    three = SeededGenerators([0, 1, 2])
    assert net.make_cond(three, 7)["class_labels"].argmax(1).tolist() == [7, 7, 7]
    assert net.make_cond(three, [3, 0, 9])["class_labels"].argmax(1).tolist() == [3, 0, 9]
    for labels, text in (
        ([1, 2], "2 classes for 3 images"),
        ([[1, 2, 3]], "3 classes for 3 images"),
        ([3, -1, 2], "class -1 is out of range: this network has classes 0..9"),
        ([3, 10, 2], "class 10 is out of range"),
        (3.7, "class 3.7"),
    ):
        with pytest.raises(UserError, match=text):
            net.make_cond(three, labels)


def test_the_list_of_coco_captions(tmp_path, monkeypatch):
    """coco30k stands for a file fetched once; anything else is a prompt or a file already."""
    asked = []

    def download(urls, dest, **more):
        asked.append(urls)
        dest.parent.mkdir(parents=True, exist_ok=True)
        dest.write_text('image_id,text\n139,"a room, with a table"\n285,a bear\n')
        return dest

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zoo, "download_file", download)
    monkeypatch.setattr(zoo, "known_sha256", lambda path, pinned: "")
    path = zoo.resolve_prompts("coco30k")
    assert [url.rpartition("/")[2] for url in asked[0]] == [Path(path).name] and Path(path).parent == Path(
        "src/ms_coco"
    )
    assert read_prompts(path) == {0: "a room, with a table", 1: "a bear"}  # in the order of the list, as the seeds are
    assert zoo.resolve_prompts("a red fox") == "a red fox" and zoo.resolve_prompts(None) is None


@pytest.mark.parametrize("setting", [{"num_blocks": 1 << 40}, {"channel_mult": [4] * 1000}, {"num_heads": 1 << 40}])
def test_networks_that_would_never_be_laid_out(setting):
    config = {"img_resolution": 32, "img_channels": 1, "model_type": "SongUNet", **setting}
    with pytest.raises(UserError, match="is too large"):
        build_denoiser("edm", config, {})
