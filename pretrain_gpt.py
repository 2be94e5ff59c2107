"""Pretrain a GPT: parse the flags, then train. ``python pretrain_gpt.py --help`` lists every flag."""

from __future__ import annotations

import sys

from megatron_hc.cli import parse_with_checkpoint
from megatron_hc.launch import leave_with, one_voice
from megatron_hc.place import place_of


def main(argv: list[str]) -> int:
    """Exit codes (docs/operations.md): 0 done, 1 failed, 2 for what the user can mend, 74 trained but not all saved, 85
    saved because told to stop."""
    with one_voice("pretrain_gpt.py"):
        # torch is loaded only once the flags are known to be right: a wrong one is refused at once.
        parsed = parse_with_checkpoint(argv)
        parsed.config.validate(place_of().world_size)
        from megatron_hc.mesh import leave_groups
        from megatron_hc.train import train

        progress = train(parsed)
        leave_groups()
        return leave_with(progress.exit_code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
