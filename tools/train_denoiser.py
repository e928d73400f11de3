r"""Trains a small EDM denoiser on a zip or folder of images (Karras et al. 2022).

    python -m tools.train_denoiser --data=datasets/mnist-train.zip --outdir=runs --minutes=90
    python -m tools.train_denoiser --data=photos.zip --cond=True --xflip=True --minutes=30
    torchrun --standalone --nproc_per_node=8 -m tools.train_denoiser --data=photos.zip \
        --model_channels=64 --num_blocks=2 --amp=bf16

Runs with plain python or torchrun, until --total_kimg or --minutes, whichever comes first. --resume
continues a run. --init starts from a network. --schedule trains only at the noise levels at which
the solver of a schedule file evaluates; the network forgets the others.

Alternating with optimize_schedule.py, this fits a schedule of few steps and its network to each
other (Huang 2024, "Optimizing Few-Step Sampler"; the rounds follow its abstract):

    net=models/pretrained/digits-edm.safetensors
    for round in 1 2 3; do
        python optimize_schedule.py --method=ofs --dataset_name=custom --model_path=$net \
            --solver=euler --dest=runs/ofs$round.json
        python -m tools.train_denoiser --data=datasets/mnist-train.zip --init=$net \
            --schedule=runs/ofs$round.json --total_kimg=100 --outdir=runs/ofs$round
        net=$(ls runs/ofs$round/network-snapshot-*.safetensors | tail -n 1)
    done

--condition trains a network that restores images: from degraded images to those of --data.

    python -m tools.train_denoiser --data=sharp --condition=blurred --outdir=runs/deblur
    python sample.py --dataset_name=custom --images=more_blurred --nfe=5 \
        --model_path=runs/deblur/network-snapshot-002000.safetensors
"""

if __name__ == "__main__":
    from torch_utils.usage import check_usage

    check_usage("tools.train_denoiser")

import math
import shlex
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from models.denoiser import rms_of_extra
from models.edm import load_edm_network, make_edm, save_edm_safetensors
from models.edm_unet import count_parameters
from models.inputs import draw_inputs, draw_noise
from solvers import sample
from solvers.schedule_file import Schedule, load_schedule
from torch_utils import distributed
from torch_utils.cli import PATH, SEED, Command, Number
from torch_utils.distributed import on_main
from torch_utils.errors import UserError
from torch_utils.files import sha256_of, write_json
from torch_utils.images import (
    ImageSource,
    count_classes,
    from_uint8,
    image_grid,
    load_array,
    paired,
    save_image,
    to_uint8,
)
from torch_utils.locks import only_command
from torch_utils.memory import explained_oom
from torch_utils.options import COUNT, POSITIVE, REQUIRED, flag, flags, given_flags, read_flags
from torch_utils.progress import progress_bar
from torch_utils.seeds import SeededGenerators, stream_seeds
from torch_utils.session import session
from torch_utils.tensor_file import write_state
from training import run_folder
from training.events import summary_writer
from training.run_folder import OPTIONS_FILE
from training.trainer import BaseRun, BaseTrainer, NotFinite

STATE_FILE = "training-state.pt"
LR, LR_OF_INIT = 2e-3, 1e-4
LOG_EVERY = 50  # iterations between lines of statistics
GRID_COLUMNS, GRID_STEPS = 10, 18
GRID_CALLS = 2 * (GRID_STEPS - 1)
ARCHITECTURES = {
    "ddpmpp": {
        "model_type": "SongUNet",
        "embedding_type": "positional",
        "encoder_type": "standard",
        "decoder_type": "standard",
        "channel_mult_noise": 1,
        "resample_filter": [1, 1],
    },
    "ncsnpp": {
        "model_type": "SongUNet",
        "embedding_type": "fourier",
        "encoder_type": "residual",
        "decoder_type": "standard",
        "channel_mult_noise": 2,
        "resample_filter": [1, 3, 3, 1],
    },
    "adm": {"model_type": "DhariwalUNet"},
}


