"""The options of one run of compare.py."""

from dataclasses import dataclass
from pathlib import Path

import click

from models import zoo
from sampling.settings import ComputeOptions, NetworkSettings, Settings
from sampling.text import TextOptions
from torch_utils.cli import PATH, PathText
from torch_utils.options import flag, like, names_of_written, part


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Options of one run of compare.py."""

    network: NetworkSettings = part()
    solvers: str = flag(
        "Solvers without a predictor, with their own options: dpmpp:max_order=2:schedule_type=logsnr. schedule=FILE: noise"
        " levels of a schedule file, at its number of evaluations; {nfe} in the name: each of --nfe. all: every solver"
        " that can run here; none: no solver",
        "all",
        metavar="S,S:OPTION=VALUE,...",
    )
    nfe: str = flag(
        "Network evaluations per image; a solver that cannot spend exactly this takes the nearest number below",
        "3,4,5,6,8,10",
        metavar="N,N,...",
    )
    presets: str = flag(
        "Settings of a solver that the flags leave open: recommended for the network and the number of evaluations,"
        " where it has been tuned, or those of the solver's paper (solvers/recommended.py)",
        "recommended",
        click.Choice(["recommended", "published"]),
    )
    predictor_path: str | None = flag(
        "Trained predictors, each compared at its own NFE", kind=PathText(several=True), metavar="N|DIR|FILE,..."
    )
    num: int = flag("Images per method", 5000, click.IntRange(min=2), aliases=("--num_images",))
    seed: int = flag("First seed", 0, click.IntRange(min=0))
    groups: int = flag(
        "Groups of seeds, for the confidence intervals; results are stored and shared per group; fewer by default where"
        " there are few images",
        5,
        click.IntRange(min=2),
    )
    baseline: str | None = flag(
        "One of the compared methods, by its name in the table; adds the paired difference of every method to it",
        metavar="METHOD",
    )
    num_reference: int | None = flag(
        "Seeds for the distance to the reference solution (default: 256, or all if fewer; 0: none)",
        kind=click.IntRange(min=0),
    )
    reference_steps: int = flag("Steps of the reference solution (Heun, 2 evaluations each)", 50, click.IntRange(min=1))
    schedule_type: str | None = like(
        Settings, "schedule_type", default=None, help="Time schedule of all solvers (default: --presets)"
    )
    schedule_rho: float | None = like(Settings, "schedule_rho", default=None)
    sigma_min: float | None = like(Settings, "sigma_min")
    sigma_max: float | None = like(Settings, "sigma_max")
    sigmas: list[float] | None = like(Settings, "sigmas", help="Explicit noise levels for all solvers")
    afs: bool | str | None = like(Settings, "afs", default=None, help="Analytical first step, for all solvers")
    text: TextOptions = part()
    ref: str | None = flag(
        "FID reference statistics (default: those of the network; without any: distances only)",
        kind=PATH,
        metavar="NPZ|URL|NAME",
    )
    detector: str | None = flag(
        "Detector of the features (default: the reference's, else inception)", kind=PATH, metavar="NAME|PATH"
    )
    trust: bool = flag("Run a TorchScript detector of unknown origin", False)
    batch: int = flag("Images per network call", 64, click.IntRange(min=1))
    outdir: str | None = flag("Output folder (default: runs/compare-<dataset_name>)", kind=PATH, metavar="DIR")
    compute: ComputeOptions = part()
    written: frozenset[str] = names_of_written()

    @property
    def folder(self) -> Path:
        return Path(self.outdir or f"runs/compare-{self.network.dataset_name}")

    @property
    def reference_name(self) -> str | None:
        """The reference of the FIDs; None if the network has no reference statistics."""
        card = zoo.find_card(self.network.dataset_name)
        return self.ref or (card.name if card is not None and card.fid_file else None)

    def common(self) -> dict:
        """Settings that all methods share, by their name in ``Settings``."""
        return vars(self.network) | {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max}
