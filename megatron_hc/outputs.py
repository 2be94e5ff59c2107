"""Files that tools write for their user: whole or not at all, and one sentence where they cannot be written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def replace_file(output: Path, save: Callable[[Path], object]) -> None:
    """Have ``save`` write a file beside ``output`` and put it in its place; folders above it are made.

    What is no file (/dev/stdout, a pipe) is written as it is: it must not be replaced by one.

    Raises:
        ValueError: it cannot be written; nothing is left beside it.
    """
    if output.is_symlink():
        output = output.resolve()
    beside = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        if output.exists() and not output.is_file() and not output.is_dir():
            save(output)
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            save(beside)
            os.replace(beside, output)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{output} cannot be written: {error.strerror or error}") from error
