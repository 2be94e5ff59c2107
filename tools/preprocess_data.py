"""Turn text into token files for training: PREFIX_text_document.bin and .idx, in Megatron-LM's format.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model --append-eod --workers 8

Reads .jsonl (one JSON object per line, the text under "text": --json-keys), .parquet and plain text (one document per
line), also as .gz or .zst, folders of these, or what the datasets library loads (--dataset). An interrupted run leaves
no dataset; the same command goes on where it stopped. Beside each dataset PREFIX_text_document.json remembers the
tokenizer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hc.cli_megatron import NOT_NEEDED, VALUES, instead_of
from megatron_hc.data.encode import Encoder, Stop, encoded, groups, leave_with_parent, start_method, stopping
from megatron_hc.data.indexed import optimal_dtype
from megatron_hc.data.inputs import add_input_arguments, check_input_arguments, described, open_inputs
from megatron_hc.data.parts import Part, Progress, join, only_one, piece
from megatron_hc.data.readers import Reader
from megatron_hc.data.tokenizer import TOKENIZERS, Tokenizer, build_tokenizer, record_of
from megatron_hc.data.tokenizer_bpe import PATTERNS

WORTH_KEEPING = 2**24
"""Bytes of text from which on a run that stops at an error keeps what it did."""

_SENTENCES = "a document is one sequence: leave it out"
_WORKERS = "give --workers: leave it out"
MEGATRONS = {
    "--json-key": "use --json-keys",
    "--split-sentences": _SENTENCES,
    "--keep-newlines": _SENTENCES,
    "--lang": _SENTENCES,
    "--keep-empty": "a document without text is none: leave it out",
    "--keep-sequential-samples": "documents keep their order with any --partitions: leave it out",
    "--dataset-impl": "there is one format: leave it out",
    "--chunk-size": "leave it out",
    **dict.fromkeys(
        ("--find-optimal-num-workers", "--workers-to-check", "--max-documents", "--performance-dir"), _WORKERS
    ),
    **{
        name: instead_of(name[2:].replace("-", "_")) or f"{NOT_NEEDED[name[2:].replace('-', '_')].why}: leave it out"
        for name in (
            *("--vocab-file", "--merge-file", "--tokenizer-name-or-path", "--tokenizer-library", "--vocab-extra-ids"),
            *("--legacy-tokenizer", "--trust-remote-code", "--tiktoken-special-tokens", "--patch-tokenizer-type"),
        )
    },
}
"""Flags of Megatron-LM's tool of this name, and of programs made of it -> what to do instead."""

Report = Callable[[int, int, int], None]
"""Called with the documents, bytes of input and tokens so far."""


class _NotOffered(argparse.Action):
    """A flag of ``MEGATRONS``."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, flag: str | None = None) -> None:
        parser.error(f"{flag} is not offered: {MEGATRONS[flag or '']}")


def _tokenizer_type(name: str) -> str:
    if name in VALUES["tokenizer_type"]:
        raise argparse.ArgumentTypeError(f"{name} is not offered: {VALUES['tokenizer_type'][name]}")
    return name


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_input_arguments(parser)
    parser.add_argument("--output-prefix", required=True, help="path of the datasets, without _text_document.bin")
    parser.add_argument("--tokenizer-type", required=True, choices=list(TOKENIZERS), type=_tokenizer_type)
    parser.add_argument("--tokenizer-model", metavar="FILE", help="file of the tokenizer, or folder of tokenizer.json")
    parser.add_argument("--vocab-size", type=int, help="number of tokens of a NullTokenizer or a TikTokenizer's .json")
    parser.add_argument("--tiktoken-pattern", choices=list(PATTERNS), help="how a TikTokenizer cuts text into words")
    parser.add_argument(
        "--tiktoken-num-special-tokens", type=int, default=1000, help="special ids in front of a TikTokenizer's .json"
    )
    parser.add_argument(
        "--parse-special-tokens",
        action="store_true",
        help="special tokens spelled out in the text become their ids (default: they are text like any other)",
    )
    parser.add_argument("--append-eod", action="store_true", help="end every document with end-of-document")
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenize, of all partitions together")
    parser.add_argument(
        "--partitions",
        type=int,
        default=1,
        help="parts of the input that are read and written at the same time; the dataset is the same",
    )
    parser.add_argument("--log-interval", type=int, default=1000, help="documents between updates of the progress bar")
    for name in MEGATRONS:
        parser.add_argument(name, action=_NotOffered, nargs="*", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in ("workers", "partitions", "log_interval"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {getattr(options, name)}")
    check_input_arguments(parser, options)
    for key in options.json_keys:
        if os.sep in key:
            parser.error(f"--json-keys {key} is part of the dataset's name and holds {os.sep!r}: rename it in the data")
    return options


def _tokenizer(options: argparse.Namespace) -> Tokenizer:
    return build_tokenizer(
        options.tokenizer_type,
        options.tokenizer_model,
        options.vocab_size,
        tiktoken_pattern=options.tiktoken_pattern,
        tiktoken_num_special_tokens=options.tiktoken_num_special_tokens,
        parse_special_tokens=options.parse_special_tokens,
    )


def partitioned(readers: Sequence[Reader], parts: int) -> list[list[Reader]]:
    """The readers in up to ``parts`` groups of about equal size, in order; large files are cut where they can be."""
    total = sum(reader.size for reader in readers)
    if parts == 1 or total == 0:
        return [list(readers)]
    pieces = [one for reader in readers for one in reader.divided(-(-reader.size * parts // total))]
    found: list[list[Reader]] = [[] for _ in range(parts)]
    before = 0
    for one in pieces:
        middle = before + one.size / 2
        found[min(parts - 1, int(middle * parts / total))].append(one)
        before += one.size
    return [group for group in found if group]


def identity(options: argparse.Namespace, plan: Sequence[Sequence[Reader]], tokenizer: Tokenizer) -> str:
    """A name for everything that decides the dataset's bytes: a run with the same one can go on with the work."""
    inputs = []
    for reader in (reader for group in plan for reader in group):
        stat = None if options.dataset else os.stat(reader.name)
        inputs.append([reader.name, reader.size, stat and [stat.st_size, stat.st_mtime_ns]])
    what = {
        "inputs": inputs,
        "partitions": [len(group) for group in plan],
        "dataset": [options.dataset, options.dataset_config, options.dataset_split],
        "keys": options.json_keys,
        "separator": options.document_separator,
        "tokenizer": [tokenizer.fingerprint, options.parse_special_tokens],
        # By the size of the vocabulary, which --vocab-size can change beside the fingerprint.
        "dtype": np.dtype(optimal_dtype(tokenizer.vocab_size)).name,
        "append_eod": options.append_eod,
    }
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]


