"""Train a sentencepiece tokenizer on text files: PREFIX.model and PREFIX.vocab.

    python tools/train_tokenizer.py --input corpus.txt --output-prefix tokenizer --vocab-size 8192

The tokenizer gives back every text exactly: spaces, line breaks and tabs survive, and what is not in the vocabulary is
spelt in bytes. The same input, flags and sentencepiece version give the same file.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_hc.data.inputs import add_input_arguments, check_input_arguments, described, open_inputs
from megatron_hc.data.streams import Unreadable
from megatron_hc.outputs import replace_file

LONGEST_LINE = 4096  # characters; the trainer would leave out longer lines, so they are cut


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_input_arguments(parser)
    parser.add_argument("--output-prefix", required=True, help="path of the tokenizer, without .model")
    parser.add_argument("--vocab-size", type=int, default=8192, help="number of tokens, all included")
    parser.add_argument(
        "--soft-vocab-limit", action="store_true", help="take fewer tokens where the text has not enough for so many"
    )
    parser.add_argument("--model-type", choices=["bpe", "unigram"], default="bpe")
    parser.add_argument("--character-coverage", type=float, default=0.9995, help="share of characters with own tokens")
    parser.add_argument("--sample-lines", type=int, default=200_000, help="train on this many random lines (0: on all)")
    parser.add_argument("--seed", type=int, default=1234, help="seed of the choice of lines")
    parser.add_argument("--threads", type=int, default=1, help="threads of the trainer (the model remembers them)")
    options = parser.parse_args(arguments)
    for name in ("vocab_size", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {getattr(options, name)}")
    if options.sample_lines < 0:
        parser.error(f"--sample-lines must not be negative, not {options.sample_lines}")
    if not 0.9 <= options.character_coverage <= 1:
        parser.error(f"--character-coverage must be in 0.9 .. 1, not {options.character_coverage}")
    check_input_arguments(parser, options)
    return options


def lines(options: argparse.Namespace) -> Iterator[str]:
    """All lines of all inputs, long ones cut. What cannot be read is refused, or with --on-bad-line skip left out."""
    bad = 0
    for reader in open_inputs(options):
        try:
            for record in reader.records():
                try:
                    texts = reader.texts(record)
                except ValueError:
                    if options.on_bad_line == "fail":
                        raise
                    bad += 1
                    continue
                for line in (line for parts in texts.values() for part in parts for line in part.split("\n") if line):
                    # The trainer ends a sentence at NUL and cannot read lone surrogates.
                    line = line.replace("\0", "").encode(errors="ignore").decode()
                    yield from (line[start : start + LONGEST_LINE] for start in range(0, len(line), LONGEST_LINE))
        except Unreadable as error:
            if options.on_bad_line == "fail":
                raise
            print(f"train_tokenizer.py: the rest is missing: {error}", file=sys.stderr)
    if bad:
        print(f"train_tokenizer.py: {bad} documents that cannot be read are skipped", file=sys.stderr)


def sample(options: argparse.Namespace) -> list[str]:
    """Every line, or ``--sample-lines`` of them, each equally likely (reservoir sampling)."""
    chosen: list[str] = []
    generator = random.Random(options.seed)
    for number, line in enumerate(lines(options)):
        if not options.sample_lines or number < options.sample_lines:
            chosen.append(line)
        elif (place := generator.randrange(number + 1)) < options.sample_lines:
            chosen[place] = line
    return chosen


def _printed(piece: str) -> str:
    return piece.replace("\n", "\\n").replace("\t", "\\t")


def train(options: argparse.Namespace) -> None:
    """Write the model; ``ValueError`` where it cannot be trained."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    texts = sample(options)
    if not texts:
        raise ValueError(f"{described(options)}: there is no text")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=options.vocab_size,
            model_type=options.model_type,
            character_coverage=options.character_coverage,
            num_threads=options.threads,
            byte_fallback=True,
            hard_vocab_limit=not options.soft_vocab_limit,
            # The text as it is: no Unicode normalisation, no added or removed spaces.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # Indentation of code as single tokens; numbers digit by digit.
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n", "\t"],
            unk_id=0,
            eos_id=1,  # end-of-document
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=4 * LONGEST_LINE,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip()
        raise ValueError(
            f"--vocab-size {options.vocab_size}: sentencepiece cannot train on this text ({reason})"
        ) from error
    processor = SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [
        f"{_printed(processor.id_to_piece(i))}\t{processor.get_score(i):g}\n" for i in range(processor.get_piece_size())
    ]
    for suffix, content in ((".vocab", "".join(pieces).encode()), (".model", model.getvalue())):
        file = Path(f"{options.output_prefix}{suffix}")
        replace_file(file, lambda beside, content=content: beside.write_bytes(content))  # type: ignore[misc]
    print(f"{options.output_prefix}.model: {len(pieces)} tokens from {len(texts)} lines")


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        train(options)
    except ValueError as error:
        print(f"train_tokenizer.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_tokenizer.py: interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
