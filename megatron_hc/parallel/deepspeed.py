"""--deepspeed: DeepSpeed's ZeRO-1, 2 or 3 in the place of our own sharding.

DeepSpeed gets the parameters of the compute dtype, as FSDP2 does (``fsdp.py``): it keeps their master weights, reduces
their gradients and, at stage 3, has the parameters themselves as shards. Norms and residual parameters, small and in
fp32 whatever the compute dtype, stay whole and ZeRO-1's (``data.py``). All numbers are the trainer's: the loss is
normalised before the forward pass, and DeepSpeed's mean of gradients is made a sum again; what is partial over
tensor-parallel ranks is summed here, once; norm, clipping, rates and the count of steps are those of ``data.py``.

DeepSpeed lays parameters one behind the other and cuts that into equal runs, so a rank's run may begin within a row:
``FlatSlot`` says where, and with it a checkpoint is written and read without gathering anything.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from megatron_hc.config import OptimizerConfig, TrainConfig
from megatron_hc.mesh import Mesh
from megatron_hc.optim import ParameterGroup
from megatron_hc.parallel.data import DataParallelOptimizer
from megatron_hc.parallel.deepspeed_config import Settings, settings_of
from megatron_hc.parallel.deepspeed_state import FlatAdamW, sharded_state
from megatron_hc.parallel.placement import Placement
from megatron_hc.parallel.plan import cast_parameters, owned_parameters, parameter_dtype
from megatron_hc.parallel.slots import FlatSlot

OLDEST = (0, 19)


def check_deepspeed(config: TrainConfig, world_size: int) -> None:
    """Refuse what cannot work before anything is built: no DeepSpeed here, or settings that contradict the flags."""
    if not config.zero.deepspeed:
        return
    config.validate(world_size)
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        raise ValueError(
            "--deepspeed needs DeepSpeed, which is not installed: pip install 'megatron_hc[deepspeed]'"
        ) from None
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        raise ValueError(
            f"--deepspeed needs DeepSpeed {OLDEST[0]}.{OLDEST[1]}, and {found} is installed: pip install --upgrade "
            "'megatron_hc[deepspeed]'"
        )
    settings = settings_of(config, config.parallel.data_parallel_size(world_size))
    if settings.stage == 3 and config.training.compile:
        raise ValueError(
            "--compile and --deepspeed at ZeRO stage 3 exclude each other: compiled layers do not fetch parameters; "
            "take --zero-stage 2, or leave out --compile"
        )


class DeepSpeedOptimizer(DataParallelOptimizer):
    """``DataParallelOptimizer`` with DeepSpeed in charge of the parameters of the compute dtype.

    Made from the fp32 initial values, which it casts. From then on ``model.through`` is DeepSpeed's forward pass.
    Raises ``ValueError`` where DeepSpeed has been told of another device, or cannot build its optimizer for the CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ParameterGroup],
        config: TrainConfig,
        mesh: Mesh,
        dtype: torch.dtype,
        placed: Mapping[str, Placement],
    ) -> None:
        owners = {name: (module, local_name) for name, module, local_name in owned_parameters(model)}
        dtypes = {name: parameter_dtype(module, dtype) for name, (module, _) in owners.items()}
        taken = {
            name for name, (module, _) in owners.items() if parameter_dtype(module, torch.bfloat16) == torch.bfloat16
        }
        super().__init__(_part(groups, owners.keys() - taken), config.optimizer, config.parallel, mesh, dtypes, placed)
        settings = settings_of(config, mesh.size("dp"))
        self.is_fully_sharded = settings.stage == 3
        groups = _part(groups, taken)
        initial = {name: p.detach() for group in groups for name, p in group["params"]}
        shapes = {name: tuple(value.shape) for name, value in initial.items()}
        cast_parameters(model, dtype)  # type: ignore[arg-type]
        if self.is_fully_sharded:
            _take_out(owners[name] for name in owners.keys() - taken)
        self.engine = _engine(model, groups, settings, config.optimizer, mesh)
        self.state = sharded_state(self.engine.optimizer)
        self._own = self.slots
        self._flat = [
            self._flat_slot(name, parameter, dtypes[name], placed[name], group, shapes[name])
            for group in groups
            for name, parameter in group["params"]
        ]
        self.slots = [*self._own, *self._flat]
        with torch.no_grad():
            for slot in self._flat:
                run = initial[slot.name].flatten()[slot.start : slot.start + slot.master.numel()]
                slot.master.copy_(run)
        self._gradients: list[Tensor] = []
        self._passes = self._num_passes = 0
        model.through = self._through  # type: ignore[assignment]

    def _flat_slot(
        self,
        name: str,
        parameter: nn.Parameter,
        dtype: torch.dtype,
        placement: Placement,
        group: ParameterGroup,
        shape: tuple[int, ...],
    ) -> FlatSlot:
        fragment = self.state.fragment(parameter)
        master, exp_avg, exp_avg_sq = (fragment.of(buffers) for buffers in self.state.buffers)
        return FlatSlot(
            name,
            parameter,
            dtype,
            placement,
            group["weight_decay"],
            group["lr_mult"],
            (0, shape[0]),
            master,
            exp_avg,
            exp_avg_sq,
            is_fully_sharded=self.is_fully_sharded,
            eps_mult=group["eps_mult"],
            shape=shape,
            start=fragment.start,
        )

    def _through(self, part: Callable[..., Any], *arguments: Any) -> Any:
        """One forward pass of DeepSpeed's; a training pass is followed by its backward pass."""
        if torch.is_grad_enabled():
            self._passes += 1
            self.engine.set_gradient_accumulation_boundary(self._passes == self._num_passes)
        self.engine.module.part = part
        return self.engine(*arguments)

    def begin(self, num_micro_batches: int) -> None:
        super().begin(num_micro_batches)
        self._passes, self._num_passes = 0, num_micro_batches
        for slot in self._flat:
            slot.grad = None
        self.state.forget_gradients()

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        assert self._passes == self._num_passes, f"{self._passes} of {self._num_passes} micro-batches came"
        self._gradients = self.state.gradients()
        torch._foreach_mul_(self._gradients, self.mesh.size("dp"))  # DeepSpeed takes the mean
        for slot in self._flat:
            slot.grad = self.state.fragment(slot.parameter).of(self._gradients)
        super().reduce_gradients()

    def _update(self, clip: float, learning_rate: float, weight_decay: float) -> None:
        self._adamw(self._own, clip, learning_rate, weight_decay)
        super().update_parameters()
        if clip < 1.0:
            torch._foreach_mul_(self._gradients, clip)
        base = self.engine.basic_optimizer
        for group in base.param_groups:
            group["lr"] = learning_rate * group["lr_mult"]
            group["weight_decay"] = weight_decay if group["decays"] else 0.0
        for state in base.state.values():
            state["step"] = self.num_steps - 1
        self.engine.step()
        assert self.engine.was_step_applied(), "DeepSpeed left out a step, and the gradient was finite"

    @torch.no_grad()
    def update_parameters(self) -> None:
        super().update_parameters()
        self.state.update_parameters()


