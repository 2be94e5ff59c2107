"""Learning rate and weight decay: known values of Megatron-LM's scheduler, and megatron-core's own."""

from __future__ import annotations

import importlib
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_hc import cli
from megatron_hc.config import TrainConfig
from megatron_hc.optim import LearningRate, WeightDecay

BASE = "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 8 --micro-batch-size 2"

COMMON = "--lr 1e-3 --min-lr 1e-4 --lr-warmup-iters 10 --train-iters 100 --global-batch-size 8"
WSD = f"{COMMON} --lr-decay-iters 90 --lr-decay-style WSD --lr-wsd-decay-iters 20"

CASES = {
    "constant": f"{COMMON} --lr-decay-style constant",
    "linear": f"{COMMON} --lr-decay-style linear --lr-decay-iters 90",
    "cosine": f"{COMMON} --lr-decay-style cosine --lr-decay-iters 90",
    "inverse": f"{COMMON} --lr-decay-style inverse-square-root --lr-decay-iters 90",
    "inverse without warm-up": "--lr 1e-3 --min-lr 1e-4 --train-iters 100 --lr-decay-style inverse-square-root",
    "WSD exponential": WSD,
    "WSD linear": f"{WSD} --lr-wsd-decay-style linear",
    "WSD cosine": f"{WSD} --lr-wsd-decay-style cosine",
    "WSD without an end": f"{WSD} --lr-wsd-decay-iters 0",
    "WSD minus_sqrt": f"{WSD} --lr-wsd-decay-style minus_sqrt",
    "fraction": "--lr 1e-3 --lr-warmup-fraction 0.033 --lr-warmup-init 1e-5 --train-iters 100 --global-batch-size 6",
    "fraction of the decay": "--lr 1e-3 --lr-warmup-fraction 0.1 --lr-decay-iters 70 --train-iters 100",
    "samples": "--lr 1e-3 --train-samples 795 --lr-warmup-samples 35 --lr-decay-samples 700 --global-batch-size 8 "
    "--lr-decay-style cosine",
    "samples WSD": "--lr 1e-3 --train-samples 795 --lr-decay-style WSD --lr-wsd-decay-samples 111 "
    "--lr-warmup-init 5e-4 --lr-warmup-samples 9",
}

# The rate at 0, 5, 10, 11, 50, 80, 85, 90, 91 and 100 iterations of 8 samples, printed by megatron-core 0.16.1.
KNOWN = {
    "constant": [0.0, 0.0005, 0.001, 0.001, 0.001, 0.001, 0.001, 0.001, 0.001, 0.001],
    "linear": [0.0, 0.0005, 0.001, 0.00098875, 0.00055, 0.00021250000000000002, 0.00015625, 0.0001, 0.0001, 0.0001],
    "cosine": [
        0.0,
        0.0005,
        0.001,
        0.0009996530663083252,
        0.00055,
        0.00013425421036992097,
        0.00010864662381854631,
        0.0001,
        0.0001,
        0.0001,
    ],
    "inverse": [
        0.0,
        0.0005,
        0.001,
        0.0009534625892455924,
        0.00044721359549995795,
        0.00035355339059327376,
        0.0003429971702850177,
        0.0003333333333333333,
        0.0001,
        0.0001,
    ],
    "WSD exponential": [
        0.0,
        0.0005,
        0.001,
        0.001,
        0.001,
        0.0004727922061357856,
        0.0002702864035024489,
        0.0001,
        0.0001,
        0.0001,
    ],
    "WSD linear": [0.0, 0.0005, 0.001, 0.001, 0.001, 0.00055, 0.000325, 0.0001, 0.0001, 0.0001],
    "WSD cosine": [0.0, 0.0005, 0.001, 0.001, 0.001, 0.00055, 0.00023180194846605365, 0.0001, 0.0001, 0.0001],
    "WSD without an end": [0.0, 0.0005, 0.001, 0.001, 0.001, 0.001, 0.001, 0.001, 0.0001, 0.0001],
    "WSD minus_sqrt": [
        0.0,
        0.0005,
        0.001,
        0.001,
        0.001,
        0.0003636038969321072,
        0.00022057713659400527,
        0.0001,
        0.0001,
        0.0001,
    ],
}

