"""Continue prompts with a trained model, in one process or, under torchrun, in several.

python tools/generate.py --load DIR --prompt TEXT [TEXT ...] --max-new-tokens N
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hc.inference.options import add_model_arguments, load_with
from megatron_hc.launch import one_voice, place_of

if TYPE_CHECKING:
    from megatron_hc.data.tokenizer import Tokenizer
    from megatron_hc.inference import Engine, Request, Written
    from megatron_hc.model.gpt import GPT


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add_model_arguments(parser)
    parser.add_argument("--prompt", nargs="+", default=[], help="texts to continue, all at once")
    parser.add_argument("--prompt-file", help="more of them: a JSON string per line")
    parser.add_argument("--output", metavar="FILE", help="write a JSON object per prompt here instead of showing text")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="tokens to write at most (default: 100)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the most likely token (default: 1)")
    parser.add_argument("--top-k", type=int, default=0, help="choose among the k most likely tokens (default: all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="choose among the most likely tokens that hold p")
    parser.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="end before any of these")
    parser.add_argument("--seed", type=int, default=1234, help="seed of the first text, one more for each (1234)")
    parser.add_argument("--batch-size", type=int, default=16, help="texts that are written at a time (default: 16)")
    parser.add_argument("--no-kv-cache", action="store_true", help="read the whole text at every token, for checks")
    return parser.parse_args(argv)


def prompts_of(arguments: argparse.Namespace) -> list[str]:
    prompts = list(arguments.prompt)
    if arguments.prompt_file is not None:
        try:
            # Not splitlines: U+2028 and others that it takes for ends of lines may stand in a JSON string.
            lines = Path(arguments.prompt_file).read_text(encoding="utf-8").split("\n")
            prompts += [json.loads(line) for line in lines if line.strip()]
        except (OSError, ValueError) as error:
            raise ValueError(f"--prompt-file {arguments.prompt_file} cannot be read: {error}") from error
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"--prompt-file {arguments.prompt_file} must have a JSON string on every line")
    if not prompts:
        raise ValueError("no prompt: give --prompt TEXT or --prompt-file FILE")
    if "" in arguments.stop:
        raise ValueError("--stop needs text: an empty string stops at once")
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, not {arguments.batch_size}")
    return prompts


def check_output(output: str | None) -> None:
    """Refuse a file that could not be written, before texts are."""
    if output is None or place_of().rank > 0:  # the first process writes it
        return
    folder = Path(output).absolute().parent
    if Path(output).is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(f"--output {output} cannot be written: name a file in a folder that is there and is yours")


def show_streaming(engine: Engine, prompts: Sequence[str], requests: Sequence[Request]) -> None:
    """Show texts one after the other as they come, though all are written at once."""
    texts = [engine.add(request) for request in requests]
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        print(("\n---\n" if number else "") + prompt, end="", flush=True)
        shown = 0
        while True:
            print(text.text[shown:], end="", flush=True)
            shown = len(text.text)
            if text.finish is not None:
                break
            engine.step()
    print()


def write_without_cache(model: GPT, tokenizer: Tokenizer, requests: Sequence[Request]) -> list[Written]:
    """The same texts, one after the other, each token from the whole text."""
    from megatron_hc.inference import TextWriter, Written
    from megatron_hc.model.generate import generate

    texts = []
    for request in requests:
        writer, text, tokens = TextWriter(tokenizer, request.prompt, request.stop), "", []
        new = generate(
            model, request.prompt, request.max_new_tokens, request.sampling, eod=tokenizer.eod, use_cache=False
        )
        for token in new:
            tokens.append(token)
            text += writer.add(token)
            if writer.is_stopped:
                break
        is_full = len(tokens) == request.max_new_tokens and not writer.is_stopped
        texts.append(Written(text + writer.finish(), tokens, "length" if is_full else "stop"))
    return texts


def write_lines(path: Path, prompts: Sequence[str], texts: Sequence[Written]) -> None:
    """One JSON object per prompt."""
    beside = path.with_name(path.name + ".tmp")
    lines = [
        json.dumps({"prompt": prompt, "text": text.text, "finish_reason": text.finish, "num_tokens": len(text.tokens)})
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    beside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    os.replace(beside, path)


def requests_of(arguments: argparse.Namespace, prompts: Sequence[str], tokenizer: Tokenizer) -> list[Request]:
    from megatron_hc.inference import Request
    from megatron_hc.model.generate import Sampling

    return [
        Request(
            prompt=tuple(tokenizer.tokenize(prompt)),
            max_new_tokens=arguments.max_new_tokens,
            sampling=Sampling(
                temperature=arguments.temperature,
                top_k=arguments.top_k,
                top_p=arguments.top_p,
                seed=arguments.seed + number,
            ),
            stop=tuple(arguments.stop),
        )
        for number, prompt in enumerate(prompts)
    ]


def run(arguments: argparse.Namespace, prompts: list[str]) -> None:
    """Load, write, show."""
    from megatron_hc.inference import Decoder, Engine, write_texts
    from megatron_hc.mesh import leave_groups
    from megatron_hc.model.generate import check_room

    model, tokenizer, config, _, mesh = load_with(arguments)
    requests = requests_of(arguments, prompts, tokenizer)
    for request in requests:
        request.sampling.validate()
        check_room(len(request.prompt), request.max_new_tokens, config.model.max_positions)
    if not mesh.is_first:
        sys.stdout = open(os.devnull, "w")
    is_shown = arguments.output is None
    if arguments.no_kv_cache:
        if mesh.world_size > 1:
            raise ValueError("--no-kv-cache is for one process")
        texts = write_without_cache(model, tokenizer, requests)
    else:
        longest = max(len(request.prompt) for request in requests) + arguments.max_new_tokens
        rows = min(arguments.batch_size, len(requests))
        engine = Engine(Decoder(model, config, mesh, rows=rows, max_length=longest), tokenizer)
        if is_shown and mesh.size("dp") == 1:
            show_streaming(engine, prompts, requests)
            is_shown = False
        else:
            texts = write_texts(engine, requests)
    if is_shown:
        print("\n---\n".join(prompt + text.text for prompt, text in zip(prompts, texts, strict=True)))
    elif arguments.output is not None and mesh.is_first:
        write_lines(Path(arguments.output), prompts, texts)
    leave_groups()


def main(argv: list[str]) -> int:
    arguments = parse_arguments(argv)
    with one_voice("generate.py"):
        check_output(arguments.output)
        run(arguments, prompts_of(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
