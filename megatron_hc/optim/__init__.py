"""Parameter groups, AdamW, gradient clipping, and the curves of learning rate, weight decay and batch size."""

from megatron_hc.optim.adamw import adamw_step
from megatron_hc.optim.clip import clip_coefficient, grad_norm_squared, num_zeros
from megatron_hc.optim.groups import ParameterGroup, parameter_groups
from megatron_hc.optim.kernels import AdamUpdate, adam_update
from megatron_hc.optim.microbatches import BatchSchedule
from megatron_hc.optim.schedule import LearningRate, WeightDecay

__all__ = [
    "AdamUpdate",
    "BatchSchedule",
    "LearningRate",
    "ParameterGroup",
    "WeightDecay",
    "adam_update",
    "adamw_step",
    "clip_coefficient",
    "grad_norm_squared",
    "num_zeros",
    "parameter_groups",
]
