"""Write docs/configuration.md: every flag, its values, its default and its meaning, out of the configuration's code.

    python tools/write_configuration.py [--output docs/configuration.md]

A test compares the file with the code: run this after a change of a flag.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_hc.cli import exit_on_user_error
from megatron_hc.cli_help import Group, default_of, groups
from megatron_hc.cli_megatron import ALIASES, FAMILIES, NOT_NEEDED, REPLACED, VALUE, VALUES, NotNeeded
from megatron_hc.cli_options import Option
from megatron_hc.config import flag
from megatron_hc.outputs import replace_file

OUTPUT = Path(__file__).parents[1] / "docs" / "configuration.md"

HEAD = """# Configuration

Written by `python tools/write_configuration.py` from the dataclasses in `megatron_hc/config/`; do not edit by hand.

Every setting is one flag of `pretrain_gpt.py` and one YAML key. The rules:

* `--yaml-cfg FILE`, given once per file, reads settings from YAML. Keys are the flags' names without the leading
  dashes, with dashes or underscores, flat or below the group's name (`model:`, `optimizer:` ...). Later files win over
  earlier ones, and the command line over all of them.
* `--use-checkpoint-args` puts the model's and the tokenizer's settings of the checkpoint under `--load` below both.
* A switch takes no value: `--bf16` turns it on, `--no-bf16` off. In YAML it is `true` or `false`.
* A flag that is given twice counts once, with its last value. Flags are never abbreviated.
* An unknown flag or key, a value of the wrong type and a flag that is not needed are reported all at once.
* The run prints every setting and where it came from; a checkpoint keeps both in `arguments.json`.
"""


def values_of(option: Option) -> str:
    """What the flag takes."""
    if option.kind is bool:
        return "switch"
    kinds = {str: "text", int: "whole number", float: "number"}
    one = ", ".join(f"`{choice}`" for choice in option.choices) or kinds[option.kind]
    return f"{one}; one or more" if option.many else one


def default_cell(option: Option) -> str:
    if option.required:
        return "required"
    if option.kind is bool and option.default is not None:
        return "on" if option.default else "off"
    return f"`{default_of(option)}`" if option.default not in (None, ()) else ""


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def section(group: Group) -> str:
    lines = [f"## {group.title.rstrip('.')}", "", f"YAML group: `{group.path[-1]}`.", ""]
    lines += ["| flag | values | default | meaning |", "|---|---|---|---|"]
    for option, text in group.flags:
        cells = (f"`{flag(option.name)}`", values_of(option), default_cell(option), cell(text))
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def megatron_section() -> str:
    """What Megatron-LM's other flags are here."""
    lines = ["## Other flags of Megatron-LM", "", "Spellings that are accepted:", "", "| flag | is |", "|---|---|"]
    for name, targets in ALIASES.items():
        shown = {VALUE: " VALUE", "true": ""}
        meant = [flag(target) + shown.get(fixed, f" {fixed}") for target, fixed in targets.items()]
        lines.append(f"| `{flag(name)}` | `{' '.join(meant)}` |")
    lines += ["", "Not offered, with what to do instead:", "", "| flag | instead |", "|---|---|"]
    lines += [f"| `{flag(name)}` | {cell(instead)} |" for name, instead in REPLACED.items()]
    lines += [f"| `{flag(prefix)}...` | {cell(instead)} |" for prefix, instead in FAMILIES.items()]
    for name, values in VALUES.items():
        lines += [f"| `{flag(name)} {value}` | {cell(instead)} |" for value, instead in values.items()]
    lines += [
        "",
        "Not needed: a command line with them is refused once, with the list and the command line without them.",
        "",
        "| flag | why |",
        "|---|---|",
    ]
    for name, entry in NOT_NEEDED.items():
        lines.append(f"| `{flag(name)}` | {cell(entry.why)}{_condition(entry)} |")
    return "\n".join(lines) + "\n"


def _condition(entry: NotNeeded) -> str:
    """With which values a flag is not needed; nothing where it never is."""
    if entry.beside is not None:
        return f" (with {flag(entry.beside[0])} {' or '.join(entry.beside[1])}; refused otherwise)"
    return f" (with {' or '.join(entry.values)}; other values are refused)" if entry.values else ""


def page() -> str:
    """The whole file."""
    return "\n".join([HEAD, *(section(group) for group in groups()), megatron_section()])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the file to write (default: %(default)s)")
    output = parser.parse_args(argv).output
    with exit_on_user_error("write_configuration.py"):
        replace_file(output, lambda beside: beside.write_text(page(), encoding="utf-8"))
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
