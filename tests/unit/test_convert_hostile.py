"""What is broken, or says what is not so, ends in one sentence and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from convert_models import saved, tensors_of, write_checkpoint
from helpers import small_config
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import convert_checkpoint  # noqa: E402
import retrofit_residual  # noqa: E402

from megatron_hc.convert import logits  # noqa: E402
from megatron_hc.convert.checkpoints import Folder, save_weights  # noqa: E402
from megatron_hc.convert.families import family_of  # noqa: E402
from megatron_hc.convert.names import NAMES  # noqa: E402
from megatron_hc.convert.shards import FileWriter, Spec  # noqa: E402

pytest.importorskip("transformers")
TO_OURS, TO_HF = ["--from", "hf", "--to", "megatron-hc"], ["--from", "megatron-hc", "--to", "hf"]


def tool(*argv: object) -> int:
    try:
        return convert_checkpoint.main([str(word) for word in argv])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    saved("qwen3", folder / "hf", max_shard_size="30KB")
    saved("mixtral", folder / "moe")
    write_checkpoint(folder / "ours", small_config({"residual_connection": "hyper"}))
    return folder


@pytest.fixture
def hf(good: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    copy = tmp_path / "hf"
    copy.mkdir()
    for file in (good / "hf").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def change(file: Path, **values: object) -> None:
    content = json.loads(file.read_text())
    content.update(values)
    file.write_text(json.dumps({name: value for name, value in content.items() if value != "delete"}))


def change_index(folder: Path, name: str, file: str) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][name] = file
    index.write_text(json.dumps(content))


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def truncated(folder: Path) -> None:
    file = shard(folder)
    file.write_bytes(file.read_bytes()[:-100])


def with_a_wrong_header(folder: Path) -> None:
    shard(folder).write_bytes(struct.pack("<Q", 1 << 40) + b"{}")


def with_a_pickle(folder: Path) -> None:
    shard(folder).write_bytes(pickle.dumps({"a": 1}))


def with_a_wrong_shape(folder: Path) -> None:
    tensors = tensors_of(folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, folder / "model.safetensors")


def with_integers(folder: Path) -> None:
    with_a_wrong_shape(folder)
    tensors = tensors_of(folder)
    tensors["model.norm.weight"] = torch.ones(48, dtype=torch.int8)
    save_file(tensors, folder / "model.safetensors")


def without_a_tensor(folder: Path) -> None:
    with_integers(folder)
    tensors = tensors_of(folder)
    del tensors["model.norm.weight"]
    tensors["model.extra.weight"] = torch.ones(3)
    save_file(tensors, folder / "model.safetensors")


CONFIG = "config.json"
EMBEDDING = "model.embed_tokens.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncated, "cannot be read as safetensors"),
    "header": (with_a_wrong_header, "cannot be read as safetensors"),
    "pickle": (with_a_pickle, "cannot be read as safetensors"),
    "shape": (with_a_wrong_shape, "model.norm.weight has shape [7] and config.json gives [48]"),
    "integers": (with_integers, "quantized checkpoints are not read"),
    "names": (without_a_tensor, "1 tensors missing: model.norm.weight; 1 tensors unexpected: model.extra.weight"),
    "up": (lambda f: change_index(f, EMBEDDING, "../hf/x.safetensors"), "is not a file of that folder"),
    "absolute": (lambda f: change_index(f, EMBEDDING, "/etc/passwd"), "is not a file of that folder"),
    "dots": (lambda f: change_index(f, EMBEDDING, ".."), "is not a file of that folder"),
    "lost shard": (lambda f: shard(f).unlink(), "which is missing"),
    "another shard": (lambda f: change_index(f, EMBEDDING, shard(f).name), "which does not have it"),
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), "neither model.safetensors nor"),
    "bad index": (lambda f: (f / "model.safetensors.index.json").write_text("[1]"), "must hold a JSON object"),
    "empty index": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
    "no config": (lambda f: (f / CONFIG).unlink(), "config.json cannot be read"),
    "bad config": (lambda f: (f / CONFIG).write_text("{"), "config.json cannot be read"),
    "layers": (lambda f: change(f / CONFIG, num_hidden_layers=5), "tensors missing: model.layers.3"),
    "fewer layers": (lambda f: change(f / CONFIG, num_hidden_layers=2), "tensors unexpected: model.layers.2"),
    "heads": (lambda f: change(f / CONFIG, num_attention_heads=7), "cannot be a model here"),
    "kv heads": (lambda f: change(f / CONFIG, num_key_value_heads=6), "k_proj.weight has shape [60, 48]"),
    "text": (lambda f: change(f / CONFIG, hidden_size="wide"), "cannot be a model here"),
    "missing": (lambda f: change(f / CONFIG, intermediate_size="delete"), "lacks 'intermediate_size'"),
    "vocabulary": (lambda f: change(f / CONFIG, vocab_size=0), "vocab_size must be positive"),
    "untied": (lambda f: change(f / CONFIG, tie_word_embeddings=False), "missing: lm_head.weight"),
    "windows": (lambda f: change(f / CONFIG, use_sliding_window=True), "use_sliding_window True of qwen3 is not"),
    "activation": (lambda f: change(f / CONFIG, hidden_act="relu"), "hidden_act 'relu' of qwen3 is not offered"),
    "layer types": (lambda f: change(f / CONFIG, layer_types=["sliding_attention"]), "layer_types sliding_attention"),
    "rope": (lambda f: change(f / CONFIG, rope_parameters={"rope_type": "yarn"}), "rope type 'yarn'"),
    "llama3": (
        lambda f: change(f / CONFIG, rope_parameters={"rope_type": "llama3", "factor": 8, "low_freq_factor": 2}),
        "low_freq_factor 2 of rope type llama3 must be 1",
    ),
    "deepseek": (lambda f: change(f / CONFIG, model_type="deepseek_v3"), "it has latent attention"),
    "unknown": (lambda f: change(f / CONFIG, model_type="bert"), "the families are llama"),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "is not a tokenizer.json"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders(name: str, hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = BROKEN[name]
    damage(hf)
    assert tool(*TO_OURS, "--load", hf, "--save", tmp_path / "new") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not list((tmp_path / "new").glob("iter_*")) if (tmp_path / "new").exists() else True


def test_wrong_flags(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*argv: object) -> str:
        assert tool(*argv, "--save", tmp_path / "new") == 2
        return capsys.readouterr().err

    ours = ["--load", good / "ours"]
    assert "cannot hold this model: --residual-connection hyper" in error(*TO_HF, *ours, "--family", "llama")
    assert "must be custom or one of llama" in error(*TO_HF, *ours, "--family", "lama")
    assert "--max-shard-size must be positive" in error(*TO_HF, *ours, "--max-shard-size", 0)
    assert "--ckpt-step 4 is not in" in error(*TO_HF, *ours, "--ckpt-step", 4)
    assert "is not a folder" in error(*TO_HF, "--load", tmp_path / "nothing")
    assert "is not offered" in error("--from", "hf", "--to", "hf", *ours)
    assert "is not a folder" in error(*TO_OURS, "--load", tmp_path / "nothing")
    assert "must be at least --seq-length" in error(*TO_OURS, "--load", good / "hf", "--seq-length", 1000)
    assert "--vocab-size would do nothing from hf" in error(*TO_OURS, "--load", good / "hf", "--vocab-size", 100)
    assert "--family would do nothing" in error(*TO_OURS, "--load", good / "hf", "--family", "llama")
    assert "--seq-length would do nothing" in error(*TO_HF, *ours, "--seq-length", 8)
    one = ["--load", next((good / "ours").glob("iter_*"))]
    assert "--ckpt-step 4 does not go with --load" in error(*TO_HF, *one, "--ckpt-step", 4)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert tool(*TO_HF, *ours, "--save", tmp_path / "full") == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.tmp").exists()


LIES: tuple[tuple[str, object, str], ...] = (
    ("num_layers", 4, "tensors missing: layers.3"),
    ("ffn_hidden_size", 40, "mlp.linear_fc1.weight is [48, 16] instead of [80, 16]"),
    ("no_such_flag", 1, "not a setting of this version"),
)


@pytest.mark.parametrize("name, value, message", LIES)
def test_a_checkpoint_of_ours_that_lies(
    name: str, value: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its arguments and its tensors belong to different models."""
    write_checkpoint(tmp_path / "ours", small_config(), **{name: value})
    assert tool(*TO_HF, "--load", tmp_path / "ours", "--save", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn])
