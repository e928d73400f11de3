"""JSON files that a person, or a stranger, may have written: read within limits."""

from pathlib import Path

from torch_utils.errors import parse_json

MOST_BYTES = 1 << 26  # far beyond anything that is kept in such a file


def read_json(path: str | Path, most_bytes: int = MOST_BYTES):
    """The content of a JSON file. Raises OSError, or ValueError where it is not JSON or too large."""
    with Path(path).open("rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"it is larger than {most_bytes >> 20} MiB")
    return parse_json(data.decode("utf-8"))
