"""sample.py --candidates: which candidates there are, that the best is kept, and what may judge."""

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import test_clip_score
import test_families_cli
import torch
from click.testing import CliRunner
from latent_nets import tiny_case
from PIL import Image
from test_clip_score import CAPTIONS
from test_families_cli import adm_config, pictures, sd_flags
from test_sample_cli import BrokenNet, ClassNet, assert_same_pictures, numbered
from two_processes import call_on_two

import sample as cli
from evaluation import verifiers
from evaluation.clip import ClipNetwork
from evaluation.detectors import EMBEDDED, PRETRAINED, ConvClassifier, load_classifier, save_classifier
from evaluation.verifiers import FORMS, load_verifier, score_images
from models import build_denoiser, create_model
from sampling.folder import Folder
from sampling.generate import Batch, generate_images
from sampling.run import search, write_images
from sampling.search import Choice, ScoreFile, keep_best
from solvers import sample
from torch_utils.errors import UserError
from torch_utils.files import sha256_of
from torch_utils.functions import find_function
from torch_utils.images import to_uint8
from torch_utils.progress import progress_bar
from torch_utils.seeds import candidate_seed

model, images, cosines = test_clip_score.model, test_clip_score.images, test_clip_score.cosines  # fixtures
files = test_families_cli.files
EULER = ("--dataset_name=digits", "--solver=euler", "--num_steps=3", "--device=cpu")
SEARCH = (*EULER, "--candidates=3", "--verifier=classifier", "--seeds=0-5")


def run(*arguments, code=0):
    done = CliRunner().invoke(cli.main, list(map(str, arguments)))
    assert done.exit_code == code, done.output + repr(done.exception)
    return done.output


def line_of(*arguments):
    (line,) = run(*arguments, code=2).strip().splitlines()
    assert line.startswith("Error: ")
    return line


def choices(folder) -> dict[int, dict]:
    with (folder / "candidates.csv").open(newline="") as file:
        return {int(row["seed"]): {k: float(v) for k, v in row.items()} for row in csv.DictReader(file)}


def assert_same_choices(found: dict, expected: dict):
    assert list(found) == sorted(expected)
    for seed, row in expected.items():
        assert found[seed] == pytest.approx(row, rel=1e-2, abs=1e-4)  # rounding depends on the batch
        assert found[seed]["noise_seed"] == row["noise_seed"]


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched") / "out"
    return folder, run(*SEARCH, "--outdir", folder)


# --------------------------------------------------------------------------------------------------
# What is kept


def test_the_best_of_all_candidates_is_kept(searched):
    """Every candidate is sampled here as its own image and scored without the code under test."""
    folder, output = searched
    net, (classifier, _) = create_model("digits"), load_classifier(PRETRAINED / EMBEDDED["digits"])
    pictures, found = numbered(folder), choices(folder)
    assert list(found) == list(range(6)) == sorted(pictures)
    for seed, row in found.items():
        noises = [candidate_seed(seed, number) for number in range(3)]
        assert noises[0] == seed and len(set(noises)) == 3
        x = torch.stack([torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(noise)) for noise in noises])
        made = torch.from_numpy(to_uint8(sample(net, x, solver="euler", num_steps=3)))[..., 0]
        with torch.no_grad():
            scores = classifier(made[:, None].float() / 255).double().softmax(1).amax(1).log()
        best = int(scores.argmax())
        assert row["candidate"] == best and row["noise_seed"] == noises[best]
        assert row["score"] == pytest.approx(scores.max().item(), rel=1e-2, abs=1e-5)
        assert row["first_score"] == pytest.approx(scores[0].item(), rel=1e-2, abs=1e-5)
        assert row["mean_score"] == pytest.approx(scores.mean().item(), rel=1e-2, abs=1e-5)
        assert_same_pictures({0: pictures[seed]}, {0: made[best].numpy().astype(int)})
    assert len({row["candidate"] for row in found.values()}) > 1  # it does choose


def test_cost_and_record(searched):
    folder, output = searched
    assert "sampled 6 images (0 skipped) NFE=6 (3 candidates of 2)" in output
    record = json.loads((folder / "sampling.json").read_text())
    assert (record["nfe"], record["nfe_per_candidate"], record["scores"]) == (6, 2, "candidates.csv")
    assert record["settings"]["candidates"] == 3 and record["settings"]["verifier"] == "classifier"
    assert len(record["settings"]["verifier_sha256"]) == 64
    assert sorted(path.name for path in folder.iterdir()) == ["000000", "candidates.csv", "sampling.json"]


