"""Data of two small tasks, made from the documentation strings of Python's own library: no download, no files.

Scores depend on the Python version, whose words these are.
"""

from __future__ import annotations

import importlib
import inspect
import random
from typing import Any

MODULES = (
    "argparse ast asyncio base64 bisect calendar collections contextlib copy csv datetime decimal difflib email.utils "
    "fnmatch fractions functools glob gzip hashlib heapq html inspect io ipaddress itertools json logging math "
    "mimetypes os os.path pathlib pprint queue random re shlex shutil socket statistics string subprocess tarfile "
    "tempfile textwrap threading time tokenize traceback types typing unicodedata urllib.parse uuid weakref zipfile"
).split()
NUM_QUESTIONS, NUM_TEXTS, MAX_CHARACTERS = 80, 24, 1500


def _documented() -> list[tuple[str, str]]:
    """(dotted name, documentation) of the public functions and classes, in a fixed order."""
    found = {}
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name, value in sorted(vars(module).items()):
            is_own = getattr(value, "__module__", None) == module_name
            if not name.startswith("_") and is_own and (inspect.isroutine(value) or inspect.isclass(value)):
                text = inspect.getdoc(value) or ""
                if text and "(" not in text.split("\n")[0]:
                    found[f"{module_name}.{name}"] = text
    return sorted(found.items())


def choice(**options: Any) -> dict[str, Any]:
    """Which summary line belongs to a function: one right, three of others."""
    from datasets import Dataset

    numbers = random.Random(0)
    summaries = [(name, " ".join(text.split("\n\n")[0].split())) for name, text in _documented()]
    summaries = [(name, text) for name, text in summaries if 20 <= len(text) <= 120]
    questions = []
    for name, text in numbers.sample(summaries, min(NUM_QUESTIONS, len(summaries))):
        others = [other for other_name, other in summaries if other_name != name and other != text]
        choices = [text, *numbers.sample(others, 3)]
        numbers.shuffle(choices)
        questions.append({"name": name, "choices": choices, "answer": choices.index(text)})
    return {"test": Dataset.from_list(questions)}


def texts(**options: Any) -> dict[str, Any]:
    """Long documentation strings, cut at 1,500 characters."""
    from datasets import Dataset

    longest = sorted(_documented(), key=lambda item: (-len(item[1]), item[0]))[:NUM_TEXTS]
    return {"test": Dataset.from_list([{"name": name, "text": text[:MAX_CHARACTERS]} for name, text in longest])}
