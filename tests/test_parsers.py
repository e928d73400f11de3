"""Everything that reads the user's text or files, on Hypothesis inputs: right or refused."""

import csv
import io
import json
import math
import zipfile

import click
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from evaluation.fid import find_reference
from evaluation.frechet import Reference
from sampling.folder import format_seeds
from solvers import check_sigmas, get_schedule
from solvers.schedule_file import FORMAT, load_schedule
from tools.compare_methods import parse_nfe, split_list
from tools.dataset_tool import parse_resolution
from tools.train_denoiser import parse_ints
from torch_utils.arrays import read_npz
from torch_utils.cli import Number
from torch_utils.distributed import pick_device
from torch_utils.download import download_file
from torch_utils.errors import UserError
from torch_utils.images import ImageSource, load_array
from torch_utils.options import AFSType, SigmaList
from torch_utils.prompts import read_prompts, seed_of
from torch_utils.seeds import parse_seeds
from training.checkpoint import load_predictor, save_predictor
from training.options import AMEDOptions
from training.predictor import DEFAULTS, AMEDPredictor

# Examples are the same in every run; files are rewritten by each, so sharing a folder is fine.
bounded = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
numbers = st.floats(allow_nan=True, allow_infinity=True)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


def or_refused(function, *arguments):
    """The result, None if it is refused with a one-line UserError; other exceptions fail."""
    try:
        return function(*arguments)
    except UserError as error:
        assert "\n" not in str(error) and str(error).strip()
        return None


def converted(kind, text):
    """The value of a flag of this click type, refused as a command line refuses it."""
    try:
        return kind.convert(text, None, None)
    except click.BadParameter as error:
        raise UserError(error.message) from None


# --------------------------------------------------------------------------------------------------
# Texts of the command lines


@bounded
@given(st.lists(st.integers(0, 500), min_size=1, max_size=40, unique=True))
def test_seed_lists_there_and_back(seeds):
    assert parse_seeds(format_seeds(seeds)) == sorted(seeds)
    assert parse_seeds(", ".join(map(str, seeds))) == seeds


@bounded
@given(st.text(alphabet="0123456789,- x\n٣", max_size=14) | st.text(max_size=10))
def test_seed_lists_of_any_text(text):
    seeds = or_refused(parse_seeds, text) if not any(len(part) > 6 for part in text.split("-")) else None
    if seeds is not None:
        assert seeds and len(set(seeds)) == len(seeds) and all(0 <= seed < 1 << 32 for seed in seeds)
        assert text.isascii()


@bounded
@given(st.lists(numbers, max_size=6))
def test_noise_levels(values):
    text = ",".join(map(repr, values))
    parsed = or_refused(converted, SigmaList(), text)
    assert (parsed is None) == (not values)
    good = len(values) >= 2 and all(math.isfinite(v) and v > 0 for v in values)
    good = good and float(np.float32(values[-1])) > 0 and math.isfinite(np.float32(values[0]))
    good = good and all(
        b <= a * (1 - 1e-5) for a, b in zip(values, values[1:], strict=False)
    )  # float32 tells them apart
    checked = or_refused(check_sigmas, values)
    assert (checked is not None) == good
    if good:
        assert checked.tolist() == values == parsed


@bounded
@given(st.text(max_size=12))
def test_noise_levels_of_any_text(text):
    parsed = or_refused(converted, SigmaList(), text)
    assert parsed is None or all(isinstance(value, float) for value in parsed)


@bounded
@given(
    st.integers(-2, 2000) | numbers,
    numbers,
    numbers,
    st.sampled_from(["polynomial", "logsnr", "time_uniform", "discrete", "x"]),
    numbers,
)
def test_schedules(num_steps, low, high, kind, rho):
    found = or_refused(get_schedule, num_steps, low, high, kind, rho)
    if found is not None:
        assert len(found) == num_steps >= 2 and np.isfinite(found.numpy()).all() and (found.diff() < 0).all()
        assert found[0].item() == pytest.approx(high, rel=1e-6) and found[-1].item() == pytest.approx(low, rel=1e-3)


@bounded
@given(
    st.text(max_size=10)
    | st.integers(0, 20_000).map(str)
    | st.tuples(st.integers(), st.integers()).map(lambda s: f"{s[0]}x{s[1]}")
)
def test_resolutions(text):
    found = or_refused(parse_resolution, text)
    assert found is None or all(1 <= side <= 16384 for side in found)


