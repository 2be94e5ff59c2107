"""Generating with a cache gives what the whole text gives: mixed, shared and normed values, every position type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import build, random_tokens, randomise, small_config

from megatron_hc.model.generate import Sampling, generate
from megatron_hc.model.gpt import GPT
from megatron_hc.model.placement import NORM_PLACEMENTS
from megatron_hc.residual import VALUE_RESIDUALS

FEATURES: dict[str, dict[str, Any]] = {
    **{f"values-{name}": {"value_residual": name} for name in VALUE_RESIDUALS},
    "single-layer-value": {"single_layer_value": True},
    **{name: {"norm_placement": name} for name in NORM_PLACEMENTS},
    "hybrid-single-layer-value": {"norm_placement": "hybrid", "single_layer_value": True},
    "cosine-per-token": {"norm_placement": "res-post-cosine", "value_residual": "per-token"},
}
SHAPES: dict[str, dict[str, Any]] = {
    "rope-grouped": {},
    "rope-half-one-group": {"rotary_percent": 0.5, "num_query_groups": 1, "attention_softmax_in_fp32": True},
    "learned-multi-head": {
        "position_embedding_type": "learned_absolute",
        "group_query_attention": False,
        "num_query_groups": 1,
        "normalization": "LayerNorm",
        "disable_bias_linear": False,
    },
    "no-positions": {"position_embedding_type": "none"},
}

every_feature = pytest.mark.parametrize("feature", FEATURES)


def model_of(feature: str, shape: str, precision: str = "fp64") -> GPT:
    config = small_config(max_position_embeddings=24, **{**SHAPES[shape], **FEATURES[feature]})
    return randomise(build(config, precision)).eval()


@every_feature
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_pieces_equal_the_whole(feature: str, shape: str) -> None:
    model, tokens = model_of(feature, shape), random_tokens()
    whole, caches = model(tokens), model.new_caches(8, 2)
    pieces = [model(tokens[:, a:b], caches=caches) for a, b in ((0, 3), (3, 4), (4, 6), (6, 8))]
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-11, atol=1e-11)


@every_feature
def test_greedy_tokens_are_the_same_with_and_without_the_cache(feature: str) -> None:
    model = model_of(feature, "rope-grouped", "fp32")
    texts = [
        list(generate(model, [3, 1, 4], 20, Sampling(temperature=0), eod=-1, use_cache=use)) for use in (True, False)
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 20


@every_feature
def test_the_cache_can_be_longer_than_the_text_and_hold_garbage(feature: str) -> None:
    model, tokens = model_of(feature, "rope-grouped"), random_tokens()
    caches = model.new_caches(11, 2)
    for cache in caches:
        for tensor in cache.tensors:
            tensor.fill_(float("nan"))
    with torch.no_grad():
        pieces = [model(tokens[:, a:b], caches=caches) for a, b in ((0, 5), (5, 8))]
        torch.testing.assert_close(torch.cat(pieces), model(tokens), rtol=1e-11, atol=1e-11)


def test_what_is_cached() -> None:
    """Keys and mixed values V'; with --single-layer-value only the first layer caches values."""
    assert [len(cache.tensors) for cache in model_of("single-layer-value", "rope-grouped").new_caches(8, 2)] == [
        2,
        1,
        1,
    ]
    model, tokens = model_of("values-constant", "rope-grouped"), random_tokens()
    caches = model.new_caches(8, 2)
    model(tokens, caches=caches)
    seen: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(model.stage_layers()):
        layer.attention.linear_qkv.register_forward_hook(
            lambda module, _, y, index=index: seen.__setitem__(index, module.parts.split_output(y)["v"])
        )
    model(tokens)
    first, _, last = (layer.values.permute(2, 0, 1, 3) for layer in caches)
    torch.testing.assert_close(first, seen[0])
    torch.testing.assert_close(last, 2 * seen[0] + seen[2])
