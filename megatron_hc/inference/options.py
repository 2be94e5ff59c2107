"""Flags that the tools which load a model share. This module needs no torch."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_hc.inference.loading import Loaded


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint, and how it is spread over processes."""
    group = parser.add_argument_group("model")
    group.add_argument("--load", required=True, help="folder that --save wrote checkpoints to")
    group.add_argument("--ckpt-step", type=int, help="iteration of the checkpoint (default: the last)")
    group.add_argument("--tokenizer-model", help="the tokenizer's file, if it has moved since training")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float64"), help="instead of the training run's precision"
    )
    for axis, what in (("tensor", "every layer's matrices"), ("pipeline", "the layers"), ("expert", "the experts")):
        group.add_argument(
            f"--{axis}-model-parallel-size", type=int, default=1, metavar="N", help=f"processes that share {what}"
        )


def load_with(arguments: argparse.Namespace) -> Loaded:
    """The model that the arguments name, at the layout they name; all processes call together."""
    from megatron_hc.inference.loading import inference_layout, load_model

    return load_model(
        arguments.load,
        arguments.ckpt_step,
        device=arguments.device,
        tokenizer_model=arguments.tokenizer_model,
        dtype=arguments.dtype,
        layout=inference_layout(
            arguments.tensor_model_parallel_size,
            arguments.pipeline_model_parallel_size,
            arguments.expert_model_parallel_size,
        ),
    )
