"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def table(header: Sequence, rows: Iterable[Sequence]) -> str:
    """A Markdown table of the texts of these cells."""
    return "\n".join(map(table_line, [header, ["---"] * len(header), *rows]))


def table_line(cells: Sequence) -> str:
    """One line of a table."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