def edm_loss(net, images, labels, generator, p_mean, p_std, sigma_data, levels=None, extra_dims=None, mu=None):
    """Weighted denoising loss of EDM (eq. 8 and Table 1), per element [B,C,H,W].

    net: the denoiser.
    images: [B,C,H,W] in [-1, 1].
    labels: one-hot [B,L], or None.
    generator: draws the noise.
    p_mean, p_std: mean and standard deviation of ln sigma.
    sigma_data: standard deviation of the data.
    levels: noise levels to draw from instead, all with the same probability. Default None.
    extra_dims: extra dimensions D of PFGM++; the noise is then Student-t with D degrees of freedom.
        Default None, Gaussian noise.
    mu: degraded images [B,C,H,W], for a restoration network. Default None.
    """
    shape = [images.shape[0], 1, 1, 1]
    if levels is None:
        sigma = (torch.randn(shape, generator=generator) * p_std + p_mean).exp().to(images.device)
    else:
        drawn = torch.randint(len(levels), shape, generator=generator)
        sigma = torch.tensor(levels, dtype=torch.float32)[drawn].to(images.device)
    noise = torch.randn(images.shape, generator=generator)
    if extra_dims is not None:
        noise = noise / rms_of_extra(torch.randn(len(images), extra_dims, generator=generator))
    noise = noise.to(images.device) * sigma
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    cond = {"class_labels": labels} if mu is None else {"mu": mu}
    return weight * (net(images + noise, sigma, **cond) - images) ** 2


class Batches:
    """Endless shuffled batches.

    Batch ``it`` depends on (seed, it, rank) only, so a resumed run sees the same batches.
    """

    def __init__(self, images, labels, batch, seed, xflip, degraded=None):
        self.images, self.labels, self.degraded = images, labels, degraded
        self.batch, self.seed, self.xflip = batch, seed, xflip
        self._epoch, self._order = -1, None

    def _index(self, position):
        epoch, offset = divmod(position, len(self.images))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.RandomState((self.seed * 7919 + epoch) % (1 << 31)).permutation(len(self.images))
        return self._order[offset]

    def get(self, it, generator, device):
        start = it * self.batch
        share = range(start + distributed.rank(), start + self.batch, distributed.world_size())
        index = np.array([self._index(position) for position in share])
        flip = torch.rand([len(index), 1, 1, 1], generator=generator).to(device) < 0.5 if self.xflip else None

        def read(array):
            images = from_uint8(torch.from_numpy(array[index]).to(device))
            return images if flip is None else torch.where(flip, images.flip(3), images)

        labels = None if self.labels is None else torch.from_numpy(self.labels[index]).to(device)
        mu = None if self.degraded is None else read(self.degraded)
        return read(self.images), labels, mu


def load_data(path, cond, gaps=False):
    """uint8 images [N,C,H,W], one-hot labels [N,L] or None, mean [C,H,W] and std of the images.

    path: zip or folder.
    cond: load labels.
    gaps: some classes may have no images. Default False.
    """
    source = ImageSource(path)
    images = load_array(source)
    if images.shape[2] != images.shape[3]:
        raise UserError(f"{path}: images are {images.shape[3]}x{images.shape[2]}, but must be square")
    labels = None
    if cond:
        if source.labels is None:
            raise UserError(f"--cond=True, but {path} has no labels (dataset.json); leave --cond out")
        labels = np.zeros([len(source), count_classes(source.labels, str(path), gaps)], dtype=np.float32)
        labels[np.arange(len(source)), source.labels] = 1
    scaled_mean = images.mean(axis=0, dtype=np.float64) / 127.5 - 1
    second = np.zeros(images.shape[1:])
    for start in range(0, len(images), 4096):
        second += ((images[start : start + 4096] / 127.5 - 1) ** 2).sum(axis=0)
    std = float(np.sqrt((second / len(images) - scaled_mean**2).mean()))
    return images, labels, torch.from_numpy(scaled_mean).float(), std


