"""Fréchet inception distance (FID) of images to reference statistics, with EDM's file format."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch

from evaluation.detectors import KNOWN, FeatureDetector, is_published_inception, load_detector
from evaluation.frechet import FeatureStatistics, Reference, frechet_distance
from evaluation.jackknife import interval_text, jackknife
from evaluation.precision_recall import MANIFOLD, groups_left_out, kid_of_subsets, manifold
from evaluation.reading import choose_indices, compute_statistics
from models import zoo
from torch_utils import distributed
from torch_utils.arrays import read_npz, write_npz
from torch_utils.download import download_file
from torch_utils.errors import UserError
from torch_utils.images import ImageSource
from torch_utils.memory import explained_oom
from torch_utils.progress import progress_bar
from torch_utils.remote import cache_dir

_USUAL_COUNT = 10_000  # below this number the bias of FID depends strongly on the number of images
METRICS = ("fid", "kid", *MANIFOLD)


@dataclass(frozen=True)
class FIDResult:
    """FID, and what it was measured with.

    fid: the distance.
    images: number of images.
    detector, detector_file, detector_sha256: name, weights file and its SHA-256.
    ref, ref_images: reference as given, and its number of images or None.
    source: the images as given.
    seed: seed of the choice of images; None: all were used.
    """

    fid: float
    images: int
    detector: str
    detector_file: str
    detector_sha256: str
    ref: str
    ref_images: int | None
    source: str
    seed: int | None
    measures: dict | None = None  # the others: {name: {"value", "spread", "spread_is"}}

    def line(self) -> str:
        weights = f"{'_'.join(self.detector_file.split())}:{self.detector_sha256[:12]}"
        return f"FID {self.fid:.4f} images={self.images} detector={self.detector} weights={weights} ref={self.ref}"

    def lines(self) -> list[str]:
        """One line per measure."""
        lines = [self.line()]
        for name, found in (self.measures or {}).items():
            value, spread = found["value"], found["spread"]
            if spread is None:
                lines.append(f"{name} {value:.6g}")
            elif name == "kid":  # unbiased, so it may be negative
                lines.append(f"{name} {value:.6g} ± {spread:.2g} ({found['spread_is']})")
            else:
                lines.append(f"{name} {interval_text(value, spread, '.6g', '.2g')} ({found['spread_is']})")
        return lines


def holds_images(path: str) -> bool:
    """Whether a reference is a folder or zip of images, not a file of statistics."""
    return Path(path).is_dir() or Path(path).suffix.lower() == ".zip"


def measure(real: np.ndarray, generated: np.ndarray, names: Sequence[str], groups: int = 5) -> dict:
    """Measures beside FID, {name: {"value", "spread", "spread_is"}}.

    real: features [N,D].
    generated: features [M,D].
    names: of ``METRICS``.
    groups: interleaved groups of the generated for the jackknife. Default 5.

    Raises UserError if there are too few images.
    """
    real, generated = torch.from_numpy(real), torch.from_numpy(generated)
    result = {}
    try:
        if "kid" in names:
            size = min(1000, len(real), len(generated))
            mean, spread = kid_of_subsets(real, generated, size=size)
            result["kid"] = {"value": mean, "spread": spread, "spread_is": f"of 100 subsets of {size}"}
        chosen = [name for name in names if name in MANIFOLD]
        if chosen:
            whole = manifold(real, generated)
            without = [manifold(real, part) for part in groups_left_out(generated, groups)]
            for name in chosen:
                estimate = jackknife(whole[name], [found[name] for found in without])
                result[name] = {"value": whole[name], "spread": estimate.half_width, "spread_is": "95 %, jackknife"}
    except ValueError as error:
        raise UserError(f"--metrics: {error}; leave such a metric out, or take more images") from None
    return result


def metric_names(text: str) -> list[str]:
    """The names in the text of --metrics, separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def check_metrics(names: Sequence[str], ref: str) -> list[str]:
    """The measures beside FID.

    Raises UserError for wrong names, or a reference that they cannot use.
    """
    if not names:
        raise UserError(f"--metrics names no measure; choose from {', '.join(METRICS)}")
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise UserError(f"--metrics: unknown '{unknown[0]}'; choose from {', '.join(METRICS)}")
    others = [name for name in names if name != "fid"]
    if others and not holds_images(ref):
        raise UserError(f"--metrics={others[0]} needs images as --ref, a folder or zip; {ref} has statistics only")
    return others


