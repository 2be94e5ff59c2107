"""Files that tools write for their user: whole or not at all, and one sentence where they cannot be written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def replace_file(output: Path, save: Callable[[Path], object]) -> None:
    """Have ``save`` write a file beside ``output`` and put it in its place; folders above it are made.

    Raises:
        ValueError: it cannot be written; nothing is left beside it.
    """
    beside = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            save(beside)
            os.replace(beside, output)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{output} cannot be written: {error.strerror or error}") from error