@bounded
@given(st.text(alphabet="0123456789,.- ex", max_size=10) | st.text(max_size=8))
def test_lists_of_numbers(text):
    nfes = or_refused(parse_nfe, text)
    assert nfes is None or (nfes == sorted(set(nfes)) and nfes[0] >= 1)
    sizes = or_refused(parse_ints, text, "--attn")
    assert sizes is None or all(size >= 1 for size in sizes)
    assert all(part and part == part.strip() for part in split_list(text))
    assert or_refused(converted, AFSType(), text) in (None, False, True, "data")


@bounded
@given(
    st.text(max_size=12)
    | st.sampled_from(["cpu:0", "cuda:-1", "cuda:9999999999999", "xla", "meta", "cpu:99999", "MPS"])
)
def test_devices(text):
    device = or_refused(pick_device, text)
    assert device is None or device.type in ("cpu", "cuda", "mps")


@bounded
@given(numbers.map(repr) | st.text(max_size=8), st.booleans())
def test_numbers_are_numbers(text, infinite):
    try:
        number = Number(infinite=infinite).convert(text, None, None)
    except click.BadParameter:
        return
    assert number == number and (infinite or math.isfinite(number))


@bounded
@given(st.text(max_size=30))
def test_names_of_images(name):
    seed = seed_of(name)
    assert seed is None or (seed >= 0 and str(seed) in name)


# --------------------------------------------------------------------------------------------------
# Addresses


@bounded
@given(
    st.sampled_from(["http://", "https://", "HTTP://", "ftp://", "file:///", "//", "", "http:/", "https://[", "data:"]),
    st.text(max_size=25),
)
def test_addresses_offline(monkeypatch_module, scheme, rest):
    """For any address, the file is in the cache folder and there is no request."""
    monkeypatch_module.setenv("AMED_OFFLINE", "1")
    assert or_refused(find_reference, scheme + rest) is None
    folder = monkeypatch_module.folder
    assert or_refused(download_file, [scheme + rest], folder / "x") is None
    assert [path.name for path in folder.iterdir()] in ([], ["fid-refs"])


@bounded
@given(st.text(alphabet="abc/.%2:@[]?#\\ \x00é", max_size=12))
def test_unusable_addresses_are_refused(monkeypatch_module, rest):
    monkeypatch_module.delenv("AMED_OFFLINE", raising=False)
    for address in ("nothing://" + rest, rest):
        assert or_refused(download_file, [address], monkeypatch_module.folder / "y") is None


@pytest.fixture(scope="module")
def monkeypatch_module(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.folder = tmp_path_factory.mktemp("cache")
        patch.setenv("AMED_CACHE", str(patch.folder))
        patch.setattr("torch_utils.download._BACKOFF_S", 0)
        yield patch


# --------------------------------------------------------------------------------------------------
# Files

SCHEDULE = {
    **{"format": FORMAT, "sigmas": [80.0, 1.0, 0.002], "sigmas_cond": None, "solver": "ipndm", "solver_options": {}},
    **{"afs": False, "method": "gits", "settings": {}, "network": None, "network_hash": None, "sigma_min": 0.002},
    **{"sigma_max": 80.0, "evaluations": 0, "seconds": 0.0, "versions": {}},
}


@bounded
@given(st.dictionaries(st.sampled_from(sorted(SCHEDULE)), json_values, max_size=3))
def test_schedule_files(tmp_path, changes):
    path = tmp_path / "s.json"
    path.write_text(json.dumps(SCHEDULE | changes))
    found = or_refused(load_schedule, path)
    if found is not None:
        assert check_sigmas(found.sigmas) is not None and (
            found.sigmas_cond is None or len(found.sigmas_cond) == len(found.sigmas)
        )
    assert load_schedule_is_strict(tmp_path, changes) or not changes


def load_schedule_is_strict(tmp_path, changes):
    """A field too few is always refused."""
    for name in changes:
        (tmp_path / "less.json").write_text(json.dumps({key: value for key, value in SCHEDULE.items() if key != name}))
        assert or_refused(load_schedule, tmp_path / "less.json") is None
    return True


@bounded
@given(st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()))
def test_schedule_files_of_any_content(tmp_path, content):
    (tmp_path / "s.json").write_bytes(content)
    assert or_refused(load_schedule, tmp_path / "s.json") is None


