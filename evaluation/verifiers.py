"""Verifiers: scores of generated images, to keep the best of several (sampling/search.py).

classifier          log-probability of the image's class, or of the most likely class for networks
                    without classes. Uses the embedded classifier (digits, cifar10-small), or the
                    network's noisy classifier at the lowest noise level (ADM with guidance "cg").
classifier:FILE     the same, with a classifier of tools/train_classifier.py
clip, clip:ID|DIR   cosine similarity of image and prompt (evaluation/clip.py)
MODULE:FUNCTION     your own function; MODULE is imported from the current folder or the installed
                    packages. The function is called for every batch:

                        function(images, *, seeds, classes, prompts) -> [B]

                    images: uint8 [B,C,H,W] on the CPU, the pixels of the PNG files.
                    seeds: list of B ints.
                    classes: list of B ints; None for networks without classes.
                    prompts: list of B strings; None for networks without prompts.

                    It returns a tensor, array or list with one finite number per image; higher is
                    better. The number should depend on the image only, not on its batch.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from evaluation.clip import DEFAULT_CLIP, ClipNetwork
from evaluation.detectors import EMBEDDED, PRETRAINED, load_classifier
from models import zoo
from models.denoiser import member
from torch_utils.errors import UserError
from torch_utils.files import sha256_of
from torch_utils.functions import find_function, names_function
from torch_utils.images import from_uint8

FORMS = "classifier[:FILE], clip[:ID|DIR] or MODULE:FUNCTION"


class Verifier:
    """Base class.

    name: as given by the user.
    digest: SHA-256 of the weights, or of the file of a function; None: unknown.
    """

    name: str
    digest: str | None = None

    def __call__(self, images: torch.Tensor, *, seeds, classes, prompts) -> torch.Tensor:
        """One number per image, higher is better; arguments as in the module's docstring."""
        raise NotImplementedError


class ClassifierVerifier(Verifier):
    """Log-probability of a class. (The probability of all good images is rounded to 1.)

    name, digest: see ``Verifier``.
    logits: function from uint8 images [B,C,H,W] to [B, num_classes].
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
    """A function of the user; the digest is that of its module's file, without its imports."""

    def __init__(self, name: str, function: Callable, file: str | None):
        self.name, self._function = name, function
        self.digest = None if file is None else sha256_of(Path(file))

    def __call__(self, images, *, seeds, classes, prompts):
        return self._function(images, seeds=seeds, classes=classes, prompts=prompts)


def check_verifier(text: str, dataset_name: str) -> None:
    """Raises UserError where text and the network's name tell that the verifier cannot work."""
    kind, _, argument = text.partition(":")
    card = zoo.find_card(dataset_name)
    if kind == "classifier":
        if argument and not Path(argument).is_file():
            raise UserError(f"--verifier={text}: no such file: {argument}; give a file of tools/train_classifier.py")
        if not argument and card is not None and card.family != "adm" and dataset_name not in EMBEDDED:
            raise _no_classifier(text)
    elif kind == "clip":
        if card is not None and not card.takes_prompts:
            raise _no_prompts(text)
    elif not names_function(text):
        raise UserError(f"--verifier={text[:100]}: choose {FORMS}")


def _no_classifier(text: str) -> UserError:
    return UserError(
        f"--verifier={text}: there is no classifier for this network; give --verifier=classifier:FILE"
        " (tools/train_classifier.py makes one), clip or MODULE:FUNCTION"
    )


def _no_prompts(text: str) -> UserError:
    return UserError(f"--verifier={text}: this network has no prompts to compare images with; choose another verifier")


def load_verifier(text: str, net, device: torch.device | str = "cpu") -> Verifier:
    """Load a verifier for the images of a network.

    text: the verifier, see the module.
    net: the denoiser.
    device: where the verifier runs. Default: the CPU.

    Under torchrun use ``distributed.local_main_first()``, because CLIP may be downloaded. Raises
    UserError for unknown verifiers, and for those that do not fit the network's images.
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
        return ClassifierVerifier(text, net.weights_hash, lambda images: net.classify(from_uint8(images.to(device))))
    embedded = EMBEDDED.get(member(net, "dataset_name"))
    if not file and embedded is None:
        raise _no_classifier(text)
    path = Path(file) if file else PRETRAINED / embedded
    try:
        model, _ = load_classifier(path)
    except UserError as error:
        raise UserError(f"--verifier={text}: {error}; give a file of tools/train_classifier.py") from None
    shape, known = (net.img_channels, net.img_resolution), model.config
    if shape != (known["img_channels"], known["img_resolution"]):
        raise UserError(
            f"--verifier={text} is for images of {known['img_channels']}x{known['img_resolution']}"
            f"x{known['img_resolution']}, those of the network have {shape[0]}x{shape[1]}x{shape[1]}"
        )
    if net.label_dim not in (0, known["num_classes"]):
        raise UserError(f"--verifier={text} has {known['num_classes']} classes, the network has {net.label_dim}")
    model = model.to(device)
    return ClassifierVerifier(text, sha256_of(path), lambda images: model(images.to(device).float() / 255))


def _clip(text: str, model: str, net, device) -> ClipVerifier:
    if not member(net, "takes_prompts"):
        raise _no_prompts(text)
    try:
        return ClipVerifier(text, ClipNetwork(model, device))
    except UserError as error:  # it names the flag of clip_score.py
        raise UserError(str(error).replace(f"--model={model}", f"--verifier=clip:{model}")) from None


def score_images(
    verifier: Verifier,
    images: torch.Tensor,
    seeds: Sequence[int],
    labels: torch.Tensor | None = None,
    prompts: Sequence[str] | None = None,
) -> torch.Tensor:
    """Scores of a batch, float64 [B] on the CPU.

    verifier: the verifier.
    images: uint8 [B,C,H,W] on the CPU.
    seeds: B seeds.
    labels: class labels of the network, int64 [B] or one-hot [B,L]. Default None.
    prompts: B prompts. Default None.

    Raises UserError unless the verifier returns one finite number per image.
    """
    if labels is not None:
        labels = (labels.argmax(dim=1) if labels.ndim == 2 else labels).tolist()
    scores = verifier(images, seeds=list(seeds), classes=labels, prompts=prompts)
    try:
        scores = torch.as_tensor(scores).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError):
        kind = type(scores).__name__
        raise UserError(f"--verifier={verifier.name} returned a {kind} instead of one number per image") from None
    if scores.shape != (len(images),):
        raise UserError(
            f"--verifier={verifier.name} returned numbers of shape {list(scores.shape)} for {len(images)} images;"
            f" expected [{len(images)}]"
        )
    bad = scores.isfinite().logical_not().nonzero().flatten().tolist()
    if bad:
        raise UserError(f"--verifier={verifier.name} returned {scores[bad[0]]:g} for an image of seed {seeds[bad[0]]}")
    return scores
