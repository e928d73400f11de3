"""Train a small EDM denoiser on a zip or folder of images (EDM loss, preconditioning and EMA; Karras et al. 2022).

    python -m tools.train_denoiser --data=datasets/mnist-train.zip --outdir=runs --minutes=90

Plain python or torchrun; stops at --total_kimg or --minutes, whichever comes first, and continues a run with --resume.
"""

import json
import time
from copy import deepcopy
from pathlib import Path

import click
import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from models.edm import EDMDenoiser, save_edm_safetensors
from models.networks import count_parameters
from torch_utils import distributed
from torch_utils.errors import UserError
from torch_utils.image_data import ImageSource, atomic_path, load_array
from torch_utils.seeds import stream_seeds

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


def edm_loss(net, images, labels, generator, p_mean, p_std, sigma_data):
    """EDM's weighted denoising loss (eq. 8 and Table 1), per element [B,C,H,W]; ln sigma ~ N(p_mean, p_std^2)."""
    shape = [images.shape[0], 1, 1, 1]
    sigma = (torch.randn(shape, generator=generator) * p_std + p_mean).exp().to(images.device)
    noise = torch.randn(images.shape, generator=generator).to(images.device) * sigma
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return weight * (net(images + noise, sigma, class_labels=labels) - images) ** 2


class Batches:
    """Endless shuffled batches; batch number ``it`` is a function of (seed, it, rank) only, so a resumed run continues it."""

    def __init__(self, images, labels, batch, seed, xflip):
        self.images, self.labels = images, labels
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
        images = torch.from_numpy(self.images[index]).to(device).float() / 127.5 - 1
        if self.xflip:
            flip = torch.rand([len(index), 1, 1, 1], generator=generator).to(device) < 0.5
            images = torch.where(flip, images.flip(3), images)
        labels = None if self.labels is None else torch.from_numpy(self.labels[index]).to(device)
        return images, labels


def load_data(path, cond):
    """uint8 images [N,C,H,W], one-hot labels or None, and the statistics stored with the network."""
    source = ImageSource(path)
    images = load_array(source)
    if images.shape[2] != images.shape[3]:
        raise UserError(f"{path}: images are {images.shape[3]}x{images.shape[2]}; the networks need square images")
    labels = None
    if cond:
        if source.labels is None:
            raise UserError(f"--cond=True, but {path} has no labels (dataset.json)")
        labels = np.eye(max(source.labels) + 1, dtype=np.float32)[np.asarray(source.labels)]
    scaled_mean = images.mean(axis=0, dtype=np.float64) / 127.5 - 1
    second = np.zeros(images.shape[1:])
    for start in range(0, len(images), 4096):
        second += ((images[start : start + 4096] / 127.5 - 1) ** 2).sum(axis=0)
    std = float(np.sqrt((second / len(images) - scaled_mean**2).mean()))
    return images, labels, torch.from_numpy(scaled_mean).float(), std


def save_grid(net, path, device, columns=10):
    """A grid of columns^2 images of fixed seeds, Heun with 18 stamps."""
    from solvers import sample
    from torch_utils.image_writer import image_grid, save_image, to_uint8
    from torch_utils.seeds import SeededGenerators

    generators = SeededGenerators(range(columns * columns))
    latents = generators.randn([net.img_channels, net.img_resolution, net.img_resolution]).to(device)
    with torch.no_grad():
        images = sample(net, latents, solver="heun", num_steps=18, cond=net.make_cond(generators))
    save_image(image_grid(to_uint8(images), columns), path)


