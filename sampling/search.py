"""Random search over starting noises: keeps the image per seed that a verifier scores highest.

Ma et al. 2025, "Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps" (arXiv
2501.09732, Section 3, "random search", best of N). The sampler is unchanged; N candidates cost N
times the evaluations. A verifier is a number that is maximised. What it does not measure may get
worse (the paper's "verifier hacking"), and images become less diverse, so report a second measure.

Candidate 0 of a seed is the image of that seed without search. All candidates share the class or
prompt of the seed.
"""

import csv
import io
import math
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import get_type_hints

import torch

from torch_utils.errors import UserError
from torch_utils.files import atomic_path
from torch_utils.seeds import candidate_seed


@dataclass(frozen=True)
class Choice:
    """The chosen candidate of a seed.

    seed: the seed.
    candidate: number of the winner.
    noise_seed: the seed whose own noise the winner started from.
    score: of the winner.
    first_score: of candidate 0.
    mean_score: mean over all candidates that are finite images.
    """

    seed: int
    candidate: int
    noise_seed: int
    score: float
    first_score: float
    mean_score: float


class _Contest:
    """The candidates of one seed, as they arrive. If two scores are equal, the earlier one wins."""

    def __init__(self, seed: int):
        self.seed, self.scores = seed, list[float]()
        self.winner: tuple[int, tuple] = (-1, ())

    def enter(self, score: float, row: tuple) -> None:
        if not self.scores or score > max(self.scores):
            self.winner = (len(self.scores), row)
        self.scores.append(score)

    def choice(self) -> Choice:
        candidate, finite = self.winner[0], [score for score in self.scores if score > -math.inf]
        mean = math.fsum(finite) / len(finite) if finite else math.nan
        noise_seed = candidate_seed(self.seed, candidate)
        return Choice(self.seed, candidate, noise_seed, max(self.scores), self.scores[0], mean)


def keep_best(batches: Iterable, candidates: int, score: Callable, report: Callable[[Choice], None]) -> Iterator:
    """The best candidate of every seed.

    batches: with seeds, images [B,C,H,W] and intermediates ([K,B,C,H,W] or None). All candidates of
        a seed follow each other, in any division into batches.
    candidates: number per seed.
    score: function (batch, rows) -> float64 [len(rows)], the scores of these rows of a batch.
        Images that are not finite are not passed to it; they lose against all others.
    report: called with the ``Choice`` of every seed that has a finite winner, before its image is
        yielded.

    Yields batches of the winners, in the same order. Their other fields are those of the batch with
    the last candidate.
    """
    contest = None
    for batch in batches:
        finite = batch.images.isfinite().flatten(1).all(dim=1).cpu()
        scores = torch.full([len(batch.seeds)], -math.inf, dtype=torch.float64)
        if finite.any():
            scores[finite] = score(batch, finite.nonzero().flatten().tolist())
        finished = []
        for row, seed in enumerate(batch.seeds):
            contest = _Contest(seed) if contest is None else contest
            inters = None if batch.intermediates is None else batch.intermediates[:, row]
            contest.enter(scores[row].item(), (batch.images[row], inters))
            if len(contest.scores) == candidates:
                finished.append(contest)
                contest = None
        if finished:
            for winner in (done.choice() for done in finished):
                if winner.score > -math.inf:
                    report(winner)
            images, inters = zip(*(done.winner[1] for done in finished), strict=True)
            stacked = None if batch.intermediates is None else torch.stack(inters, dim=1)
            seeds = [done.seed for done in finished]
            yield replace(batch, seeds=seeds, images=torch.stack(images), intermediates=stacked)


class ScoreFile:
    """The choices of all seeds in an output folder: ``candidates.csv``, one line per seed.

    While sampling, every process appends to a file of its own, so that after a kill every image has
    its line. ``merge`` joins the files.
    """

    NAME = "candidates.csv"

    def __init__(self, folder: Path, rank: int = 0):
        self.path = Path(folder) / self.NAME
        self._own = self.path.with_name(f"{self.NAME}.{rank}-{secrets.token_hex(4)}")

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.NAME}.*"))

    def add(self, choice: Choice) -> None:
        """Appends a line. Several commands may do so in one folder at the same time."""
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(getattr(choice, field.name) for field in fields(Choice))
        self._own.parent.mkdir(parents=True, exist_ok=True)
        with self._own.open("a", encoding="utf-8") as file:  # closed at once, so that the line exists before its image
            file.write(line.getvalue())

    def read(self) -> dict[int, Choice]:
        """The choices by seed; the latest line of a seed counts.

        An unfinished line of a killed process is skipped, since its image was not written either.
        """
        found: dict[int, Choice] = {}
        kinds = get_type_hints(Choice).values()
        for path in [self.path] * self.path.exists() + self._parts():
            text = path.read_text(encoding="utf-8")
            complete = text[: text.rfind("\n") + 1]
            for number, line in enumerate(csv.reader(io.StringIO(complete))):
                if path == self.path and number == 0:
                    continue
                try:
                    choice = Choice(*(kind(value) for kind, value in zip(kinds, line, strict=True)))
                except (ValueError, TypeError):
                    raise UserError(f"{path}: line {number + 1} is damaged; delete the file, or sample again") from None
                found[choice.seed] = choice
        return found

    def merge(self) -> None:
        """Joins all files into one sorted file. One process calls it while no other appends."""
        parts = self._parts()
        if not parts:
            return
        choices = self.read()
        with atomic_path(self.path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(field.name for field in fields(Choice))
            for seed in sorted(choices):
                writer.writerow(getattr(choices[seed], field.name) for field in fields(Choice))
        for part in parts:
            part.unlink()

    def remove(self) -> None:
        for path in [self.path, *self._parts()]:
            path.unlink(missing_ok=True)