WEIGHT_DECAY = {
    "constant": ("--weight-decay 0.1", [0.1, 0.1, 0.1, 0.1]),
    "linear": (
        "--weight-decay-incr-style linear --start-weight-decay 0.02 --end-weight-decay 0.12",
        [0.02, 0.045, 0.12, 0.12],
    ),
    "cosine": (
        "--weight-decay-incr-style cosine --start-weight-decay 0.02 --end-weight-decay 0.12",
        [0.02, 0.034644660940672634, 0.12, 0.12],
    ),
}


def config_of(flags: str) -> TrainConfig:
    config = cli.parse(f"{BASE} {flags} --mock-data --tokenizer-type ByteTokenizer".split()).config
    config.validate()
    return config


@pytest.fixture(scope="module")
def scheduler_class() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module("megatron.core.optimizer_param_scheduler").OptimizerParamScheduler
        except ImportError:
            pytest.skip("megatron-core is not installed")


def oracle(scheduler_class: Any, config: TrainConfig, batch_size: int) -> Any:
    """The scheduler of megatron-core, set up from our configuration as Megatron-LM's training script does it."""
    optimizer, training = config.optimizer, config.training
    by_samples = training.train_samples is not None
    unit = 1 if by_samples else batch_size

    def length(name: str) -> Any:
        value = getattr(optimizer, f"{name}_samples" if by_samples else f"{name}_iters")
        return None if value is None else value * unit

    run = (training.train_samples if by_samples else training.train_iters) * unit
    decay = length("lr_decay") or run
    fraction = optimizer.lr_warmup_fraction
    growing = optimizer.weight_decay_incr_style != "constant"
    return scheduler_class(
        SimpleNamespace(param_groups=[{}]),
        init_lr=optimizer.lr_warmup_init,
        max_lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        lr_warmup_steps=length("lr_warmup") if fraction is None else fraction * decay,
        lr_decay_steps=decay,
        lr_decay_style=optimizer.lr_decay_style,
        start_wd=optimizer.start_weight_decay if growing else optimizer.weight_decay,
        end_wd=optimizer.end_weight_decay if growing else optimizer.weight_decay,
        wd_incr_steps=run,
        wd_incr_style=optimizer.weight_decay_incr_style,
        wsd_decay_steps=length("lr_wsd_decay"),
        lr_wsd_decay_style=optimizer.lr_wsd_decay_style,
    )


@pytest.mark.parametrize("case", CASES)
def test_equals_megatron_core_at_every_step(scheduler_class: Any, case: str) -> None:
    config = config_of(CASES[case])
    batch_size = config.training.global_batch_size or 2
    reference, rate = oracle(scheduler_class, config, batch_size), LearningRate(config.optimizer, config.training)
    for iteration in range(130):
        assert rate.at(iteration * batch_size) == reference.optimizer.param_groups[0]["lr"], iteration
        reference.step(batch_size)


@pytest.mark.parametrize("case", KNOWN)
def test_known_values(case: str) -> None:
    config = config_of(CASES[case])
    rate = LearningRate(config.optimizer, config.training)
    values = [rate.at(iteration * 8) for iteration in (0, 5, 10, 11, 50, 80, 85, 90, 91, 100)]
    assert values == pytest.approx(KNOWN[case], rel=1e-14)


def test_the_batch_size_counts_data_parallel_ranks() -> None:
    config = config_of("--lr 1 --train-iters 10 --lr-decay-style linear")
    assert LearningRate(config.optimizer, config.training, data_parallel_size=4).at(3 * 8) == pytest.approx(0.7)
    flags = "--lr 1 --train-iters 10 --weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 1"
    config = config_of(flags)
    assert WeightDecay(config.optimizer, config.training, data_parallel_size=4).at(3 * 8) == pytest.approx(0.3)


@pytest.mark.parametrize("style", WEIGHT_DECAY)
def test_weight_decay(scheduler_class: Any, style: str) -> None:
    flags, known = WEIGHT_DECAY[style]
    config = config_of(f"{COMMON} {flags}")
    decay, reference = WeightDecay(config.optimizer, config.training), oracle(scheduler_class, config, 8)
    assert [decay.at(iteration * 8) for iteration in (0, 25, 100, 101)] == pytest.approx(known, rel=1e-14)
    for iteration in range(120):
        assert decay.at(iteration * 8) == reference.optimizer.param_groups[0]["weight_decay"], iteration
        reference.step(8)
