"""Packages that a run needs only where it is told to use them: imported here, or refused with what to install."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple


class Package(NamedTuple):
    """An optional package."""

    module: str
    """Its top-level module."""
    install: str
    """How to get it."""
    distributions: tuple[str, ...]
    """Names under which it may be installed, as far as they are known."""


PACKAGES = {
    "transformer-engine": Package(
        "transformer_engine",
        "pip install 'megatron_hc[te]'",
        ("transformer-engine", "transformer_engine", "transformer-engine-cu12", "transformer-engine-cu13"),
    ),
    "apex": Package("apex", "build it with its CUDA extensions from https://github.com/NVIDIA/apex", ("apex",)),
    "torchao": Package("torchao", "pip install 'megatron_hc[fp8]'", ("torchao",)),
    "deepspeed": Package("deepspeed", "pip install 'megatron_hc[deepspeed]'", ("deepspeed",)),
}


def load(name: str, flag: str, *modules: str) -> list[ModuleType]:
    """The modules of the package ``name``; ``ValueError`` in one sentence that says why ``flag`` needs what."""
    try:
        return [importlib.import_module(module) for module in modules]
    except Exception as error:  # besides ImportError whatever a library's loader raises: OSError, RuntimeError ...
        raise ValueError(f"{flag} {reason(name, error)}") from error


def reason(name: str, error: Exception) -> str:
    """Why a package did not load, and the mend, as the end of a sentence."""
    package = PACKAGES[name]
    folder = folder_of(package.module)
    if folder is None:
        return f"needs {name}, which is not installed: {package.install}"
    if name == "apex" and not (folder / "normalization").is_dir():
        return (
            f"needs NVIDIA's apex, and the apex in {folder} is another project, which has that name on PyPI: "
            f"pip uninstall apex, then {package.install}"
        )
    if name == "apex" and isinstance(error, ImportError) and error.name not in (None, "apex"):
        return f"needs apex with its CUDA extensions, and this one was built without {error.name}: {package.install}"
    return f"needs {name}, which is installed in {folder} and does not load ({first_line(error)})"


def folder_of(module: str) -> Path | None:
    """Where a top-level module lies, without importing it; None: it is not installed."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    places: Sequence[str] = list(spec.submodule_search_locations or ())
    return Path(places[0] if places else spec.origin or ".")


def version_of(name: str) -> str | None:
    """Of an installed package, from its metadata; None: unknown, or not installed."""
    for distribution in PACKAGES[name].distributions if name in PACKAGES else (name,):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
