"""What Megatron-LM's arguments mean here, and tensors that its ranks wrote in chunks."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hc.config import ModelConfig
from megatron_hc.convert.megatron import find_folder, join, model_arguments, training_config
from megatron_hc.convert.shards import Spec
from megatron_hc.convert.torch_dist import TorchDistFolder

SMALL = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 4, "seq_length": 16}
EXPERTS = {"num_experts": 4, "moe_router_topk": 2}


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        # GELU is the tanh formula where it is fused with a bias, or asked for, and exact elsewhere.
        ({}, {"openai_gelu": True, "disable_bias_linear": False}),
        ({"bias_gelu_fusion": False}, {"openai_gelu": False}),
        ({"add_bias_linear": False}, {"openai_gelu": False, "disable_bias_linear": True}),
        ({"add_bias_linear": False, "openai_gelu": True}, {"openai_gelu": True}),
        ({"bias_gelu_fusion": False, "openai_gelu": True}, {"openai_gelu": True}),
        ({"swiglu": True}, {"openai_gelu": False, "swiglu": True}),
        ({"squared_relu": True, "openai_gelu": True}, {"openai_gelu": False, "squared_relu": True}),
        ({"max_position_embeddings": 64}, {"max_position_embeddings": 64}),
        ({"max_position_embeddings": None}, {"max_position_embeddings": 16}),
        # Without the switch there is a key for every head, whatever the number says.
        ({"group_query_attention": True, "num_query_groups": 2}, {"num_query_groups": 2}),
        ({"group_query_attention": False, "num_query_groups": 2}, {"num_query_groups": None}),
        (
            {"position_embedding_type": "rope", "rotary_percent": 0.5, "use_rope_scaling": True},
            {"rotary_percent": 0.5, "use_rope_scaling": True},
        ),
        (
            {"position_embedding_type": "learned_absolute", "rotary_percent": 0.5, "use_rope_scaling": True},
            {"rotary_percent": None, "use_rope_scaling": None},
        ),
        ({"layernorm_epsilon": 1e-6, "norm_epsilon": 1e-5}, {"norm_epsilon": 1e-6}),
        # Dropout and kernels do not come along.
        ({"hidden_dropout": 0.1, "attention_dropout": 0.1}, {"hidden_dropout": None, "attention_dropout": None}),
        # Streams, and experts, of a model that has none.
        ({"mhc_sinkhorn_iterations": 7}, {"mhc_sinkhorn_iterations": None, "residual_connection": None}),
        (
            {"enable_mhc_connections": True, "mhc_sinkhorn_iterations": 7},
            {"mhc_sinkhorn_iterations": 7, "residual_connection": "mhc", "mhc_convention": "megatron"}
            | {"residual_streams": 4},
        ),
        ({"enable_mhc_connections": True, "mhc_num_residual_streams": 2}, {"residual_streams": 2}),
        ({"moe_router_topk": 2, "moe_aux_loss_coeff": 0.1}, {"moe_router_topk": None, "moe_aux_loss_coeff": None}),
        (EXPERTS, {"moe_router_dtype": "fp32", "moe_router_topk": 2, "moe_layer_freq": None}),
        ({**EXPERTS, "moe_router_dtype": "fp64"}, {"moe_router_dtype": "fp64"}),
        ({**EXPERTS, "moe_layer_freq": 2}, {"moe_layer_freq": ["2"]}),
        ({**EXPERTS, "moe_layer_freq": [0, 1]}, {"moe_layer_freq": ["[0, 1]"]}),
        (
            {**EXPERTS, "moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.5},
            {"moe_router_load_balancing_type": ["seq_aux_loss"], "moe_aux_loss_coeff": [0.5]},
        ),
        (
            {**EXPERTS, "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"], "moe_aux_loss_coeff": [1, 2]},
            {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"], "moe_aux_loss_coeff": [1, 2]},
        ),
    ],
)
def test_arguments(args: dict[str, Any], expected: dict[str, Any]) -> None:
    """None: left out."""
    found = model_arguments(SMALL | args)
    assert {name: found.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("args", "given", "vocab"),
    [
        ({}, None, 24),
        ({"tokenizer_type": "NullTokenizer"}, None, 24),
        ({"vocab_size": 20}, None, 20),
        ({"vocab_size": 20, "tokenizer_type": "NullTokenizer"}, None, 21),
        ({"vocab_size": 20}, 24, 24),
        ({"vocab_size": 20}, 1, 1),
    ],
)
def test_size_of_the_vocabulary(args: dict[str, Any], given: int | None, vocab: int) -> None:
    config, found = training_config(SMALL | args, 24, given, None, None)
    assert found == vocab and config.data.vocab_size == vocab - 1 and config.model.seq_length == 16
    longer = training_config(SMALL | args | {"max_position_embeddings": 64}, 24, given, 32, None)[0].model
    assert (longer.seq_length, longer.max_positions) == (32, 64)


@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "SentencePieceTokenizer", "GPT2BPETokenizer"])
def test_a_tokenizer_that_is_there(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is named from anywhere; where it is gone, or of another kind, ids stand for themselves."""
    monkeypatch.chdir(tmp_path)
    args = SMALL | {"tokenizer_type": kind, "tokenizer_model": "a.model", "vocab_size": 20}
    gone = training_config(args, 24, None, None, None)[0].data
    assert (gone.tokenizer_type, gone.tokenizer_model, gone.vocab_size) == ("NullTokenizer", None, 19)
    for name in ("a.model", "b.model"):
        (tmp_path / name).touch()
    for given, expected in ((None, "a.model"), ("b.model", "b.model")):
        data = training_config(args, 24, None, None, given)[0].data
        known = (kind, str(tmp_path / expected), 20)
        found = (data.tokenizer_type, data.tokenizer_model, data.vocab_size)
        assert found == (("NullTokenizer", None, 19) if kind.startswith("GPT2") else known)