def find_reference(ref: str) -> Reference:
    """The reference statistics of a network of the zoo, a path or a URL (kept in the cache folder).

    Raises UserError if they do not exist or are unusable.
    """
    if ref in zoo.CARDS:
        return Reference.load(zoo.resolve_fid_ref(ref))
    if ref.startswith(("http://", "https://")):
        try:
            last = Path(urlparse(ref).path).name[-100:] or "reference.npz"
        except ValueError as exc:
            raise UserError(f"--ref={ref}: not a usable address ({exc})") from None
        # Two addresses may have files of the same name.
        name = f"{hashlib.sha256(ref.encode('utf-8', 'replace')).hexdigest()[:12]}-{last}"
        path = cache_dir() / "fid-refs" / name
        with distributed.local_main_first():
            if distributed.local_rank() == 0 and not path.is_file():
                download_file([ref], path, desc=path.name, hint="pass a local file as --ref")
        return Reference.load(path)
    if not Path(ref).is_file():
        raise UserError(
            f"--ref={ref}: no such file; pass an npz made by 'fid.py ref', its URL, or one of {', '.join(zoo.CARDS)}"
        )
    return Reference.load(ref)


def choose_detector(
    name: str | None, reference: Reference | None, device: torch.device, trust: bool = False
) -> FeatureDetector:
    """The feature detector for a reference.

    name: name or file of the detector. Default: that of the reference, or Inception.
    reference: its statistics, or None.
    device: where the detector runs.
    trust: also run unknown TorchScript files. Default False.

    Raises UserError if the detector is not that of the reference.
    """
    stored = reference.detector if reference is not None else None
    if name is None and stored not in (None, *KNOWN):
        raise UserError(f"the reference was made with the detector '{stored}'; pass its file as --detector=PATH")
    with distributed.local_main_first():
        detector = load_detector(name or stored or "inception", device, trust)
    if len(set(distributed.gather_objects(detector.digest))) > 1:
        raise UserError(
            f"the processes found different files of the detector '{detector.name}'; pass one as --detector"
        )
    if reference is None:
        return detector
    if stored is not None and (
        stored != detector.name or not _same_weights(reference.detector_sha256, detector.digest)
    ):
        raise UserError(
            f"--detector={name or stored}: the reference was made with '{stored}'"
            + (" (other weights)" if stored == detector.name else "")
            + f", not '{detector.name}'; leave --detector out, or make a reference with 'fid.py ref'"
        )
    if len(reference.mu) != detector.feature_dim:
        raise UserError(
            f"--ref has {len(reference.mu)} features and the detector '{detector.name}' {detector.feature_dim};"
            " choose the detector of the reference"
        )
    return detector


def _same_weights(stored: str | None, digest: str) -> bool:
    return stored in (None, digest) or (is_published_inception(stored) and is_published_inception(digest))


def choose_images(source: ImageSource, num: int | None, seed: int) -> Sequence[int]:
    """Indices of all images, or of ``num`` random ones, which depend on the names and the seed."""
    count = len(source) if num is None else num
    if count > len(source):
        raise UserError(f"--num={num}: {source.path} has only {len(source)} images")
    if count < 2:
        raise UserError(f"{source.path}: {count} image is too few; a covariance needs at least 2")
    return choose_indices(len(source), num, seed)


def image_statistics(
    source: ImageSource,
    indices: Sequence[int],
    detector: FeatureDetector,
    batch: int,
    device: torch.device,
    feature_cache: str | Path | None = None,
    workers: int | None = None,
    keep: bool = False,
) -> FeatureStatistics:
    """Feature statistics of images over all processes, with a progress bar.

    source: the images.
    indices: which of them.
    detector: the feature detector.
    batch: images per call of the detector.
    device: where the detector runs.
    feature_cache: npz file to read features from, or to write them to. Default: none.
    workers: see ``read_batches``. Default None.
    keep: also keep the features, as ``features`` [N,D] of the result on rank 0. Default False.
    """
    # Detectors for RGB repeat grey images to three channels, so that sets may be mixed.
    source.expect(detector.img_channels or 3, f"which is what the detector '{detector.name}' takes")
    detector.check(source.shape, source.where(0))
    if feature_cache is not None:
        cached = _from_cache(Path(feature_cache), source, indices, detector)
        if cached is not None:
            return cached
    share = indices[distributed.rank() :: distributed.world_size()]
    kept: list[np.ndarray] = []
    with progress_bar(len(share), unit="img", desc=detector.name) as bar:

        def on_batch(features: torch.Tensor) -> None:
            bar.update(len(features))
            if feature_cache is not None or keep:
                kept.append(features.cpu().numpy())

        with explained_oom(device, f"lower --batch (now {batch})"):
            statistics = compute_statistics(
                source, detector, indices=indices, batch=batch, device=device, workers=workers, on_batch=on_batch
            )
    source.report_conversions(shared=True)
    if feature_cache is not None or keep:
        statistics.features = _gathered(len(indices), detector, kept)
    if feature_cache is not None and distributed.rank() == 0:
        keys = np.array([source.fingerprint(int(index)) for index in indices])
        write_npz(
            Path(feature_cache), keys=keys, features=statistics.features, detector_sha256=np.asarray(detector.digest)
        )
    return statistics


