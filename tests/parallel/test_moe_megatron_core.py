"""Routers and a branch of experts against megatron-core 0.16.1 where its numbers are right: one rank, and ep 2.

Its scores are in fp32 (1e-5 here). Not compared: expert tensor parallelism other than tensor parallelism, where its
gradients are not to be trusted; ``global_aux_loss`` on several ranks, which it divides by their number twice.
"""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import TRAINING, VOCAB, small_config
from pool import Pool

from megatron_hc.config import ModelConfig, MoEConfig, ParallelConfig, TrainConfig
from megatron_hc.mesh import Mesh, mesh_of
from megatron_hc.model.moe import MoE
from megatron_hc.parallel.expert import DISPATCHERS
from megatron_hc.parallel.plan import build_model, compute_dtype, materialize, placements

pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs megatron-core")

Arrays = dict[str, np.ndarray]
LOSSES: dict[str, Any] = {"moe_aux_loss_coeff": (0.3,), "moe_z_loss_coeff": 0.02}
FORMS: dict[str, dict[str, Any]] = {
    "softmax": LOSSES,
    "pre-softmax": {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 1.5, **LOSSES},
    "sigmoid-bias": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_load_balancing_type": ("seq_aux_loss",),
        "moe_aux_loss_coeff": (0.3,),
    },
    "groups": {
        "moe_router_score_function": "sigmoid",
        "moe_router_topk": 4,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        **LOSSES,
    },
    "several-losses": {
        "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss", "global_aux_loss"),
        "moe_aux_loss_coeff": (0.3, 0.2, 0.1),
    },
    "sinkhorn": {"moe_router_load_balancing_type": ("sinkhorn",)},
    "capacity-probs": {"moe_expert_capacity_factor": 0.8, **LOSSES},
    # Not --moe-token-drop-policy position: it takes torch.topk's choice among equals, which is not the first ones.
    "shared-gate": {"moe_shared_expert_intermediate_size": 12, "moe_shared_expert_gate": True, **LOSSES},
}


def in_their_names(arrays: Arrays, num_experts: int) -> Arrays:
    """Our parameters of a branch by megatron-core's names: a module per expert, the gate's rows before the up rows."""
    found = {"router.weight": arrays["router.weight"]}
    first = arrays["experts.linear_fc1.weight"].reshape(num_experts, -1, arrays["router.weight"].shape[1])
    second = arrays["experts.linear_fc2.weight"].reshape(num_experts, -1, arrays["router.weight"].shape[1])
    for expert in range(num_experts):
        name = f"experts.local_experts.{expert}"
        found[f"{name}.linear_fc1.weight"] = np.concatenate([first[expert, 0::2], first[expert, 1::2]])
        found[f"{name}.linear_fc2.weight"] = second[expert].T
    if "shared_experts.linear_fc1.weight" in arrays:
        gate_up = arrays["shared_experts.linear_fc1.weight"]
        found["shared_experts.linear_fc1.weight"] = np.concatenate([gate_up[0::2], gate_up[1::2]])
        found["shared_experts.linear_fc2.weight"] = arrays["shared_experts.linear_fc2.weight"]
        found["shared_experts.gate_weight"] = arrays["shared_experts.gate.weight"]
    return found


def on_a_cpu() -> None:
    """What megatron-core asks of torch.cuda, and of gloo, answered on a CPU."""

    class Stream:
        def wait_stream(self, stream: Stream) -> None: ...
        def synchronize(self) -> None: ...
        def record_event(self) -> Stream:
            return self

    exchange, stream = dist.all_to_all_single, Stream()

    def with_numbers(output: Any, input: Any, received: Any = None, sent: Any = None, **options: Any) -> Any:
        sizes = options.pop("output_split_sizes", received), options.pop("input_split_sizes", sent)
        numbers = (size.tolist() if isinstance(size, torch.Tensor) else size for size in sizes)
        return exchange(output, input, *numbers, **options)

    if torch.cuda.current_device.__name__ == "<lambda>":
        return
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    torch.cuda.Stream = Stream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = lambda device=None: stream  # type: ignore[assignment]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment]
    dist.all_to_all_single = with_numbers  # type: ignore[assignment]


def their_layer(config: ModelConfig, expert_ranks: int = 1, dispatcher: str = "allgather") -> Any:
    """megatron-core's branch. Changes torch.cuda of this process: to be called in a rank of a pool."""
    import torch._dynamo
    from megatron.core import parallel_state
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.tensor_parallel.random import initialize_rng_tracker
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch._dynamo.config.disable = True
    on_a_cpu()
    moe_utils.te_general_gemm = None  # undefined without transformer-engine
    moe_utils.clear_aux_losses_tracker()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(expert_model_parallel_size=expert_ranks)
        initialize_rng_tracker(inference_rng_tracker=True)
    moe = config.moe
    kinds, coefficients = list(moe.moe_router_load_balancing_type), list(moe.moe_aux_loss_coeff)
    theirs = TransformerConfig(
        num_layers=1,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        ffn_hidden_size=config.expert_ffn_size,
        moe_ffn_hidden_size=config.expert_ffn_size,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        params_dtype=torch.float64,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        num_moe_experts=moe.num_experts,
        moe_token_dispatcher_type=dispatcher,
        expert_model_parallel_size=expert_ranks,
        moe_router_dtype="fp64",
        moe_router_load_balancing_type=kinds[0] if len(kinds) == 1 else kinds,
        moe_aux_loss_coeff=coefficients[0] if len(kinds) == 1 else coefficients,
        **{
            name: getattr(moe, name)
            for name in (
                *("moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax"),
                *("moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk"),
                *("moe_router_enable_expert_bias", "moe_z_loss_coeff", "moe_expert_capacity_factor"),
                *("moe_token_drop_policy", "moe_shared_expert_intermediate_size", "moe_shared_expert_gate"),
            )
        },
    )
    spec = get_moe_module_spec(use_te=False, num_experts=moe.num_experts, moe_grouped_gemm=False)
    layer = MoELayer(theirs, spec.submodules, layer_number=1).double()
    layer.set_layer_number(1)
    return layer


