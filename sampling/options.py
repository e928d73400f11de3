"""The options of one run of sample.py."""

from dataclasses import dataclass
from pathlib import Path

import click
import torch

from evaluation.fid import StreamedFID, metric_names
from evaluation.verifiers import FORMS
from models import zoo
from sampling.flags import schedule_file_flag
from sampling.folder import GRID_LIMIT
from sampling.inputs import InputOptions
from sampling.settings import ComputeOptions, Settings
from sampling.text import TextOptions
from solvers.particle_search import METHODS
from solvers.schedule_file import Schedule
from torch_utils.cli import PATH
from torch_utils.errors import UserError
from torch_utils.files import check_destination
from torch_utils.memory import BatchSize
from torch_utils.options import ALWAYS, CHANGED, COUNT, derived, flag, names_of_written, part


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Options of the search over starting noises."""

    candidates: int | None = flag(
        "Noise search: keep the best of N images for every seed, at N times the evaluations", metavar="N"
    )
    search: str = flag(
        "best: the best of N images (--candidates=N). rollover, quota or resample: search along the path, within"
        " --budget evaluations per image, from N starting noises",
        "best",
        click.Choice(["best", *METHODS]),
        record=CHANGED,
    )
    budget: int | None = flag("Network evaluations per image of a search along the path", kind=COUNT, record=CHANGED)
    verifier: str | None = flag(
        f"Score that chooses among the candidates: {FORMS} (evaluation/verifiers.py)", kind=PATH, metavar="V"
    )

    @property
    def along_path(self) -> bool:
        return self.search != "best"

    def check(self) -> None:
        """Raises UserError if --candidates and --verifier do not go together."""
        candidates, verifier = self.candidates, self.verifier
        if self.along_path != (self.budget is not None):
            raise UserError("--budget goes with --search=rollover, quota or resample, and each of these needs it")
        if self.along_path and (verifier is None or candidates is None):
            raise UserError(
                f"--search={self.search} needs --candidates=N starting noises and a score, --verifier={FORMS}"
            )
        if candidates is not None and candidates < 1:
            raise UserError(f"--candidates={candidates}: must be at least 1")
        if verifier is None and candidates not in (None, 1):
            raise UserError(f"--candidates={candidates}: add a score to choose by, --verifier={FORMS}")
        if verifier is not None and candidates is None:
            raise UserError(f"--verifier={verifier[:100]} has no effect without --candidates=N: give both or none")


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is written where: images, or only their measures."""

    outdir: str | None = flag(
        "Output folder (default: samples/<dataset_name>/<solver>[-plugin]_nfe<NFE>[_best<N>], or a folder beside it if"
        " that holds images of other settings)",
        kind=PATH,
        metavar="DIR",
    )
    subdirs: bool = flag("One folder for every 1000 seeds", True, record=ALWAYS)
    grid: bool = flag(f"Also write grid.png, with up to {GRID_LIMIT} images", False)
    return_inters: bool = flag("Also write strips of denoised images, to inters/", False)
    fid_ref: str | None = flag(
        "Measure the images against this reference, as fid.py calc --ref",
        kind=PATH,
        aliases=("--ref",),
        metavar="NPZ|URL|NAME|PATH",
    )
    metrics: str | None = flag(
        "Measures, as fid.py calc --metrics: fid, kid, precision, recall, density, coverage; all but fid need images as"
        " --fid_ref (default: fid with --fid_ref). Without --fid_ref: against the reference of the network",
        metavar="NAME,...",
    )
    fid_detector: str | None = flag(
        "Detector of --metrics (default: the reference's, else inception)", kind=PATH, metavar="NAME|PATH"
    )
    fid_json: str | None = flag(
        "Also write the measures and the settings of the run to this file", kind=PATH, metavar="FILE"
    )
    save_images: bool | None = flag("Write images (default: True; False with --fid_ref or --metrics)")
    overwrite: bool = flag("Replace images that exist", False)

    @property
    def measures(self) -> bool:
        return self.fid_ref is not None or self.metrics is not None

    @property
    def writes_images(self) -> bool:
        return not self.measures or bool(self.save_images)

    def stream(self, dataset_name: str, count: int, device: torch.device) -> StreamedFID | None:
        """What measures ``count`` images while they are sampled; None: nothing does.

        dataset_name: network, whose reference is the default.
        """
        if not self.measures:
            return None
        if self.fid_ref is None and dataset_name not in zoo.CARDS:
            raise UserError(f"--metrics: the network '{dataset_name}' has no reference of its own; give --fid_ref")
        names = metric_names(self.metrics or "fid")
        return StreamedFID(self.fid_ref or dataset_name, count, self.fid_detector, device, names)

    def check(self, written: frozenset[str]) -> None:
        """Raises UserError for flags without effect, and files that cannot be written.

        written: names of the user's flags.
        """
        if self.fid_json is not None:
            check_destination(self.fid_json, "--fid_json")
        if self.outdir is not None and Path(self.outdir).is_file():
            raise UserError(f"--outdir={self.outdir} is a file; choose a folder")
        if not self.measures:
            for name in ("fid_detector", "fid_json", "save_images"):
                if getattr(self, name) not in (None, True):
                    raise UserError(f"--{name} has no effect without --fid_ref or --metrics: leave it out, or add one")
        if not self.writes_images:
            for name in ("outdir", "grid", "return_inters", "overwrite", "subdirs", "candidates"):
                if name in written:
                    given = "--fid_ref" if self.fid_ref is not None else "--metrics"
                    raise UserError(
                        f"--{name}: with {given} no images are written; add --save_images=True, or leave it out"
                    )


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Options of one run of sample.py.

    ``settings`` holds what the flags say; a predictor replaces it by its own settings.
    """

    predictor_path: str | None = flag(
        "Trained predictor: a name of --list, experiment number, folder, file, https address or hf:owner/name",
        kind=PATH,
        metavar="NAME|N|DIR|FILE|URL",
    )
    settings: Settings = part()
    schedule: Schedule | None = derived(flags=schedule_file_flag, default=None)
    compute: ComputeOptions = part()
    text: TextOptions = part()
    seeds: str = flag("Seeds, one image each: 0-63 or 1,2,5-10", "0-63")
    batch: int | str = flag(
        "Images per network call and process; auto: as many as fit into memory. It changes rounding: single pixels by"
        " one grey level, with --amp most pixels by several",
        64,
        BatchSize(),
    )
    class_idx: int | None = flag(
        "Class of all images (default: drawn per seed)", kind=click.IntRange(min=0), called="class", record=ALWAYS
    )
    quantize: str = flag(
        "int8: 8-bit layers, calibrated on the run's own settings; faster on x86 CPUs with --compile",
        "none",
        click.Choice(["none", "int8"]),
        record=CHANGED,
    )
    inputs: InputOptions = part()
    search: SearchOptions = part()
    output: OutputOptions = part()
    written: frozenset[str] = names_of_written()

    def check(self) -> None:
        """Raises UserError for flags that do not go together with any network."""
        self.search.check()
        self.inputs.check(self.written)
        self.output.check(self.written)
        from_noise = self.inputs.images is None and self.inputs.observe is None
        alone = self.predictor_path is None and not self.output.return_inters and from_noise
        if self.search.along_path and not alone:
            raise UserError(f"--search={self.search.search} works from noise, without predictor and --return_inters")
        if self.quantize != "none" and not from_noise:
            raise UserError("--quantize needs noise as its start, and one prompt for all images")
        if self.quantize != "none" and self.compute.amp != "none":
            raise UserError("--quantize replaces --amp: leave it out")
        if self.inputs.observe is not None and self.predictor_path is not None and self.compute.compile != "none":
            raise UserError("--observe: a compiled network hides what the predictor reads; leave --compile out")

    def recorded_parts(self) -> tuple:
        """Option dataclasses that the images depend on besides the settings."""
        return self.text, self.compute, self.inputs, self.search, self.output, self