def test_folders(tmp_path: Path) -> None:
    for step in (0, 7, 12):
        place = tmp_path / f"iter_{step:07d}"
        place.mkdir()
        (place / ".metadata").touch()
    assert find_folder(tmp_path, None).name == "iter_0000000"
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7\n")
    assert find_folder(tmp_path, None).name == "iter_0000007"
    assert find_folder(tmp_path, 12).name == "iter_0000012"
    assert find_folder(tmp_path, 0).name == "iter_0000000"
    assert find_folder(tmp_path / "iter_0000012", None).name == "iter_0000012"
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    assert find_folder(tmp_path, None).name == "iter_0000000"
    with pytest.raises(ValueError, match=r"holds no torch_dist checkpoint \(.*iter_0000008/.metadata is missing\)"):
        find_folder(tmp_path, 8)


GATED = ModelConfig(swiglu=True)
E, F, C = 2, 3, 5
GATES, UPS = torch.arange(E * F * C).reshape(E, F, C), 1000 + torch.arange(E * F * C).reshape(E, F, C)


def test_rows_of_gates_and_ups() -> None:
    """Theirs stand below each other, ours alternate; experts follow one another."""
    both = torch.cat((GATES, UPS), 1)
    for e in range(E):
        found = join(GATED, "layers.0.mlp.linear_fc1.weight", [both[e]])
        assert found[0::2].equal(GATES[e]) and found[1::2].equal(UPS[e])
        assert join(GATED, "layers.0.mlp.shared_experts.linear_fc1.weight", [both[e]]).equal(found)
        assert join(GATED, "layers.0.mlp.linear_fc1.bias", [both[e, :, 0]]).equal(found[:, 0])
        assert join(ModelConfig(), "layers.0.mlp.linear_fc1.weight", [both[e]]).equal(both[e])
    found = join(GATED, "layers.0.mlp.experts.linear_fc1.weight", [both])
    assert found[0::2].equal(GATES.flatten(0, 1)) and found[1::2].equal(UPS.flatten(0, 1))
    assert join(GATED, "layers.0.mlp.experts.linear_fc1.bias", [both[:, :, 0]]).equal(found[:, 0])
    plain = join(ModelConfig(), "layers.0.mlp.experts.linear_fc1.weight", [both])
    assert plain.equal(both.flatten(0, 1))