def _from_cache(
    path: Path, source: ImageSource, indices: Sequence[int], detector: FeatureDetector
) -> FeatureStatistics | None:
    """The statistics from a cache that has all images unchanged and of this detector, or None.

    Rank 0 reads the file; all ranks get the same answer.
    """
    rows = None
    with distributed.together():
        if distributed.rank() == 0 and path.exists():
            try:
                data = read_npz(path)
                keys, features, digest = data["keys"], data["features"], str(data["detector_sha256"])
                if features.shape != (len(keys), detector.feature_dim) or features.dtype.kind != "f":
                    raise ValueError(f"features {list(features.shape)} of {len(keys)} images")
            except (ValueError, KeyError, TypeError) as exc:
                raise UserError(
                    f"--feature-cache={path}: not a feature cache ({exc}); give another file or delete it"
                ) from None
            known = {str(key): row for row, key in enumerate(keys)} if digest == detector.digest else {}
            wanted = [known.get(source.fingerprint(int(index))) for index in indices]
            rows = None if None in wanted else features[wanted]
    if not distributed.broadcast_object(rows is not None):
        return None
    statistics = FeatureStatistics(detector.feature_dim)
    if rows is not None:  # rank 0, the only one that needs the result
        statistics.append(torch.from_numpy(rows))
        statistics.features = rows
    return statistics


def _gathered(count: int, detector: FeatureDetector, kept: list[np.ndarray]) -> np.ndarray | None:
    """The features [count,D] of all processes in the order of the images, on rank 0."""
    own = np.concatenate(kept) if kept else np.zeros([0, detector.feature_dim], dtype=np.float32)
    parts = distributed.gather_objects(own)
    if distributed.rank() != 0:
        return None
    features = np.empty([count, detector.feature_dim], dtype=np.float32)
    for rank, part in enumerate(parts):
        features[rank :: len(parts)] = part
    return features


def calculate_fid(
    images: str | Path,
    ref: str,
    *,
    num: int | None = None,
    seed: int = 0,
    batch: int = 250,
    detector: str | None = None,
    feature_cache: str | Path | None = None,
    device: torch.device | str = "cpu",
    trust: bool = False,
    workers: int | None = None,
    metrics: Sequence[str] = ("fid",),
) -> FIDResult | None:
    """FID of a folder or zip of images, and other measures. Warnings go to stderr.

    images: the folder or zip.
    ref: reference, see ``find_reference``; or a folder or zip of images.
    num: number of random images to use. Default: all.
    seed: seed of their choice. Default 0.
    batch: images per call of the detector. Default 250.
    detector, trust: see ``choose_detector``.
    feature_cache, workers: see ``image_statistics``.
    device: where the detector runs. Default: the CPU.
    metrics: names of ``METRICS``; those beside "fid" need images as the reference. Default: fid.

    Features of reference images go into a second cache file, <name>-ref.npz. Returns the result on
    rank 0, None on the others.
    """
    device, ref = torch.device(device), str(ref)
    others = check_metrics(metrics, ref)
    reference = _open_reference(ref)
    source = ImageSource(images)
    source.check_one_run()
    source.by_seed()  # no image twice
    indices = choose_images(source, num, seed)
    network = choose_detector(detector, reference if isinstance(reference, Reference) else None, device, trust)
    warn_about_count(len(indices), network)
    options = {"batch": batch, "device": device, "workers": workers, "keep": bool(others)}
    real = _statistics_of_reference(reference, network, feature_cache, **options)
    statistics = image_statistics(source, indices, network, feature_cache=feature_cache, **options)
    if distributed.rank() != 0:
        return None
    seed = None if len(indices) == len(source) else seed
    return _result(statistics, real, network, others, ref=ref, source=str(images), seed=seed)