def load_pairs(path, condition):
    """Images and their degraded versions, uint8 [N,C,H,W] each, and statistics of the difference.

    path: the images: zip or folder.
    condition: the degraded images: zip or folder with the same names.

    Returns (images, degraded, mean [C,1,1], std) of image - degraded for images in [-1, 1].
    """
    source, other = ImageSource(path), ImageSource(condition)
    pairs = paired(source, other)
    images = load_array(source)
    if images.shape[2] != images.shape[3]:
        raise UserError(f"{path}: images are {images.shape[3]}x{images.shape[2]}, but must be square")
    other.expect(images.shape[1], f"as the images of {path} are")
    if other.shape != images.shape[1:]:
        raise UserError(
            f"--condition={condition}: its images are {other.shape[2]}x{other.shape[1]}, those of --data"
            f" {images.shape[3]}x{images.shape[2]}; enlarge or crop them first"
        )
    degraded = load_array(other)[[partner for _, partner in pairs]]
    total, second = np.zeros(images.shape[1]), 0.0
    for start in range(0, len(images), 4096):
        part = slice(start, start + 4096)
        difference = (images[part].astype(np.float64) - degraded[part]) / 127.5
        total += difference.sum(axis=(0, 2, 3))
        second += np.square(difference).sum()
    mean = total * len(total) / images.size
    std = float(np.sqrt(second / images.size - np.square(mean).mean()))
    if std == 0:
        raise UserError(f"--condition={condition}: its images equal those of --data; give degraded versions of them")
    return images, degraded, torch.from_numpy(mean).float().reshape(-1, 1, 1), std


