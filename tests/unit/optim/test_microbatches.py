"""Batch size ramp-up and the length of a run, against megatron-core's calculator."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest

from megatron_hc.config import TrainingConfig
from megatron_hc.optim import BatchSchedule


@pytest.fixture(scope="module")
def calculator_class() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = importlib.import_module("megatron.core.num_microbatches_calculator")
        except ImportError:
            pytest.skip("megatron-core is not installed")
    return module.RampupBatchsizeNumMicroBatchesCalculator


def test_constant_batch() -> None:
    schedule = BatchSchedule(TrainingConfig(micro_batch_size=2, global_batch_size=12, train_iters=7), 3)
    assert (schedule.global_batch_size(0), schedule.num_micro_batches(0), schedule.num_micro_batches(10**9)) == (
        12,
        2,
        2,
    )
    assert (schedule.total_iterations, schedule.total_samples, schedule.largest) == (7, 84, 12)
    schedule = BatchSchedule(TrainingConfig(micro_batch_size=2, train_samples=20), 3)
    assert (schedule.global_batch_size(0), schedule.num_micro_batches(0)) == (6, 1)
    assert (schedule.total_iterations, schedule.total_samples) == (3, 20)


RAMPS = [((4, 4, 100), 16, 1000), ((8, 2, 37), 12, 301), ((4, 4, 7), 32, 90), ((4, 2, 90), 64, 90), ((8, 4, 50), 8, 99)]
RAMPS += [((2, 2, 54), 28, 80)]  # 54 / (54 / 13) is less than 13, and a batch ends after 54 samples


@pytest.mark.parametrize("ramp, largest, samples", RAMPS)
def test_ramp_up_equals_megatron_core(
    calculator_class: Any, ramp: tuple[int, int, int], largest: int, samples: int
) -> None:
    config = TrainingConfig(
        micro_batch_size=1, global_batch_size=largest, train_samples=samples, rampup_batch_size=ramp
    )
    schedule = BatchSchedule(config, data_parallel_size=2)
    if ramp[0] == largest:  # megatron-core divides by zero; here it is no ramp
        assert {schedule.global_batch_size(consumed) for consumed in range(samples)} == {largest}
        return
    reference = calculator_class(largest, 1, 2, False, 1, *ramp)
    for consumed in range(samples):
        reference.update(consumed, consistency_check=True)
        assert schedule.global_batch_size(consumed) == reference.get_current_global_batch_size(), consumed
        assert schedule.num_micro_batches(consumed) == reference.get()


@pytest.mark.parametrize("ramp, largest, samples", RAMPS)
def test_the_run_takes_as_many_whole_batches_as_there_are_samples(
    ramp: tuple[int, int, int], largest: int, samples: int
) -> None:
    config = TrainingConfig(
        micro_batch_size=1, global_batch_size=largest, train_samples=samples, rampup_batch_size=ramp
    )
    schedule, consumed = BatchSchedule(config), 0
    for _ in range(schedule.total_iterations):
        consumed += schedule.global_batch_size(consumed)
    assert consumed <= samples < consumed + schedule.global_batch_size(consumed)


@pytest.mark.parametrize("ramp, largest, samples", RAMPS)
def test_a_run_that_is_resumed_ends_where_the_whole_one_does(
    ramp: tuple[int, int, int], largest: int, samples: int
) -> None:
    config = TrainingConfig(
        micro_batch_size=1, global_batch_size=largest, train_samples=samples, rampup_batch_size=ramp
    )
    schedule, consumed = BatchSchedule(config), 0
    for iteration in range(schedule.total_iterations + 1):
        assert schedule.iterations_at_end(iteration, consumed) == schedule.total_iterations
        assert schedule.iterations_at_end(iteration + 5, consumed) == schedule.total_iterations + 5
        consumed += schedule.global_batch_size(consumed)
    assert schedule.iterations_at_end(7, samples + 3 * largest) == 7, "--train-samples less than at first"


def test_known_ramp() -> None:
    config = TrainingConfig(micro_batch_size=4, global_batch_size=16, train_samples=100, rampup_batch_size=(4, 4, 30))
    schedule, consumed, sizes = BatchSchedule(config), 0, []
    for _ in range(schedule.total_iterations):
        sizes.append(schedule.global_batch_size(consumed))
        consumed += sizes[-1]
    assert sizes == [4, 4, 4, 8, 12, 16, 16, 16, 16]
