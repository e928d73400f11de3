"""Models in the formats of diffusers and transformers: finding, downloading, refusing code."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch_utils import files as json_file
from torch_utils.download import offline
from torch_utils.errors import MissingExtra, UserError
from torch_utils.file_kind import explain, file_kind

_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # either of these
TOKENIZER_FILES = (*sum(_TOKENIZERS, ()), "tokenizer_config.json")
_SETTINGS = ("config.json", "preprocessor_config.json", *TOKENIZER_FILES)


def import_transformers(purpose: str, extra: str = "text"):
    """The package, without torchvision. Raises MissingExtra if it is not installed."""
    try:
        import transformers
    except ImportError:
        raise MissingExtra("transformers", extra, purpose) from None
    return transformers


def hub_folder(name: str, patterns: Sequence[str], problem: str, remedy: str, revision: str | None = None) -> str:
    """The folder with these files of a repository of the Hugging Face hub, downloaded if needed.

    name: the repository.
    patterns: names of the files.
    problem, remedy: parts of the message of the UserError, "problem (reason); remedy".
    revision: branch, tag or commit. Default: the newest.

    When ``offline``, only the cache of the hub is used.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingExtra("huggingface_hub", "hub", "a repository of the Hugging Face hub") from None
    try:
        return snapshot_download(name, revision=revision, allow_patterns=list(patterns), local_files_only=offline())
    except (OSError, ValueError) as exc:
        raise UserError(f"{problem} ({first_line(exc)}); {remedy}") from None


def has_tokenizer(folder: str | Path) -> bool:
    """Whether the files of a tokenizer exist. Without them CLIPTokenizer would be empty."""
    return any(all((Path(folder) / name).is_file() for name in layout) for layout in _TOKENIZERS)


def first_line(exc: Exception) -> str:
    """The first line of a library's exception, at most 200 characters."""
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0][:200]


_LARGEST_CONFIG = 1 << 24  # bytes; usual ones have thousands


# With these entries of a configuration both libraries fetch an implementation, from the hub if its
# name has a slash or the package is not installed. quantization_config chooses a package; timm
# fetches its own weights.
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")

_REFUSED = {
    *(f"{prefix}{name}{suffix}" for name in _IMPLEMENTATIONS for prefix in ("", "_") for suffix in ("", "_internal")),
    *("auto_map", "trust_remote_code", "custom_pipeline", "custom_pipelines", "custom_generate", "use_kernels"),
    *("quantization_config", "compression_config", "use_timm_backbone", "use_pretrained_backbone"),
}

_HARMLESS = ("eager", "sdpa")  # of PyTorch itself


def refuse_code_in_configs(folders: Iterable[Path], source) -> None:
    """Raises UserError if a configuration can run or fetch code, or names another model.

    folders: their files ``*config.json`` are read, but not those of subfolders.
    source: the user's text, for the message.
    """
    for folder in folders:
        for path in sorted(folder.glob("*config.json")):
            if path.name == "adapter_config.json":  # names a model of the hub that is loaded instead
                raise UserError(f"{source}: {path.name} refers to another model, which is not loaded; remove the file")
            if name := _refused_entry(read_json(path)):
                raise UserError(
                    f"{source}: '{name}' in {path.parent.name}/{path.name} can run or fetch code, which is not done; "
                    "remove the entry if the model works without it"
                )


def read_json(path: Path):
    """The content of a foreign JSON file. UserError if it is too large or not JSON."""
    try:
        return json_file.read_json(path, _LARGEST_CONFIG)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable as JSON ({explain(path, error, reads=('json',))})") from None


def _refused_entry(content) -> str | None:
    """The first refused entry, at any depth; None without."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            for key, entry in value.items():
                if key in _REFUSED and entry and entry not in _HARMLESS:
                    return key
        if isinstance(value, (dict, list)):
            waiting.extend(value.values() if isinstance(value, dict) else value)
    return None


def refuse_other_files(weights: Iterable[Path]) -> None:
    """Raises UserError if a weights file is truncated or something else (Git LFS pointer, ...)."""
    for path in weights:
        with path.open("rb") as file:
            if kind := file_kind(file):
                raise UserError(f"{path} cannot be read as weights: it is {kind}")