def test_experts_second_matrices() -> None:
    theirs = GATES.transpose(1, 2)
    assert join(GATED, "layers.0.mlp.experts.linear_fc2.weight", [theirs]).equal(GATES.flatten(0, 1))
    assert join(GATED, "layers.0.mlp.linear_fc2.weight", [theirs[0]]).equal(theirs[0])
    biases = torch.rand(E, C)
    assert join(GATED, "layers.0.mlp.experts.linear_fc2.bias", [biases]).equal(biases)


class Chunked(TorchDistFolder):
    """A folder with one tensor, of which there are chunks between ``cuts`` of each dim."""

    def __init__(self, whole: Tensor, cuts: tuple[tuple[int, ...], ...], lost: int | None = None) -> None:
        self.folder, self.whole, self.reads = Path("x"), whole, 0
        corners = itertools.product(*(list(zip(each, each[1:], strict=False)) for each in cuts))
        chunks = [
            SimpleNamespace(offsets=[low for low, _ in corner], sizes=[high - low for low, high in corner])
            for corner in corners
        ]
        self.chunks = chunks
        entry: Any = SimpleNamespace(chunks=[chunk for i, chunk in enumerate(chunks) if i != lost])
        self.specs, self._entries = {"w": Spec(tuple(whole.shape), whole.dtype)}, {"w": entry}

    def _chunk(self, name: str, offset: tuple[int, ...]) -> Tensor:
        self.reads += 1
        size = next(chunk.sizes for chunk in self.chunks if tuple(chunk.offsets) == offset)
        return self.whole[tuple(slice(at, at + length) for at, length in zip(offset, size, strict=True))]


WHOLE = torch.arange(5 * 6 * 4).reshape(5, 6, 4)


@pytest.mark.parametrize(
    "cuts", [((0, 5), (0, 6), (0, 4)), ((0, 2, 5), (0, 6), (0, 4)), ((0, 1, 3, 5), (0, 4, 6), (0, 2, 4))]
)
def test_chunks_of_pipeline_and_tensor_ranks(cuts: tuple[tuple[int, ...], ...]) -> None:
    folder = Chunked(WHOLE, cuts)
    assert folder.read("w").equal(WHOLE)
    for layer in range(5):
        folder.reads = 0
        assert folder.read("w", layer).equal(WHOLE[layer])
        assert folder.reads == (len(cuts[1]) - 1) * (len(cuts[2]) - 1), "only what holds the layer"


def test_a_scalar_and_a_row_of_one() -> None:
    assert Chunked(torch.tensor(3.0), ()).read("w").equal(torch.tensor(3.0))
    assert Chunked(torch.tensor([3.0]), ((0, 1),)).read("w").equal(torch.tensor([3.0]))


def test_a_chunk_that_is_missing_or_of_another_shape() -> None:
    cuts = ((0, 2, 5), (0, 4, 6), (0, 4))
    with pytest.raises(ValueError, match="x is damaged: it has 104 of 120 elements of w"):
        Chunked(WHOLE, cuts, lost=1).read("w")
    with pytest.raises(ValueError, match="x is damaged: it has 16 of 24 elements of w"):
        Chunked(WHOLE, cuts, lost=1).read("w", 1)
    folder = Chunked(WHOLE, cuts)
    folder.chunks[0].sizes[2] = 3
    folder._chunk = lambda name, offset: WHOLE[:2, :4]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"x: w has a chunk of shape \[2, 4, 4\] instead of \[2, 4, 3\]"):
        folder.read("w")


@pytest.mark.parametrize("path", [None, "../w.distcp", "/w.distcp", "sub/w.distcp"])
def test_a_chunk_in_no_file_of_the_folder(path: str | None, tmp_path: Path) -> None:
    """Metadata from elsewhere cannot name a file outside of it."""
    folder: Any = Chunked(WHOLE, ((0, 5), (0, 6), (0, 4)))
    folder.folder = tmp_path
    folder._places = {("w", (0, 0, 0)): SimpleNamespace(relative_path=path, offset=0, length=9)} if path else {}
    with pytest.raises(ValueError, match=r"\.metadata has no file of this folder for a part of w"):
        TorchDistFolder._chunk(folder, "w", (0, 0, 0))
