#!/usr/bin/env python
"""What this machine can run: every back end and optional library, its version, a small test of each.

    python tools/check_environment.py
    python tools/check_environment.py --require CUDA transformer-engine --json -

ok: it is there and gave the right numbers. no: it cannot be used on this machine, and why. FAILED: it should work and
does not. Exit code 1 where something FAILED, where torch or another library of every run is no, or where something of
--require is not ok; otherwise 0.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

try:
    from environment_probes import PARTS, Part, Unusable
except (ImportError, OSError) as error:  # an absent torch, or one whose libraries are
    sys.exit(f"tools/check_environment.py: torch or numpy cannot be imported ({error}): pip install torch numpy")

from megatron_hc.cli import exit_on_user_error
from megatron_hc.outputs import replace_file
from megatron_hc.packages import first_line, version_of

PROG = "tools/check_environment.py"


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    names = [part.name for part in PARTS]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help="test these only")
    parser.add_argument("--require", nargs="+", default=[], metavar="NAME", choices=names, help="what must be ok")
    parser.add_argument("--build", action="store_true", help="compile DeepSpeed's CPU kernel if it is not (minutes)")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON (-: to standard output, no table)")
    return parser.parse_args(argv)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Nothing of what packages print, from C++ neither."""
    sys.stdout.flush()
    kept = os.dup(1), os.dup(2)
    sys.stderr.flush()
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            for number, copy in enumerate(kept, start=1):
                os.dup2(copy, number)
                os.close(copy)


def result_of(part: Part) -> dict[str, Any]:
    """One row."""
    started = time.perf_counter()
    try:
        with silenced():
            status, words = "ok", part.probe()
    except Unusable as why:
        status, words = "no", str(why)
    except KeyboardInterrupt:
        raise
    # A package that calls sys.exit, or one in Rust that panics, must not end the table: neither is an Exception.
    except BaseException as error:
        status, words = "FAILED", str(error) if isinstance(error, ValueError) else first_line(error)
    return {
        "name": part.name,
        "status": status,
        "version": version_of(part.package),
        "known": part.known,
        "for": part.flags,
        "details": words,
        "seconds": round(time.perf_counter() - started, 2),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Columns as wide as what is in them; details last."""
    columns = {"name": "part", "status": "", "version": "version", "known": "ran with", "for": "for", "details": ""}
    rows = [columns, *({name: str(result[name] or "") for name in columns} for result in results)]
    widths = {name: max(len(row[name]) for row in rows) for name in columns}
    return "\n".join("  ".join(row[name].ljust(widths[name]) for name in columns).rstrip() for row in rows)


def exit_code(results: Sequence[dict[str, Any]], required: Sequence[str]) -> int:
    base = {part.name for part in PARTS if part.is_base} | {*required}
    bad = [row for row in results if row["status"] == "FAILED" or (row["name"] in base and row["status"] != "ok")]
    return int(bool(bad))


def main(argv: Sequence[str]) -> int:
    own = arguments(argv)
    if own.build:
        os.environ["CHECK_ENVIRONMENT_BUILD"] = "1"
    wanted = None if own.only is None else {*own.only, *own.require}
    results = [result_of(part) for part in PARTS if wanted is None or part.name in wanted]
    machine = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    if own.json != "-":
        print(f"{machine}\n\n{table(results)}")
    if own.json is not None:
        text = json.dumps({"machine": machine, "parts": results}, indent=2) + "\n"
        if own.json == "-":
            print(text, end="")
        else:
            with exit_on_user_error(PROG):
                replace_file(Path(own.json), lambda beside: beside.write_text(text, encoding="utf-8"))
    return exit_code(results, own.require)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