def restored_grid(net, images, degraded, device, columns):
    """Rows of the first images: degraded, restored by Heun's method, original; uint8 [H,W,C].

    images, degraded: uint8 [N,C,H,W].
    """
    columns = min(columns, len(images))
    count = columns * max(min(columns // 3, len(images) // columns), 1)
    mu = from_uint8(degraded[:count]).to(device)
    latents = draw_noise(net, SeededGenerators(range(count))).to(device)
    with torch.no_grad():
        restored = sample(net, latents, solver="heun", num_steps=GRID_STEPS, cond=net.make_cond(images=mu))
    kinds = [to_uint8(mu), to_uint8(restored), images[:count].transpose(0, 2, 3, 1)]
    rows = [kind[start : start + columns] for start in range(0, count, columns) for kind in kinds]
    return image_grid(np.concatenate(rows), columns)


def sample_grid(net, device, columns=GRID_COLUMNS):
    """A grid of columns^2 images of fixed seeds, by Heun's method, uint8 [H,W,C]."""
    latents, cond = draw_inputs(net, range(columns * columns), device=device)
    with torch.no_grad():
        images = sample(net, latents, solver="heun", num_steps=GRID_STEPS, cond=cond)
    return image_grid(to_uint8(images), columns)


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """The flags of the network."""

    arch: str = flag("Architecture", "ddpmpp", tuple(ARCHITECTURES))
    model_channels: int = flag("Width of the first resolution", 16, click.IntRange(8))
    channel_mult: str = flag("Width of each resolution", "1,2,4")
    num_blocks: int = flag("Residual blocks per resolution", 1, COUNT)
    attn: str = flag("Resolutions with self-attention", "8")
    dropout: float = flag("Probability of dropout", 0.0, Number(0, 1, max_open=True))
    extra_dims: int = flag("Extra dimensions D of PFGM++; 0 = EDM's Gaussian noise", 0, click.IntRange(0, 1 << 20))

    def config(self, given: set[str], init: bool) -> dict:
        """Arguments of EDMDenoiser. init: only those that the user wrote."""
        config = {
            **ARCHITECTURES[self.arch],
            "model_channels": self.model_channels,
            "channel_mult": parse_ints(self.channel_mult, "--channel_mult"),
            "num_blocks": self.num_blocks,
            "attn_resolutions": parse_ints(self.attn, "--attn"),
            "dropout": self.dropout,
        }
        if not config["channel_mult"]:
            raise UserError("--channel_mult is empty: give one number per resolution, like 1,2,4")
        if init:
            for name in ("arch", "model_channels", "channel_mult", "num_blocks", "attn"):
                if name in given:
                    raise UserError(f"--init: its network sets the architecture; leave out --{name}")
            config = {"dropout": self.dropout} if "dropout" in given else {}
        if self.extra_dims or "extra_dims" in given:
            config |= {"pfgmpp": self.extra_dims > 0, "D": max(self.extra_dims, 1)}
        return config


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to train, on what, and where."""

    data: str = flag("Training images: zip or folder", REQUIRED, PATH)
    condition: str | None = flag(
        "Degraded versions of the images, under the same names: trains a network that restores images",
        kind=PATH,
        metavar="DIR|ZIP",
    )
    init: str | None = flag(
        "Start from this EDM network (.safetensors, .pkl), with its architecture", kind=PATH, metavar="FILE"
    )
    schedule: str | None = flag(
        "Train only at the noise levels at which the solver of this schedule file evaluates", kind=PATH, metavar="FILE"
    )
    outdir: str = flag("Where to write snapshots", "runs/denoiser", PATH)
    total_kimg: float = flag("Length of the training in thousands of images", 2000, POSITIVE)
    minutes: float = flag("Time limit in minutes, snapshot and grid included; 0 = no limit", 0, Number(0))
    batch: int = flag("Total batch size", 128, COUNT)
    lr: float | None = flag(f"Learning rate (default: {LR:g}, with --init {LR_OF_INIT:g})", kind=POSITIVE)
    warmup_kimg: float = flag("kimg over which the learning rate rises", 10, Number(0))
    ema_kimg: float = flag("EMA half-life", 50, Number(0))
    p_mean: float = flag("Mean of ln sigma in training", -1.2, Number())
    p_std: float = flag("Standard deviation of ln sigma in training", 1.2, POSITIVE)
    amp: str = flag("Autocast of the network", "none", ("none", "bf16"))
    compile: bool = flag("torch.compile of the network, which takes minutes", False)
    channels_last: bool = flag("Memory format channels_last, mostly faster", True)
    xflip: bool = flag("Random horizontal flips", False)
    cond: bool = flag("Class-conditional", False)
    seed: int = flag("Random seed of the training", 0, SEED)
    snap: float = flag("kimg between snapshots, 0 = end", 100, Number(0))
    grid: bool = flag("Sample a grid at each snapshot", True)
    tensorboard: bool = flag("Also write event files of TensorBoard: statistics and grids", False)
    resume: bool = flag("Continue the run in --outdir", False)


def build_network(net_config):
    """The network. UserError if its widths do not fit the groups or attention heads."""
    try:
        return make_edm(**net_config)
    except UserError:
        raise
    except ValueError as error:
        widths = ",".join(map(str, net_config["channel_mult"]))
        multiple = 64 if net_config["model_type"] == "DhariwalUNet" else 32
        raise UserError(
            f"--model_channels={net_config['model_channels']} with --channel_mult={widths} does not work: {error};"
            f" --model_channels can be any multiple of {multiple}"
        ) from None


def load_initial(path, shape):
    """The network of --init, and the SHA-256 of its file.

    path: the file.
    shape: img_resolution, img_channels, label_dim and takes_images that the network must have.

    Raises UserError if it is not an EDM network of this shape.
    """
    try:
        net, digest = load_edm_network(path), sha256_of(path)
    except (OSError, UserError) as error:
        raise UserError(f"--init={path}: {error}") from None
    for name, wanted in shape.items():
        if name == "takes_images" and net.takes_images != wanted:
            raise UserError(
                f"--init={path}: its network {'restores' if net.takes_images else 'does not restore'} images;"
                f" {'give' if net.takes_images else 'leave out'} --condition"
            )
        if getattr(net, name) != wanted:
            raise UserError(
                f"--init={path}: its network has {name}={getattr(net, name)}, the images of --data {wanted}"
            )
    return net, digest


@torch.no_grad()
def evaluated_levels(net, schedule: Schedule) -> tuple[float, ...]:
    """The noise levels at which the solver of a schedule evaluates, in descending order.

    They are found by a trial run: for most solvers all points but the last; with AFS without the
    first; for two-stage solvers with the intermediate points.

    net: network on the CPU.
    schedule: the schedule.

    Raises UserError if the schedule cannot be used with this network or for training.
    """
    if schedule.sigmas_cond is not None:
        raise UserError("it has noise levels of its own for the network (sigmas_cond), which training cannot use")
    asked = []
    handle = net.register_forward_pre_hook(lambda module, arguments: asked.append(float(arguments[1])))
    try:
        latents = torch.zeros(1, net.img_channels, net.img_resolution, net.img_resolution, dtype=torch.float64)
        arguments = {"sigmas": schedule.sigmas, "afs": schedule.afs, **schedule.solver_options}
        cond = net.make_cond(images=latents) if net.takes_images else None
        sample(net, latents, solver=schedule.solver, cond=cond, **arguments)
    finally:
        handle.remove()
    return tuple(sorted(set(asked), reverse=True))


class DenoiserTrainer(BaseTrainer):
    """The network, its moving average, the optimizer, and one iteration on a share of a batch.

    net_config: arguments of EDMDenoiser that the images do not determine. With options.init, only
        those that replace the initial network's.
    images, labels, data_mean, data_std: see ``load_data``, and ``load_pairs`` for restoration.
    options: see ``Options``.
    device: where to train.
    degraded: degraded versions of the images, uint8 [N,C,H,W], for a restoration network. Default
        None.

    Attributes: ``net``, ``ema``, ``optimizer``, ``iteration`` (iterations done), ``levels``
    (trained noise levels; None: all), ``origin`` (what written networks record about init and
    schedule).
    """

    kept = {"net": "net", "ema": "ema", "optimizer": "optimizer", "it": "iteration"}

    def __init__(self, net_config, images, labels, data_mean, data_std, options, device, degraded=None):
        label_dim = 0 if labels is None else labels.shape[1]
        shape = {"img_resolution": images.shape[2], "img_channels": images.shape[1], "label_dim": label_dim}
        self.origin, initial = {}, None
        if options.init is not None:
            initial, digest = load_initial(options.init, {"takes_images": degraded is not None, **shape})
            self.origin["init"] = {"file": Path(options.init).name, "sha256": digest}
            ends = {"sigma_min": initial.sigma_min, "sigma_max": initial.sigma_max}
            net_config = {**initial.config, **ends, **net_config}
        elif images.shape[2] % (1 << ((levels := len(net_config["channel_mult"])) - 1)):
            raise UserError(f"--channel_mult: {images.shape[2]} pixels cannot be halved {levels - 1} times")
        if options.batch % distributed.world_size():
            raise UserError(
                f"--batch={options.batch} must be divisible by the number of processes ({distributed.world_size()})"
            )
        self.options, self.device = options, device
        self.batches = Batches(images, labels, options.batch, options.seed, options.xflip, degraded)
        if degraded is not None and initial is None:
            # The highest noise level is to the spread of the residual as 80 is to EDM's 0.5.
            residual = {"sigma_data": data_std, "sigma_max": min(160 * data_std, 80.0)}
            net_config = {**net_config, "restores": True, **residual}
        torch.manual_seed(options.seed)
        self.net = build_network({**shape, **net_config})
        self.net.data_mean, self.net.data_std = data_mean, data_std
        if initial is not None:
            self.net.load_state_dict(initial.state_dict())
            initial.weights_hash = digest
        self.levels = None
        if options.schedule is not None:
            self.levels = self._use_schedule(options.schedule, initial or self.net)
        self.net = self.net.to(device).train()
        self.net.autocast = {"bf16": torch.bfloat16, "none": None}[options.amp]
        if options.channels_last:
            self.net = self.net.to(memory_format=torch.channels_last)
        self.ema = deepcopy(self.net).eval().requires_grad_(False)
        self.ema.data_mean = data_mean.to(device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=options.lr, betas=(0.9, 0.99), eps=1e-8)
        if options.compile:
            self.net.compile()
        several = distributed.world_size() > 1
        self._ddp = DistributedDataParallel(self.net, broadcast_buffers=False) if several else self.net

    def _use_schedule(self, path, net):
        """The noise levels to train at; records their origin. net: the network before training."""
        schedule = load_schedule(path)
        for line in schedule.warnings(net):
            distributed.print0(f"Warning: {line}", file=sys.stderr)
        try:
            levels = evaluated_levels(net, schedule)
        except UserError as error:
            raise UserError(f"--schedule={path}: {error}") from None
        names = ("sigmas", "solver", "solver_options", "afs", "method")
        self.origin["schedule"] = {"file": Path(path).name, **{name: getattr(schedule, name) for name in names}}
        return levels

    def step(self, lr):
        """One iteration. Returns its loss, the mean over all processes.

        Raises NotFinite on every process if the loss or the gradient is not finite. Network and
        optimizer are then unchanged.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        seed, p_mean, p_std = self.options.seed, self.options.p_mean, self.options.p_std
        index = self.iteration * distributed.world_size() + distributed.rank()
        generator = torch.Generator().manual_seed(stream_seeds(seed, index, 1)[0])
        # Dropout draws from the global generators; indices below zero keep its masks apart from the
        # noise.
        torch.manual_seed(stream_seeds(seed, -1 - index, 1)[0])
        images, labels, mu = self.batches.get(self.iteration, generator, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        sigma_data, levels = self.net.sigma_data, self.levels
        noise = (p_mean, p_std, sigma_data, levels, self.net.D)
        loss = edm_loss(self._ddp, images, labels, generator, *noise, mu).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        mean_loss = self._agreed(loss.detach(), norm)
        self.optimizer.step()
        self._average()
        self.iteration += 1
        return mean_loss

    def _agreed(self, loss, norm):
        """The mean loss over the processes. All raise NotFinite together, or some would wait."""
        mean = float(distributed.all_reduce_sum(loss / distributed.world_size()))
        if not (math.isfinite(mean) and math.isfinite(norm)):
            raise NotFinite.found(math.isfinite(loss))
        return mean

    def _average(self):
        """Moves the average towards the network. Its half-life grows up to ``ema_kimg``."""
        half_life = min(self.options.ema_kimg * 1000, 0.05 * self.iteration * self.options.batch + 1e-8)
        beta = 0.5 ** (self.options.batch / max(half_life, 1e-8))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 1 - beta)


class DenoiserRun(BaseRun):
    """The training of a denoiser in its folder, up to a number of images or minutes."""

    def __init__(self, trainer, options, started=None):
        super().__init__(trainer, options, options.outdir)
        self._start = self._start if started is None else started  # reading the data counts as well
        self._grid_columns = GRID_COLUMNS
        self._longest, self._writing = 0.0, 0.0  # seconds: of an iteration, of all but the grid of a snapshot
        self.loss = float("nan")  # running mean
        self._lr, self._fraction = options.lr, 0.0  # learning rate of the iteration; share of the run before it
        self._snap_kimg = 0.0  # kimg at the last snapshot

    @property
    def state_path(self):
        return self.folder / STATE_FILE

    def restore(self):
        """Restores the state of an interrupted run."""
        state = on_main(read_state, self.state_path)
        settings = self._settings()
        for name, before in state.get("settings", {}).items():
            if (now := settings.get(name)) != before:
                raise UserError(f"--resume: the run in {self.folder} has {name}={before}, not {now}; repeat its flags")
        try:
            self.trainer.load_state(state)
        except RuntimeError:
            raise UserError(f"--resume: the run in {self.folder} has another architecture; repeat its flags") from None
        self._elapsed_before, self._start = state["elapsed"], time.monotonic()
        self._snap_kimg, self._saved_at = self.kimg, self.trainer.iteration
        on_main(self.log.rewind, "kimg", self.kimg)
        if self.finished():
            raise UserError(
                f"--resume: {self.folder} is finished; to continue, pass a larger --total_kimg or --minutes"
            )

    def finished(self):
        kimg, minutes = self.options.total_kimg, self.options.minutes
        self._fraction = self.kimg / kimg
        if minutes:  # use the first process's clock, or processes could disagree about the last iteration
            left = 60 * minutes - self._longest - self._reserve(60 * minutes)
            passed = self.elapsed / left if left > 0 else float(self.trainer.iteration > 0)
            self._fraction = distributed.broadcast_object(max(self._fraction, passed))
        return self._fraction >= 1

    def _reserve(self, budget):
        """Seconds to keep for the last snapshot.

        Its grid gets fewer images if it would take more than a tenth of the budget. An image of the
        grid takes GRID_CALLS network calls, and a sample of an iteration about three.
        """
        if not self.options.grid or not self._longest:
            return self._writing
        image = self._longest * distributed.world_size() / self.options.batch * GRID_CALLS / 3
        self._grid_columns = min(GRID_COLUMNS, max(2, int((budget / 10 / image) ** 0.5)))
        return self._writing + image * self._grid_columns**2

    def iterate(self):
        self._lr = self._learning_rate(self._fraction)
        return self.trainer.step(self._lr)

    def show(self, bar, statistics, seconds):
        self.loss = statistics if math.isnan(self.loss) else 0.99 * self.loss + 0.01 * statistics
        self._longest = (
            seconds if self.trainer.iteration < 3 else max(seconds, 0.9 * self._longest)
        )  # the first is slow
        bar.update(min(100 * self._fraction, 100) - bar.n)
        if self.trainer.iteration % LOG_EVERY == 0:
            bar.set_postfix_str(f"{self.kimg:.3g} kimg, loss {self.loss:.4f} per pixel")
            self.log.stats({"kimg": self.kimg, "loss": self.loss, "seconds": self.elapsed, "lr": self._lr})

    def after_iteration(self, stopping):
        if stopping or (self.options.snap and self.kimg - self._snap_kimg >= self.options.snap):
            self.snapshot()

    def on_interruption(self):
        return f" at {self.kimg:g} kimg; repeat the command with --resume=True"

    def loop(self):
        super().loop()
        if self._saved_at != self.trainer.iteration:
            self.snapshot()
        network = shlex.quote(str(self.network_path))
        inputs = "--grid" if self.options.condition is None else "--images=FOLDER_OF_DEGRADED_IMAGES"
        distributed.print0(
            f"trained {self.kimg:.3g} kimg in {self.elapsed / 60:.1f} min -> {network}\n"
            f"next: python sample.py --dataset_name=custom --model_path={network} --nfe=8 {inputs}"
        )

    @property
    def network_path(self):
        return self.folder / f"network-snapshot-{int(self.kimg):06d}.safetensors"

    def _settings(self):
        """What a resumed run must share with its beginning."""
        settings = {name: getattr(self.options, name) for name in ("batch", "seed", "cond", "xflip")}
        return {**settings, "levels": self.trainer.levels}

    def snapshot(self):
        on_main(self._write_snapshot)
        self._snap_kimg, self._saved_at = self.kimg, self.trainer.iteration

    def _write_snapshot(self):
        kimg, options = self.kimg, self.options
        meta = {"trained_kimg": kimg, "minutes": self.elapsed / 60, "data": Path(options.data).name, "loss": self.loss}
        for name in ("seed", "batch", "lr", "p_mean", "p_std", "amp", "ema_kimg", "xflip"):
            meta[name] = getattr(options, name)
        if options.condition is not None:
            meta["condition"] = Path(options.condition).name
        meta |= self.trainer.origin
        began = time.monotonic()
        save_edm_safetensors(self.trainer.ema, self.network_path, {"training": meta})
        more = {"elapsed": self.elapsed, "settings": self._settings()}
        write_state(self.state_path, self.trainer.state(copied=False) | more)
        self._writing = time.monotonic() - began
        if options.grid:
            net, device, columns, batches = (
                self.trainer.ema,
                self.trainer.device,
                self._grid_columns,
                self.trainer.batches,
            )
            if batches.degraded is None:
                pixels = sample_grid(net, device, columns)
            else:
                pixels = restored_grid(net, batches.images, batches.degraded, device, columns)
            save_image(pixels, self.folder / f"grid-{int(kimg):06d}.png")
            self.log.images(lambda: pixels, kimg)

    def _learning_rate(self, progress):
        """Linear warm-up, and linear decay over the second half.

        progress: share of the run; under --minutes the warm-up ends at a tenth of it at the latest.
        """
        lr, warmup = self.options.lr, self.kimg / max(self.options.warmup_kimg, 1e-8)
        if self.options.minutes:
            warmup = max(warmup, 10 * progress)
        return max(lr * min(1.0, warmup) * min(1.0, (1 - progress) / 0.5), lr * 1e-3)

    def failure_text(self, error):
        ranks = ", ".join(map(str, error.ranks))
        if self._saved_at < 0:
            remedy = f"nothing is saved yet: start again with a smaller --lr (now {self.options.lr:g})"
        else:
            kept = f"the state at {self._snap_kimg:g} kimg is in {self.state_path}"
            remedy = f"{kept}: continue with --resume=True and a smaller --lr (now {self.options.lr:g})"
        return (
            f"the loss is not finite at {self.kimg:g} kimg (iteration {self.trainer.iteration + 1}, rank {ranks});"
            f" {remedy}"
        )

    def progress_bar(self):
        return progress_bar(
            100,
            mininterval=5,
            bar_format="{percentage:3.0f}%|{bar:12}| [{elapsed}<{remaining}{postfix}]",
        )


def check_folder(outdir, resume):
    """Raises UserError if ``outdir`` cannot be used for this run. Writes nothing."""
    outdir = Path(outdir)
    if outdir.exists() and not outdir.is_dir():
        raise UserError(f"--outdir={outdir} is a file; choose a folder")
    state = outdir / STATE_FILE
    if resume and not state.is_file():
        raise UserError(f"--resume: no such file: {state}")
    if not resume and state.exists():
        raise UserError(f"--outdir={outdir} already holds a run; pass --resume=True or another folder")


def read_state(path):
    """The training state of a run, on the CPU. Raises UserError if the file is damaged."""
    try:
        return run_folder.read_state(path, {"net", "ema", "optimizer", "it", "elapsed"})
    except UserError as error:
        raise UserError(f"--resume: {error}") from None


def train(*, net_config, device, **options):
    """Trains, and writes snapshots, training-state.pt, stats.jsonl and grids to ``outdir``.

    net_config: arguments of EDMDenoiser (model_type, model_channels, ...) that the images do not
        determine.
    device: where to train.
    options: the fields of ``Options``.

    Every process of a torchrun calls this. Raises UserError for settings that cannot work, before
    anything is written, and for a loss that is not finite.
    """
    started, settings = time.monotonic(), Options(**options)
    data, outdir, resume = settings.data, settings.outdir, settings.resume
    if settings.lr is None:
        settings = replace(settings, lr=LR if settings.init is None else LR_OF_INIT)
    if settings.tensorboard:
        summary_writer()
    on_main(check_folder, outdir, resume)
    labels = degraded = None
    if settings.condition is None:
        images, labels, *statistics = load_data(data, settings.cond, gaps=settings.init is not None)
    elif settings.cond:
        raise UserError("--condition trains a network that restores images, without classes; leave --cond out")
    else:
        images, degraded, *statistics = load_pairs(data, settings.condition)
    trainer = DenoiserTrainer(net_config, images, labels, *statistics, settings, device, degraded)
    refusal = f"another command is training in {outdir}: wait until it ends, or choose another --outdir"
    with only_command(Path(outdir) / ".lock", refusal):
        on_main(check_folder, outdir, resume)  # again, since another command may have used the folder until now
        run = DenoiserRun(trainer, settings, started)
        if resume:
            run.restore()
        else:
            places = {"data": str(data), "outdir": str(outdir)}
            on_main(write_json, Path(outdir) / OPTIONS_FILE, {**net_config, **asdict(settings), **places})
        size = f"{count_parameters(trainer.net):,} parameters, {len(images):,} images"
        distributed.print0(f"{size}, batch {settings.batch}, {outdir}")
        with (
            run.log.event_file(settings.tensorboard, run.kimg),
            explained_oom(device, f"lower --batch (now {settings.batch})"),
        ):
            run.loop()


def parse_ints(text, option):
    """The whole numbers, all at least 1, of a comma-separated list; [] for an empty text."""
    try:
        values = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"{option}={text}: must be whole numbers like 1,2,4") from None
    if min(values, default=1) < 1:
        raise UserError(f"{option}={text}: must be numbers of at least 1")
    return values


GROUPS = {
    "Data": "data cond condition xflip",
    "How long": "minutes total_kimg",
    "Network": "init | arch model_channels channel_mult num_blocks attn dropout extra_dims",
    "Training": "batch lr seed | schedule warmup_kimg ema_kimg p_mean p_std",
    "Output": "outdir resume | snap grid tensorboard",
    "Speed": "device | amp compile channels_last",
}


@click.command(cls=Command, groups=GROUPS, may_be_empty=("attn",))
@flags(Options)
@flags(NetworkOptions)
@click.option("--device", default=None, help="cpu, cuda or mps (default: the fastest available)")
@click.pass_context
def main(ctx, device, **values):
    """Trains a small EDM denoiser on a zip or folder of images.

    It starts from a network with --init, trains only at the noise levels of a schedule file with
    --schedule, and trains a network that restores degraded images with --condition.
    """
    given = given_flags(ctx)
    options = read_flags(Options, values, given)
    net_config = read_flags(NetworkOptions, values, given).config(given, options.init is not None)
    if options.schedule is not None:
        for name in ("p_mean", "p_std"):
            if name in given:
                raise UserError(f"--schedule sets the noise levels; leave out --{name}")
    with session(device) as chosen:
        train(net_config=net_config, device=chosen, **vars(options))


if __name__ == "__main__":
    main()
