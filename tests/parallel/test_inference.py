"""Texts and scores at any layout are those of one process: in float64, for every way that a carry crosses a stage."""

from __future__ import annotations

import dataclasses
import functools
import random
from typing import Any

import pool as pools
import pytest
import torch
from helpers import TRAINING, VOCAB, build, randomise, small_config
from parity import Cell, move_off_initial_values
from pool import Pool

from megatron_hc import train
from megatron_hc.cli import parse
from megatron_hc.config import ModelConfig, MoEConfig, TrainConfig
from megatron_hc.data.tokenizer import NullTokenizer
from megatron_hc.inference import Decoder, Engine, Request, inference_layout, write_texts
from megatron_hc.inference.scoring import Item, Scorer
from megatron_hc.mesh import Mesh
from megatron_hc.model.generate import Sampling
from megatron_hc.model.linear import Linear
from megatron_hc.parallel.plan import build_model, cast_parameters, materialize, parallelize, placements

LAYOUTS = {"tp2": (2, 1, 2), "pp2": (1, 2, 2), "dp2": (1, 1, 2), "tp2-pp2": (2, 2, 4), "tp2-dp2": (2, 1, 4)}
"""Tensor- and pipeline-parallel size, number of processes."""
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "hyper, dense values": ({"residual_connection": "hyper"}, {"value_residual": "dense"}),
    "mhc, single-layer value": ({"residual_connection": "mhc"}, {"single_layer_value": True}),
    "single-pass mhc, untied": (
        {"residual_connection": "mhc", "mhc_single_pass": True},
        {"untie_embeddings_and_output_weights": True, "position_embedding_type": "learned_absolute"},
    ),
    "denseformer, one group": ({"residual_connection": "denseformer"}, {"num_query_groups": 1}),
    "muddformer, values": ({"residual_connection": "muddformer"}, {"value_residual": "per-token"}),
    "experts": ({"residual_connection": "frac"}, {"moe": MoEConfig(num_experts=4, moe_router_topk=2)}),
}


def config_of(model: str, layout: str, expert: int = 1) -> TrainConfig:
    residual, change = MODELS[model]
    tp, pp, _ = LAYOUTS[layout]
    return TrainConfig(
        model=small_config(residual, max_position_embeddings=24, **change),
        training=TRAINING["fp64"],
        parallel=inference_layout(tp, pp, expert),
    )


def requests() -> list[Request]:
    numbers = random.Random(0)
    return [
        Request(
            prompt=tuple(numbers.randrange(VOCAB - 1) for _ in range(numbers.randrange(1, 9))),
            max_new_tokens=numbers.randrange(1, 7),
            sampling=Sampling(temperature=float(index % 2), seed=index),
            num_logprobs=1,
        )
        for index in range(5)
    ]


