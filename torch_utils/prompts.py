"""Prompt files: which caption belongs to which seed."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from torch_utils.errors import UserError, parse_json

FILES = (".txt", ".csv", ".jsonl")
TEXT_COLUMNS = ("prompt", "caption", "text")
NUMBER_COLUMNS = ("seed", "index")
NAME_COLUMNS = ("file_name", "filename", "image_path", "image", "path")
_NUMBER = "[0-9]{1,18}"


def seed_of(name: str) -> int | None:
    """The seed in the name of an image: 123 for ``000000/000123.png``; None: not a number."""
    stem = PurePosixPath(name).stem
    return int(stem) if re.fullmatch(_NUMBER, stem) else None


def batch_of_prompts(prompts: str | Sequence[str] | None, count: int | None, labels=None) -> list[str]:
    """One prompt for each image of a batch.

    prompts: a text for all images, or one per image.
    count: size of the batch. None: any.
    labels: must be None, since text-to-image networks do not take them.

    Raises UserError for a wrong number of prompts and for values that are not strings.
    """
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


@dataclass(frozen=True)
class Captions:
    """The captions of a file.

    by_seed: by seed, in the order of the file.
    by_name: by the name of the image, with forward slashes; None if the file does not name images.
    by_row: the seeds are the row numbers.
    """

    by_seed: dict[int, str]
    by_name: dict[str, str] | None
    by_row: bool


def read_prompts(path: str | Path, column: str | None = None) -> dict[int, str]:
    """Captions by seed, in the order of the file; see ``read_captions``."""
    return read_captions(path, column).by_seed


def read_captions(path: str | Path, column: str | None = None) -> Captions:
    """The captions of a UTF-8 file.

    path: the file:
        .txt: one caption per line; the first line belongs to seed 0.
        .csv: comma-separated with a header.
        .jsonl: one JSON object per line, such as metadata.jsonl of a Hugging Face imagefolder.
    column: column of the captions. Default None: "prompt", "caption" or "text" (in any case).

    The column "file_name" (or "filename", "image_path", "image", "path") names the image of a
    caption. The seed is in the column "seed"; else it is the name of the image, if all names are
    different numbers; else it is in the column "index"; else the first row belongs to seed 0. An
    empty line or cell leaves its image without a caption. Raises UserError with the file and what
    is wrong.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected captions in a .txt, .csv or .jsonl file")
    if kind not in FILES:
        raise UserError(f"{path}: expected captions in a .txt file (one a line), .csv (with a header) or .jsonl")
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
    if kind == ".txt":
        captions = _numbered(path, enumerate(text.split("\n")))
        return Captions(captions, None, by_row=True)
    lines, header, rows = _csv_table(path, text) if kind == ".csv" else _json_table(path, text)
    return _captions_of_table(path, lines, header, rows, column)


def _numbered(path: Path, pairs) -> dict:
    """Captions by number or name, without empty ones."""
    captions, seen = {}, set()
    for key, caption in pairs:
        if key in seen:
            what = "seed number" if isinstance(key, int) else "image"
            raise UserError(f"{path}: two rows have the {what} {key}")
        seen.add(key)
        if caption.strip():
            captions[key] = caption.strip()
    if not captions:
        raise UserError(f"{path}: holds no caption, only a header and empty cells")
    return captions


def _captions_of_table(
    path: Path, lines: list[int], header: list[str], rows: list[list[str]], column: str | None
) -> Captions:
    text_column = _text_column(path, header, column)
    known: dict[str, int] = {}
    for place, name in enumerate(header):
        if place != text_column:
            known.setdefault(name.lower(), place)
    texts = [row[text_column] for row in rows]

    def first(names):
        return next((known[name] for name in names if name in known), None)

    names = by_name = None
    if (name_column := first(NAME_COLUMNS)) is not None:
        names = [row[name_column].strip().replace("\\", "/").removeprefix("./") for row in rows]
        if "" in names:
            raise UserError(f"{path}: line {lines[names.index('')]} has no {header[name_column]}")
        # An image with several captions cannot be paired with one, but they can be prompts.
        by_name = _numbered(path, zip(names, texts, strict=True)) if len(set(names)) == len(names) else {}
    number_column = first(NUMBER_COLUMNS[:1])
    if number_column is None and names is not None:
        seeds = [seed_of(name) for name in names]
        if None not in seeds and len(set(seeds)) == len(seeds):
            return Captions(_numbered(path, zip(seeds, texts, strict=True)), by_name, by_row=False)
    if number_column is None:
        number_column = first(NUMBER_COLUMNS)
    if number_column is None:
        return Captions(_numbered(path, enumerate(texts)), by_name, by_row=True)
    seeds = []
    for line, row in zip(lines, rows, strict=True):
        number = row[number_column].strip()
        if not re.fullmatch(_NUMBER, number):
            raise UserError(
                f"{path}: line {line} has the {header[number_column]} {number[:40]!r}; expected an integer from 0 up"
            )
        seeds.append(int(number))
    return Captions(_numbered(path, zip(seeds, texts, strict=True)), by_name, by_row=False)


def _csv_table(path: Path, text: str) -> tuple[list[int], list[str], list[list[str]]]:
    """Line numbers, header and rows."""
    # strict: otherwise an unclosed quotation mark would silently swallow the rest of the file.
    reader = csv.reader(io.StringIO(text), strict=True)
    lines, rows = [], []
    try:
        header = [name.strip() for name in next(filter(None, reader))]
        for row in filter(None, reader):
            if len(row) != len(header):
                raise UserError(
                    f"{path}: line {reader.line_num} has {len(row)} columns, the header {len(header)}; put captions"
                    " that hold a comma in quotation marks"
                )
            lines.append(reader.line_num)
            rows.append(row)
    except csv.Error as exc:
        raise UserError(f"{path}: line {reader.line_num} is not valid CSV ({exc})") from None
    return lines, header, rows


def _json_table(path: Path, text: str) -> tuple[list[int], list[str], list[list[str]]]:
    """The same for JSON lines. Columns: keys with a text or whole number in the first line."""
    lines, header, rows = [], [], []
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            entry = parse_json(content)
        except ValueError as exc:
            raise UserError(f"{path}: line {line} is not valid JSON ({exc})") from None
        if not isinstance(entry, dict):
            raise UserError(f"{path}: line {line} is not a JSON object")
        header = header or [key for key, value in entry.items() if isinstance(value, (str, int))]
        lines.append(line)
        row = [entry.get(key) for key in header]
        rows.append(["" if value is None else str(value) for value in row])
    return lines, header, rows


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