def test_one_candidate_is_the_plain_run(tmp_path):
    run(*EULER, "--seeds=0-4", "--outdir", tmp_path / "plain")
    run(*EULER, "--seeds=0-4", "--outdir", tmp_path / "one", "--candidates=1")
    run(*EULER, "--seeds=0-4", "--outdir", tmp_path / "judged", "--candidates=1", "--verifier=classifier")
    for seed in range(5):
        expected = (tmp_path / "plain" / "000000" / f"{seed:06d}.png").read_bytes()
        for name in ("one", "judged"):
            assert (tmp_path / name / "000000" / f"{seed:06d}.png").read_bytes() == expected
    assert not (tmp_path / "one" / "candidates.csv").exists()
    records = [json.loads((tmp_path / name / "sampling.json").read_text()) for name in ("plain", "one")]
    assert records[0] == records[1]
    assert all(row["candidate"] == 0 for row in choices(tmp_path / "judged").values())


@pytest.mark.parametrize("options", [("--batch=1",), ("--batch=4", "--return_inters=True")])
def test_batches_do_not_change_the_choice(searched, tmp_path, options):
    """Of one image, and such that cut the candidates of a seed apart."""
    run(*SEARCH, "--outdir", tmp_path, *options)
    assert_same_choices(choices(tmp_path), choices(searched[0]))
    assert_same_pictures(numbered(tmp_path), numbered(searched[0]))
    if "--return_inters=True" in options:
        for seed, picture in numbered(tmp_path).items():
            with Image.open(tmp_path / "inters" / f"{seed:06d}.png") as strip:
                assert np.array_equal(np.asarray(strip)[:, -32:], picture)


def test_two_processes_and_a_rerun_choose_the_same(searched, tmp_path):
    run(*SEARCH[:-1], "--seeds=3-4", "--outdir", tmp_path)
    assert call_on_two(cli.main, *SEARCH, "--batch=2", f"--outdir={tmp_path}").codes == [0, 0]
    assert_same_choices(choices(tmp_path), choices(searched[0]))
    assert_same_pictures(numbered(tmp_path), numbered(searched[0]))
    assert not list(tmp_path.glob("candidates.csv.*"))


def test_a_killed_run_keeps_what_it_chose(searched, tmp_path, monkeypatch):
    real, seen = verifiers.ClassifierVerifier.__call__, []

    def dying(self, images, *, seeds, **more):
        seen.append(seeds)
        if 4 in seeds:
            raise KeyboardInterrupt
        return real(self, images, seeds=seeds, **more)

    monkeypatch.setattr(verifiers.ClassifierVerifier, "__call__", dying)
    run(*SEARCH, "--batch=3", "--outdir", tmp_path, code=130)
    (part,) = tmp_path.glob("candidates.csv.0-*")
    part.write_text(part.read_text() + "4,2,77")  # the line that was being written
    monkeypatch.setattr(verifiers.ClassifierVerifier, "__call__", real)
    assert "sampled 2 images (4 skipped)" in run(*SEARCH, "--outdir", tmp_path)
    assert_same_choices(choices(tmp_path), choices(searched[0]))
    assert_same_pictures(numbered(tmp_path), numbered(searched[0]))


def test_images_with_and_without_search_are_never_mixed(tmp_path):
    plain = (*EULER, "--seeds=0-1", "--outdir", tmp_path)
    searched = (*plain, "--candidates=2", "--verifier=classifier")
    run(*searched)
    assert "candidates: 2 there, null now" in line_of(*plain)
    assert "candidates: 2 there, 3 now" in line_of(*plain, "--candidates=3", "--verifier=classifier")
    run(*plain, "--overwrite=True")
    assert not (tmp_path / "candidates.csv").exists()


def test_default_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*EULER, "--seeds=0", "--candidates=2", "--verifier=classifier")
    assert (tmp_path / "samples" / "digits" / "euler_nfe2_best2" / "000000" / "000000.png").exists()


