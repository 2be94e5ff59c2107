"""A text corpus without a download: the sources of this Python's standard library, one document per file.

Left out are tests, tables of numbers (character maps and the like) and generated documentation: they teach a small
model nothing that can be read. Writes JSON lines {"text": ..., "source": ...}.

    python tools/make_corpus.py --output corpus.jsonl
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from pathlib import Path

from megatron_hc.cli import exit_on_user_error
from megatron_hc.outputs import replace_file

SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "__pycache__", "lib2to3", "idlelib",
}  # fmt: skip
LARGEST_SHARE_OF_DIGITS = 0.08


def documents(root: Path) -> list[Path]:
    """The .py files below ``root`` that read as prose and code, in a fixed order."""
    found = [path for path in root.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(root).parts)]
    return sorted(found)


def is_table(text: str) -> bool:
    """Mostly numbers."""
    return sum(letter.isdigit() for letter in text) > LARGEST_SHARE_OF_DIGITS * len(text)


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="ignore")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def write_corpus(root: Path, output: Path) -> tuple[int, int]:
    """Write the corpus and return (documents, characters); an interruption leaves no half-written file."""
    count = characters = 0

    def save(beside: Path) -> None:
        nonlocal count, characters
        with open(beside, "w", encoding="utf-8") as file:
            for path in documents(root):
                text = read(path)
                if not text.strip() or is_table(text):
                    continue
                file.write(json.dumps({"text": text, "source": str(path.relative_to(root))}) + "\n")
                count, characters = count + 1, characters + len(text)
        if count == 0:
            raise ValueError(f"no Python sources below {root}: give --root or your own text")

    replace_file(output, save)
    return count, characters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="the .jsonl file to write")
    parser.add_argument(
        "--root", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="folder of sources (default: stdlib)"
    )
    arguments = parser.parse_args()
    with exit_on_user_error("make_corpus.py"):
        count, characters = write_corpus(arguments.root, arguments.output)
    print(f"{arguments.output}: {count} documents, {characters / 1e6:.1f} MB of text")


if __name__ == "__main__":
    main()
