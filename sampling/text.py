"""Texts of text-to-image networks: their flags, captions by seed, and their record."""

from dataclasses import dataclass, replace
from pathlib import Path

from models import use_tokenizer, zoo
from models.denoiser import member
from sampling.folder import format_seeds
from sampling.generate import text_of
from torch_utils.cli import PATH
from torch_utils.errors import UserError
from torch_utils.files import sha256_of
from torch_utils.options import CHANGED, flag
from torch_utils.prompts import FILES, read_prompts
from torch_utils.seeds import SeededGenerators

PROMPT_HELP = (
    "Text for all images, or a .txt (one per line) or .csv file of captions,"
    f" {{}}; {zoo.COCO_30K}: the 30,000 captions of MS-COCO, downloaded"
)


def _is_file_of_prompts(prompt: str) -> bool:
    return Path(prompt).suffix.lower() in FILES


def _recorded(prompt: str) -> str | dict:
    """The text; for a file, its name and checksum."""
    return {"file": Path(prompt).name, "sha256": sha256_of(prompt)} if _is_file_of_prompts(prompt) else prompt


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Texts for a text-to-image network."""

    prompt: str | None = flag(
        PROMPT_HELP.format("numbered by seed"),
        kind=PATH,
        metavar="TEXT|FILE",
        record=CHANGED,
        record_as=_recorded,
    )
    negative_prompt: str | None = flag(
        "Text that guidance leads away from (default: empty)", metavar="TEXT", record=CHANGED
    )
    tokenizer_path: str | None = flag("Tokenizer of Stable Diffusion (default: from the hub)", kind=PATH, metavar="DIR")

    def resolve(self) -> "TextOptions":
        """These options, with the (maybe downloaded) file of a named set of captions."""
        return replace(self, prompt=zoo.resolve_prompts(self.prompt))

    def read(self, network, seeds: list[int], model_path: str | None = None) -> str | dict[int, str] | None:
        """The text for all images, or the captions of a .txt or .csv file by seed.

        network: its ``dataset_name`` and ``guidance_type`` (``NetworkSettings``).
        seeds: must all have a caption.
        model_path: of the network. Default: none.
        """
        dataset_name = network.dataset_name
        wanted = zoo.takes_prompts(dataset_name, model_path)  # noticed before gigabytes are read
        if self.prompt is None and wanted:
            raise _text_is_missing(dataset_name)
        if wanted is False:
            self._refuse(dataset_name)
        if self.negative_prompt is not None and network.guidance_type == "none":
            raise _negative_is_idle()
        if self.prompt is None or not _is_file_of_prompts(self.prompt):
            return self.prompt
        captions = read_prompts(self.prompt)
        without = [seed for seed in seeds if seed not in captions]
        if without:
            raise UserError(
                f"{self.prompt} has no caption for seeds {format_seeds(without)[:60]}; it has them for --seeds="
                f"{format_seeds(list(captions))[:60]}"
            )
        return captions

    def _refuse(self, dataset_name: str) -> None:
        for name, value in vars(self).items():
            if value is not None:
                raise UserError(f"--{name}: {dataset_name} is not a text-to-image network; leave it out")

    def prepare(self, net, dataset_name: str, prompts) -> None:
        """Gives the network its tokenizer.

        Raises UserError if prompts are missing, have no effect, or cannot be encoded.
        """
        if not member(net, "takes_prompts"):
            self._refuse(dataset_name)
            return
        if prompts is None:
            raise _text_is_missing(dataset_name)
        if self.negative_prompt is not None and net.evals_per_call == 1:
            raise _negative_is_idle()
        if self.tokenizer_path is not None:
            use_tokenizer(net, self.tokenizer_path)
        seed = next(iter(prompts)) if isinstance(prompts, dict) else 0
        net.make_cond(SeededGenerators([seed]), **text_of([seed], prompts, self.negative_prompt))


def _text_is_missing(dataset_name: str) -> UserError:
    return UserError(f"{dataset_name} needs a text: give --prompt=TEXT, or --prompt=FILE with captions (.txt or .csv)")


def _negative_is_idle() -> UserError:
    return UserError("--negative_prompt has no effect without classifier-free guidance; leave it out")