# --------------------------------------------------------------------------------------------------
# The parts


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_keep_best_for_any_division_into_batches(size):
    rng = np.random.default_rng(0)
    table = rng.integers(0, 4, [7, 5]).astype(float)  # with ties
    rows = [(seed, number) for seed in range(7) for number in range(5)]
    broken = {(2, int(table[2].argmax())), *((6, number) for number in range(5))}

    def batches():
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            images = torch.tensor([[math.nan if row in broken else 10.0 * row[0] + row[1]] for row in part])
            yield Batch([s for s, _ in part], images.reshape(-1, 1, 1, 1), images.reshape(1, -1, 1, 1, 1), None, {})

    def score(batch, rows):
        values = batch.images.flatten()[rows].int().tolist()
        return torch.tensor([table[value // 10][value % 10] for value in values], dtype=torch.float64)

    reported = []
    results = list(keep_best(batches(), 5, score, reported.append))
    assert [seed for result in results for seed in result.seeds] == list(range(7))
    shown = torch.cat([result.images.flatten() for result in results])
    assert torch.cat([result.intermediates.flatten() for result in results]).equal(shown) or shown[-1].isnan()
    for row in broken:
        table[row] = -np.inf
    assert shown[:6].tolist() == [10.0 * seed + table[seed].argmax() for seed in range(6)] and shown[6].isnan()
    assert [choice.seed for choice in reported] == list(range(6))  # nothing is reported of a seed without an image
    for choice in reported:
        finite = table[choice.seed][np.isfinite(table[choice.seed])]
        assert choice.score == finite.max() and choice.mean_score == pytest.approx(finite.mean())
        assert choice.noise_seed == candidate_seed(choice.seed, choice.candidate)


def test_score_file(tmp_path):
    first, second = Choice(3, 1, 99, 0.1 + 0.2, -1e-17, 0.0), Choice(1, 0, 1, 2.0, 2.0, 2.0)
    for rank, choice in ((1, first), (0, second)):
        ScoreFile(tmp_path, rank).add(choice)
    ScoreFile(tmp_path).merge()
    ScoreFile(tmp_path).merge()
    assert list(ScoreFile(tmp_path).read().items()) == [(1, second), (3, first)]
    ScoreFile(tmp_path).add(Choice(3, 2, 5, 1.0, 0.0, 0.0))
    ScoreFile(tmp_path).merge()
    assert ScoreFile(tmp_path).read()[3].candidate == 2 and [p.name for p in tmp_path.iterdir()] == ["candidates.csv"]
    (tmp_path / "candidates.csv").write_text("seed\n1,2,x\n")
    with pytest.raises(UserError, match="line 2 is damaged"):
        ScoreFile(tmp_path).read()


class NoisyClassNet(ClassNet):
    """The image is made of its class and of the state, in which all noise is."""

    def forward(self, x, sigma, classes):
        return super().forward(x, sigma, classes) + x / (1 + torch.as_tensor(sigma).reshape(-1, 1, 1, 1))


def drawn(seeds, **options) -> torch.Tensor:
    settings = {"solver": "edm", "num_steps": 4, "S_churn": 40.0, "device": "cpu"}
    return torch.cat([b.images for b in generate_images(NoisyClassNet(), seeds, **settings, **options)])


def test_candidates_share_the_class_and_begin_with_the_image_itself():
    """With a solver that draws noise; more candidates do not change the first streams."""
    plain = drawn([4, 9, 2])
    three = drawn([4, 9, 2], candidates=3, batch=4).reshape(3, 3, 1, 4, 4)
    assert torch.equal(three[:, 0], plain)
    torch.testing.assert_close(drawn([4, 9, 2], candidates=5, batch=64).reshape(3, 5, 1, 4, 4)[:, :3], three)
    assert len({round(value, 5) for value in three.flatten(2).mean(2).flatten().tolist()}) == 9
    shown = [
        [round(image.mean().item()) for image in batch.images]
        for batch in generate_images(
            ClassNet(), [4, 9, 2], candidates=3, batch=3, device="cpu", solver="euler", sigmas=[1.0, 0.002]
        )
    ]
    assert all(len(set(row)) == 1 for row in shown) and len({row[0] for row in shown}) > 1
    labelled = generate_images(
        ClassNet(), [4, 9], candidates=2, labels=[7, 8], device="cpu", solver="euler", sigmas=[1.0, 0.002]
    )
    assert [round(image.mean().item()) for image in next(labelled).images] == [7, 7, 8, 8]


# --------------------------------------------------------------------------------------------------
# Verifiers


def test_a_function_of_ones_own(tmp_path, monkeypatch):
    """It sees what the PNG files have, and its choice is followed; found in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_taste.py").write_text(
        "import torch\n"
        "def bright(images, *, seeds, classes, prompts):\n"
        "    assert images.dtype == torch.uint8 and images.shape[1:] == (1, 32, 32) and len(seeds) == len(images)\n"
        "    assert classes is None and prompts is None and images.device.type == 'cpu'\n"
        "    return images.float().mean(dim=(1, 2, 3)).tolist()\n"
    )
    run(*EULER, "--seeds=0-2", "--candidates=4", "--verifier=my_taste:bright", "--outdir", tmp_path / "o")
    for seed, picture in numbered(tmp_path / "o").items():
        row = choices(tmp_path / "o")[seed]
        assert row["score"] == pytest.approx(picture.mean()) and row["score"] >= row["first_score"]
    digest = json.loads((tmp_path / "o" / "sampling.json").read_text())["settings"]["verifier_sha256"]
    assert digest == sha256_of(tmp_path / "my_taste.py")


def test_classes_and_prompts_reach_a_verifier():
    seen = SimpleNamespace(name="mine")

    def mine(images, *, seeds, classes, prompts):
        seen.got = (seeds, classes, prompts)
        return np.zeros(len(images))

    mine.name = "mine"
    score_images(mine, torch.zeros(2, 1, 4, 4, dtype=torch.uint8), [5, 6], torch.tensor([[0, 1], [1, 0]]), None)
    assert seen.got == ([5, 6], [1, 0], None)
    score_images(mine, torch.zeros(2, 1, 4, 4, dtype=torch.uint8), [5, 6], torch.tensor([3, 0]), ["a", "b"])
    assert seen.got == ([5, 6], [3, 0], ["a", "b"])


def test_classifier_of_a_file(tmp_path):
    torch.manual_seed(0)
    classifier = ConvClassifier(1, 8, 3, feature_dim=4, width=4).eval()
    save_classifier(classifier, tmp_path / "c.safetensors")
    net = SimpleNamespace(img_channels=1, img_resolution=8, label_dim=3)
    verifier = load_verifier(f"classifier:{tmp_path / 'c.safetensors'}", net)
    pixels = torch.randint(256, [4, 1, 8, 8], dtype=torch.uint8)
    with torch.no_grad():
        expected = classifier(pixels.float() / 255).double().log_softmax(1)
    found = score_images(verifier, pixels, range(4), torch.tensor([2, 0, 1, 1]))
    torch.testing.assert_close(found, expected[range(4), [2, 0, 1, 1]])
    torch.testing.assert_close(score_images(verifier, pixels, range(4)), expected.amax(1))
    for changes, message in (({"img_resolution": 16}, "is for images of 1x8x8"), ({"label_dim": 5}, "has 3 classes")):
        with pytest.raises(UserError, match=message):
            load_verifier(verifier.name, SimpleNamespace(**vars(net) | changes))


def test_the_noisy_classifier_of_adm():
    """The reference's classifier, called at the lowest noise level with the given class."""
    facts, weights, _ = tiny_case("adm_guided")
    net = build_denoiser("adm", adm_config(facts), weights, "cg", 2.0)
    net.weights_hash = "0" * 64
    verifier = load_verifier("classifier", net)
    pixels = torch.randint(256, [3, net.img_channels, net.img_resolution, net.img_resolution], dtype=torch.uint8)
    x = (pixels.double() / 127.5 - 1) / math.sqrt(1 + net.sigma_min**2)
    with torch.no_grad():  # sigma_min belongs to t = 0.001, of the steps 0..999
        logits = net.classifier(x.float(), torch.full([3], 0.999)).double()
    labels = torch.tensor([1, 0, 2])
    found = score_images(verifier, pixels, range(3), labels)
    torch.testing.assert_close(found, logits.log_softmax(1)[range(3), labels], rtol=1e-3, atol=1e-4)
    assert found.std() > 1e-4
    plain = build_denoiser("adm", adm_config(facts), weights)
    with pytest.raises(UserError, match="there is no classifier for this network"):
        load_verifier("classifier", plain)


def test_clip(model, images, cosines):
    net = SimpleNamespace(takes_prompts=True)
    verifier = load_verifier(f"clip:{model}", net)
    for seed, path in enumerate(sorted(images.iterdir())):
        with Image.open(path) as image:
            pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)[None]
        found = score_images(verifier, pixels, [seed], None, [CAPTIONS[seed]])
        assert found.item() == pytest.approx(cosines[seed, seed], abs=1e-5)
    with pytest.raises(UserError, match=r"^--verifier=clip:/nowhere: no such folder"):
        load_verifier("clip:/nowhere", net)


def test_prompts_of_the_command_line_reach_clip(files, model, tmp_path):
    """Every image was compared with the caption of its own seed."""
    flags = sd_flags(files, "--prompt", files["table"], "--seeds=5,7", "--candidates=2", f"--verifier=clip:{model}")
    run(*flags, "--batch=3", "--device=cpu", "--outdir", tmp_path)
    network, shown = ClipNetwork(model), pictures(tmp_path)
    for seed, caption in ((5, "a b"), (7, "c d")):
        prepared = network.prepare(shown[seed].astype(np.uint8).transpose(2, 0, 1))
        expected = network.similarity(torch.from_numpy(prepared)[None], [caption]).item()
        assert choices(tmp_path)[seed]["score"] == pytest.approx(expected, abs=1e-5)


def test_clip_without_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs the package 'transformers'.*\[text\]"):
        load_verifier("clip", SimpleNamespace(takes_prompts=True))


# --------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--candidates=0", "--verifier=classifier"), "--candidates=0: must be at least 1"),
        (("--candidates=4",), "--candidates=4: add a score to choose by"),
        (("--verifier=classifier",), "has no effect without --candidates"),
        (("--candidates=2", "--verifier=nobody:f"), "cannot import the module 'nobody'"),
        (("--candidates=2", "--verifier=math:nothing"), "has no function 'nothing'"),
        (("--candidates=2", "--verifier=magic"), "choose classifier[:FILE], clip[:ID|DIR] or MODULE:FUNCTION"),
        (("--candidates=2", "--verifier=clip"), "this network has no prompts"),
        (("--candidates=2", "--verifier=classifier:/nowhere.safetensors"), "/nowhere.safetensors"),
    ],
)
def test_mistakes_take_one_line_and_leave_nothing(tmp_path, flags, message):
    assert message in line_of(*EULER, "--seeds=0", "--outdir", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return images.float().mean(dim=(2, 3))", "returned numbers of shape [4, 1] for 4 images; expected [4]"),
        ("return [1.0]", "returned numbers of shape [1] for 4 images"),
        ("return [float('nan') if s == 1 else 0.0 for s in seeds]", "returned nan for an image of seed 1"),
        ("return [float('inf')] * len(seeds)", "returned inf for an image of seed 0"),
        ("return None", "returned a NoneType instead of one number per image"),
        ("return ['good'] * len(seeds)", "returned a list instead of one number per image"),
    ],
)
def test_verifiers_that_do_not_answer(tmp_path, monkeypatch, body, message):
    name = f"bad_{abs(hash(body))}"
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"{name}.py").write_text(f"def judge(images, *, seeds, classes, prompts):\n    {body}\n")
    output = run(*EULER, "--seeds=0-1", "--candidates=2", f"--verifier={name}:judge", "--outdir", tmp_path, code=2)
    assert message in output.strip().splitlines()[-1] and not list(tmp_path.rglob("*.png"))


def test_a_seed_without_any_finite_image_is_named(tmp_path):
    batches = generate_images(BrokenNet(), [10, 11], batch=3, candidates=2, device="cpu", solver="euler", num_steps=3)
    scores = ScoreFile(tmp_path)
    verifier = load_verifier("math:fsum", None)
    verifier._function = lambda images, **_: torch.ones(len(images))
    folder = Folder(tmp_path, subdirs=False, inters=False)
    with progress_bar(disable=True) as bar:  # one of two candidates is broken: the other one is kept
        write_images(search(batches, verifier, 2, None, scores), folder, 2, bar)
    assert {seed: choice.candidate for seed, choice in scores.read().items()} == {10: 0, 11: 0}
    batches = generate_images(BrokenNet(), [10, 11], candidates=1, device="cpu", solver="euler", num_steps=3)
    with pytest.raises(UserError, match="for seeds 11: not written"), progress_bar(disable=True) as bar:
        write_images(search(batches, verifier, 1, None, scores), folder, 2, bar)


def test_find_function():
    assert find_function("json:dumps", "--verifier", FORMS) == (json.dumps, json.__file__)
    with pytest.raises(UserError, match="choose classifier"):
        find_function("json:dumps.x", "--verifier", FORMS)