def items() -> list[Item]:
    numbers = random.Random(1)
    lengths = [numbers.randrange(2, 20) for _ in range(9)]
    return [Item([numbers.randrange(VOCAB - 1) for _ in range(length)], (length + 1) // 2) for length in lengths]


def written(engine: Engine) -> Any:
    """Twice: with one that ends later than the others, so that rows move."""
    first = write_texts(engine, requests())
    second = write_texts(engine, requests()[:2])
    assert second == first[:2]
    return [(text.text, text.tokens, text.finish) for text in first]


def in_a_rank(config: TrainConfig, world_size: int) -> Any:
    tp = config.parallel.tensor_model_parallel_size
    mesh = _mesh(config, world_size)
    if mesh is None:
        return None
    model = build_model(config, VOCAB, mesh)
    placed = placements(model, mesh)
    # As ``build`` and ``randomise`` do it, on the whole parameters.
    whole = randomise(build(dataclasses.replace(config.model), "fp64"))
    materialize(model, placed, 1, mesh, torch.float64)
    values = dict(whole.named_parameters())
    assert tp == mesh.size("tp")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = values[name]
            rows = placed[name].whole_shape[0] - value.shape[0]  # padding of the vocabulary
            parameter.copy_(placed[name].cut(torch.cat([value, value.new_zeros(rows, *value.shape[1:])])))
    parallelize(model, mesh)
    cast_parameters(model, torch.float64)
    model.eval()
    engine = Engine(Decoder(model, config, mesh, rows=3, max_length=16), NullTokenizer(VOCAB - 1))
    with torch.no_grad():
        return written(engine), [tuple(score) for score in Scorer(model, config, mesh, 2)(items())]


def _mesh(config: TrainConfig, world_size: int) -> Any:
    """Without the checks of training."""
    import torch.distributed as dist

    from megatron_hc.mesh import mesh_of

    config.parallel.validate(config.model)
    rank = dist.get_rank()
    found = mesh_of(rank, world_size, config, "cpu")
    return found if rank < world_size else None


def alone(config: ModelConfig) -> Any:
    model = randomise(build(config)).eval()
    run = TrainConfig(model=config, training=TRAINING["fp64"])
    engine = Engine(Decoder(model, run, Mesh(), rows=3, max_length=16), NullTokenizer(VOCAB - 1))
    with torch.no_grad():
        return written(engine), Scorer(model, run, Mesh(), 2)(items())


@pytest.mark.parametrize(
    "model, layout, expert",
    [
        ("plain", "dp2", 1),
        ("plain", "tp2-dp2", 1),
        ("hyper, dense values", "tp2-pp2", 1),
        ("hyper, dense values", "pp2", 1),
        ("mhc, single-layer value", "tp2-pp2", 1),
        ("mhc, single-layer value", "pp2", 1),
        ("single-pass mhc, untied", "pp2", 1),
        ("single-pass mhc, untied", "tp2", 1),
        ("denseformer, one group", "tp2-pp2", 1),
        ("muddformer, values", "tp2-pp2", 1),
        ("experts", "tp2-pp2", 2),
        ("experts", "tp2", 1),
        ("experts", "dp2", 1),
    ],
)
def test_layouts(pool: Pool, model: str, layout: str, expert: int) -> None:
    config = config_of(model, layout, expert)
    texts, scores = alone(config.model)
    world_size = LAYOUTS[layout][2]
    for rank, found in enumerate(pool.run(in_a_rank, config, world_size)):
        if rank >= world_size:
            continue
        assert found[0] == texts
        for (logprob, is_greedy), expected in zip(found[1], scores, strict=True):
            assert abs(logprob - expected.logprob) < 1e-9 and is_greedy == expected.is_greedy


# Scores of a model that is being trained


def scores_in_training(cell: Cell) -> Any:
    parsed = parse(cell.flags)
    mesh = pools.mesh(parsed.config, cell.world_size)
    if mesh is None:
        return None
    run = train.set_up(parsed, mesh)
    move_off_initial_values(run)
    run.model.eval()
    scores = [tuple(score) for score in Scorer(run.model, run.config, mesh)(short_items())]
    layers = [module.multiply for module in run.model.layers.modules() if isinstance(module, Linear)]
    noted = {layer.func.__self__ for layer in layers if isinstance(layer, functools.partial)}
    assert noted <= {run.pipeline.waiting}, "training finds its weight gradients where it looks"
    return scores


def short_items() -> list[Item]:
    """At most the cells' 8 tokens."""
    return [Item(item.tokens[:9], 1 + index % 2) for index, item in enumerate(items()) if len(item.tokens) > 2]


TP = "--tensor-model-parallel-size 2 --sequence-parallel"
EXPERTS = "--num-experts 4 --moe-router-topk 2 --swiglu --disable-bias-linear"


@pytest.mark.parametrize(
    "model, layout, world_size",
    [
        ("--residual-connection hyper", TP, 4),
        ("--residual-connection hyper", "--context-parallel-size 2", 2),
        (EXPERTS, "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall", 2),
        (EXPERTS, f"{TP} --expert-model-parallel-size 4 --expert-tensor-parallel-size 1", 4),
        ("", "--pipeline-model-parallel-size 2 --pipeline-schedule zbv --num-layers 4", 2),
        ("--residual-connection mhc", "--data-parallel-sharding-strategy optim_grads_params", 2),
    ],
)
def test_scores_while_training(pool: Pool, model: str, layout: str, world_size: int) -> None:
    if "--num-layers" in layout:
        model = f"{model} --num-layers 4"
    cell = Cell(model, layout, world_size=world_size)
    expected = pool.run(scores_in_training, cell.whole)[0]
    for found in pool.run(scores_in_training, cell)[:world_size]:
        for (logprob, is_greedy), (whole, is_greedy_whole) in zip(found, expected, strict=True):
            assert abs(logprob - whole) < 1e-9 and is_greedy == is_greedy_whole


@pytest.mark.parametrize(
    "flags, message",
    [
        (TP, "--sequence-parallel"),
        ("--data-parallel-sharding-strategy optim_grads_params", "optim_grads_params"),
    ],
)
def test_layouts_that_cannot_write(pool: Pool, flags: str, message: str) -> None:
    for found in pool.run(refused, Cell("", flags, world_size=2))[:2]:
        assert found is not None and message in found


def refused(cell: Cell) -> str | None:
    parsed = parse(cell.flags)
    mesh = pools.mesh(parsed.config, cell.world_size)
    if mesh is None:
        return None
    run = train.set_up(parsed, mesh)
    try:
        Decoder(run.model, run.config, mesh, rows=1, max_length=8)
    except ValueError as error:
        return str(error)
    return None