def test_tensors_of_ours_that_are_no_numbers_of_a_model(
    dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "ours", small_config())
    source = Folder(str(tmp_path / "ours"))
    tensors = {name: source.read(name) for name in source.specs}
    tensors["model.embedding.weight"] = tensors["model.embedding.weight"].to(dtype)
    specs = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    arguments = json.loads((source.path / "arguments.json").read_text())
    save_weights(str(tmp_path / "odd"), 0, specs, tensors.__getitem__, source.state, arguments)
    assert tool(*TO_HF, "--load", tmp_path / "odd", "--save", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"1 tensors of a wrong dtype: embedding.weight is {dtype}" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()


def test_checkpoints_that_are_there_stay(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A conversion is of iteration 0, or of the source's: it would take the place of one, and be the latest."""
    write_checkpoint(tmp_path / "ours", small_config())
    before = {path: path.read_bytes() for path in (tmp_path / "ours").rglob("*") if path.is_file()}
    argv = ["--load", str(tmp_path / "ours"), "--save", str(tmp_path / "ours"), "--residual-connection", "hyper"]
    assert tool(*TO_OURS, "--load", good / "hf", "--save", tmp_path / "ours") == 2
    with pytest.raises(SystemExit):
        retrofit_residual.main(argv)
    assert capsys.readouterr().err.count("ours holds checkpoints already, the latest of iteration 0") == 2
    assert {path: path.read_bytes() for path in (tmp_path / "ours").rglob("*") if path.is_file()} == before


def test_only_a_conversions_own_left_over_is_deleted(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--to hf writes to NAME.tmp first, which may be somebody's."""
    argv = [*TO_HF, "--load", good / "ours", "--save", tmp_path / "out"]
    theirs = tmp_path / "out.tmp" / "data"
    theirs.parent.mkdir()
    theirs.touch()
    assert tool(*argv) == 2
    error = capsys.readouterr().err
    assert f"{theirs.parent} is in the way" in error and error.count("\n") == 1 and theirs.exists()
    theirs.unlink()
    (tmp_path / "elsewhere").mkdir()
    theirs.parent.rmdir()
    theirs.parent.symlink_to(tmp_path / "elsewhere")
    assert tool(*argv) == 2 and "is in the way" in capsys.readouterr().err and theirs.parent.is_symlink()
    theirs.parent.unlink()
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *_, **__: None)
        killed.setattr(FileWriter, "write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tool(*argv)
    assert list(theirs.parent.glob("*.safetensors"))
    assert tool(*argv) == 0
    assert not theirs.parent.exists() and not [path for path in (tmp_path / "out").iterdir() if path.name[0] == "."]


def test_a_model_that_is_not_the_same_is_not_kept(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody takes the output of a --check-logits that failed for a good one."""
    monkeypatch.setattr(logits, "TOLERANCE", -1.0)
    hf, ours = tmp_path / "hf", tmp_path / "ours"
    assert tool(*TO_HF, "--load", good / "ours", "--save", hf, "--check-logits") == 2
    assert not hf.exists() and not (tmp_path / "hf.tmp").exists()
    assert tool(*TO_OURS, "--load", good / "moe", "--save", ours, "--check-logits") == 2
    assert not list(ours.iterdir())
    flags = ["--load", str(good / "moe"), "--save", str(ours), "--value-residual", "dense", "--check-logits"]
    with pytest.raises(SystemExit):
        retrofit_residual.main(flags)
    assert not list(ours.iterdir())
    assert capsys.readouterr().err.count("what was converted is not kept") == 3
    assert tool(*TO_OURS, "--load", good / "moe", "--save", ours) == 0


def test_a_damaged_file_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files are as long as they should be, which is all that is looked at before they are read."""
    write_checkpoint(tmp_path / "ours", small_config())
    (file,) = (tmp_path / "ours").glob("iter_*/*.safetensors")
    content = file.read_bytes()
    for damaged in (struct.pack("<Q", 1 << 40) + content[8:], content[:20] + b"x" * 40 + content[60:]):
        file.write_bytes(damaged)
        assert tool(*TO_HF, "--load", tmp_path / "ours", "--save", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert "is damaged, model.embedding.weight cannot be read" in error and error.count("\n") == 1, error
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()


def test_a_full_disk(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FileWriter, "write", write)
    assert tool(*TO_HF, "--load", good / "ours", "--save", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "could not be written ([Errno 28] No space left on device): free space" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()


def test_a_retrofit_where_nothing_can_be_written(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a folder of Hugging Face, which is converted beside --save first."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path / ".out.x"))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(SystemExit):
        retrofit_residual.main(["--load", str(good / "hf"), "--save", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert "out: nothing can be written beside it (Read-only file system): choose another folder" in error
    assert error.count("\n") == 1


GPT2 = {
    "normalization": "LayerNorm", "position_embedding_type": "learned_absolute", "openai_gelu": True, "swiglu": False,
    "disable_bias_linear": False, "group_query_attention": False, "num_query_groups": 1,
}  # fmt: skip


def test_a_layernorm_without_bias_is_no_gpt2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "ours", small_config(**GPT2, disable_bias_layernorm=True))
    argv = [*TO_HF, "--load", tmp_path / "ours", "--save", tmp_path / "out", "--family", "gpt2"]
    assert tool(*argv) == 2
    error = capsys.readouterr().err
    assert "--family gpt2 cannot hold this model: --disable-bias-layernorm; use --family custom" in error


def test_families_of_models() -> None:
    """The first family that can hold a model is the one that has its parts; what no family has needs own code."""
    llama = small_config(untie_embeddings_and_output_weights=True)
    assert family_of(llama) == "llama"
    assert family_of(small_config(add_qkv_bias=True)) == "qwen2"
    assert family_of(small_config(qk_layernorm=True)) == "qwen3"
    assert family_of(small_config(norm_placement="peri")) is None
    assert family_of(small_config(value_residual="half")) is None
    assert family_of(small_config(squared_relu=True, swiglu=False)) is None
    assert family_of(small_config(rotary_percent=0.5)) is None
    assert family_of(small_config({"residual_scale": "completep", "base_num_layers": 1})) is None
    assert family_of(small_config(**GPT2)) == "gpt2"
    assert family_of(small_config(**GPT2, disable_bias_layernorm=True)) is None
    assert set(NAMES) >= {"llama", "qwen2", "qwen3", "olmo2", "gpt2", "mixtral", "olmoe", "qwen3_moe"}