def _open_reference(ref: str) -> Reference | ImageSource:
    """Reference statistics, or reference images. Raises UserError if there are none."""
    return ImageSource(ref) if holds_images(ref) else find_reference(ref)


def _statistics_of_reference(
    reference: Reference | ImageSource, network: FeatureDetector, feature_cache=None, **options
) -> Reference | FeatureStatistics:
    """Those of ``_open_reference``; reference images have a cache file of their own."""
    if isinstance(reference, Reference):
        return reference
    cache = Path(feature_cache) if feature_cache is not None else None
    cache = cache and cache.with_name(f"{cache.stem}-ref{cache.suffix}")
    return image_statistics(reference, range(len(reference)), network, feature_cache=cache, **options)


def _result(
    statistics: FeatureStatistics,
    real: Reference | FeatureStatistics,
    network: FeatureDetector,
    others: Sequence[str],
    **more,
) -> FIDResult:
    """The result on rank 0. others: measures beside FID, for which both sides have features."""
    measures = measure(real.features, statistics.features, others) if others else None
    mu, sigma = statistics.moments()
    stored = isinstance(real, Reference)
    return FIDResult(
        fid=frechet_distance(mu, sigma, *((real.mu, real.sigma) if stored else real.moments())),
        images=statistics.count,
        detector=network.name,
        detector_file=network.file,
        detector_sha256=network.digest,
        ref_images=real.num if stored else real.count,
        measures=measures,
        **more,
    )


class StreamedFID:
    """FID of images straight from a sampler, and other measures. Each process makes one object.

    ref: reference, see ``find_reference``; or a folder or zip of images.
    count: number of images of all processes together, for the warnings.
    detector: see ``choose_detector``.
    device: where the detector runs. Default: the CPU.
    metrics: names of ``METRICS``; see ``calculate_fid``. Default: fid.
    batch: images per call of the detector, for reference images. Default 250.

    The result is that of ``calculate_fid`` for the same images in the order of their seeds. Raises
    UserError for an unknown reference, or a detector that is not that of the reference.
    """

    def __init__(
        self,
        ref: str,
        count: int,
        detector: str | None = None,
        device: torch.device | str = "cpu",
        metrics: Sequence[str] = ("fid",),
        batch: int = 250,
    ):
        self.ref, device = ref, torch.device(device)
        if count < 2:
            raise UserError(f"FID of {count} image is not defined: a covariance needs at least 2")
        self.others = check_metrics(metrics, ref)
        reference = _open_reference(ref)
        self.detector = choose_detector(detector, reference if isinstance(reference, Reference) else None, device)
        self.statistics = FeatureStatistics(self.detector.feature_dim, device)
        self._kept: list[tuple[int, np.ndarray]] = []  # seeds and features
        warn_about_count(count, self.detector)
        more = {"batch": batch, "device": device, "keep": bool(self.others)}
        self.reference = _statistics_of_reference(reference, self.detector, **more)

    def append(self, pixels: torch.Tensor, seeds: Sequence[int]) -> None:
        """Add images, uint8 [B,C,H,W] on any device, of these seeds."""
        features = self.detector(pixels)
        self.statistics.append(features)
        if self.others:
            self._kept += zip(seeds, features.cpu().numpy(), strict=True)

    def result(self, source: str) -> FIDResult | None:
        """The measures of all images on rank 0, None on the other ranks; source: for the record."""
        self.statistics.all_reduce()
        kept = distributed.gather_objects(self._kept) if self.others else []
        if distributed.rank() != 0:
            return None
        if self.others:
            everything = sorted((pair for part in kept for pair in part), key=lambda pair: pair[0])
            self.statistics.features = np.stack([features for _, features in everything])
        more = {"ref": self.ref, "source": source, "seed": None}
        return _result(self.statistics, self.reference, self.detector, self.others, **more)


def warn_about_count(count: int, detector: FeatureDetector) -> None:
    if distributed.rank() != 0:
        return
    if count <= detector.feature_dim:
        message = f"{count} images for {detector.feature_dim} features: the covariance is singular"
        print(f"Warning: {message} and the FID far too large", file=sys.stderr)
    elif count < _USUAL_COUNT:
        message = f"FID of {count} images is biased upwards; compare it only with FIDs of {count} images"
        print(f"Note: {message} (published figures: 50000)", file=sys.stderr)