def _part(groups: Sequence[ParameterGroup], names: Collection[str]) -> list[ParameterGroup]:
    """The groups with these parameters only, without empty ones."""
    parts = [{**group, "params": [item for item in group["params"] if item[0] in names]} for group in groups]
    return [part for part in parts if part["params"]]  # type: ignore[misc]


def _take_out(owned: Iterable[tuple[nn.Module, str]]) -> None:
    """Parameters that stage 3 must not see, as plain attributes: it shards all that a module lists as its own."""
    for module, name in owned:
        module.__dict__[name] = module._parameters.pop(name)


class _Passes(nn.Module):
    """What DeepSpeed takes for the model: any function that runs some of its parts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.part: Callable[..., Any] | None = None

    def forward(self, *arguments: Any) -> Any:
        assert self.part is not None
        return self.part(*arguments)


class MeshUnits:
    """The mesh by the names that DeepSpeed asks for (its ``mpu``). Groups of one process are real ones there."""

    def __init__(self, mesh: Mesh) -> None:
        self._ranks = {"data": mesh.rank("dp"), "model": mesh.rank("tp")}
        self._sizes = {"data": mesh.size("dp"), "model": mesh.size("tp")}
        alone = None
        if mesh.group("dp") is None or mesh.group("tp") is None:
            alone = _alone(mesh)
        self._groups = {"data": mesh.group("dp") or alone, "model": mesh.group("tp") or alone}

    def get_data_parallel_rank(self) -> int:
        return self._ranks["data"]

    def get_data_parallel_world_size(self) -> int:
        return self._sizes["data"]

    def get_data_parallel_group(self) -> Any:
        return self._groups["data"]

    def get_model_parallel_rank(self) -> int:
        return self._ranks["model"]

    def get_model_parallel_world_size(self) -> int:
        return self._sizes["model"]

    def get_model_parallel_group(self) -> Any:
        return self._groups["model"]

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group


def _alone(mesh: Mesh) -> Any:
    """A group of this process; all call together."""
    import torch.distributed as dist

    groups = [dist.new_group([rank]) for rank in range(mesh.world_size)]
    return groups[mesh.world_rank]


def _engine(
    model: nn.Module, groups: Sequence[ParameterGroup], settings: Settings, config: OptimizerConfig, mesh: Mesh
) -> Any:
    """DeepSpeed's engine around the model."""
    deepspeed = _import_for(mesh)
    deepspeed.utils.logger.setLevel(settings.engine["log_level"].upper())
    if not torch.distributed.is_initialized():  # one process, which needs a group of its own there
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(
            deepspeed.get_accelerator().communication_backend_name(), store=store, rank=0, world_size=1
        )
    flat_groups = [
        {
            "params": [parameter for _, parameter in group["params"]],
            "lr_mult": group["lr_mult"],
            "decays": group["weight_decay"],
            "eps": config.adam_eps * group["eps_mult"],
        }
        for group in groups
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = FlatAdamW(flat_groups, betas) if settings.takes_torch_adam else _cpu_adam(flat_groups, betas)
    units = MeshUnits(mesh)
    try:
        return deepspeed.initialize(model=_Passes(model), optimizer=optimizer, config=settings.engine, mpu=units)[0]
    except ValueError as error:  # a value that is none for its key
        raise ValueError(f"--deepspeed-config: DeepSpeed refuses it: {' '.join(str(error).split())}") from error


def _import_for(mesh: Mesh) -> Any:
    """The package, told about this process's device in its own variables; all of it loads with the first import."""
    kind, _, index = mesh.device.partition(":")
    os.environ.setdefault("DS_ACCELERATOR", kind)
    os.environ.setdefault("LOCAL_RANK", index or "0")
    import deepspeed

    # torch 2.13 deprecates the names that DeepSpeed calls.
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated")
    if kind == "cpu":
        # Collectives in shared memory, for inference: they would be compiled at the first use of anything.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    found = deepspeed.get_accelerator().device_name()
    if found != kind:
        raise ValueError(
            f"DeepSpeed works on {found} here (DS_ACCELERATOR={os.environ['DS_ACCELERATOR']}) and --device is {kind}: "
            "unset DS_ACCELERATOR, or make them the same"
        )
    return deepspeed


def _cpu_adam(groups: Sequence[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    try:
        return DeepSpeedCPUAdam(groups, betas=betas, adamw_mode=True)
    except Exception as error:  # of a compiler, of ninja, of torch's loader
        reason = " ".join(str(error.__cause__ or error).split())[-200:]
        raise ValueError(
            "DeepSpeed builds its Adam for the CPU at the first use, and could not: install a C++ compiler (g++) and "
            f"ninja, or write optimizer.params.torch_adam true into --deepspeed-config for torch's ({reason})"
        ) from error
