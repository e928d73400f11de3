"""Images out: rounding, grids, background writing."""

import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

import torch_utils.images as image_writer
from torch_utils.errors import UserError
from torch_utils.images import ImageWriter, image_grid, save_image, to_uint8


def test_to_uint8_is_edms_rounding():
    values = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.5, 1.0, 3.0])
    images = values.reshape(1, 1, 1, 7)
    # by hand: x * 127.5 + 128, cut off below
    assert to_uint8(images)[0, 0, :, 0].tolist() == [0, 0, 0, 128, 191, 255, 255]


def test_to_uint8_inverts_the_usual_normalisation_and_moves_channels_last():
    pixels = torch.arange(256).reshape(1, 1, 16, 16).expand(2, 3, 16, 16).clone()
    pixels[1, 2] = 255 - pixels[1, 2]
    found = to_uint8(pixels.float() / 127.5 - 1)
    assert found.dtype == np.uint8 and np.array_equal(found, pixels.permute(0, 2, 3, 1).numpy())


def test_grid_places_images_row_by_row():
    images = np.stack([np.full([3, 4, 1], value, np.uint8) for value in (10, 20, 30, 40, 50)])
    grid = image_grid(images, columns=3, pad=2, fill=7)
    assert grid.shape == (3 + 2 + 3, 3 * 4 + 2 * 2, 1)
    for index, value in enumerate((10, 20, 30, 40, 50)):
        top, left = index // 3 * 5, index % 3 * 6
        assert (grid[top : top + 3, left : left + 4] == value).all()
        grid[top : top + 3, left : left + 4] = 7
    assert (grid == 7).all()  # nothing else was touched
    assert image_grid(images[:2], columns=9).shape == (3, 10, 1)
    with pytest.raises(UserError, match="at least one image"):
        image_grid(images[:0], 3)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_saved_image_reads_back(tmp_path, channels, mode):
    array = np.random.default_rng(0).integers(0, 256, [5, 6, channels], dtype=np.uint8)
    save_image(array, tmp_path / "new" / "a.png")
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.mode == mode and image.format == "PNG"
        assert np.array_equal(np.asarray(image).reshape(5, 6, channels), array)


@pytest.mark.parametrize("array", [np.zeros([4, 4, 2], np.uint8), np.zeros([4, 4, 3], np.float32)])
def test_what_is_no_picture_is_refused(tmp_path, array):
    with pytest.raises(UserError, match="uint8 grey or RGB"):
        save_image(array, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_writer_writes_everything_before_it_is_left(tmp_path):
    with ImageWriter(threads=3, capacity=2) as writer:
        for index in range(50):
            writer.submit(np.full([4, 4, 1], index, np.uint8), tmp_path / f"{index % 5}" / f"{index}.png")
    found = {int(path.stem): np.asarray(Image.open(path))[0, 0] for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {index: index for index in range(50)}  # and no temporary file


def test_writer_raises_the_first_error_and_does_not_hang(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"), ImageWriter(threads=2, capacity=1) as writer:
        for _ in range(200):
            writer.submit(np.zeros([4, 4, 1], np.uint8), tmp_path / "file" / "a.png")
    assert (tmp_path / "file").read_text() == "in the way"


def test_error_of_the_block_goes_first_and_queued_images_are_kept(tmp_path):
    with pytest.raises(KeyError, match="mine"), ImageWriter() as writer:
        for index in range(20):
            writer.submit(np.zeros([4, 4, 1], np.uint8), tmp_path / f"{index}.png")
        raise KeyError("mine")
    assert len(list(tmp_path.iterdir())) == 20


def test_queue_is_bounded(tmp_path, monkeypatch):
    """If the disk hangs, submit waits with one image in writing and ``capacity`` in the queue."""
    writing, go, submitted = threading.Event(), threading.Event(), []

    def stand_still(array, path):
        writing.set()
        assert go.wait(60)

    monkeypatch.setattr(image_writer, "save_image", stand_still)

    def feed():
        with ImageWriter(threads=1, capacity=3) as writer:
            for index in range(10):
                writer.submit(np.zeros([1, 1, 1], np.uint8), index)
                submitted.append(index)
                assert writing.wait(60)  # the first image has left the queue

    feeder = threading.Thread(target=feed)
    feeder.start()
    end = time.monotonic() + 60
    while len(submitted) < 4 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.2)  # for one too many
    assert submitted == [0, 1, 2, 3]
    go.set()
    feeder.join(60)
    assert submitted == list(range(10))


def test_a_failed_write_leaves_nothing_half_written(tmp_path, monkeypatch):
    save_image(np.full([4, 4, 1], 9, np.uint8), tmp_path / "a.png")

    def full_disk(self, path, format):
        path.write_bytes(b"\x89PN")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(UserError, match="No space left"):
        save_image(np.zeros([4, 4, 1], np.uint8), tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert np.asarray(Image.open(tmp_path / "a.png"))[0, 0] == 9
