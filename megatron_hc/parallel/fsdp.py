"""--data-parallel-sharding-strategy optim_grads_params: parameters and gradients as shards too (ZeRO-3), by FSDP2.

Torch's ``fully_shard`` gathers a layer's matrices when the layer runs, in the compute dtype, frees them afterwards, and
reduces their gradients to shards after every micro-batch. Its shard of a parameter is in fp32 (fp64) and lies where
ZeRO-1 puts it (dim 0 in equal parts), so it is the master weight: optimizer, norms and checkpoints are those of
``data.py``. Norms and residual parameters, small and in fp32 whatever the compute dtype, stay whole and ZeRO-1's.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from megatron_hc.kernels.norm import promote
from megatron_hc.mesh import Mesh
from megatron_hc.model.experts import Experts
from megatron_hc.parallel.plan import owned_parameters, parameter_dtype
from megatron_hc.parallel.slots import Sharding, local


def shard_fully(
    model: nn.Module,
    layers: Sequence[nn.Module],
    mesh: Mesh,
    sharding: Sharding,
    expert_sharding: Sharding,
    dtype: torch.dtype,
) -> bool:
    """Hand the parameters of the compute dtype to FSDP2: each of ``layers`` is a unit, what is left of ``model`` one.

    The parameters must have their values, in at least fp32. Comes before the optimizer, which takes what it leaves.
    Returns whether it did: with one data-parallel rank there is nothing to do. If so, FSDP2 does the cast of what it
    takes, and ``cast_what_is_left`` the others'. Experts are units of their own over the ranks that hold the same ones;
    where there is one such rank, they are left.
    """
    if sharding.group is None and sharding.replicas is None:
        return False
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    # Of what changes an output in place, which nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    wide = [
        (module, name)
        for _, module, name in owned_parameters(model)
        if parameter_dtype(module, torch.bfloat16) != torch.bfloat16
    ]
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    has_copies = expert_sharding.group is not None
    ignored = {module._parameters[name] for module, name in wide}
    if not has_copies:
        ignored |= {parameter for module in experts for parameter in module.parameters()}
    options: dict[str, Any] = {
        # By default inputs are cast as well, and with them the fp32 weights in the carry.
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=promote(dtype), cast_forward_inputs=False),
        "ignored_params": ignored,
    }
    expert_mesh, dense_mesh = _device_mesh(mesh, expert_sharding) if has_copies else None, _device_mesh(mesh, sharding)
    units = [(unit, expert_mesh) for unit in experts] if has_copies else []
    # The outermost unit is needed again at once, for the backward pass of the loss. In a pipeline every unit is needed
    # again soon: for the next micro-batch.
    frees = mesh.size("pp") == 1
    for unit, device_mesh in (*units, *((unit, dense_mesh) for unit in (*layers, model))):
        sharded = fully_shard(unit, mesh=device_mesh, reshard_after_forward=frees and unit is not model, **options)
        # The loss is normalised already. A plain sum is the one reduction that gloo has.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "through")  # stages call the model's parts, not its forward
    return True


def cast_what_is_left(model: nn.Module, dtype: torch.dtype) -> None:
    """To the compute dtype, what FSDP2 did not take and is not kept wide."""
    for _, module, name in owned_parameters(model):
        parameter = module._parameters[name]
        if parameter is not None and local(parameter) is parameter:
            parameter.data = parameter.data.to(parameter_dtype(module, dtype))


def _device_mesh(mesh: Mesh, sharding: Sharding) -> Any:
    """FSDP2's view of the data-parallel ranks: [shards], or [replicas, shards]."""
    from torch.distributed import get_process_group_ranks
    from torch.distributed.device_mesh import DeviceMesh

    kind = mesh.device.partition(":")[0]
    if sharding.replicas is None:
        return DeviceMesh.from_group(sharding.group, kind, mesh_dim_names=("shard",))
    if sharding.group is None:
        raise AssertionError("config.validate: as many shards as instances would leave nothing to share out")
    own, shards = get_process_group_ranks(sharding.replicas), get_process_group_ranks(sharding.group)
    step = shards[1] - shards[0]
    ranks = torch.tensor([[rank + step * (shard - sharding.shard) for shard in range(len(shards))] for rank in own])
    return DeviceMesh.from_group([sharding.replicas, sharding.group], kind, ranks, mesh_dim_names=("copy", "shard"))
