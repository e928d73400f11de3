"""Times frechet_distance against the textbook formula with scipy.linalg.sqrtm.

    OMP_NUM_THREADS=1 python -m benchmarks.frechet_speed --dim=2048

Both use the same number of threads.
"""

import time

import click
import numpy as np
import scipy.linalg

from evaluation.frechet import frechet_distance
from torch_utils.cli import Command


def with_sqrtm(mu1, sigma1, mu2, sigma2) -> float:
    root = np.real(scipy.linalg.sqrtm(sigma1 @ sigma2))
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root))


def statistics(rng: np.random.Generator, count: int, mixing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of ``count`` correlated, non-negative features."""
    features = np.maximum(rng.standard_normal((count, len(mixing))) @ mixing, 0)
    return features.mean(0), np.cov(features, rowvar=False)


@click.command(cls=Command)
@click.option("--dim", type=click.IntRange(min=2), default=2048, show_default=True)
@click.option(
    "--count", type=click.IntRange(min=2), default=10000, show_default=True, help="Samples behind each matrix"
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def main(dim, count, seed):
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((dim, dim)) * np.arange(1, dim + 1)[:, None] ** -0.5 / np.sqrt(np.log(dim + 1))
    first, second = statistics(rng, count, mixing), statistics(rng, count, mixing * 1.05)
    seconds, values = [], []
    for function in (frechet_distance, with_sqrtm):
        start = time.perf_counter()
        values.append(function(*first, *second))
        seconds.append(time.perf_counter() - start)
    print(f"dim={dim} count={count}")
    print(f"frechet_distance {seconds[0]:8.2f} s   {values[0]:.9f}")
    print(f"scipy sqrtm      {seconds[1]:8.2f} s   {values[1]:.9f}")
    print(f"ratio {seconds[1] / seconds[0]:.1f}   relative difference {abs(values[0] / values[1] - 1):.1e}")


if __name__ == "__main__":
    main()
