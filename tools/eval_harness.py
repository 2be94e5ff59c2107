"""Score a checkpoint with lm-evaluation-harness, in one process or, under torchrun, in several.

python tools/eval_harness.py --model_args load=DIR --tasks TASK,TASK [any flag of lm_eval]

All flags are lm_eval's; --model is megatron_hc unless it is given.
"""

from __future__ import annotations

import os
import sys

from megatron_hc.launch import one_voice, place_of

FIRST_ONLY = ("--output_path", "-o", "--wandb_args", "--wandb_config_args", "--trackio_args", "--hf_hub_log_args")
"""Flags that say where results go: one process writes them."""


def harness_flags(argv: list[str], rank: int, world_size: int) -> list[str]:
    """The harness's command line for one of several processes; ``ValueError`` for what would lead them apart."""
    if argv[:1] == ["ls"] or argv[:1] == ["validate"] or {"-h", "--help"} & {*argv}:
        return argv
    argv = argv if argv[:1] == ["run"] else ["run", *argv]
    if not any(word.split("=")[0] in ("--model", "-M") for word in argv):
        argv = [*argv, "--model", "megatron_hc"]
    if world_size > 1 and any(word.split("=")[0] in ("--use_cache", "-c") for word in argv):
        raise ValueError("--use_cache is for one process: caches that differ would have processes wait for each other")
    if rank == 0:
        return argv
    kept: list[str] = []
    is_left_out = False
    for word in argv:
        if word.startswith("-"):
            is_left_out = word.split("=")[0] in (*FIRST_ONLY, "--log_samples", "-s")
        if not is_left_out:
            kept.append(word)
    return kept


def main(argv: list[str]) -> int:
    with one_voice("eval_harness.py"):
        place = place_of()
        argv = harness_flags(argv, place.rank, place.world_size)
        if place.rank > 0:
            os.environ["LMEVAL_LOG_LEVEL"] = "ERROR"
            sys.stdout = open(os.devnull, "w")
        from megatron_hc.inference.harness import register
        from megatron_hc.mesh import leave_groups

        register()
        from lm_eval.__main__ import cli_evaluate

        sys.argv = ["eval_harness.py", *argv]
        cli_evaluate()
        leave_groups()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
