"""How tables of facts are written: as text, a row a word or a line, its columns parted by `|`.

Owns: the notation. Does not know: any fact. Place on the road: the tables of the kinds are read through it.
"""


def listed(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


def table(text: str) -> list[list[str]]:
    """A row for each word."""
    return [row.split("|") for row in text.split()]


def lines(text: str) -> list[list[str]]:
    """A row for each line: for columns with spaces in them."""
    return [row.split("|") for row in text.strip().splitlines()]
