"""A file's bytes as they were before gzip or Zstandard packed them, a stretch at a time.

Owns which packing a file has (its first bytes tell, its name does not) and what is said of one that is not whole. Does
not know what the bytes hold.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal, cast

from graftlm.errors import UserError

PACKED_SUFFIXES = (".gz", ".zst")

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_COMMANDS = {"gzip": "gzip -dc", "Zstandard": "zstd -dc"}


def inner_name(path: Path) -> Path:
    """The name without the suffix of a packing: `rows.jsonl` of `rows.jsonl.gz`."""
    return path.with_suffix("") if path.suffix.lower() in PACKED_SUFFIXES else path


def packing_of(path: Path) -> Literal["gzip", "Zstandard"] | None:
    """How a file is packed, by its first bytes. Raises OSError."""
    with path.open("rb") as stream:
        head = stream.read(4)
    return "gzip" if head.startswith(_GZIP) else "Zstandard" if head == _ZSTD else None


def unpacking_command(path: Path) -> str:
    """The command that writes a packed file's bytes to standard output; "" for one that is not packed."""
    packing = packing_of(path)
    return f"{_COMMANDS[packing]} {path}" if packing else ""


@contextmanager
def unpacked(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked as they are read.

    Raises UserError: it cannot be read, it is cut off or damaged, or its name promises a packing it does not have.
    """
    packing = None
    try:
        packing = packing_of(path)
        if packing is None and path.suffix.lower() in PACKED_SUFFIXES:
            if not path.stat().st_size:
                raise UserError(
                    f"{path} is empty; a packed file never is.", "Copy or download it again, or take it away."
                )
            raise UserError(
                f"{path} is named {path.suffix} and is not packed so: its first bytes are others.",
                "Copy or download it again; one that is not packed, give without that ending.",
            )
        with path.open("rb") as stream:
            if packing == "gzip":
                yield cast(IO[bytes], gzip.GzipFile(fileobj=stream))
            elif packing == "Zstandard":
                import pyarrow  # for its Zstandard: Python has none of its own before 3.14

                yield io.BufferedReader(pyarrow.CompressedInputStream(stream, "zstd"))  # pyright: ignore[reportArgumentType]
            else:
                yield stream
    except (OSError, EOFError, zlib.error) as error:
        # The system's errors have a number, those of damaged data have none.
        if packing is not None and getattr(error, "errno", None) is None:
            fix = f"Copy or download it again; `{unpacking_command(path)} > /dev/null` must run without an error."
            raise UserError(f"{path}: not a whole {packing} file ({error}).", fix) from None
        told = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read: {told}.", "Give the path of an existing file.") from None
