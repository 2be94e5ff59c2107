"""Files damaged at random: refused with our own errors, without a hang, within twice the file's size in memory.

FUZZ_EXAMPLES=2000 python -m pytest tests/unit/test_fuzz.py --timeout 0 runs more than the few of the default.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import string
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_hc import checkpoint, cli, cli_options
from megatron_hc.config import flag
from megatron_hc.data import IndexedDatasetWriter
from megatron_hc.data.indexed import IndexedDataset
from megatron_hc.data.tokenizer import build_tokenizer
from megatron_hc.mesh import Mesh

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)
SPARE_BYTES = 300_000
"""What a reader may take for itself, whatever the file."""

NUMBERS = [0, 1, -1, 2**7, 2**15, 2**31 - 1, -(2**31), 2**32, 2**62, 2**63 - 1, -(2**63)]
EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.floats(0, 1), st.integers(0, 7)),
        st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
        st.tuples(st.just("number"), st.floats(0, 1), st.sampled_from(NUMBERS)),
        st.tuples(st.just("drop"), st.floats(0, 1), st.integers(1, 40)),
        st.tuples(st.just("repeat"), st.floats(0, 1), st.integers(1, 40)),
        st.tuples(st.just("junk"), st.floats(0, 1), st.integers(0, 2**32)),
    ),
    min_size=1,
    max_size=6,
)


def edited(content: bytes, edits: list[tuple[str, float, int]]) -> bytes:
    data = bytearray(content)
    for kind, where, value in edits:
        at = min(int(where * len(data)), max(len(data) - 1, 0))
        if kind == "cut":
            del data[at:]
        elif kind == "flip" and data:
            data[at] ^= 1 << value
        elif kind == "number":
            data[at : at + 8] = value.to_bytes(8, "little", signed=value < 0)
        elif kind == "drop":
            del data[at : at + value]
        elif kind == "repeat":
            data[at:at] = data[at : at + value]
        elif kind == "junk":
            data[at:at] = random.Random(value).randbytes(12)
    return bytes(data)


def within_memory(size: int, action: Callable[[], Any], refused: type[Exception] = ValueError) -> Any:
    """The action's result, None where it refuses; never another error, never more than twice ``size`` in memory."""
    began = time.process_time()
    tracemalloc.start()
    try:
        return action()
    except refused as error:
        assert str(error) and len(str(error)) < 4000 + 3 * size, "a sentence for people"
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert time.process_time() - began < 20, "as good as a hang"
        assert peak <= 2 * size + SPARE_BYTES, f"{peak} bytes for a file of {size}"


@pytest.fixture(scope="module", autouse=True)
def libraries_are_loaded(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What they take is not the file's."""
    file = tmp_path_factory.mktemp("first") / "run.yaml"
    for text in ("lr: 1e-3", "lr: [1, 2", "lr: {a: 1}", "lx: 1"):
        file.write_text(text)
        with contextlib.suppress(cli.UsageError):
            cli.parse([*REQUIRED, "--yaml-cfg", str(file)])


# ---- .idx ----


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    prefix = str(tmp_path_factory.mktemp("dataset") / "data")
    draw = random.Random(0)
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for _ in range(3000):
            writer.add_document([draw.randrange(1000) for _ in range(draw.randrange(6))])
    return Path(prefix + ".idx").read_bytes(), Path(prefix + ".bin").read_bytes()


@fuzz
@given(edits=EDITS, head=st.booleans())
def test_index_of_a_dataset(edits: list, head: bool, dataset: tuple[bytes, bytes]) -> None:
    index, tokens = dataset
    # Edits of the whole file hardly ever meet the 34 bytes that count.
    index = edited(index[:34], edits) + index[34:] if head else edited(index, edits)
    with tempfile.TemporaryDirectory() as folder:
        prefix = f"{folder}/data"
        Path(prefix + ".idx").write_bytes(index)
        Path(prefix + ".bin").write_bytes(tokens)

        def read() -> None:
            found = IndexedDataset(prefix)
            for number in (0, len(found) // 2, len(found) - 1):
                if len(found):
                    assert len(found[number]) <= len(tokens)

        within_memory(len(index) + len(tokens), read)


# ---- flags and YAML ----

REQUIRED = "--num-layers 2 --hidden-size 8 --num-attention-heads 2 --seq-length 8 --micro-batch-size 1".split()
NAMES = [flag(name) for name in cli_options.options()]
WORDS = st.one_of(
    st.sampled_from(NAMES),
    st.sampled_from(
        ["--", "-", "=", "--no-bf16", "--yaml-cfg", "nan", "inf", "-1", "1e400", "null", "[]", "0x10", "١"]
    ),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=12),
    st.tuples(st.sampled_from(NAMES), st.text(max_size=8)).map("=".join),
)


@fuzz
@given(words=st.lists(WORDS, max_size=8))
def test_command_line(words: list[str]) -> None:
    if any(word in ("--help", "-h") or word.startswith(("--help=", "-h=")) for word in words):
        return

    def parse() -> None:
        config = cli.parse([*REQUIRED, *words]).config
        within_memory(10**6, config.validate)

    within_memory(10**6, parse, cli.UsageError)


YAML = """
num-layers: 4
model: {hidden_size: 64, num-attention-heads: 4}
seq-length: 128
data_path: [0.5, a, 0.5, "b c"]
micro-batch-size: 8
lr: 3e-4
bf16: true
split: 90,10,0
recompute-modules: [residual]
ckpt-step: null
train_iters: 100  # and a comment
"""
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.dates())
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
)


