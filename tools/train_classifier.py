r"""Trains a small classifier; its pooled features serve as a detector for the Fréchet distance.

The first command makes the embedded one of digits:

    python tools/train_classifier.py --data=datasets/mnist-train.zip \
        --test=datasets/mnist-test.zip --dest=models/pretrained/digits-features.safetensors
    python -m tools.train_classifier --data=train.zip --test=test.zip --dest=features.safetensors \
        --arch=residual --flip=True
    python -m tools.train_classifier --data=train.zip --test=test.zip --dest=wide.safetensors \
        --width=32 --feature_dim=128 --epochs=12
"""

import sys
from pathlib import Path

if not __package__:  # run as a file: the repository root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    from torch_utils.usage import check_usage

    check_usage("tools.train_classifier")

import time

import click
import torch
import torch.nn.functional as F

from evaluation.detectors import ARCHITECTURES, save_classifier
from torch_utils import distributed
from torch_utils.cli import PATH, SEED, Command, Number
from torch_utils.errors import UserError
from torch_utils.files import check_destination, sha256_of
from torch_utils.images import ImageSource, count_classes, load_array
from torch_utils.progress import progress_bar


def load_labelled(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, uint8 [N,C,R,R], and labels, int64 [N], of a labelled folder or zip."""
    source = ImageSource(path)
    if source.labels is None:
        raise UserError(f"{path} has no labels (dataset.json); make it with tools/dataset_tool.py from labelled data")
    if source.shape[1] != source.shape[2]:
        raise UserError(f"{path}: images are {source.shape[2]}x{source.shape[1]}, but must be square")
    return torch.from_numpy(load_array(source)), torch.tensor(source.labels)


def augment(images: torch.Tensor, shift: int, flip: bool) -> torch.Tensor:
    """Images shifted at random, filled with zeros.

    images: uint8 [B,C,H,W].
    shift: largest shift in pixels, in each direction.
    flip: also mirror half of the images.
    """
    batch, _, height, width = images.shape
    padded = F.pad(images, [shift] * 4)
    rows = torch.randint(2 * shift + 1, [batch, 1]) + torch.arange(height)
    columns = torch.randint(2 * shift + 1, [batch, 1]) + torch.arange(width)
    if flip:
        mirrored = torch.rand([batch, 1]) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    index = torch.arange(batch)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.inference_mode()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, device: torch.device) -> float:
    model.eval()
    hits = 0
    for part, truth in zip(images.split(500), labels.split(500), strict=True):
        hits += int((model(part.to(device).float() / 255).argmax(1).cpu() == truth).sum())
    return hits / len(images)


def train(model, images, labels, *, epochs, batch, lr, shift, flip, device) -> None:
    """Cross-entropy with AdamW and a one-cycle learning rate."""
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    cycle = {"total_steps": max(steps, 5), "pct_start": 0.25}  # with 4 steps PyTorch divides by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, **cycle)
    model.train()
    with progress_bar(steps, unit="step") as bar:
        for _ in range(epochs):
            order = torch.randperm(len(images))[: len(images) // batch * batch]
            for chosen in order.split(batch):
                inputs = augment(images[chosen], shift, flip).to(device).float() / 255
                loss = F.cross_entropy(model(inputs), labels[chosen].to(device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                if bar.n % 50 == 0:
                    bar.set_postfix(loss=f"{loss.item():.4f}")


GROUPS = {
    "Data": "data test flip | shift",
    "Network": "arch width | feature_dim",
    "Training": "epochs batch lr seed",
    "Output": "dest",
    "Speed": "device",
}


@click.command(cls=Command, groups=GROUPS)
@click.option("--data", type=PATH, required=True, metavar="PATH", help="Labelled training images: folder or zip")
@click.option("--test", type=PATH, required=True, metavar="PATH", help="Labelled test images: folder or zip")
@click.option("--dest", type=PATH, required=True, metavar="FILE", help="File to write, .safetensors")
@click.option("--arch", type=click.Choice(list(ARCHITECTURES)), default="conv", show_default=True, help="Architecture")
@click.option("--epochs", type=click.IntRange(min=1), default=6, show_default=True, help="Passes over the images")
@click.option("--batch", type=click.IntRange(min=2), default=128, show_default=True, help="Images per step")
@click.option("--lr", type=Number(min=0, min_open=True), default=4e-3, show_default=True, help="Learning rate")
@click.option("--width", type=click.IntRange(min=1), default=16, show_default=True, help="Channels of the first layer")
@click.option("--feature_dim", type=click.IntRange(min=1), default=64, show_default=True, help="Number of features")
@click.option("--shift", type=click.IntRange(min=0), default=2, show_default=True, help="Largest random shift, pixels")
@click.option("--flip", type=bool, default=False, show_default=True, help="Mirror images at random (not for digits)")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Random seed of the training")
@click.option("--device", default=None, help="cpu, cuda or mps (default: the fastest available)")
def main(data, test, dest, arch, epochs, batch, lr, width, feature_dim, shift, flip, seed, device):
    """Trains a small classifier on a labelled image set."""
    if Path(dest).suffix != ".safetensors":
        raise UserError(f"--dest={dest}: must end in .safetensors")
    check_destination(dest, "--dest")
    device = distributed.pick_device(device)
    images, labels = load_labelled(data)
    test_images, test_labels = load_labelled(test)
    num_classes = count_classes(labels.tolist(), data)
    if test_images.shape[1:] != images.shape[1:] or int(test_labels.max()) >= num_classes:
        raise UserError(f"--test={test}: the images or classes differ from those of --data")
    if len(images) < batch:
        raise UserError(f"--batch={batch}: must not exceed the {len(images)} images of --data")
    torch.manual_seed(seed)
    model = ARCHITECTURES[arch](images.shape[1], images.shape[2], num_classes, feature_dim, width).to(device)
    start = time.perf_counter()
    train(model, images, labels, epochs=epochs, batch=batch, lr=lr, shift=shift, flip=flip, device=device)
    result = accuracy(model, test_images, test_labels, device)
    save_classifier(
        model.cpu(),
        dest,
        test_accuracy=f"{result:.4f}",
        seed=seed,
        epochs=epochs,
        batch=batch,
        lr=lr,
        shift=shift,
        flip=flip,
        train_images=len(images),
        data=Path(data).name,
        data_sha256=sha256_of(Path(data)) if Path(data).is_file() else "",
    )
    print(f"{dest}: test accuracy {100 * result:.2f}% after {epochs} epochs, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
