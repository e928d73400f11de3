"""The options of one run of compare.py."""

from dataclasses import dataclass
from pathlib import Path

import click

from models import zoo
from sampling.flags import flag, like, names_of_written, part
from sampling.settings import ComputeOptions, NetworkSettings, Settings
from sampling.text import TextOptions
from torch_utils.cli import PATH, PathText


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """One run of compare.py: the methods, the seeds, what all methods share, the judge, and where results go."""

    network: NetworkSettings = part()
    solvers: str = flag(
        "Solvers without a predictor, with options of their own if need be: dpmpp:max_order=2:schedule_type=logsnr."
        " schedule=FILE: with the noise levels of a schedule file, at its number of evaluations; {nfe} in the name stands"
        " for each of --nfe. all: all that can run here; none: none",
        "all",
        metavar="S,S:OPTION=VALUE,...",
    )
    nfe: str = flag(
        "Network evaluations per image; the nearest possible below where a solver cannot spend just that",
        "3,4,5,6,8,10",
        metavar="N,N,...",
    )
    predictor_path: str | None = flag(
        "Trained predictors, each at its own NFE", kind=PathText(several=True), metavar="N|DIR|FILE,..."
    )
    num: int = flag("Images per method", 5000, click.IntRange(min=2), names=("--num", "--num_images"))
    seed: int = flag("First seed; then upwards", 0, click.IntRange(min=0))
    groups: int = flag(
        "Groups of seeds: for the confidence intervals, and the unit in which work is stored and shared; by default"
        " fewer where there are few images",
        5,
        click.IntRange(min=2),
    )
    baseline: str | None = flag(
        "One of the compared methods, by its name in the table; the paired difference of every method to it is added to"
        " all results",
        metavar="METHOD",
    )
    num_reference: int | None = flag(
        "Seeds whose distance to the reference solution is taken (default: 256, or all if fewer; 0: none)",
        kind=click.IntRange(min=0),
    )
    reference_steps: int = flag("Steps of the reference solution (Heun, 2 evaluations each)", 50, click.IntRange(min=1))
    schedule_type: str | None = like(
        Settings, "schedule_type", default=None, help="For all solvers (default: customary)"
    )
    schedule_rho: float | None = like(Settings, "schedule_rho", default=None)
    sigma_min: float | None = like(Settings, "sigma_min")
    sigma_max: float | None = like(Settings, "sigma_max")
    sigmas: list[float] | None = like(Settings, "sigmas", help="Explicit noise levels for all solvers")
    afs: bool | str | None = like(Settings, "afs", default=None, help="Free first step, for all solvers")
    text: TextOptions = part()
    ref: str | None = flag(
        "FID reference statistics (default: those of the network; without any: distances only)",
        kind=PATH,
        metavar="NPZ|URL|NAME",
    )
    detector: str | None = flag("Default: the reference's, else inception", kind=PATH, metavar="NAME|PATH")
    trust: bool = flag("Run a TorchScript detector not known here", False)
    batch: int = flag("Images per network call", 64, click.IntRange(min=1))
    outdir: str | None = flag("Default: runs/compare-<dataset_name>", kind=PATH, metavar="DIR")
    compute: ComputeOptions = part()
    written: frozenset[str] = names_of_written()

    @property
    def folder(self) -> Path:
        return Path(self.outdir or f"runs/compare-{self.network.dataset_name}")

    @property
    def reference_name(self) -> str | None:
        """What FIDs are taken to; None where the network has no reference statistics."""
        card = zoo.find_card(self.network.dataset_name)
        return self.ref or (card.name if card is not None and card.fid_file else None)

    def common(self) -> dict:
        """What the settings of all methods share, by its name in ``Settings``."""
        return vars(self.network) | {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max}
