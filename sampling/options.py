"""The options of one run of sample.py."""

from dataclasses import dataclass

import click

from evaluation.verifiers import FORMS
from sampling.flags import ALWAYS, derived, flag, names_of_written, part, schedule_file_flag
from sampling.folder import GRID_LIMIT
from sampling.settings import ComputeOptions, Settings
from sampling.text import TextOptions
from solvers.schedule_file import Schedule
from torch_utils.cli import PATH
from torch_utils.errors import UserError
from torch_utils.memory import BatchSize


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The search over starting noises."""

    candidates: int | None = flag(
        "Noise search: for every seed the best of N images is kept; N times the evaluations", metavar="N"
    )
    verifier: str | None = flag(f"What is best: {FORMS} (evaluation/verifiers.py)", kind=PATH, metavar="V")

    def check(self) -> None:
        """UserError where --candidates and --verifier do not go together."""
        candidates, verifier = self.candidates, self.verifier
        if candidates is not None and candidates < 1:
            raise UserError(f"--candidates={candidates}: of every seed there must be at least 1 image")
        if verifier is None and candidates not in (None, 1):
            raise UserError(f"--candidates={candidates}: say how to choose among them, --verifier={FORMS}")
        if verifier is not None and candidates is None:
            raise UserError(f"--verifier={verifier[:100]} has no effect without --candidates=N: give both or none")


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is written where: images, or their FID alone."""

    outdir: str | None = flag(
        "Default: samples/<dataset_name>/<solver>[-plugin]_nfe<NFE>[_best<N>], or a folder beside it where that holds"
        " images of other settings",
        kind=PATH,
        metavar="DIR",
    )
    subdirs: bool = flag("A folder for every 1000 seeds", True, record=ALWAYS)
    grid: bool = flag(f"Also grid.png, of up to {GRID_LIMIT}", False)
    return_inters: bool = flag("Also strips of denoised images, in inters/", False)
    fid_ref: str | None = flag("Also the FID of these images, as fid.py calc --ref", kind=PATH, metavar="NPZ|URL|NAME")
    fid_detector: str | None = flag(
        "Its detector (default: the reference's, else inception)", kind=PATH, metavar="NAME|PATH"
    )
    fid_json: str | None = flag(
        "Also write the FID and how the images were made to this file", kind=PATH, metavar="FILE"
    )
    save_images: bool | None = flag("Write images (default: True, with --fid_ref False)")
    overwrite: bool = flag("Redo images that exist already", False)

    @property
    def writes_images(self) -> bool:
        return self.fid_ref is None or bool(self.save_images)

    def check(self, written: frozenset[str]) -> None:
        """UserError for flags without effect. written: names of those that the user wrote."""
        if self.fid_ref is None:
            for name in ("fid_detector", "fid_json", "save_images"):
                if getattr(self, name) not in (None, True):
                    raise UserError(f"--{name} goes with --fid_ref; leave it out, or give the reference as well")
        if not self.writes_images:
            for name in ("outdir", "grid", "return_inters", "overwrite", "subdirs", "candidates"):
                if name in written:
                    raise UserError(
                        f"--{name}: with --fid_ref nothing is written; add --save_images=True or leave it out"
                    )


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """One run of sample.py. ``settings`` is what the flags say of what is sampled; a predictor brings its own."""

    predictor_path: str | None = flag(
        "Trained predictor: a name of --list, experiment number, folder or file", kind=PATH, metavar="NAME|N|DIR|FILE"
    )
    settings: Settings = part()
    schedule: Schedule | None = derived(flags=schedule_file_flag, default=None)
    compute: ComputeOptions = part()
    text: TextOptions = part()
    seeds: str = flag("One image each: 0-63 or 1,2,5-10", "0-63")
    batch: int | str = flag(
        "Images per process and network call; auto: as many as fit into memory. The noise does not depend on it, but"
        " rounding does: single pixels change by one grey level, under --amp most of them and by several",
        64,
        BatchSize(),
    )
    class_idx: int | None = flag(
        "Class of all images (default: drawn per seed)", kind=click.IntRange(min=0), names=("--class",), record=ALWAYS
    )
    search: SearchOptions = part()
    output: OutputOptions = part()
    written: frozenset[str] = names_of_written()

    def check(self) -> None:
        """UserError for flags that do not go together, whatever the network."""
        self.search.check()
        self.output.check(self.written)

    def recorded_parts(self) -> tuple:
        """Dataclasses of options that the images depend on besides their settings."""
        return self.text, self.compute, self.output, self
