"""Folders and repositories of diffusers and transformers: found, downloaded, and refused where they would run code."""

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
    """The package, without torchvision; raises MissingExtra where it is not installed."""
    try:
        import transformers
    except ImportError:
        raise MissingExtra("transformers", extra, purpose) from None
    return transformers


def hub_folder(name: str, patterns: Sequence[str], problem: str, remedy: str, revision: str | None = None) -> str:
    """The folder with files of a repository of the Hugging Face hub, downloaded to its cache.

    name: id of the repository.
    patterns: of the files.
    problem, remedy: UserError is "problem (reason); remedy"; when ``offline``, unless the cache has
        the files.
    revision: branch, tag or commit. Default: the newest.
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
    """Whether the files of a tokenizer are there. Without them CLIPTokenizer makes an empty one."""
    return any(all((Path(folder) / name).is_file() for name in layout) for layout in _TOKENIZERS)


def first_line(exc: Exception) -> str:
    """The message of a library's exception, fit for a line of one's own."""
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0][:200]


_LARGEST_CONFIG = 1 << 24  # bytes; usual ones have thousands


# Both libraries read these names in a configuration as "get this implementation", from the hub if it has a slash or if
# the package is not installed; quantization_config chooses a package, timm fetches weights of its own.
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


_REFUSED = {
    *(f"{prefix}{name}{suffix}" for name in _IMPLEMENTATIONS for prefix in ("", "_") for suffix in ("", "_internal")),
    *("auto_map", "trust_remote_code", "custom_pipeline", "custom_pipelines", "custom_generate", "use_kernels"),
    *("quantization_config", "compression_config", "use_timm_backbone", "use_pretrained_backbone"),
}


_HARMLESS = ("eager", "sdpa")  # of PyTorch itself


def refuse_code_in_configs(folders: Iterable[Path], source) -> None:
    """Raise UserError if a configuration in the folders asks to run or to fetch code, or names another model.

    folders: their files ``*config.json`` are read, not those of folders in them.
    source: what the user gave, for the message.
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
    """The content of a JSON file of someone else; UserError if it is too large, or something else."""
    try:
        return json_file.read_json(path, _LARGEST_CONFIG)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable as JSON ({explain(path, error, reads=('json',))})") from None


def _refused_entry(content) -> str | None:
    """The first entry, at any depth, that is refused."""
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
    """Raise UserError if one of the weights files is something else, such as a Git LFS pointer, or truncated."""
    for path in weights:
        with path.open("rb") as file:
            if kind := file_kind(file):
                raise UserError(f"{path} cannot be read as weights: it is {kind}")