def train(
    *,
    data,
    outdir,
    net_config,
    total_kimg,
    minutes,
    batch,
    lr,
    warmup_kimg,
    ema_kimg,
    p_mean,
    p_std,
    amp,
    compile,
    channels_last,
    xflip,
    cond,
    seed,
    snap,
    grid,
    resume,
    device,
):
    """Trains and writes network-snapshot-*.safetensors, training-state.pt, stats.jsonl and grids into ``outdir``."""
    images, labels, data_mean, data_std = load_data(data, cond)
    world, main = distributed.world_size(), distributed.rank() == 0
    levels = len(net_config["channel_mult"])
    if not levels or images.shape[2] % (1 << (levels - 1)):
        raise UserError(f"--channel_mult: {images.shape[2]} pixels cannot be halved {max(levels - 1, 0)} times")
    if batch % world:
        raise UserError(f"--batch={batch} must be divisible by the number of processes ({world})")
    torch.manual_seed(seed)
    net_config = {
        "img_resolution": images.shape[2],
        "img_channels": images.shape[1],
        "label_dim": 0 if labels is None else labels.shape[1],
        **net_config,
    }
    net = EDMDenoiser(**net_config).to(device).train()
    net.autocast = {"bf16": torch.bfloat16, "none": None}[amp]
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    ema = deepcopy(net).eval().requires_grad_(False)
    ema.data_mean, ema.data_std = data_mean.to(device), data_std
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, betas=(0.9, 0.99), eps=1e-8)
    it, elapsed_before = 0, 0.0
    state_path = Path(outdir) / "training-state.pt"
    if resume:
        if not state_path.is_file():
            raise UserError(f"--resume: there is no {state_path}")
        state = torch.load(state_path, weights_only=True, map_location=device)
        try:
            net.load_state_dict(state["net"])
            ema.load_state_dict(state["ema"])
        except RuntimeError:
            raise UserError(f"--resume: the run in {outdir} has another architecture; repeat its flags") from None
        optimizer.load_state_dict(state["optimizer"])
        it, elapsed_before = state["it"], state["elapsed"]
        if it * batch / 1000 >= total_kimg or (minutes and elapsed_before / 60 >= minutes):
            raise UserError(f"--resume: {outdir} is finished; pass a larger --total_kimg or --minutes to train on")
    if compile:
        net.compile()
    ddp = DistributedDataParallel(net, broadcast_buffers=False) if world > 1 else net
    batches = Batches(images, labels, batch, seed, xflip)
    distributed.print0(f"{count_parameters(net):,} parameters, {len(images):,} images, batch {batch}, {outdir}")

    def snapshot(loss):
        kimg = it * batch / 1000
        meta = {"trained_kimg": kimg, "minutes": elapsed() / 60, "data": Path(data).name, "seed": seed, "loss": loss}
        meta.update(batch=batch, lr=lr, p_mean=p_mean, p_std=p_std, amp=amp, ema_kimg=ema_kimg, xflip=xflip)
        save_edm_safetensors(ema, Path(outdir) / f"network-snapshot-{int(kimg):06d}.safetensors", {"training": meta})
        state = {"net": net.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()}
        with atomic_path(state_path) as temporary:
            torch.save({**state, "it": it, "elapsed": elapsed()}, temporary)
        if grid:
            save_grid(ema, Path(outdir) / f"grid-{int(kimg):06d}.png", device)

    start = time.monotonic()

    def elapsed():
        return elapsed_before + time.monotonic() - start

    bar = tqdm(total=total_kimg, unit="kimg", disable=not main, mininterval=5, bar_format="{l_bar}{bar}{r_bar}")
    mean_loss, last_snap = float("nan"), it * batch / 1000
    while True:
        kimg = it * batch / 1000
        # Rank 0's clock decides for everybody, or the ranks could disagree about the last iteration.
        progress = max(kimg / total_kimg, elapsed() / 60 / minutes if minutes else 0.0)
        if minutes and world > 1:
            progress = distributed.broadcast_object(progress)
        if progress >= 1:
            break
        rate = lr * min(1.0, kimg / max(warmup_kimg, 1e-8)) * min(1.0, (1 - progress) / 0.5)
        for group in optimizer.param_groups:
            group["lr"] = max(rate, lr * 1e-3)
        generator = torch.Generator().manual_seed(stream_seeds(seed, it * world + distributed.rank(), 1)[0])
        x, y = batches.get(it, generator, device)
        optimizer.zero_grad(set_to_none=True)
        loss = edm_loss(ddp, x, y, generator, p_mean, p_std, net.sigma_data).mean()
        loss.backward()
        value = float(loss.detach())
        if not np.isfinite(value):
            raise UserError(
                f"the loss became {value} at {kimg:.1f} kimg; the last state is in {state_path}: lower --lr"
            )
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        half_life = min(ema_kimg * 1000, 0.05 * it * batch + 1e-8)
        beta = 0.5 ** (batch / max(half_life, 1e-8))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - beta)
        mean_loss = value if np.isnan(mean_loss) else 0.99 * mean_loss + 0.01 * value
        it += 1
        bar.update(batch / 1000)
        if it % 50 == 0:
            bar.set_postfix_str(f"loss {mean_loss:.4f} {100 * progress:.0f}% done")
            if main:
                record = {"kimg": it * batch / 1000, "loss": mean_loss, "seconds": elapsed(), "lr": rate}
                with open(Path(outdir) / "stats.jsonl", "a") as file:
                    file.write(json.dumps(record) + "\n")
        if main and snap and it * batch / 1000 - last_snap >= snap:
            last_snap = it * batch / 1000
            snapshot(mean_loss)
    bar.close()
    if main:
        snapshot(mean_loss)