def write_part(
    options: argparse.Namespace,
    readers: list[Reader],
    part: Part,
    encoder: Encoder,
    workers: int,
    report: Report,
    stop: Stop,
) -> None:
    """Read what is left of a part's input and write its tokens."""
    keys = options.json_keys
    with part:
        if part.progress.is_done:
            return
        source = groups(readers, part.progress.reader, part.progress.records)
        for group, found in encoded(encoder, readers, keys, source, workers):
            if group.problem and options.on_bad_line == "fail":
                raise ValueError(group.problem)
            part.add(group, found)
            report(part.progress.num_documents, group.position, sum(part.progress.tokens.values()))
            stop.check()
        part.finish()


def _part_in_process(
    options: argparse.Namespace,
    readers: list[Reader],
    folder: Path,
    encoder: Encoder,
    workers: int,
    slot: int,
    shared: Any,
) -> None:
    """One partition, in a process of its own."""
    counters, messages, parent, stop = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides, and sends SIGTERM
    stop.on(signal.SIGTERM)  # forked with the object: a signal before this line is noted in it too
    leave_with_parent(parent)

    def report(documents: int, position: int, tokens: int) -> None:
        counters[3 * slot : 3 * slot + 3] = [documents, position, tokens]

    try:
        write_part(options, readers, Part(folder, options.json_keys, encoder.dtype), encoder, workers, report, stop)
    except ValueError as error:
        messages.put(str(error))
        sys.exit(2)
    except OSError as error:
        messages.put(f"{error.filename or folder}: {error.strerror or error}")
        sys.exit(2)