class Numbers(NamedTuple):
    """What one rank gets of a branch from its tokens; parameters by megatron-core's names."""

    output: np.ndarray
    inputs: np.ndarray
    """Gradient of the inputs."""
    gradients: Arrays
    """Of this rank's parameters, not yet summed over ranks."""
    losses: dict[str, float]


def our_branch(config: ModelConfig, expert_ranks: int, dispatcher: Any) -> MoE:
    layout = ParallelConfig(expert_model_parallel_size=expert_ranks, moe_token_dispatcher_type=dispatcher)
    run = TrainConfig(model=config, training=TRAINING["fp64"], parallel=layout)
    mesh = mesh_of(dist.get_rank(), expert_ranks, run, "cpu") if expert_ranks > 1 else Mesh()
    model = build_model(run, VOCAB, mesh)
    materialize(model, placements(model, mesh), 1, mesh, compute_dtype(run))
    branch = model.stage_layers()[1].mlp
    assert isinstance(branch, MoE)
    if branch.router.expert_bias is not None:
        branch.router.expert_bias.copy_(torch.linspace(-0.2, 0.2, branch.num_experts, dtype=torch.float64))
    return branch.train()


def numbers_of(branch: MoE) -> tuple[Arrays, Arrays]:
    """(parameters, gradients) by megatron-core's names."""
    parameters = {name: p.detach().numpy() for name, p in branch.named_parameters()}
    gradients = {name: p.grad.numpy() for name, p in branch.named_parameters() if p.grad is not None}
    found = [in_their_names(arrays, branch.experts.num_experts) for arrays in (parameters, gradients)]
    return found[0], found[1]


def both(config: ModelConfig, expert_ranks: int, dispatcher: str) -> tuple[Numbers, Numbers]:
    """In a rank: (ours, theirs)."""
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    generator = torch.Generator().manual_seed(4 + dist.get_rank())
    x = torch.randn(12, 2, 16, generator=generator, dtype=torch.float64)
    branch, inputs = our_branch(config, expert_ranks, dispatcher), x.clone().requires_grad_()
    output = branch(inputs)
    (output * weighting(output)).sum().backward()
    weights, gradients = numbers_of(branch)
    losses = {name: value.item() for name, value in branch.router.step.losses.items()}
    ours = Numbers(output.detach().numpy(), inputs.grad.numpy(), gradients, losses)  # type: ignore[union-attr]

    layer, inputs = their_layer(config, expert_ranks, dispatcher), x.clone().requires_grad_()
    own = dict(layer.named_parameters())
    assert own.keys() == weights.keys(), own.keys() ^ weights.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(torch.from_numpy(weights[name]))
        if branch.router.expert_bias is not None:
            layer.router.expert_bias.copy_(branch.router.expert_bias)
    output, _ = layer.train()(inputs)
    (output * weighting(output)).sum().backward()
    losses = {name: float(entry["values"][0]) for name, entry in get_moe_layer_wise_logging_tracker().items()}
    gradients = {name: p.grad.numpy() for name, p in own.items()}
    return ours, Numbers(output.detach().numpy(), inputs.grad.numpy(), gradients, losses)  # type: ignore[union-attr]


def weighting(output: torch.Tensor) -> torch.Tensor:
    """A loss that is not the same for all outputs."""
    return torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)


def assert_alike(ours: Numbers, theirs: Numbers) -> None:
    for found, wanted in ((ours.output, theirs.output), (ours.inputs, theirs.inputs)):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * abs(wanted).max())
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in ours.gradients.items():
        size = np.linalg.norm(theirs.gradients[name])
        error = np.linalg.norm(gradient - theirs.gradients[name]) / max(size, 1e-12)
        assert error <= 1e-5, f"{name}: {error:.1e}"
    assert ours.losses.keys() == {name for name, value in theirs.losses.items() if value}
    for name, value in ours.losses.items():
        assert abs(value - theirs.losses[name]) <= 1e-5 * theirs.losses[name], name


def config_of(form: str, **changes: Any) -> ModelConfig:
    return small_config(moe=MoEConfig(num_experts=8, **FORMS[form] | changes), ffn_hidden_size=12)


@pytest.fixture(scope="module")
def rank() -> Any:
    ranks = Pool(size=1, timeout_s=300)  # megatron-core takes long to import
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def two_ranks() -> Any:
    ranks = Pool(size=2, timeout_s=300)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("form", FORMS)
def test_a_branch_equals_megatron_core(rank: Pool, form: str) -> None:
    ((ours, theirs),) = rank.run(both, config_of(form), 1, "allgather")
    assert_alike(ours, theirs)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_that_share_out_experts_equal_megatron_core(two_ranks: Pool, form: str, dispatcher: str) -> None:
    """Each rank has its own tokens and half of the experts; every rank's own gradients are compared."""
    changes: dict[str, Any] = {}
    if form == "several-losses":
        changes = {"moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss"), "moe_aux_loss_coeff": (0.3, 0.2)}
    found = two_ranks.run(both, config_of(form, **changes), 2, dispatcher)
    for ours, theirs in found:
        assert_alike(ours, theirs)
    (first, _), (second, _) = found
    assert not np.allclose(first.output, second.output)
