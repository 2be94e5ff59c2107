"""Whether a run may write where it is told to: asked before it starts."""

from __future__ import annotations

import os
from pathlib import Path


def check_folder(flag: str, folder: str | Path) -> None:
    """Refuse (``ValueError``, naming ``flag``) a folder that can be neither written nor made; makes nothing."""
    place = Path(folder).absolute()
    try:
        while not place.exists() and not place.is_symlink():
            place = place.parent
        is_folder = place.is_dir()
    except OSError as error:  # a name that is too long, a folder above it that is closed to this user
        raise ValueError(f"{flag} {folder} cannot be used: {error.strerror}: choose another folder") from error
    if not is_folder:
        raise ValueError(f"{flag} {folder} cannot be a folder because {place} is a file: choose another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{flag} {folder} cannot be written because {place} is read-only here: choose another folder")
