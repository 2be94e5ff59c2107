"""Convert checkpoints between Hugging Face, Megatron-LM and megatron_hc, on the CPU, tensor by tensor.

::

    python tools/convert_checkpoint.py --from hf --to megatron-hc --load Qwen2.5-0.5B --save runs/qwen --check-logits
    python tools/convert_checkpoint.py --from megatron-hc --to hf --load runs/qwen --save export
    python tools/convert_checkpoint.py --from megatron --to megatron-hc --load iter_0001000 --save runs/a --allow-pickle

Train on from what --to megatron-hc wrote: --load runs/qwen --use-checkpoint-args --finetune. See docs/conversion.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_hc.cli import exit_on_user_error

DTYPES = ("keep", "float32", "bfloat16", "float16")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--from", dest="source", required=True, choices=("hf", "megatron-hc", "megatron"), help="what --load holds")
    add("--to", dest="target", required=True, choices=("hf", "megatron-hc"), help="what is written to --save")
    add("--load", required=True, help="folder to read")
    add("--save", required=True, help="folder to write")
    add("--ckpt-step", type=int, help="iteration of a megatron-hc or megatron checkpoint (default: the last)")
    add("--family", help="to hf: custom, or a model_type such as llama (default: the first that can hold the model)")
    add("--dtype", choices=DTYPES, default="keep", help="of what is written (default: as it is)")
    add("--max-shard-size", type=float, default=5.0, help="gigabytes of one file at most (default: 5)")
    add("--seq-length", type=int, help="to megatron-hc: tokens of a sample (default: the positions, at most 4096)")
    add("--tokenizer-model", help="the tokenizer's file or folder, if it is not with the weights or has moved")
    add("--vocab-size", type=int, help="from megatron: tokens without padding (default: as its arguments say)")
    add("--allow-pickle", action="store_true", help="from megatron: unpickle its metadata, which can run any code")
    add("--check-logits", action="store_true", help="compare both models on tokens (both in memory, in fp32)")
    return parser.parse_args(argv)


def check_flags(arguments: argparse.Namespace) -> None:
    """Refuse flags that are about other directions."""
    idle = {
        "--ckpt-step": arguments.ckpt_step is not None and arguments.source == "hf",
        "--family": arguments.family is not None and arguments.target != "hf",
        "--seq-length": arguments.seq_length is not None and arguments.target == "hf",
        "--vocab-size": arguments.vocab_size is not None and arguments.source != "megatron",
    }
    given = [name for name, is_idle in idle.items() if is_idle]
    if given:
        raise ValueError(
            f"{', '.join(given)} would do nothing from {arguments.source} to {arguments.target}: leave it out"
        )


def convert(arguments: argparse.Namespace) -> None:
    import torch

    from megatron_hc.convert import hf, logits, megatron
    from megatron_hc.convert.checkpoints import Folder, kept_if_right

    check_flags(arguments)
    if arguments.check_logits and arguments.source == "megatron":
        raise ValueError("--check-logits needs both models: Megatron-LM's cannot be run here")
    if arguments.check_logits:
        logits.import_transformers()  # asked for before hours of conversion
    if arguments.max_shard_size <= 0:
        raise ValueError(f"--max-shard-size must be positive, not {arguments.max_shard_size:g}")
    options = hf.Options(
        dtype=None if arguments.dtype == "keep" else getattr(torch, arguments.dtype),
        max_shard_bytes=int(arguments.max_shard_size * 1e9),
        tokenizer_model=arguments.tokenizer_model,
    )
    if (arguments.source, arguments.target) == ("hf", "megatron-hc"):
        folder = hf.import_hf(arguments.load, arguments.save, seq_length=arguments.seq_length, options=options)
        if arguments.check_logits:
            with kept_if_right(folder):
                logits.check_logits(arguments.load, *logits.root_of(folder), print, options.dtype)
    elif (arguments.source, arguments.target) == ("megatron-hc", "hf"):

        def check(exported: Path) -> None:
            ours = logits.root_of(Folder(arguments.load, arguments.ckpt_step).path)
            logits.check_logits(str(exported), *ours, print, options.dtype)

        hf.export_hf(
            *(arguments.load, arguments.save),
            step=arguments.ckpt_step,
            family=arguments.family,
            options=options,
            check=check if arguments.check_logits else None,
        )
    elif (arguments.source, arguments.target) == ("megatron", "megatron-hc"):
        if not arguments.allow_pickle:
            raise ValueError(
                "--from megatron unpickles .metadata and common.pt, which can run any code: add --allow-pickle if you "
                "trust where the checkpoint is from"
            )
        megatron.import_megatron(
            *(arguments.load, arguments.save),
            step=arguments.ckpt_step,
            vocab_size=arguments.vocab_size,
            seq_length=arguments.seq_length,
            options=options,
        )
    else:
        raise ValueError(
            f"--from {arguments.source} --to {arguments.target} is not offered: from hf or megatron to megatron-hc, or "
            "from megatron-hc to hf"
        )


def main(argv: list[str]) -> int:
    """Exit codes: 0, 2 for what the user can mend."""
    arguments = parse_arguments(argv)
    with exit_on_user_error("convert_checkpoint.py"):
        convert(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
