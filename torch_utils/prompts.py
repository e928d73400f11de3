"""Prompt files: which caption belongs to which seed number."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from torch_utils.errors import UserError

TEXT_COLUMNS = ("prompt", "caption", "text")
NUMBER_COLUMNS = ("seed", "index")
_NUMBER = "[0-9]{1,18}"


def seed_of(name: str) -> int | None:
    """The seed number that an image is named after: 123 for ``000000/000123.png``; None for names that are no number."""
    stem = PurePosixPath(name).stem
    return int(stem) if re.fullmatch(_NUMBER, stem) else None


def batch_of_prompts(prompts: str | Sequence[str] | None, count: int | None, labels=None) -> list[str]:
    """One prompt for each image of a batch; a string is for all of them. count: the batch, None for any. Raises UserError
    for other numbers of prompts, for what is no text, and for labels, which text-to-image networks do not take."""
    if labels is not None:
        raise UserError("this network takes prompts, not classes")
    if prompts is None:
        raise UserError("this network is conditioned on text: pass prompts")
    prompts = [prompts] * (1 if count is None else count) if isinstance(prompts, str) else list(prompts)
    if not prompts or count not in (None, len(prompts)):
        raise UserError(f"{len(prompts)} prompts were given for a batch of {count or 'at least 1'}")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise UserError(f"a prompt has to be a string, not a {type(prompt).__name__}")
    return prompts


def read_prompts(path: str | Path, column: str | None = None) -> dict[int, str]:
    """Captions by seed number, in the order of a UTF-8 file.

    .txt   one caption a line; the first line belongs to seed 0
    .csv   comma-separated with a header. The captions are in ``column``, by default the one that is called "prompt",
           "caption" or "text" (in any case). The seed number is in the column "seed", else "index", if there is such a
           column; else the first row below the header belongs to seed 0.

    An empty line or cell leaves its number without a caption. Raises UserError, naming the file and what is wrong.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected captions in a .txt or .csv file")
    if kind not in (".txt", ".csv"):
        raise UserError(f"{path}: expected captions in a .txt file (one a line) or a .csv file (with a header)")
    if kind == ".txt" and column is not None:
        raise UserError(f"{path}: a text file has no column '{column}'; leave the column out")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as exc:
        raise UserError(f"{path}: not UTF-8 text (byte {exc.start}); save it as UTF-8") from None
    except OSError as exc:
        raise UserError(f"{path}: cannot be read ({exc.strerror or exc})") from None
    if "\0" in text:
        raise UserError(f"{path}: not UTF-8 text (it holds null bytes); save it as UTF-8")
    if not text.strip():
        raise UserError(f"{path}: the file is empty; expected one caption a line")
    prompts = {}
    for number, caption in _csv_rows(path, text, column) if kind == ".csv" else enumerate(text.split("\n")):
        if number in prompts:
            raise UserError(f"{path}: two rows have the seed number {number}")
        if caption.strip():
            prompts[number] = caption.strip()
    if not prompts:
        raise UserError(f"{path}: holds no caption, only a header and empty cells")
    return prompts


def _csv_rows(path: Path, text: str, column: str | None) -> Iterator[tuple[int, str]]:
    # strict: a quotation mark that is never closed would silently swallow the rest of the file.
    reader = csv.reader(io.StringIO(text), strict=True)
    try:
        header = [name.strip() for name in next(filter(None, reader))]
        text_column = _text_column(path, header, column)
        known = [name.lower() for name in header]
        number_column = next((known.index(name) for name in NUMBER_COLUMNS if name in known), None)
        if number_column == text_column:
            number_column = None
        for row_number, row in enumerate(filter(None, reader)):
            if len(row) != len(header):
                raise UserError(
                    f"{path}: line {reader.line_num} has {len(row)} columns, the header {len(header)}; put captions"
                    " that hold a comma in quotation marks"
                )
            number = row_number
            if number_column is not None:
                if not re.fullmatch(_NUMBER, row[number_column].strip()):
                    raise UserError(
                        f"{path}: line {reader.line_num} has the {header[number_column]} {row[number_column]!r};"
                        " expected an integer from 0 up"
                    )
                number = int(row[number_column])
            yield number, row[text_column]
    except csv.Error as exc:
        raise UserError(f"{path}: line {reader.line_num} is not valid CSV ({exc})") from None


def _text_column(path: Path, header: list[str], column: str | None) -> int:
    if column is None:
        found = [index for index, name in enumerate(header) if name.lower() in TEXT_COLUMNS]
    else:
        found = [index for index, name in enumerate(header) if name == column]
    columns = ", ".join(f"'{name[:40]}'" for name in header[:10])
    if not found:
        wanted = f"'{column}'" if column is not None else "'prompt', 'caption' or 'text'"
        raise UserError(f"{path}: there is no column {wanted}; its header has {columns}")
    if len(found) > 1:
        raise UserError(f"{path}: more than one column can hold the captions ({columns}); choose one by its name")
    return found[0]
