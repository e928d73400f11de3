r"""Speed of reading images for the FID, and of the detector's features.

    python -m benchmarks.fid_loader --num_images=5000 --workers=0,4   # detector of the digits
    python -m benchmarks.fid_loader --detector=inception --device=cuda --size=32 --channels=3 \
        --num_images=50000

The loader should not be slower than the detector. Times are wall times, since images are decoded in
threads and processes.
"""

import tempfile
import time
from pathlib import Path

import click
import numpy as np

from benchmarks.measuring import describe_machine, interleaved, spread
from evaluation.detectors import load_detector
from evaluation.frechet import FeatureStatistics
from evaluation.reading import compute_statistics, read_batches
from torch_utils.cli import Command
from torch_utils.distributed import pick_device
from torch_utils.images import ImageSource, ImageWriter
from torch_utils.markdown import table


def make_folder(folder: Path, count: int, size: int, channels: int) -> float:
    """Writes smooth random images; returns images per second."""
    rng, start = np.random.default_rng(0), time.perf_counter()
    ramp = np.add.outer(np.arange(size), np.arange(size))[:, :, None] * 3
    with ImageWriter() as writer:
        for index in range(count):
            image = (ramp + rng.integers(0, 40, [size, size, channels]) + index) % 256
            writer.submit(image.astype(np.uint8), folder / f"{index // 1000 * 1000:06d}" / f"{index:06d}.png")
    return count / (time.perf_counter() - start)


@click.command(cls=Command)
@click.option("--detector", default="digits", show_default=True, metavar="NAME|PATH")
@click.option("--num_images", type=click.IntRange(min=2), default=5000, show_default=True)
@click.option("--size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--channels", type=click.IntRange(1, 3), default=1, show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=250, show_default=True)
@click.option("--workers", default="0,2", show_default=True, help="Numbers of processes to try; 0: threads")
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--device", default=None)
def main(detector, num_images, size, channels, batch, workers, repeats, device):
    device = pick_device(device)
    batch, network = min(batch, num_images), load_detector(detector, device)
    with tempfile.TemporaryDirectory() as folder:
        written = make_folder(Path(folder), num_images, size, channels)
        source = ImageSource(folder)
        first = next(iter(read_batches(source, range(batch), batch, device, workers=0)))

        def features():
            statistics = FeatureStatistics(network.feature_dim, device)
            for _ in range(num_images // batch):
                statistics.append(network(first))
            return statistics.count  # waits for the device

        variants = {f"detector {network.name} and statistics, alone": features}
        for count in map(int, workers.split(",")):
            how = f"{count} processes" if count else "threads"
            variants[f"loader alone, {how}"] = lambda count=count: sum(
                len(images) for images in read_batches(source, range(num_images), batch, device, workers=count)
            )
            variants[f"both, {how}"] = lambda count=count: (
                compute_statistics(source, network, batch=batch, device=device, workers=count).count
            )
        seconds = interleaved(variants, repeats, device)
    print(describe_machine(device))
    print(f"{num_images} PNG files of {size}x{size}x{channels}, batch {batch}, {repeats} interleaved repeats;")
    print(f"they were written at {written:.0f} images/s\n")
    baseline = [wall for wall, _ in next(iter(seconds.values()))]
    rows = [
        [
            label,
            spread([num_images / wall for wall, _ in times]),
            spread([alone / wall for alone, (wall, _) in zip(baseline, times, strict=True)]),
        ]
        for label, times in seconds.items()
    ]
    print(table(["what", "images per second", "against the detector alone"], rows))


if __name__ == "__main__":
    main()
