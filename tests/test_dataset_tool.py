"""Reading folders and zips of images, and making dataset zips."""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from tools.dataset_tool import main, make_dataset, parse_resolution
from torch_utils.errors import UserError
from torch_utils.files import atomic_path
from torch_utils.images import ImageSource, decode_image, load_array

ROOT = Path(__file__).parents[1]
RNG = np.random.default_rng(0)


def write_image(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def png(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="png", **options)
    return buffer.getvalue()


def run_tool(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "dataset_tool.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)


def test_npz_to_padded_zip(tmp_path):
    images = RNG.integers(0, 256, (1003, 5, 6), dtype=np.uint8)
    labels = RNG.integers(0, 10, 1003)
    np.savez(tmp_path / "data.npz", x=images, y=labels)
    dest = tmp_path / "out" / "data.zip"
    done = run_tool(f"--source={tmp_path / 'data.npz'}", f"--dest={dest}", "--resolution=9x8", "--transform=pad")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(dest) as archive:
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        table = json.loads(archive.read("dataset.json"))["labels"]
    assert table[0] == ["00000/img00000000.png", int(labels[0])] and table[-1][0] == "00001/img00001002.png"
    source = ImageSource(dest)
    assert source.labels == labels.tolist() and source.num_classes == labels.max() + 1
    found = load_array(source)
    expected = np.zeros((1003, 1, 8, 9), dtype=np.uint8)
    expected[:, 0, 1:6, 1:7] = images
    np.testing.assert_array_equal(found, expected)


def test_same_source_same_bytes_and_nothing_overwritten(tmp_path):
    np.savez(tmp_path / "data.npz", images=RNG.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8))
    for name in ("a.zip", "b.zip"):
        assert make_dataset(tmp_path / "data.npz", tmp_path / name, max_images=3) == 3
    before = (tmp_path / "a.zip").read_bytes()
    assert before == (tmp_path / "b.zip").read_bytes()
    with pytest.raises(UserError, match="exists"):
        make_dataset(tmp_path / "data.npz", tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == before
    assert make_dataset(tmp_path / "data.npz", tmp_path / "a.zip", overwrite=True) == 4
    assert ImageSource(tmp_path / "a.zip").labels is None


def test_center_crop(tmp_path):
    image = np.zeros((40, 80, 3), dtype=np.uint8)
    image[:, 20:60] = [200, 100, 50]  # the middle square
    write_image(tmp_path / "in" / "wide.png", image)
    make_dataset(tmp_path / "in", tmp_path / "out.zip", (10, 10), "center-crop")
    found = load_array(tmp_path / "out.zip")[0]
    np.testing.assert_array_equal(found, np.broadcast_to(np.reshape([200, 100, 50], (3, 1, 1)), (3, 10, 10)))


def test_labels_follow_images_from_folder_to_zip(tmp_path):
    values = {"b/x.png": 7, "a/z.png": 1, "a/y.png": 4, "b/y.png": 9}
    for name, value in values.items():
        write_image(tmp_path / "in" / name, np.full((4, 4), value, dtype=np.uint8))
    (tmp_path / "in" / "dataset.json").write_text(json.dumps({"labels": [[k, v] for k, v in values.items()]}))
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    make_dataset(tmp_path / "in", tmp_path / "out.zip")
    source = ImageSource(tmp_path / "out.zip")
    assert source.labels == [4, 1, 7, 9]
    assert load_array(source)[:, 0, 0, 0].tolist() == [4, 1, 7, 9]
    assert ImageSource(tmp_path / "in").names == ["a/y.png", "a/z.png", "b/x.png", "b/y.png"]
    make_dataset(tmp_path / "in", tmp_path / "half.zip", max_images=2)  # evenly spaced
    half = ImageSource(tmp_path / "half.zip")
    assert half.labels == load_array(half)[:, 0, 0, 0].tolist() == [4, 7]
    assert load_array(source, 2)[:, 0, 0, 0].tolist() == [4, 7]


def test_a_failure_leaves_no_file(tmp_path):
    write_image(tmp_path / "in" / "a.png", np.zeros((4, 4), dtype=np.uint8))
    (tmp_path / "in" / "b.png").write_bytes(b"not a png")
    with pytest.raises(UserError, match="b.png"):
        make_dataset(tmp_path / "in", tmp_path / "out.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_atomic_path_gives_the_usual_permissions(tmp_path):
    """Also if the writer makes a file that others may not read, as safetensors does."""
    (tmp_path / "plain").write_text("")
    with atomic_path(tmp_path / "file") as temporary:
        temporary.chmod(0o600)
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_atomic_path_keeps_the_old_file(tmp_path):
    dest = tmp_path / "file.txt"
    dest.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(dest) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert dest.read_text() == "old" and list(tmp_path.iterdir()) == [dest]


def test_damaged_files_are_named(tmp_path):
    whole = png(RNG.integers(0, 256, (32, 32), dtype=np.uint8))
    sixteen_bit = png(np.full((4, 4), 70, dtype=np.uint16))
    transparent = png(np.zeros((4, 4, 4), dtype=np.uint8))
    for data in (whole[: len(whole) // 2], whole[:20], b"", b"hello", sixteen_bit, transparent):
        with pytest.raises(UserError, match="^bad.png: "):
            decode_image(data, "bad.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb_is_refused(monkeypatch):
    data = png(np.zeros((64, 64), dtype=np.uint8))
    for limit in (4000, 1000):  # Pillow only warns below twice its limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UserError, match="bomb.png: the image claims more"):
            decode_image(data, "bomb.png")


def test_palette_and_jpeg_are_read(tmp_path):
    colours = np.zeros((16, 16, 3), dtype=np.uint8) + np.array([250, 10, 30], dtype=np.uint8)
    palette = io.BytesIO()
    Image.fromarray(colours).quantize(4).save(palette, format="png")
    np.testing.assert_array_equal(decode_image(palette.getvalue(), "p.png"), colours.transpose(2, 0, 1))
    jpeg = io.BytesIO()
    Image.fromarray(colours).save(jpeg, format="jpeg", quality=95)
    assert np.abs(decode_image(jpeg.getvalue(), "j.jpg").astype(int) - colours.transpose(2, 0, 1)).max() < 8


def test_mixed_sizes_and_colours_among_grey_are_errors(tmp_path):
    write_image(tmp_path / "in" / "1.png", np.zeros((4, 4), dtype=np.uint8))
    write_image(tmp_path / "in" / "2.png", np.zeros((4, 6), dtype=np.uint8))
    with pytest.raises(UserError, match="2.png: 6x4 pixels"):
        load_array(tmp_path / "in")
    write_image(tmp_path / "in" / "2.png", RNG.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    with pytest.raises(UserError, match="2.png: RGB image, expected grey-scale, as the others are"):
        ImageSource(tmp_path / "in", channels=1).read(1)


def test_unusable_sources_are_errors(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.zip").write_text("hello")
    (tmp_path / "file.txt").write_text("hello")
    write_image(tmp_path / "labels" / "a.png", np.zeros((4, 4), dtype=np.uint8))
    (tmp_path / "labels" / "dataset.json").write_text('{"labels": [["b.png", 1]]}')
    for name, message in {
        "missing": "no such",
        "empty": "holds no image$",
        "text.zip": "not a readable zip",
        "file.txt": "expected a folder",
        "labels": "label of a.png",
    }.items():
        with pytest.raises(UserError, match=message):
            ImageSource(tmp_path / name)


def test_source_changes_its_fingerprint_with_its_file(tmp_path):
    write_image(tmp_path / "a.png", np.zeros((4, 4), dtype=np.uint8))
    source = ImageSource(tmp_path)
    before = source.fingerprint(0)
    assert source.fingerprint(0) == before
    write_image(tmp_path / "a.png", RNG.integers(0, 256, (4, 4), dtype=np.uint8))
    assert source.fingerprint(0) != before


def test_resolution():
    assert parse_resolution("32") == (32, 32) and parse_resolution("64x48") == (64, 48)
    for text in ("", "x", "0", "32x", "-4", "32x32x32", "999999"):
        with pytest.raises(UserError, match="--resolution"):
            parse_resolution(text)


def test_wrong_command_lines(tmp_path):
    np.savez(tmp_path / "data.npz", images=np.zeros((2, 8, 8), dtype=np.uint8))
    np.savez(tmp_path / "floats.npz", images=np.zeros((2, 8, 8)))
    np.savez(tmp_path / "names.npz", pictures=np.zeros((2, 8, 8), dtype=np.uint8))
    good = {"--source": tmp_path / "data.npz", "--dest": tmp_path / "out.zip"}
    cases = [
        ({**good, "--source": tmp_path / "none.npz"}, "no such file"),
        ({**good, "--source": tmp_path / "floats.npz"}, "expected uint8"),
        ({**good, "--source": tmp_path / "names.npz"}, "no array named"),
        ({**good, "--dest": tmp_path / "out.tar"}, "must end in .zip"),
        ({**good, "--resolution": "4", "--transform": "pad"}, "do not fit"),
        ({**good, "--resolution": "16"}, "8x8 pixels, not 16x16"),
        ({**good, "--transform": "center-crop"}, "needs --resolution"),
    ]
    for options, message in cases:
        done = CliRunner().invoke(main, [f"{key}={value}" for key, value in options.items()])
        last = done.output.strip().splitlines()[-1]
        assert done.exit_code != 0 and message in last, done.output
        assert isinstance(done.exception, SystemExit)  # not an error of the program
        assert not (tmp_path / "out.zip").exists() and not (tmp_path / "out.tar").exists()