def parse_yaml(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_bytes(content)
        # PyYAML's nodes and marks take some hundred bytes for a character.
        within_memory(400 * len(content), lambda: cli.parse([*REQUIRED, "--yaml-cfg", str(file)]), cli.UsageError)


@fuzz
@given(edits=EDITS)
def test_yaml_text(edits: list) -> None:
    parse_yaml(edited(YAML.encode(), edits))


@fuzz
@given(values=st.dictionaries(st.sampled_from([*cli_options.options(), "model", "moe", "x"]), VALUES, max_size=4))
def test_yaml_values(values: dict[str, Any]) -> None:
    import yaml

    parse_yaml(yaml.safe_dump(values).encode())


BILLION_LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{earlier}'] * 9)}]\n" for earlier, name in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        BILLION_LAUGHS,
        "lr: " + "[" * 5000,
        "lr: " + "{a: " * 3000 + "1" + "}" * 3000,
        "lr: " + "9" * 5000,
        "lr: 2001-99-99",
        "lr: !!python/object/apply:os.system ['touch hacked']",
        "? [1, 2]\n: 3",
        "<<: [1]\nlr: 1",
        "lr: !!binary '\xff'",
        "lr: 1:99999999999999999:1",
    ],
    ids=range(10),
)
def test_yaml_that_is_meant_badly(text: str) -> None:
    parse_yaml(text.encode())
    assert not Path("hacked").exists()


# ---- checkpoints ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a small checkpoint."""
    root = tmp_path_factory.mktemp("checkpoint")
    tensors = {"model.w": torch.randn(8, 4), "model.b": torch.ones(3, dtype=torch.int64), "optimizer.m": torch.ones(5)}
    arguments = {"hidden_size": {"value": 64, "origin": "command line"}}
    folder = checkpoint.save(root, 7, tensors, {"iteration": 7}, arguments, mesh=Mesh())
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def load(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "run"
        folder = root / "iter_0000007"
        folder.mkdir(parents=True)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        outside = sorted(path for path in Path(name).rglob("*") if not path.is_relative_to(folder))

        def read() -> None:
            found = checkpoint.find(root)
            tensors = {"model.w": torch.zeros(8, 4), "model.b": torch.zeros(3, dtype=torch.int64)}
            checkpoint.check(found, tensors)
            checkpoint.load_tensor_shapes(found)
            checkpoint.read_state(found)
            checkpoint.read_arguments(found)
            checkpoint.load(found, tensors)

        within_memory(sum(map(len, files.values())), read)
        assert sorted(path for path in Path(name).rglob("*") if not path.is_relative_to(folder)) == outside


@fuzz
@given(edits=EDITS, which=st.integers(0, 99))
def test_files_of_a_checkpoint(edits: list, which: int, saved: dict[str, bytes]) -> None:
    name = sorted(saved)[which % len(saved)]
    content = edited(saved[name], edits)
    files = saved | {name: content}
    load(files)
    # The same with sizes and checksums that agree, as another program may write them.
    try:
        manifest = json.loads(files["checkpoint.json"])
        manifest = {key: value for key, value in manifest.items() if key not in ("self", "crc32")}
        manifest["files"] |= {name: len(content)} if name != "checkpoint.json" else {}
    except (ValueError, AttributeError, TypeError, KeyError):
        return
    load(files | {"checkpoint.json": json.dumps(manifest).encode()})


@fuzz
@given(data=st.data())
def test_values_in_the_index_of_a_checkpoint(data: st.DataObject, saved: dict[str, bytes]) -> None:
    """One value somewhere in checkpoint.json is another one."""
    manifest = json.loads(saved["checkpoint.json"])
    del manifest["self"], manifest["crc32"]
    place: Any = manifest
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if isinstance(place[key], dict | list) and place[key] and data.draw(st.integers(0, 3)):
            place = place[key]
        else:
            break
    odd = st.sampled_from(
        [-1, 0, 3, 2**40, 1.5, True, None, "", "../x", "/etc/passwd", "float32", [], [[]], {}, [2, 3]]
    )
    if isinstance(place, dict) and data.draw(st.booleans()):
        place[data.draw(st.sampled_from(["../../x", "/etc/passwd", "x", ""]))] = place.pop(key)
    else:
        place[key] = data.draw(odd)
    load(saved | {"checkpoint.json": json.dumps(manifest).encode()})


# ---- tokenizers ----


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("\n".join(string.ascii_lowercase[n % 9 :] for n in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "t"), vocab_size=30, minloglevel=2
    )
    return (folder / "t.model").read_bytes()


def tokenize(kind: str, name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_bytes(content)

        def use() -> None:
            tokenizer = build_tokenizer(kind, str(file))
            ids = tokenizer.tokenize("abc def")
            assert all(0 <= index < tokenizer.vocab_size for index in ids)
            tokenizer.detokenize(ids)

        within_memory(20 * len(content), use)


@fuzz
@given(edits=EDITS)
def test_sentencepiece_model(edits: list, sentencepiece_model: bytes) -> None:
    tokenize("SentencePieceTokenizer", "t.model", edited(sentencepiece_model, edits))


TOKENIZER_JSON = {
    "version": "1.0",
    "added_tokens": [{"id": 4, "content": "<eos>", "special": True, "single_word": False, "lstrip": False}],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "<eos>": 4}, "merges": [["a", "b"]]},
}


@fuzz
@given(edits=EDITS)
def test_tokenizer_json(edits: list) -> None:
    pytest.importorskip("tokenizers")
    tokenize("HuggingFaceTokenizer", "tokenizer.json", edited(json.dumps(TOKENIZER_JSON).encode(), edits))
