#!/usr/bin/env python
"""What a run will need, before it runs: parameters, memory, traffic, time, and which layout is best.

    python tools/estimate.py --hardware h100 --num-gpus 64 --yaml-cfg run.yaml
    python tools/estimate.py --hardware h200 --num-gpus 1024 --search --yaml-cfg run.yaml --json search.json

All other flags are those of pretrain_gpt.py. No GPU is needed, and nothing is allocated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

from megatron_hc.cli import Parsed, exit_on_user_error, parse_with_checkpoint
from megatron_hc.outputs import replace_file

PROG = "tools/estimate.py"


def arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(this tool's own flags, those of the run)."""
    from megatron_hc.estimate.hardware import HARDWARE, Hardware

    parser = argparse.ArgumentParser(prog=PROG, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--hardware", choices=sorted(HARDWARE), default="h100", help="kind of GPU (default: h100)")
    for item in dataclasses.fields(Hardware):
        if item.name not in ("name", "gpus_per_node"):
            parser.add_argument(f"--{item.name.replace('_', '-')}", type=float, help="instead of the preset's figure")
    parser.add_argument("--gpus-per-node", type=int, help="instead of the preset's figure")
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs of the run")
    parser.add_argument("--search", action="store_true", help="find the best layouts instead of taking the given one")
    parser.add_argument("--num-results", type=int, default=8, help="layouts that --search shows")
    parser.add_argument("--tokens", type=float, help="length of the run, for days and cost")
    parser.add_argument("--price-per-gpu-hour", type=float, help="for the cost of --tokens")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON (-: to standard output)")
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="draw memory per rank and time per part")
    own, rest = parser.parse_known_args(argv)
    return own, rest


def main() -> None:
    own, rest = arguments(sys.argv[1:])
    with exit_on_user_error(PROG):
        run(own, rest)


def run(own: argparse.Namespace, rest: list[str]) -> None:
    """Estimate or search, and show it."""
    from megatron_hc.estimate.hardware import HARDWARE
    from megatron_hc.estimate.report import Budget

    for name in ("num_gpus", "num_results", "tokens", "price_per_gpu_hour"):
        value = getattr(own, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, not {value:g}")
    if own.price_per_gpu_hour is not None and own.tokens is None:
        raise ValueError("--price-per-gpu-hour needs --tokens, the length of the run")
    parsed = parse_with_checkpoint(rest, prog=PROG)
    changes = {item: getattr(own, item) for item in _figures()}
    hardware = HARDWARE[own.hardware].with_changes(**changes)
    budget = None if own.tokens is None else Budget(own.tokens, own.price_per_gpu_hour)
    vocab_size = vocabulary(parsed)
    if own.search:
        shown, data = searched(own, parsed, hardware, vocab_size, budget)
    else:
        shown, data = estimated(own, parsed, hardware, vocab_size, budget)
    if own.json is not None and str(own.json) == "-":
        print(json.dumps(data, indent=2))
        return
    print(shown)
    if own.json is not None:
        replace_file(own.json, lambda beside: beside.write_text(json.dumps(data, indent=2) + "\n"))


def _figures() -> list[str]:
    from megatron_hc.estimate.hardware import Hardware

    return [item.name for item in dataclasses.fields(Hardware) if item.name != "name"]


def vocabulary(parsed: Parsed) -> int:
    """Tokens of the run's tokenizer."""
    from megatron_hc.data import tokenizer_of

    return tokenizer_of(parsed.config.data).vocab_size


def estimated(own, parsed, hardware, vocab_size, budget):  # type: ignore[no-untyped-def]
    from megatron_hc.estimate.estimate import estimate
    from megatron_hc.estimate.report import as_dict, as_text, draw

    found = estimate(parsed.config, hardware, own.num_gpus, vocab_size)
    if own.output is not None:
        draw(found, own.output)
    return as_text(found, budget), as_dict(found, budget)


def searched(own, parsed, hardware, vocab_size, budget):  # type: ignore[no-untyped-def]
    from megatron_hc.estimate.report import as_dict, as_text, draw, launch_command, search_text
    from megatron_hc.estimate.search import search

    results = search(parsed.config, hardware, own.num_gpus, vocab_size, own.num_results)
    best = results[0].estimate
    if own.output is not None:
        draw(best, own.output)
    command = launch_command(best.config, own.num_gpus, hardware.gpus_per_node)
    warning = "" if best.fits else "\nno layout fits: the first ones need the least time, not the least memory\n"
    shown = "\n\n".join([search_text(results) + warning, "the first layout:", as_text(best, budget), command])
    data = as_dict(best, budget)
    data["command"] = command
    data["layouts"] = [
        {**r.choice._asdict(), "reason": r.reason, "step_seconds": r.estimate.step_seconds, "mfu": r.estimate.mfu,
         "peak_bytes": r.estimate.peak_bytes, "fits": r.estimate.fits}
        for r in results
    ]  # fmt: skip
    return shown, data


if __name__ == "__main__":
    main()
