"""What a checkpoint holds: named tensors and a little JSON, the same for every layout."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from megatron_hc.mesh import Mesh
from megatron_hc.model.gpt import GPT
from megatron_hc.parallel.data import DataParallelOptimizer
from megatron_hc.parallel.placement import Placement
from megatron_hc.parallel.plan import stored
from megatron_hc.stored import Stored


def model_tensors(model: GPT, placed: dict[str, Placement]) -> dict[str, Stored]:
    """'model.NAME' -> this rank's part of the parameter."""
    return {
        f"model.{name}": stored(model, placed, name, [((0,) * parameter.dim(), parameter.detach())], parameter.dtype)
        for name, parameter in model.named_parameters()
    } | _buffers(model)


def _buffers(model: GPT) -> dict[str, Stored]:
    """'model.NAME' -> what training moves by itself (expert biases), whole on every rank."""
    return {
        f"model.{name}": Stored(tuple(buffer.shape), buffer.dtype, (((0,) * buffer.dim(), buffer),))
        for name, buffer in model.named_buffers()
    }


def is_dense(names: Iterable[str]) -> bool:
    """Whether the checkpoint with these tensors has no experts."""
    return not any(name.endswith("mlp.router.weight") for name in names)


def from_dense(tensors: dict[str, Stored], num_experts: int) -> dict[str, Stored]:
    """Tensors of a model with experts as parts of a dense checkpoint: every expert is the MLP; routers are left out."""
    found = {}
    for name, tensor in tensors.items():
        if ".mlp.router." in name:
            continue
        found[name.replace(".mlp.experts.", ".mlp.")] = (
            _expert_from_dense(name, tensor, num_experts) if ".mlp.experts." in name else tensor
        )
    return found


def _expert_from_dense(name: str, tensor: Stored, num_experts: int) -> Stored:
    """Rows of the experts' matrices, one below the other and the second ones transposed, as boxes of the MLP's."""
    block = tensor.shape[0] // num_experts
    is_second_bias = name.endswith("linear_fc2.bias")
    is_transposed = name.endswith("linear_fc2.weight")
    boxes: list[tuple[tuple[int, ...], Tensor]] = []
    for (first, *columns), local in tensor.slices:
        last = first + local.shape[0]
        for start in range(first // block * block, last, block):  # of an expert
            low, high = max(first, start), min(last, start + block)
            rows, offset = local[low - first : high - first], (low - start, *columns)
            if is_second_bias:
                rows, offset = rows[0], tuple(columns)
            elif is_transposed:
                rows, offset = rows.t(), offset[::-1]
            boxes.append((offset, rows))
    shape = (block, *tensor.shape[1:])
    dense_shape = shape[1:] if is_second_bias else shape[::-1] if is_transposed else shape
    return Stored(dense_shape, tensor.dtype, tuple(boxes))


def training_tensors(
    model: GPT, placed: dict[str, Placement], optimizer: DataParallelOptimizer, *, with_optimizer: bool
) -> dict[str, Stored]:
    """'model.NAME' -> this rank's rows of the master weights, 'optimizer.exp_avg.NAME' and so on -> of the moments."""
    tensors = {}
    for slot in optimizer.slots:
        kinds = {"model": slot.master}
        if with_optimizer:
            kinds |= {"optimizer.exp_avg": slot.exp_avg, "optimizer.exp_avg_sq": slot.exp_avg_sq}
        for kind, tensor in kinds.items():
            tensors[f"{kind}.{slot.name}"] = stored(model, placed, slot.name, slot.boxes(tensor), tensor.dtype)
    return tensors | _buffers(model)


def gather_state(
    optimizer: DataParallelOptimizer, iteration: int, consumed_samples: int, *, with_rng: bool
) -> dict[str, Any]:
    """The JSON side: progress, the optimizer's step count, random generators by stage; all ranks call together."""
    state: dict[str, Any] = {
        "iteration": iteration,
        "consumed_samples": consumed_samples,
        "optimizer_steps": optimizer.num_steps,
    }
    if with_rng:
        generators = {"cpu": _encode(torch.get_rng_state())}
        if torch.cuda.is_available():
            generators["cuda"] = _encode(torch.cuda.get_rng_state())
        state["rng"] = {"stages": _over_stages(generators, optimizer.mesh)}
    return state


def restore_state(
    state: dict[str, Any], optimizer: DataParallelOptimizer | None, mesh: Mesh, *, with_rng: bool
) -> None:
    """Put back what ``gather_state`` took. With another number of stages random numbers begin anew, but not as at 0."""
    if optimizer is not None:
        optimizer.num_steps = state["optimizer_steps"]
    if not with_rng or "rng" not in state:
        return
    stages = state["rng"]["stages"]
    if len(stages) != mesh.size("pp"):
        torch.manual_seed(torch.initial_seed() + state["iteration"])
        return
    rng = stages[mesh.rank("pp")]
    if "cpu" in rng:
        torch.set_rng_state(_decode(rng["cpu"]))
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(rng["cuda"]))


def _over_stages(value: Any, mesh: Mesh) -> list[Any]:
    """The value of every pipeline process of this rank's copy of the model."""
    values = [value] * mesh.size("pp")
    if mesh.group("pp") is not None:
        torch.distributed.all_gather_object(values, value, group=mesh.group("pp"))
    return values


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
