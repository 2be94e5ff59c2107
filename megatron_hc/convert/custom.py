"""A model that no family can hold, as a folder with modelling code of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_hc.config import ModelConfig


def write_code(model: ModelConfig, vocab_size: int, dtype: str, folder: Path) -> dict[str, Any]:
    """Copy the modelling code into ``folder``; returns its config.json."""
    raise ValueError("no family of transformers can hold this model, and code of its own is not written yet")
