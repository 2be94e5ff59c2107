"""Every setting of a run, as frozen dataclasses. One field is one command-line flag and one YAML key.

The string under a field is its documentation and its ``--help``. A flag's name is the field's name with dashes; a
boolean field gives ``--name`` and ``--no-name``. ``validate()`` raises ``ValueError`` in one sentence that names the
flags, the values and the mend. This module imports no torch: a wrong flag is refused before torch is loaded.
"""

from megatron_hc.config.backends import BackendConfig
from megatron_hc.config.common import flag
from megatron_hc.config.data import DataConfig
from megatron_hc.config.evaluation import EvaluationConfig
from megatron_hc.config.model import (
    HEAD_NORM_PLACEMENTS,
    NO_READ_NORM_PLACEMENTS,
    OWN_NORM_CONNECTIONS,
    REPLACEABLE_CONNECTIONS,
    REPLACING_PLACEMENTS,
    ModelConfig,
)
from megatron_hc.config.moe import MoEConfig
from megatron_hc.config.optimizer import OptimizerConfig
from megatron_hc.config.parallel import ParallelConfig
from megatron_hc.config.residual import RESIDUAL_CONNECTIONS, ResidualConfig
from megatron_hc.config.run import TrainConfig, leaf_fields
from megatron_hc.config.training import LogConfig, TrainingConfig
from megatron_hc.config.zero import ZeroConfig

__all__ = [
    "BackendConfig",
    "DataConfig",
    "EvaluationConfig",
    "HEAD_NORM_PLACEMENTS",
    "LogConfig",
    "MoEConfig",
    "ModelConfig",
    "NO_READ_NORM_PLACEMENTS",
    "OWN_NORM_CONNECTIONS",
    "OptimizerConfig",
    "ParallelConfig",
    "REPLACEABLE_CONNECTIONS",
    "REPLACING_PLACEMENTS",
    "RESIDUAL_CONNECTIONS",
    "ResidualConfig",
    "TrainConfig",
    "TrainingConfig",
    "ZeroConfig",
    "flag",
    "leaf_fields",
]