def write_partitions(
    options: argparse.Namespace,
    plan: list[list[Reader]],
    folders: list[Path],
    encoder: Encoder,
    report: Report,
    stop: Stop,
) -> None:
    """All partitions at the same time; the first error ends the others, which keep their work."""
    context: Any = multiprocessing.get_context(start_method())
    shared = context.Array("q", 3 * len(plan), lock=False), context.SimpleQueue(), os.getpid(), stop
    counters, messages, *_ = shared
    workers = max(1, options.workers // len(plan))
    processes = [
        context.Process(target=_part_in_process, args=(options, readers, folder, encoder, workers, slot, shared))
        for slot, (readers, folder) in enumerate(zip(plan, folders, strict=True))
    ]
    try:
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            time.sleep(0.1)
            stop.check()
            report(sum(counters[0::3]), sum(counters[1::3]), sum(counters[2::3]))
            if any(process.exitcode for process in processes):
                break
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        why = "a partition died, perhaps for lack of memory: give fewer --workers or --partitions"
        raise ValueError(why if messages.empty() else messages.get())


class _Bar:
    """The progress on a terminal: bytes read of all, documents and tokens. Nothing in a log file."""

    def __init__(self, total: int, interval: int) -> None:
        from tqdm import tqdm

        self.interval = interval
        self.shown = 0
        self.bar = tqdm(total=total or None, unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False)

    def __call__(self, documents: int, position: int, tokens: int) -> None:
        if documents - self.shown >= self.interval:
            self.shown = documents
            self.bar.set_postfix_str(f"{documents} documents, {tokens} tokens", refresh=False)
            self.bar.update(position - self.bar.n)


def preprocess(options: argparse.Namespace) -> None:
    """Write the datasets; ``ValueError`` and no dataset where something cannot be read."""
    readers = open_inputs(options)
    tokenizer = _tokenizer(options)
    encoder = Encoder(tokenizer, append_eod=options.append_eod, skip_bad=options.on_bad_line == "skip")
    plan = partitioned(readers, options.partitions)
    prefix = Path(options.output_prefix)
    work = prefix.with_name(f"{prefix.name}.partial-{identity(options, plan, tokenizer)}")
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with only_one(work, f"--output-prefix {prefix}"):
            _say_what_is_there(prefix, work)
            done = False
            try:
                progress = _write(options, plan, work, encoder)
                _check_text(options, progress)
                _join(options, plan, work, encoder, progress)
                done = True
            except ValueError:
                done = not _is_worth_keeping(work)
                raise
            finally:
                if done:
                    shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise ValueError(f"{error.filename or options.output_prefix}: {error.strerror or error}") from error


def _say_what_is_there(prefix: Path, work: Path) -> None:
    others = [path for path in prefix.parent.glob(f"{prefix.name}.partial-*") if path != work]
    for path in others:
        print(f"{path} is left from a run with other flags or input: delete it if it is not needed", file=sys.stderr)


def _is_worth_keeping(work: Path) -> bool:
    return sum(path.stat().st_size for path in work.glob("*/*.bin")) >= WORTH_KEEPING


def _write(options: argparse.Namespace, plan: list[list[Reader]], work: Path, encoder: Encoder) -> Progress:
    """Write all parts and return their sum."""
    dtype = encoder.dtype
    folders = [work / f"{number:04d}" for number in range(len(plan))]
    keys = options.json_keys
    for folder in folders:
        found = Part(folder, keys, dtype).progress
        if found.num_documents or found.num_bad:
            print(f"{folder}: going on after {found.num_documents + found.num_bad} documents", file=sys.stderr)
    bar = _Bar(sum(reader.size for group in plan for reader in group), options.log_interval)
    try:
        with stopping() as stop:
            if len(plan) == 1:
                write_part(options, plan[0], Part(folders[0], keys, dtype), encoder, options.workers, bar, stop)
            else:
                write_partitions(options, plan, folders, encoder, bar, stop)
    finally:
        bar.bar.close()
    return _total([Part(folder, keys, dtype).progress for folder in folders], keys)


def _total(parts: list[Progress], keys: Sequence[str]) -> Progress:
    return Progress(
        num_empty=sum(part.num_empty for part in parts),
        num_bad=sum(part.num_bad for part in parts),
        num_documents=sum(part.num_documents for part in parts),
        examples=[example for part in parts for example in part.examples],
        unreadable=[problem for part in parts for problem in part.unreadable],
        tokens={key: sum(part.tokens[key] for part in parts) for key in keys},
    )


def _check_text(options: argparse.Namespace, progress: Progress) -> None:
    skipped = f", and {progress.num_bad} skipped: {progress.examples[0]}" if progress.num_bad else ""
    for problem in progress.unreadable:
        print(f"preprocess_data.py: the rest is missing: {problem}", file=sys.stderr)
    for key, count in progress.tokens.items():
        if count == 0:
            raise ValueError(
                f"{described(options)}: there is no text (key {key}) in {progress.num_documents} documents{skipped}"
            )
    for example in progress.examples[:5]:
        print(f"preprocess_data.py: skipped: {example}", file=sys.stderr)


def _join(
    options: argparse.Namespace, plan: list[list[Reader]], work: Path, encoder: Encoder, progress: Progress
) -> None:
    dtype = encoder.dtype
    parts = [Part(work / f"{number:04d}", options.json_keys, dtype) for number in range(len(plan))]
    record = record_of(
        encoder.tokenizer,
        tokenizer_model=options.tokenizer_model,
        tiktoken_pattern=options.tiktoken_pattern,
        tiktoken_num_special_tokens=options.tiktoken_num_special_tokens,
        append_eod=options.append_eod,
        documents=progress.num_documents,
        empty_documents=progress.num_empty,
        skipped_documents=progress.num_bad,
        unreadable_files=progress.unreadable,
    )
    for key in options.json_keys:
        prefix = f"{options.output_prefix}_{key}_document"
        join([piece(part, key) for part in parts], prefix, dtype, record, work, move=True)
        counts = [f"{progress.num_documents} documents"]
        counts += [f"{progress.num_empty} of them empty"] * (progress.num_empty > 0)
        counts += [f"{progress.num_bad} more skipped"] * (progress.num_bad > 0)
        counts += [f"{len(progress.unreadable)} files not read to the end"] * bool(progress.unreadable)
        print(f"{prefix}.bin: {', '.join(counts)}, {progress.tokens[key]} tokens")


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # --workers says how many processes work
    try:
        preprocess(options)
    except ValueError as error:
        print(f"preprocess_data.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("preprocess_data.py: interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    # A scheduler's SIGTERM ends like Ctrl-C: workers stop, and the progress is noted.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
