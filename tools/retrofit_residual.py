"""Give a trained plain model another residual path with the same function, and train on.

::

    python tools/retrofit_residual.py --load runs/plain --save runs/mhc --residual-connection mhc --check-logits
    python tools/retrofit_residual.py --load Qwen2.5-0.5B --save runs/values --value-residual learnable
    python tools/retrofit_residual.py --load runs/gpt2 --save runs/rms --pre-rmsnorm

--load: a checkpoint of ours, or a folder of Hugging Face. All flags of the residual path and of value residuals that
training has are taken. Optimizer state of old parameters is kept; new ones have none. Then
--load runs/mhc --use-checkpoint-args goes on with the run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from megatron_hc.cli import exit_on_user_error


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--load", required=True, help="checkpoint folder, or folder of Hugging Face")
    parser.add_argument("--save", required=True, help="folder to write the checkpoint to")
    parser.add_argument("--ckpt-step", type=int, help="iteration of the checkpoint (default: the last)")
    parser.add_argument("--pre-rmsnorm", action="store_true", help="LayerNorm -> RMSNorm, lossless; nothing else then")
    parser.add_argument("--check-logits", action="store_true", help="compare both models on random tokens")
    return parser.parse_known_args(argv)


def convert(arguments: argparse.Namespace, flags: list[str], load: str) -> None:
    from megatron_hc.convert import logits, rmsnorm
    from megatron_hc.convert.checkpoints import Folder, kept_if_right
    from megatron_hc.convert.retrofit import retrofit

    if arguments.pre_rmsnorm:
        if flags:
            raise ValueError(f"--pre-rmsnorm goes alone, without {' '.join(flags)}: convert twice")
        folder = rmsnorm.to_rmsnorm(load, arguments.save, step=arguments.ckpt_step)
    else:
        folder = retrofit(load, arguments.save, flags, step=arguments.ckpt_step)
    print(f"{load} in {folder}")
    if arguments.check_logits:
        before = logits.root_of(Folder(load, arguments.ckpt_step).path)
        with kept_if_right(folder):
            logits.check_ours(before, logits.root_of(folder), print)


def main(argv: list[str]) -> int:
    """Exit codes: 0, 2 for what the user can mend."""
    arguments, flags = parse_arguments(argv)
    with exit_on_user_error("retrofit_residual.py"):
        if not (Path(arguments.load) / "config.json").is_file():
            convert(arguments, flags, arguments.load)
            return 0
        from megatron_hc.convert import hf

        save = Path(arguments.save).absolute()
        if not save.parent.is_dir():
            raise ValueError(f"--save {arguments.save}: {save.parent} is not a folder")
        try:
            between = tempfile.TemporaryDirectory(dir=save.parent, prefix=f".{save.name}.")
        except OSError as error:  # a disk that is full or read-only
            raise ValueError(
                f"--save {arguments.save}: nothing can be written beside it ({error.strerror}): choose another folder"
            ) from error
        with between as own:
            hf.import_hf(arguments.load, own, seq_length=None, options=hf.Options())
            convert(arguments, flags, own)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
