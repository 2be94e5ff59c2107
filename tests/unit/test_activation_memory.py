"""What a forward pass leaves in memory for the backward pass, counted in bytes of storages that are still alive."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import VOCAB, build, random_tokens, small_config
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_hc.config import ParallelConfig
from megatron_hc.model.gpt import GPT
from megatron_hc.parallel.recompute_reads import best_interval

SIZES = {"hidden_size": 64, "ffn_hidden_size": 192, "num_attention_heads": 4, "num_query_groups": 4, "seq_length": 64}
RESIDUAL = {"recompute_granularity": "selective", "recompute_modules": ("residual",)}


class Storages(TorchDispatchMode):
    """Every storage that an operation makes, as long as somebody holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.found[StorageWeakRef(storage)] = storage.nbytes()
        return result

    def alive(self, without: set[StorageWeakRef]) -> int:
        found = ((storage, size) for storage, size in self.found.items() if storage not in without)
        return sum(size for storage, size in found if not storage.expired())


def kept(model: GPT, length: int = 64) -> int:
    """Bytes between a forward pass and its backward pass, parameters left out."""
    weights = {StorageWeakRef(p.untyped_storage()) for p in model.parameters()}
    tokens = random_tokens(2, length, vocab_size=VOCAB)
    with Storages() as storages:
        loss = model.output.loss(model(tokens), tokens, torch.full(tokens.shape, 1 / tokens.numel()))
        size = storages.alive(weights)
    del loss
    return size


def model_of(method: str, layers: int, parallel: dict[str, Any] | None = None, **model: Any) -> GPT:
    config = small_config({"residual_connection": method}, num_layers=layers, **SIZES, **model)
    return build(config, "fp32", parallel=ParallelConfig(**parallel) if parallel else None)


@pytest.mark.parametrize("method", ["hyper", "frac"])
def test_the_fused_boundary_keeps_at_most_half_of_the_plain_form(method: str) -> None:
    """Of what is kept beyond the plain residual."""
    plain = kept(model_of("plain", 4))
    fused, written_out = (kept(model_of(method, 4, fused_residual=value)) - plain for value in (True, False))
    assert fused <= written_out / 2


@pytest.mark.parametrize("method", ["hyper", "mhc"])
def test_recompute_brings_memory_down_to_the_plain_model_s(method: str) -> None:
    """n = 4: at most 15 % more than plain, and without recompute 25 % more."""
    plain = kept(model_of("plain", 16))
    assert kept(model_of(method, 16)) > 1.2 * plain
    assert kept(model_of(method, 16, RESIDUAL)) <= 1.15 * plain


def test_recompute_of_the_rest_comes_on_top() -> None:
    parallel = {**RESIDUAL, "recompute_modules": ("residual", "mlp", "core_attn")}
    assert kept(model_of("hyper", 8, parallel)) < 0.8 * kept(model_of("hyper", 8, RESIDUAL))


def full(*modules: str, interval: int | None = None) -> dict[str, Any]:
    found = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {**found, "recompute_modules": modules, "residual_recompute_interval": interval}


@pytest.mark.parametrize("method", ["hyper", "mhc"])
def test_full_recompute_keeps_outputs_instead_of_all_streams(method: str) -> None:
    """n = 4, in numbers per token, units of the width C = 64.

    Full recompute alone keeps at the entrance of every layer the streams, the pending output and its 4 + 16 weights.
    With the residual recomputed: both outputs of every layer, and streams and weights once in 4 of 16 layers.
    """
    unit = 2 * 64 * 64 * 4  # bytes of [B, S, C] in fp32
    entrance = 4 + 20 / 64
    alone = kept(model_of(method, 16, full())) / unit
    assert alone - kept(model_of(method, 4, full())) / unit == pytest.approx(12 * (entrance + 1), abs=0.01)
    for interval, num_blocks in ((None, 4), (16, 2), (32, 1)):
        both = kept(model_of(method, 16, full("residual", interval=interval))) / unit
        assert alone - both == pytest.approx(16 * (entrance + 1) - 2 * 16 - num_blocks * entrance, abs=0.01)


def test_the_square_root_rule() -> None:
    """arXiv 2512.24880, equation 20: 64 sublayers and 4 streams give 6.5."""
    assert best_interval(64, 4) == 7 and best_interval(2, 4) == 1 and best_interval(8, 1) == 2
