"""Verifiers: what judges generated images, so that the best of several can be kept (sampling/search.py).

classifier          log-probability of the class that was asked for; of the likeliest class for networks without classes.
                    By the embedded classifier of that kind of images (digits, cifar10-small), or by the network's own
                    noisy classifier at the lowest noise level (ADM under guidance_type "cg").
classifier:FILE     the same by a classifier of tools/train_classifier.py
clip, clip:ID|DIR   cosine between the CLIP embeddings of image and prompt (evaluation/clip.py), for text-to-image networks
MODULE:FUNCTION     a function of one's own, called with one batch after the other as

                        function(images, *, seeds, classes, prompts) -> [B]

                    images: uint8 [B,C,H,W] on the CPU, the pixels that a PNG file would have; seeds: list of B ints;
                    classes: list of B ints, None for networks without classes; prompts: list of B texts, None for networks
                    without text. The result, a tensor, an array or a list, is one finite number per image; higher is
                    better. It should depend on the image alone and not on its place in the batch. MODULE is imported
                    from the current folder or from what is installed.

Every verifier here is called in that way.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from evaluation.clip import DEFAULT_CLIP, ClipNetwork
from evaluation.detectors import EMBEDDED, PRETRAINED, load_classifier
from models.denoiser import member
from torch_utils.errors import UserError
from torch_utils.files import sha256_of
from torch_utils.functions import find_function

FORMS = "classifier[:FILE], clip[:ID|DIR] or MODULE:FUNCTION"


class Verifier:
    """name: as the user gave it; digest: SHA-256 of what it judges by (weights, or the file of a function), or None."""

    name: str
    digest: str | None = None

    def __call__(self, images: torch.Tensor, *, seeds, classes, prompts) -> torch.Tensor:
        """One number per image, higher is better; arguments: see the module."""
        raise NotImplementedError


class ClassifierVerifier(Verifier):
    """logits: uint8 images [B,C,H,W] -> [B, num_classes].

    The log-probability and not the probability, which is rounded to 1 for all good images alike.
    """

    def __init__(self, name: str, digest: str, logits: Callable[[torch.Tensor], torch.Tensor]):
        self.name, self.digest, self._logits = name, digest, logits

    @torch.inference_mode()
    def __call__(self, images, *, seeds, classes, prompts):
        scores = self._logits(images).cpu().double().log_softmax(dim=1)
        if classes is None:
            return scores.amax(dim=1)
        return scores.gather(1, torch.tensor(classes).reshape(-1, 1)).flatten()


class ClipVerifier(Verifier):
    def __init__(self, name: str, network: ClipNetwork):
        self.name, self.digest, self._network = name, network.digest, network

    def __call__(self, images, *, seeds, classes, prompts):
        prepared = [torch.from_numpy(self._network.prepare(image)) for image in images.numpy()]
        return self._network.similarity(torch.stack(prepared), prompts)


class FunctionVerifier(Verifier):
    """The digest is that of the module's file; what it imports may change unseen."""

    def __init__(self, name: str, function: Callable, file: str | None):
        self.name, self._function = name, function
        self.digest = None if file is None else sha256_of(Path(file))

    def __call__(self, images, *, seeds, classes, prompts):
        return self._function(images, seeds=seeds, classes=classes, prompts=prompts)


def load_verifier(text: str, net, device: torch.device | str = "cpu") -> Verifier:
    """The verifier that ``text`` names (see the module) for the images of a network.

    Raises UserError for unknown ones and for those that cannot judge this network's images. Under torchrun call it inside
    ``distributed.local_main_first()``: CLIP may be downloaded.
    """
    kind, _, argument = text.partition(":")
    if kind == "classifier":
        return _classifier(text, argument, net, device)
    if kind == "clip":
        return _clip(text, argument or DEFAULT_CLIP, net, device)
    return FunctionVerifier(text, *find_function(text, "--verifier", FORMS))


def _classifier(text: str, file: str, net, device) -> ClassifierVerifier:
    own = getattr(net, "classifier", None)
    if not file and own is not None:
        return ClassifierVerifier(text, net.weights_hash, lambda images: net.classify(_to_range(images, device)))
    embedded = EMBEDDED.get(member(net, "dataset_name"))
    if not file and embedded is None:
        raise UserError(
            f"--verifier={text}: there is no classifier for this network; give --verifier=classifier:FILE"
            " (tools/train_classifier.py makes one), clip or MODULE:FUNCTION"
        )
    path = Path(file) if file else PRETRAINED / embedded
    try:
        model, _ = load_classifier(path)
    except UserError as error:  # it does not know by which flag the file was named
        raise UserError(f"--verifier={text}: {error}; give a file of tools/train_classifier.py") from None
    shape, known = (net.img_channels, net.img_resolution), model.config
    if shape != (known["img_channels"], known["img_resolution"]):
        raise UserError(
            f"--verifier={text}: it judges {known['img_channels']}x{known['img_resolution']}x{known['img_resolution']}"
            f" images, the network makes {shape[0]}x{shape[1]}x{shape[1]}"
        )
    if net.label_dim not in (0, known["num_classes"]):
        raise UserError(f"--verifier={text}: it knows {known['num_classes']} classes, the network has {net.label_dim}")
    model = model.to(device)
    return ClassifierVerifier(text, sha256_of(path), lambda images: model(images.to(device).float() / 255))


def _to_range(images: torch.Tensor, device) -> torch.Tensor:
    """uint8 -> float32 in [-1, 1], as networks are trained on them."""
    return images.to(device).float() / 127.5 - 1


def _clip(text: str, model: str, net, device) -> ClipVerifier:
    if not member(net, "takes_prompts"):
        raise UserError(
            f"--verifier={text}: this network has no prompts to compare images with; choose another verifier"
        )
    try:
        return ClipVerifier(text, ClipNetwork(model, device))
    except UserError as error:  # there the model is a flag of its own
        raise UserError(str(error).replace(f"--model={model}", f"--verifier=clip:{model}")) from None


def judge(
    verifier: Verifier,
    images: torch.Tensor,
    seeds: Sequence[int],
    labels: torch.Tensor | None = None,
    prompts: Sequence[str] | None = None,
) -> torch.Tensor:
    """The verifier's numbers for one batch, float64 [B] on the CPU.

    images: uint8 [B,C,H,W] on the CPU; labels: as networks take them, int64 [B] or one-hot [B,L]. Raises UserError where
    the verifier gives anything but one finite number per image.
    """
    if labels is not None:
        labels = (labels.argmax(dim=1) if labels.ndim == 2 else labels).tolist()
    scores = verifier(images, seeds=list(seeds), classes=labels, prompts=prompts)
    try:
        scores = torch.as_tensor(scores).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError):
        kind = type(scores).__name__
        raise UserError(f"--verifier={verifier.name} gave a {kind} and not one number per image") from None
    if scores.shape != (len(images),):
        raise UserError(
            f"--verifier={verifier.name} gave numbers of shape {list(scores.shape)} for {len(images)} images;"
            f" expected [{len(images)}]"
        )
    bad = scores.isfinite().logical_not().nonzero().flatten().tolist()
    if bad:
        raise UserError(f"--verifier={verifier.name} gave {scores[bad[0]]:g} for an image of seed {seeds[bad[0]]}")
    return scores
