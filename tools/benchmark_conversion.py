"""Peak memory and time of converting a large random checkpoint, there and back.

python tools/benchmark_conversion.py --folder DIR [--gigabytes 1.5] [--shard-gigabytes 0.4]

Writes a Llama of that size in safetensors shards under --folder, converts it to a checkpoint of ours and back in
processes of their own, compares all tensors bit by bit, and deletes what it wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch

from megatron_hc.convert.families import arguments_of
from megatron_hc.convert.hf import training_config
from megatron_hc.convert.names import NAMES
from megatron_hc.convert.pieces import all_pieces
from megatron_hc.convert.shards import ShardedFolder, ShardWriter, Spec

TOOL = Path(__file__).with_name("convert_checkpoint.py")
LAYER_GIGABYTES = 0.0514
"""fp32 numbers of one layer of the model below."""
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 1024, "num_attention_heads": 16,
    "num_key_value_heads": 16, "intermediate_size": 2816, "vocab_size": 32000, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip


def write_random(folder: Path, gigabytes: float, shard_gigabytes: float) -> None:
    """A folder of random tensors, each of its own numbers."""
    folder.mkdir(parents=True)
    layers = max(round((gigabytes - 2 * 32000 * 1024 * 4e-9) / LAYER_GIGABYTES), 1)
    content = CONFIG | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(content))
    arguments, vocab_size = arguments_of(content)
    model = training_config(arguments, vocab_size, None, folder, None).model
    shapes = [item for piece in all_pieces(model, vocab_size, NAMES["llama"]) for item in piece.theirs]
    generator = torch.Generator().manual_seed(1)
    with ShardWriter(folder, [{n: Spec(s, torch.float32)} for n, s in shapes], int(shard_gigabytes * 1e9)) as writer:
        for name, shape in shapes:
            writer.write(name, torch.randn(shape, generator=generator))
    writer.write_index()


def run(*argv: str) -> tuple[float, float]:
    """The converter in a process of its own -> (seconds, peak resident gigabytes)."""
    started = time.monotonic()
    process = os.posix_spawn(sys.executable, [sys.executable, str(TOOL), *argv], os.environ)
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"convert_checkpoint.py {' '.join(argv)} failed")
    return time.monotonic() - started, usage.ru_maxrss * 1024 / 1e9


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--folder", required=True, help="an empty or new folder with room for three checkpoints")
    parser.add_argument("--gigabytes", type=float, default=1.5, help="size of the checkpoint (default: 1.5)")
    parser.add_argument("--shard-gigabytes", type=float, default=0.4, help="size of one file (default: 0.4)")
    options = parser.parse_args(argv)
    root = Path(options.folder)
    hf, ours, back = root / "hf", root / "ours", root / "back"
    try:
        write_random(hf, options.gigabytes, options.shard_gigabytes)
        files = sorted(hf.glob("*.safetensors"))
        sizes = [file.stat().st_size / 1e9 for file in files]
        print(f"{sum(sizes):.2f} GB in {len(files)} files, the largest {max(sizes):.2f} GB")
        shard = ["--max-shard-size", str(options.shard_gigabytes)]
        there = run("--from", "hf", "--to", "megatron-hc", "--load", str(hf), "--save", str(ours), *shard)
        print(f"hf -> megatron-hc: {there[0]:.1f} s, peak {there[1]:.2f} GB")
        again = run("--from", "megatron-hc", "--to", "hf", "--load", str(ours), "--save", str(back), *shard)
        print(f"megatron-hc -> hf: {again[0]:.1f} s, peak {again[1]:.2f} GB")
        a, b = ShardedFolder(hf), ShardedFolder(back)
        same = a.specs == b.specs and all(a.read(name).equal(b.read(name)) for name in a.specs)
        print(f"all tensors bit-identical after both: {same}")
    finally:
        for folder in (hf, ours, back):
            shutil.rmtree(folder, ignore_errors=True)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