def parse_ints(text, option):
    try:
        return [int(part) for part in text.split(",") if part]
    except ValueError:
        raise UserError(f"{option}={text} is not a comma-separated list of whole numbers") from None


@click.command()
@click.option("--data", help="Training images: zip or folder", required=True, type=click.Path(exists=True))
@click.option("--outdir", help="Where to write snapshots", default="runs/denoiser", show_default=True)
@click.option("--arch", type=click.Choice(list(ARCHITECTURES)), default="ddpmpp", show_default=True)
@click.option("--model_channels", type=click.IntRange(8), default=16, show_default=True)
@click.option("--channel_mult", default="1,2,4", show_default=True, help="Width of each resolution")
@click.option("--num_blocks", type=click.IntRange(1), default=1, show_default=True)
@click.option("--attn", default="8", show_default=True, help="Resolutions with self-attention")
@click.option("--dropout", type=click.FloatRange(0, 1), default=0.0, show_default=True)
@click.option("--total_kimg", type=click.FloatRange(0, min_open=True), default=2000, show_default=True)
@click.option("--minutes", type=click.FloatRange(0), default=0, help="Wall-clock budget, 0 = none", show_default=True)
@click.option("--batch", type=click.IntRange(1), default=128, help="Total batch size", show_default=True)
@click.option("--lr", type=click.FloatRange(0, min_open=True), default=2e-3, show_default=True)
@click.option("--warmup_kimg", type=click.FloatRange(0), default=10, show_default=True)
@click.option("--ema_kimg", type=click.FloatRange(0), default=50, help="EMA half-life", show_default=True)
@click.option("--p_mean", type=float, default=-1.2, help="Mean of ln sigma in training", show_default=True)
@click.option("--p_std", type=click.FloatRange(0, min_open=True), default=1.2, show_default=True)
@click.option("--amp", type=click.Choice(["none", "bf16"]), default="none", show_default=True)
@click.option("--compile", type=bool, default=False, help="torch.compile; minutes to start", show_default=True)
@click.option("--channels_last", type=bool, default=True, show_default=True)
@click.option("--xflip", type=bool, default=False, help="Random horizontal flips", show_default=True)
@click.option("--cond", type=bool, default=False, help="Class-conditional", show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--snap", type=click.FloatRange(0), default=100, help="kimg between snapshots, 0 = end", show_default=True
)
@click.option("--grid", type=bool, default=True, help="Sample a grid at each snapshot", show_default=True)
@click.option("--resume", type=bool, default=False, help="Continue the run in --outdir", show_default=True)
@click.option("--device", default=None, help="cpu, cuda, mps; default: the best there is")
def main(arch, model_channels, channel_mult, num_blocks, attn, dropout, outdir, device, resume, **options):
    """Train a small EDM denoiser on a zip or folder of images."""
    net_config = {
        **ARCHITECTURES[arch],
        "model_channels": model_channels,
        "channel_mult": parse_ints(channel_mult, "--channel_mult"),
        "num_blocks": num_blocks,
        "attn_resolutions": parse_ints(attn, "--attn"),
        "dropout": dropout,
    }
    chosen = distributed.init(device)
    try:
        if distributed.rank() == 0:
            if Path(outdir).exists() and not Path(outdir).is_dir():
                raise UserError(f"--outdir={outdir} is a file; choose a folder")
            Path(outdir).mkdir(parents=True, exist_ok=True)
            if not resume and (Path(outdir) / "training-state.pt").exists():
                raise UserError(f"--outdir={outdir} already holds a run; pass --resume=True or another folder")
            if not resume:
                with atomic_path(Path(outdir) / "training_options.json") as temporary:
                    temporary.write_text(json.dumps({**net_config, **options}, indent=2))
        distributed.barrier()
        train(outdir=outdir, net_config=net_config, device=chosen, resume=resume, **options)
    finally:
        distributed.shutdown()


if __name__ == "__main__":
    main()