@bounded
@given(st.dictionaries(st.sampled_from([*DEFAULTS, "surprise"]), json_values, max_size=2))
def test_metadata_of_predictors(tmp_path, changes):
    predictor = AMEDPredictor(dataset_name="digits", num_steps=3)
    predictor.config |= changes
    save_predictor(predictor, tmp_path / "p.safetensors")
    found = or_refused(load_predictor, tmp_path / "p.safetensors")
    if found is not None:
        assert found.evaluations() == 2 * (len(found.config["sigmas"] or range(found.config["num_steps"])) - 1) - bool(
            found.config["afs"]
        )


@bounded
@given(st.dictionaries(st.sampled_from([*AMEDOptions(dataset_name="digits").to_dict(), "x"]), json_values, max_size=2))
def test_options_of_training_states(changes):
    options = or_refused(AMEDOptions.from_dict, AMEDOptions(dataset_name="digits").to_dict() | changes)
    if options is not None:
        or_refused(options.check, 1)


@bounded
@given(
    st.lists(st.tuples(st.integers(0, 50), st.text(max_size=12)), max_size=6),
    st.sampled_from(["seed", "index", "SEED", "n"]),
)
def test_caption_tables_there_and_back(tmp_path, rows, column):
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([[column, "caption"], *rows])
    (tmp_path / "c.csv").write_bytes(buffer.getvalue().encode("utf-8", "surrogatepass"))
    found = or_refused(read_prompts, tmp_path / "c.csv")
    if found is not None and column != "n":
        written = {number: caption.strip() for number, caption in rows if caption.strip()}
        assert found.keys() == written.keys()
        assert all(caption == written[number] or "\r" in written[number] for number, caption in found.items())


@bounded
@given(st.binary(max_size=80) | st.text(max_size=60).map(str.encode), st.sampled_from([".csv", ".txt"]))
def test_caption_files_of_any_content(tmp_path, content, suffix):
    (tmp_path / f"c{suffix}").write_bytes(content)
    found = or_refused(read_prompts, tmp_path / f"c{suffix}")
    assert found is None or all(number >= 0 and caption.strip() for number, caption in found.items())


@bounded
@given(
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from(["<f8", ">f4", "<i8", "|u1", "<c8", "<U3", "|b1", ">U2"]),
    st.sampled_from(["mu", "sigma", "num", "detector"]),
)
def test_statistics_files(tmp_path, shape, kind, name):
    arrays = {"mu": np.zeros(2), "sigma": np.eye(2), "num": 5, "detector": "digits"}
    arrays[name] = np.zeros(shape, dtype=kind)
    np.savez(tmp_path / "r.npz", **arrays)
    np.testing.assert_array_equal(read_npz(tmp_path / "r.npz")[name], arrays[name])
    found = or_refused(Reference.load, tmp_path / "r.npz")
    assert found is None or (found.sigma.shape == (len(found.mu),) * 2 and np.isfinite(found.mu).all())


def png(side, mode):
    buffer = io.BytesIO()
    Image.new(mode, (side, side)).save(buffer, "png")
    return buffer.getvalue()


PNGS = {(side, mode): png(side, mode) for side in (1, 4) for mode in ("L", "RGB", "RGBA", "1", "P", "I;16", "LA")}


@bounded
@given(
    st.dictionaries(
        st.text(alphabet="ab/.\\:é", max_size=6).map(lambda name: name + ".png")
        | st.sampled_from(["x.PNG", "notes.txt", "y.jpg"]),
        st.sampled_from(list(PNGS.values())) | st.binary(max_size=20),
        max_size=4,
    ),
    st.none()
    | json_values
    | st.lists(st.tuples(st.text(max_size=6), st.integers(-1, 5)), max_size=3).map(lambda p: {"labels": p}),
)
def test_datasets(tmp_path, parts, labels):
    path = tmp_path / "d.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
        if labels is not None:
            archive.writestr("dataset.json", json.dumps(labels))
    source = or_refused(ImageSource, path)
    if source is not None:
        assert source.labels is None or len(source.labels) == len(source)
        found = or_refused(load_array, source)
        assert found is None or (found.dtype == np.uint8 and found.shape[0] == len(source) and found.shape[1] in (1, 3))
