"""How far the distribution of a student's final samples is from that of the teacher's, without pairs."""

import math

import torch

from solvers.feature_loss import DenoiserFeatures


def mean_distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[n]: the mean Euclidean distance of each x [n,d] to all y [m,d]."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").mean(dim=1)


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of two samples [n,d] and [m,d] (Székely & Rizzo 2013), without bias: pairs of a
    sample with itself are left out. Zero in expectation exactly where the distributions agree."""
    n, m = len(x), len(y)
    within = mean_distance(x, x).mean() * n / (n - 1) + mean_distance(y, y).mean() * m / (m - 1)
    return 2 * mean_distance(x, y).mean() - within


class DistributionTerm:
    """The energy distance between features of students' and of teachers' samples, unpaired.

    Features are means and spreads over the places of the maps of ``DenoiserFeatures``, standardised by those of the
    teacher's samples and divided by the root of their number. Pairs within the batch would be other ones for another
    number of processes; the student's side of them is a queue of features of the latest iterations instead.
    """

    def __init__(self, net, feature_sigma: float, queue: int):
        self.features, self.length = DenoiserFeatures(net, feature_sigma), queue
        self.bank: torch.Tensor | None = None  # [N,d] of the teacher's samples
        self.queue: torch.Tensor | None = None  # [<= length, d] of the student's, newest last
        self._shift, self._scale = 0.0, 1.0

    def _pooled(self, x, cond) -> torch.Tensor:
        maps = self.features(x.float(), cond)
        parts = [(m.mean(dim=(2, 3)), (m.var(dim=(2, 3), correction=0) + 1e-6).sqrt()) for m in maps]
        return torch.cat([value for pair in parts for value in pair], dim=1)

    def vectors(self, x: torch.Tensor, cond) -> torch.Tensor:
        """Standardised features [B,d] of samples [B,C,H,W], with gradients."""
        return (self._pooled(x, cond) - self._shift) * self._scale

    @torch.no_grad()
    def set_bank(self, batches) -> None:
        """Takes the teacher's samples, (images, cond) pairs."""
        bank = torch.cat([self._pooled(images, cond) for images, cond in batches])
        self._shift = bank.mean(dim=0)
        self._scale = 1 / ((bank.std(dim=0) + 1e-6) * math.sqrt(bank.shape[1]))
        self.bank = (bank - self._shift) * self._scale

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        """[B]: terms whose mean has the gradient of the energy distance, were the queue drawn from the same student.

        Every sample moves in both of its places, X and X', hence the 2 before the queue.
        """
        if self.queue is None:
            raise RuntimeError("the queue of the student's features is empty")
        return 2 * mean_distance(vectors, self.bank) - 2 * mean_distance(vectors, self.queue)

    def push(self, vectors: torch.Tensor) -> None:
        """Puts the features of an iteration, those of all processes, at the end of the queue."""
        vectors = vectors.detach()
        kept = vectors if self.queue is None else torch.cat([self.queue, vectors])
        self.queue = kept[-self.length :]
