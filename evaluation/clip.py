"""CLIP (Radford et al. 2021): similarity of images and captions, by transformers' CLIPModel."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from torch_utils.errors import UserError
from torch_utils.files import sha256_of
from torch_utils.hub import (
    _SETTINGS,
    first_line,
    has_tokenizer,
    hub_folder,
    import_transformers,
    refuse_code_in_configs,
    refuse_other_files,
)
from torch_utils.transfer import Arrival, to_device

DEFAULT_CLIP = "laion/CLIP-ViT-g-14-laion2B-s34B-b88K"


# In the order of transformers' preference; a repository often has the same weights several times.
_WEIGHTS = ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin")
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class ImagePreparation:
    """Resize, crop and normalise an image: uint8 [C,H,W], grey or RGB -> float32 [3,S,S].

    processor: the image processor of transformers.

    It can be called from several threads, and sent to other processes.
    """

    processor: Callable

    def __call__(self, image: np.ndarray) -> np.ndarray:
        rgb = np.ascontiguousarray(np.broadcast_to(image, (3, *image.shape[1:])).transpose(1, 2, 0))
        return self.processor(images=Image.fromarray(rgb), return_tensors="np")["pixel_values"][0].astype(np.float32)


class ClipNetwork:
    """A CLIP model with its tokenizer and image preprocessing, in float32.

    model: a folder in the format of transformers, or a hub id, which is downloaded to the hub's
        cache. Default DEFAULT_CLIP.
    device: where the model runs. Default: the CPU.
    amp: compute in float16 on a GPU, bfloat16 on the CPU. Default False.

    Attributes for the record of results:

    prepare: the ``ImagePreparation``.
    revision: commit of the hub; None for a folder.
    digest: SHA-256 of the weights file, or of the list of digests if there are several.
    preprocessing: settings of the image processor.
    image_size: (height, width) of the network's input.

    Under torchrun use ``distributed.local_main_first()``, because this may download. Raises
    UserError if the model does not exist, cannot be reached, is incomplete, or is not CLIP.
    """

    def __init__(self, model: str | Path = DEFAULT_CLIP, device: torch.device | str = "cpu", amp: bool = False):
        transformers = import_transformers("the CLIP score")
        self.model = str(model)
        self.device = torch.device(device)
        self.precision = torch.float32
        if amp:
            self.precision = torch.bfloat16 if self.device.type == "cpu" else torch.float16
        folder, self.revision = clip_folder(self.model)
        self._load("config.json", lambda: refuse_code_in_configs([Path(folder)], folder))
        self._load("weights", lambda: refuse_other_files(_weight_files(folder)))
        self.digest = _digest(_weight_files(folder))
        with _quiet(transformers):
            config = self._load("config.json", lambda: transformers.CLIPConfig.get_config_dict(folder)[0])
            if config.get("model_type") != "clip":
                kind = config.get("model_type")
                raise UserError(f"--model={self.model}: its config.json is of the type '{kind}', expected 'clip'")
            # Transformers 5 has one processor per backend, and names them after it.
            processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
            self.prepare = ImagePreparation(
                self._load("preprocessor_config.json", lambda: processor.from_pretrained(folder))
            )
            self._tokenizer = self._load("tokenizer", lambda: transformers.CLIPTokenizer.from_pretrained(folder))
            network, report = self._load(
                "weights",
                lambda: transformers.CLIPModel.from_pretrained(
                    folder, output_loading_info=True, weights_only=True, local_files_only=True
                ),
            )
        if report["missing_keys"]:  # transformers fills them with random numbers
            lost = sorted(report["missing_keys"])
            raise UserError(
                f"--model={self.model}: its weights are those of another network ({len(lost)} missing, first {lost[0]})"
            )
        self._network = network.float().eval().requires_grad_(False).to(self.device)
        self._check_tokenizer()
        settings = self.prepare.processor.to_dict()
        plain = (dict, list, tuple, int, float)
        self.preprocessing = {name: value for name, value in settings.items() if isinstance(value, plain)}
        self.image_size = self.prepare(np.zeros([3, 64, 64], dtype=np.uint8)).shape[1:]
        vision = network.config.vision_config
        if self.image_size != (vision.image_size, vision.image_size):
            raise UserError(
                f"--model={self.model}: preprocessor_config.json gives {self.image_size[1]}x{self.image_size[0]} pixels,"
                f" the network takes {vision.image_size}x{vision.image_size}"
            )

    def tokenize(self, captions: Sequence[str]) -> torch.Tensor:
        """Token ids, int64 [B,T], cut or padded to the length T of the text transformer."""
        length = self._network.config.text_config.max_position_embeddings
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        return self._tokenizer(list(captions), **options)["input_ids"]

    def similarity(self, images: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        """Cosine similarities, float64 [B], of prepared images [B,3,S,S] and B captions."""
        return self.start(images, captions)()

    @torch.no_grad()
    def start(self, images: torch.Tensor, captions: Sequence[str]) -> Callable[[], torch.Tensor]:
        """Start what ``similarity`` computes. The returned function waits for the result."""
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images for {len(captions)} captions")
        network = self._network
        # No attention mask is needed: attention is causal, and the output of the end-of-text token,
        # which comes before the padding, is used. The rounding of TF32 depends on the batch size.
        with (
            torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False),
        ):
            seen = network.vision_model(pixel_values=to_device(images, self.device)).pooler_output
            read = network.text_model(input_ids=to_device(self.tokenize(captions), self.device)).pooler_output
            both = Arrival(torch.stack([network.visual_projection(seen), network.text_projection(read)]))
        return lambda: torch.nn.functional.cosine_similarity(*both.read().double(), dim=1)

    def _load(self, what: str, load: Callable):
        try:
            return load()
        except Exception as exc:  # the tokenizers library raises plain Exceptions for damaged files
            reason = exc if isinstance(exc, UserError) else first_line(exc)
            raise UserError(f"--model={self.model}: its {what} cannot be used ({reason})") from exc

    def _check_tokenizer(self) -> None:
        text, end = self._network.config.text_config, self._tokenizer.eos_token_id
        # Old configurations have 2, which stands for the largest token id.
        if len(self._tokenizer) > text.vocab_size or (text.eos_token_id not in (2, end)):
            raise UserError(
                f"--model={self.model}: the tokenizer is not this network's ({len(self._tokenizer)} tokens, end {end};"
                f" expected {text.vocab_size}, end {text.eos_token_id})"
            )


def clip_folder(model: str) -> tuple[str, str | None]:
    """(folder of a model, its commit on the hub or None). Raises UserError if files are missing.

    With AMED_OFFLINE=1 (or HF_HUB_OFFLINE=1) only the cache of the hub is used.
    """
    revision = None
    folder = Path(model)
    if not folder.is_dir():
        folder = Path(_from_hub(model, (*_SETTINGS, *_WEIGHTS[:2], _INDICES[0])))
        if not _weight_files(folder):
            folder = Path(_from_hub(model, (*_SETTINGS, *_WEIGHTS[2:], _INDICES[1])))
        revision = folder.name
    for name in ("config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            raise UserError(
                f"--model={model}: not a CLIP model in the format of transformers: {name} is missing; give another"
            )
    if not has_tokenizer(folder):
        raise UserError(f"--model={model}: it has neither tokenizer.json nor vocab.json and merges.txt")
    if not _weight_files(folder):
        raise UserError(f"--model={model}: it has no weights (model.safetensors)")
    return str(folder), revision


def _from_hub(model: str, patterns: Sequence[str]) -> str:
    problem = f"--model={model}: no such folder, and the model cannot be loaded from the Hugging Face hub"
    return hub_folder(model, patterns, problem, "check the name and the network, or give a local folder")


def _weight_files(folder: str | Path) -> list[Path]:
    for pattern in _WEIGHTS:
        if files := sorted(Path(folder).glob(pattern)):
            return files
    return []


def _digest(files: list[Path]) -> str:
    digests = [sha256_of(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


@contextmanager
def _quiet(transformers) -> Iterator[None]:
    """Context without progress bars and reports of transformers; the caller checks the result."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
