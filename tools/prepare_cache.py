"""Build the index caches of a run before it starts, on one machine without a GPU.

    python tools/prepare_cache.py --world-size 64 <the flags of pretrain_gpt.py>

The flags must be those of the run, and --world-size its number of processes: both decide how many samples are drawn.
The paths must be spelled as the run will spell them, because the caches go by name.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from megatron_hc.cli import Parsed, exit_on_user_error, parse_with_checkpoint
from megatron_hc.config import DataConfig


def parse_arguments(arguments: list[str]) -> tuple[int, Parsed]:
    """The number of processes, and the run's own flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--world-size", type=int, default=1, help="processes of the run")
    options, rest = parser.parse_known_args(arguments)
    return options.world_size, parse_with_checkpoint(rest)


def prepare(world_size: int, parsed: Parsed) -> None:
    """Check the files and write the caches; ``ValueError`` in one sentence for what the run would refuse."""
    config = parsed.config
    if world_size < 1:
        raise ValueError(f"--world-size must be positive, not {world_size}")
    config.validate(world_size)
    if config.data.mock_data:
        raise ValueError("--mock-data has no files and needs no cache")
    from megatron_hc.data import build_datasets, tokenizer_of
    from megatron_hc.optim.microbatches import BatchSchedule
    from megatron_hc.run import num_samples

    batches = BatchSchedule(config.training, config.parallel.data_parallel_size(world_size))
    started = time.monotonic()
    wanted = num_samples(config, batches)
    for name, count, dataset in zip(
        ("training", "validation", "test"),
        wanted,
        build_datasets(config, tokenizer_of(config.data), wanted),
        strict=True,
    ):
        found = "none" if dataset is None else f"{len(dataset)} samples"
        print(f"{name}: {found} ({count} will be drawn)")
    folders = {config.data.data_cache_path} if config.data.data_cache_path else set(cache_folders(config.data))
    print(f"caches in {', '.join(sorted(folders))}, {time.monotonic() - started:.1f} s")


def cache_folders(data: DataConfig) -> list[str]:
    """The default folders: beside each dataset."""
    values = [value for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path")
              for value in getattr(data, name)]  # fmt: skip
    if data.data_args_path is not None:
        values += Path(data.data_args_path).read_text(encoding="utf-8").split()
    return [
        str(Path(value).parent / "cache" / "GPTDataset_indices") for value in values if Path(f"{value}.idx").exists()
    ]


def main(arguments: list[str] | None = None) -> int:
    with exit_on_user_error("prepare_cache.py"):
        prepare(*parse_arguments(sys.argv[1:] if arguments is None else arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
