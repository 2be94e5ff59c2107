"""Mixture of experts in one process: against a reference that loops over tokens, and what must not change a number."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    VOCAB,
    assert_same_bits,
    build,
    full_recompute,
    gradients,
    random_tokens,
    randomise,
    selective_recompute,
    small_config,
)
from moe_reference import MoEDecoder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_hc.cli import parse
from megatron_hc.config import RESIDUAL_CONNECTIONS, ModelConfig, MoEConfig
from megatron_hc.log_sinks import tags_of
from megatron_hc.mesh import Mesh
from megatron_hc.model.generate import Sampling, generate
from megatron_hc.model.gpt import GPT
from megatron_hc.model.moe import MoE
from megatron_hc.model.router import Router, Step, routers_of
from megatron_hc.parallel.expert import begin_step
from megatron_hc.parallel.plan import build_model
from megatron_hc.train import train

LOSSES = {"moe_aux_loss_coeff": (0.3,), "moe_z_loss_coeff": 0.02}
ALL_LOSSES = {
    "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss", "global_aux_loss"),
    "moe_aux_loss_coeff": (0.3, 0.2, 0.1),
    "moe_z_loss_coeff": 0.02,
}
SIGMOID = {"moe_router_score_function": "sigmoid"}
SHARED = {"moe_shared_expert_intermediate_size": 8}
FORMS: dict[str, dict[str, Any]] = {
    "softmax": LOSSES,
    "pre-softmax-top1": {"moe_router_pre_softmax": True, "moe_router_topk": 1, **LOSSES},
    "pre-softmax-scaled-all-losses": {
        "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_topk": 3,
        **ALL_LOSSES,
    },
    "sigmoid-bias-groups": {
        **SIGMOID,
        "num_experts": 12,  # 3 of a group, of which the best 2 decide
        "moe_router_topk": 4,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_enable_expert_bias": True,
        "moe_router_load_balancing_type": ("seq_aux_loss",),
        **LOSSES,
    },
    "sigmoid-top1": {**SIGMOID, "moe_router_topk": 1, **ALL_LOSSES},
    "softmax-groups": {"num_experts": 6, "moe_router_num_groups": 3, "moe_router_group_topk": 1, **LOSSES},
    "sinkhorn": {"moe_router_load_balancing_type": ("sinkhorn",)},
    "sinkhorn-top1": {"moe_router_load_balancing_type": ("sinkhorn",), "moe_router_topk": 1},
    "capacity-probs": {"moe_expert_capacity_factor": 0.7, **LOSSES},
    "capacity-position": {"moe_expert_capacity_factor": 0.6, "moe_token_drop_policy": "position", **LOSSES},
    "capacity-padded": {"moe_expert_capacity_factor": 0.7, "moe_pad_expert_input_to_capacity": True, **SHARED},
    "capacity-padded-roomy": {"moe_expert_capacity_factor": 9.0, "moe_pad_expert_input_to_capacity": True},
    "shared": {**SHARED, "moe_router_load_balancing_type": ("none",)},
    "shared-gated-some-layers": {**SHARED, "moe_shared_expert_gate": True, "moe_layer_freq": ("([0]+[1]*2)",)},
    "every-second-layer-wide": {"moe_layer_freq": ("2",), "moe_ffn_hidden_size": 10, **LOSSES},
}
every_form = pytest.mark.parametrize("form", FORMS)


def moe_config(
    form: str | dict[str, Any] = "softmax", residual: dict[str, Any] | None = None, **model: Any
) -> ModelConfig:
    options = FORMS[form] if isinstance(form, str) else form
    return small_config(residual, moe=MoEConfig(**{"num_experts": 4, **options}), **model)


def built(config: ModelConfig, precision: str = "fp64", **more: Any) -> GPT:
    """A training model off its initial values, its expert biases included."""
    model = randomise(build(config, precision, **more)).train()
    generator = torch.Generator().manual_seed(9)
    for router in routers_of([model]):
        if router.expert_bias is not None:
            router.expert_bias += 0.2 * torch.randn(router.num_experts, generator=generator)
    return model


def assert_equals_reference(model: GPT) -> MoEDecoder:
    """Outputs, loss, every gradient (of the router's losses too) and logged losses within 1e-9."""
    tokens = random_tokens()
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    reference = MoEDecoder(model.config, parameters, dict(model.named_buffers()))
    expected = reference.hidden(tokens)
    assert_near(model(tokens), expected, "hidden states")
    weights = torch.linspace(0.5, 1.5, tokens.numel(), dtype=torch.float64).reshape(tokens.shape) / tokens.numel()
    weights[:, -1] = 0
    expected_loss = reference.loss(expected, tokens.roll(-1, 1), weights, VOCAB)
    (expected_loss + reference.router_loss).backward()
    for router in routers_of([model]):
        router.step = Step()
    loss, found = gradients(model, tokens)
    assert_near(loss, expected_loss.detach(), "loss")
    largest = max(p.grad.abs().max().item() for p in parameters.values() if p.grad is not None)
    for name, gradient in found.items():
        wanted = parameters[name].grad
        assert wanted is not None, f"{name} plays no part in the reference"
        error = (gradient - wanted).abs().max().item()
        assert error <= 1e-9 * max(wanted.abs().max().item(), 1e-3 * largest), f"{name}: {error:.1e}"
    for name, module in model.named_modules():
        if isinstance(module, Router):
            wanted_losses = reference.routers[name.removesuffix(".router")].losses
            assert module.step.losses.keys() == wanted_losses.keys()
            for kind, value in module.step.losses.items():
                assert_near(value, wanted_losses[kind], kind)
    return reference


def assert_near(got: Tensor, expected: Tensor, what: str, tolerance: float = 1e-9) -> None:
    error = (got - expected).abs().max().item()
    assert error <= tolerance * max(expected.abs().max().item(), 1e-30), f"{what}: {error:.1e}"


@every_form
def test_every_form_equals_the_reference(form: str) -> None:
    model = built(moe_config(form))
    reference = assert_equals_reference(model)
    router_gradients = [p.grad for name, p in model.named_parameters() if name.endswith("router.weight")]
    assert router_gradients and all(g is not None and g.abs().max() > 1e-6 for g in router_gradients)
    assert reference.routers


@pytest.mark.parametrize("method", RESIDUAL_CONNECTIONS)
def test_every_residual_method_equals_the_reference(method: str) -> None:
    form = {**FORMS["capacity-probs"], **SHARED, "num_experts": 3}
    assert_equals_reference(built(moe_config(form, {"residual_connection": method})))


@pytest.mark.parametrize(
    "changes",
    [
        {"swiglu": False, "disable_bias_linear": False},
        {"value_residual": "learnable", "norm_placement": "peri", "disable_bias_linear": False},
        {"norm_placement": "hybrid"},
    ],
    ids=["gelu-biases", "value-residual-peri-biases", "hybrid"],
)
def test_other_models_equal_the_reference(changes: dict[str, Any]) -> None:
    assert_equals_reference(built(moe_config({**FORMS["capacity-position"], **SHARED}, **changes)))


@pytest.mark.parametrize("logits", ["ties", "one takes all", "one without tokens", "huge"])
@pytest.mark.parametrize("form", ["softmax", "sigmoid-bias-groups", "sinkhorn", "capacity-probs", "capacity-position"])
def test_adversarial_inputs(form: str, logits: str) -> None:
    model = built(moe_config(form, normalization="LayerNorm"))
    with torch.no_grad():
        for layer, router in zip(model.stage_layers(), routers_of([model]), strict=True):
            if logits == "ties":
                router.weight.copy_(router.weight[:1].expand_as(router.weight))
                if router.expert_bias is not None:
                    router.expert_bias.zero_()
            elif logits == "huge":
                router.weight *= 5
            else:
                # The first channel of what routers read becomes 1.
                layer.mlp_norm.weight[0], layer.mlp_norm.bias[0] = 0.0, 1.0
                router.weight[:, 0] = 0.0
                router.weight[1, 0] = 20.0 if logits == "one takes all" else -20.0
    assert_equals_reference(model)
    if form in ("softmax", "capacity-probs", "capacity-position") and logits.startswith("one"):
        chosen = [router(torch.ones(1, 5, 16, dtype=torch.float64)).experts for router in routers_of([model])]
        assert all((e == 1).any(1).all() if logits == "one takes all" else not (e == 1).any() for e in chosen)


def test_fewer_tokens_than_experts() -> None:
    config = moe_config({"num_experts": 64, "moe_router_topk": 2, "moe_expert_capacity_factor": 1.0, **LOSSES})
    assert_equals_reference(built(config))


@every_form
@pytest.mark.parametrize("recompute", ["full", "moe", "mlp"])
def test_recompute_changes_nothing_and_counts_once(form: str, recompute: str) -> None:
    config, tokens = replace(moe_config(form), num_layers=3), random_tokens()
    parallel = full_recompute("uniform", 2) if recompute == "full" else selective_recompute(recompute)
    plain, again = built(config), built(config, parallel=parallel)
    for _ in range(2):  # a second micro-batch, so that counts over the step differ from the micro-batch's
        loss, expected = gradients(plain, tokens)
        loss_again, found = gradients(again, tokens)
        assert loss.equal(loss_again)
        assert_same_bits(found, expected)
        tokens = tokens.roll(3, 1)
    for one, other in zip(routers_of([plain]), routers_of([again]), strict=True):
        assert_same_bits(other.step.losses, one.step.losses)
        assert one.step.num_calls == other.step.num_calls
        if one.step.load is not None:
            assert other.step.load is not None and one.step.load.equal(other.step.load)


def test_recompute_replays_jitter() -> None:
    config, tokens = moe_config({"moe_input_jitter_eps": 0.1, **LOSSES}), random_tokens()
    plain, again = built(config), built(config, parallel=full_recompute())
    _, expected = gradients(plain, tokens)
    _, found = gradients(again, tokens)
    assert_same_bits(found, expected)
    _, later = gradients(plain, tokens)
    assert not later["layers.0.mlp.router.weight"].equal(expected["layers.0.mlp.router.weight"])


def test_jitter_is_noise_of_the_router_alone() -> None:
    model = built(moe_config({"moe_input_jitter_eps": 0.25}))
    router = routers_of([model])[0]
    x = torch.ones(8, 64, 16, dtype=torch.float64)
    noisy = router._jittered(x, 0)
    assert 0.75 <= noisy.min() < 0.76 and 1.24 < noisy.max() <= 1.25
    assert abs(noisy.mean().item() - 1) < 0.01
    assert router._jittered(x, 0).equal(noisy) and not router._jittered(x, 1).equal(noisy)
    tokens = random_tokens()
    assert model.eval()(tokens).equal(model(tokens))


def test_jitter_is_other_noise_at_every_step() -> None:
    model = built(moe_config({"moe_input_jitter_eps": 0.25}))
    router, x = routers_of([model])[0], torch.ones(8, 2, model.config.hidden_size, dtype=torch.float64)

    def noise(seed: int, iteration: int) -> Tensor:
        begin_step(model, Mesh(), seed=seed, iteration=iteration, num_micro_batches=1)
        return router._jittered(x, 0)

    first = noise(1, 0)
    assert noise(1, 0).equal(first) and not noise(1, 1).equal(first) and not noise(2, 0).equal(first)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("form", ["softmax", "capacity-probs", "capacity-padded"])
@pytest.mark.parametrize("bias", [False, True])
def test_grouped_matrix_products_equal_the_loop(form: str, precision: str, bias: bool) -> None:
    """Rows that belong to nobody hold undefined numbers: they must reach neither outputs nor gradients."""
    options = {**FORMS[form], "moe_ffn_hidden_size": 24}
    results = []
    for grouped in (True, False):
        config = moe_config({**options, "moe_grouped_gemm": grouped}, disable_bias_linear=not bias)
        results.append(gradients(built(config, precision), random_tokens()))
    (loss, found), (expected_loss, expected) = results
    tolerance = 2e-5 if precision == "fp32" else 0.03
    assert_near(loss, expected_loss, "loss", tolerance)
    for name, gradient in found.items():
        assert_near(gradient, expected[name], name, tolerance)


@pytest.mark.parametrize(("is_training", "has_grad"), [(True, False), (False, True), (False, False)])
def test_only_a_pass_with_gradients_in_training_counts(is_training: bool, has_grad: bool) -> None:
    """Statistics are measured without gradients in training mode; a bias must not follow what they route."""
    model = built(moe_config({**SIGMOID, **ALL_LOSSES, "moe_router_enable_expert_bias": True}))
    with torch.set_grad_enabled(has_grad):
        model.train(is_training)(random_tokens())
    for router in routers_of([model]):
        assert router.step.load is None and not router.step.losses and router.step.global_counts is None


def test_expert_bias_follows_the_load() -> None:
    form = {**SIGMOID, "moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.01}
    model = built(moe_config(form))
    router = routers_of([model])[0]
    assert router.expert_bias is not None
    before = router.expert_bias.clone()
    gradients(model, random_tokens())
    gradients(model, random_tokens(seed=4))
    load = router.step.load
    assert load is not None and int(load.sum()) == 2 * 2 * 16  # micro-batches, experts per token, tokens
    router.move_bias()
    expected = torch.tensor([0.01 * ((one < 16) - (one > 16)) for one in load.tolist()], dtype=torch.float64)
    assert_near(router.expert_bias - before, expected, "change of the bias", 1e-12)
    with torch.no_grad():
        model.eval()(random_tokens())
    assert router.step.load is load  # evaluation counts nothing


def test_the_load_is_of_the_choices_that_experts_took() -> None:
    form = {**SIGMOID, "moe_router_enable_expert_bias": True, "moe_expert_capacity_factor": 0.5}
    model = built(moe_config(form))
    gradients(model, random_tokens())
    for router in routers_of([model]):
        assert router.step.load is not None
        assert int(router.step.load.max()) == 16 * 2 // router.num_experts // 2  # tokens times choices, halved


@pytest.mark.parametrize("form", ["softmax", "sigmoid-bias-groups", "sinkhorn", "capacity-probs", "shared"])
def test_generation_with_cache_equals_without(form: str) -> None:
    model = built(moe_config(form, {"residual_connection": "hyper"}, max_position_embeddings=24))
    prompt, greedy = [3, 1, 4], Sampling(temperature=0)
    cached = list(generate(model, prompt, 12, greedy, eod=VOCAB - 1))
    assert cached and cached == list(generate(model, prompt, 12, greedy, eod=VOCAB - 1, use_cache=False))


def test_initial_weights_of_an_expert_do_not_depend_on_the_others() -> None:
    few, many = build(moe_config({"num_experts": 2})), build(moe_config({"num_experts": 5}))
    for name in ("linear_fc1", "linear_fc2"):
        one = few.get_parameter(f"layers.1.mlp.experts.{name}.weight").unflatten(0, (2, -1))
        other = many.get_parameter(f"layers.1.mlp.experts.{name}.weight").unflatten(0, (5, -1))
        assert one.equal(other[:2]) and not other[0].equal(other[1])


def test_only_marked_layers_have_experts() -> None:
    model = build(moe_config("shared-gated-some-layers"))
    assert [isinstance(layer.mlp, MoE) for layer in model.stage_layers()] == [False, True, True]


def test_routers_stay_wide_in_bf16() -> None:
    model = build(moe_config("sigmoid-bias-groups"), "bf16")
    for router in routers_of([model]):
        assert router.weight.dtype == torch.float32
        assert router.expert_bias is not None and router.expert_bias.dtype == torch.float32
    assert model.get_parameter("layers.0.mlp.experts.linear_fc1.weight").dtype == torch.bfloat16


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_router_dtype(score: str) -> None:
    """fp64 in an fp32 model: scores that fp32 cannot hold; the branch's output stays fp32."""
    form = {"moe_router_score_function": score}
    x = torch.randn(8, 2, 16, generator=torch.Generator().manual_seed(2))
    found = {}
    for dtype in ("fp32", "fp64"):
        branch = built(moe_config({**form, "moe_router_dtype": dtype}), "fp32").stage_layers()[1].mlp
        found[dtype] = branch.router(x).weights.double()
        assert branch(x).dtype == torch.float32
        logits = (x.double() @ branch.router.weight.double().t()).flatten(0, 1)
    chosen = logits.topk(2).values
    expected = chosen.softmax(-1) if score == "softmax" else chosen.sigmoid() / chosen.sigmoid().sum(-1, keepdim=True)
    assert_near(found["fp64"], expected, "fp64", 1e-14)
    assert_near(found["fp32"], expected, "fp32", 1e-5)
    assert not torch.allclose(found["fp32"], expected, rtol=1e-10, atol=0)


class HostReads(TorchDispatchMode):
    """Operations whose result's shape, or a Python number, depends on what is in a tensor."""

    NAMES = ("_local_scalar_dense", "nonzero", "repeat_interleave", "unique", "bincount", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in func.__name__ for name in self.NAMES):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["softmax", "sigmoid-bias-groups", "capacity-probs", "capacity-padded", "shared"])
def test_the_host_reads_nothing(form: str) -> None:
    """On a GPU it would wait: forward and backward with grouped matrix products need no number out of a tensor."""
    options = {**FORMS[form], "moe_ffn_hidden_size": 24}
    branch = built(moe_config(options), "fp32").stage_layers()[1].mlp
    x = torch.randn(8, 2, 16, requires_grad=True)
    with HostReads() as mode:
        branch(x).square().sum().backward()
    assert not mode.found
    with HostReads() as mode:
        float(x.detach().sum())
    assert mode.found  # it sees such a read


REFUSED = [
    ({"moe_router_topk": 5}, "--moe-router-topk (5) must be at most --num-experts (4)"),
    ({"moe_router_topk": 1}, "add --moe-router-pre-softmax"),
    ({"moe_router_enable_expert_bias": True}, "needs --moe-router-score-function sigmoid"),
    ({"moe_router_num_groups": 2}, "need each other"),
    ({"moe_router_num_groups": 3, "moe_router_group_topk": 1}, "(3) must divide --num-experts (4)"),
    ({"moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss")}, "one number for each"),
    ({"moe_router_load_balancing_type": ("sinkhorn",), "moe_aux_loss_coeff": (0.1,)}, "needs a loss"),
    ({"moe_router_load_balancing_type": ("quantile",)}, "must be any of"),
    ({"moe_pad_expert_input_to_capacity": True}, "need --moe-expert-capacity-factor"),
    ({"moe_shared_expert_gate": True}, "needs --moe-shared-expert-intermediate-size"),
    ({"moe_layer_freq": ("[0,1]",)}, "--num-layers (3)"),
    ({"moe_layer_freq": ("__import__('os')",)}, "must be a whole number N"),
    ({"moe_layer_freq": ("[0]*3",)}, "no layer experts"),
    ({"num_experts": None, "moe_z_loss_coeff": 0.1}, "--moe-z-loss-coeff (0.1) needs --num-experts"),
]


@pytest.mark.parametrize("options, message", REFUSED, ids=[message for _, message in REFUSED])
def test_refused_in_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        MoEConfig(**{"num_experts": 4, **options}).validate(3)
    assert message in str(caught.value)


TP2 = "--tensor-model-parallel-size 2"
REFUSED_LAYOUTS = [
    (4, f"--num-experts 4 {TP2}", f"--num-experts with {TP2.replace(' 2', ' (2)')} needs --sequence-parallel"),
    (4, "--num-experts 3 --expert-model-parallel-size 2", "(2) must divide --num-experts (3)"),
    (2, "--num-experts 4 --expert-model-parallel-size 4", "must divide the processes of a pipeline stage (2)"),
    (4, f"--num-experts 4 {TP2} --sequence-parallel --expert-tensor-parallel-size 3", "--moe-ffn-hidden-size (64)"),
    (4, f"--num-experts 4 {TP2} --sequence-parallel --moe-ffn-hidden-size 9", "--moe-ffn-hidden-size (9)"),
    (
        *(4, f"--num-experts 4 {TP2} --sequence-parallel --moe-shared-expert-intermediate-size 9"),
        "must divide --moe-shared-expert-intermediate-size (9)",
    ),
    (2, "--expert-model-parallel-size 2", "need --num-experts"),
    (2, "--expert-tensor-parallel-size 2", "need --num-experts"),
    (1, "--recompute-granularity selective --recompute-modules moe", "--recompute-modules moe needs --num-experts"),
    (1, "--moe-per-layer-logging", "needs --num-experts"),
    (1, "--moe-use-upcycling --load x", "--moe-use-upcycling needs --num-experts"),
    (1, "--num-experts 4 --moe-use-upcycling", "--moe-use-upcycling needs --load"),
    (1, "--num-experts 4 --moe-use-upcycling --load x --moe-router-pre-softmax", "leave out"),
    (1, "--num-experts 4 --moe-use-upcycling --load x --moe-ffn-hidden-size 8", "leave out"),
]


@pytest.mark.parametrize("world_size, flags, message", REFUSED_LAYOUTS, ids=[flags for _, flags, _ in REFUSED_LAYOUTS])
def test_a_layout_that_cannot_work_is_refused(world_size: int, flags: str, message: str) -> None:
    run = """--num-layers 2 --hidden-size 16 --num-attention-heads 4 --seq-length 8 --micro-batch-size 2 --train-iters 2
        --lr 1e-3 --mock-data --tokenizer-type ByteTokenizer --global-batch-size 16"""
    with pytest.raises(ValueError) as caught:
        parse(f"{run} {flags}".split()).config.validate(world_size)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "given, expected",
    [
        (("1",), [True] * 4),
        (("2",), [True, False, True, False]),
        (("([0]+[1]*3)",), [False, True, True, True]),
        (("([0]+[1])*2",), [False, True, False, True]),
        (("0", "1", "1", "0"), [False, True, True, False]),
    ],
)
def test_layer_frequency(given: tuple[str, ...], expected: list[bool]) -> None:
    assert MoEConfig(num_experts=4, moe_layer_freq=given).has_experts(4) == expected


RUN = "--mock-data --tokenizer-type ByteTokenizer --save run".split()
EXAMPLES = sorted((Path(__file__).parents[3] / "examples" / "moe").glob("*.yaml"))


@pytest.mark.parametrize("file", EXAMPLES, ids=[file.stem for file in EXAMPLES])
def test_an_example_is_accepted(file: Path) -> None:
    config = parse(["--yaml-cfg", str(file), *RUN]).config
    config.validate()
    assert config.model.moe.num_experts


# Parameters without those of the residual, those that a token uses (in billions), vocabulary, those of the residual.
SIZES = {
    "olmoe-1b-7b-hyper": (6.9, 1.3, 50304, 394_048),  # 2409.02060; 2409.19606: +0.0057 %
    "olmoe-1b-7b-frac": (6.9, 1.3, 50304, 165_056),  # 2503.14125: +0.0024 %
    "mixtral-8x7b-mhc": (46.7, 12.9, 32000, None),  # 2401.04088
}


@pytest.mark.parametrize("name", SIZES)
def test_an_example_has_the_published_size(name: str) -> None:
    whole, active, vocab_size, of_residual = SIZES[name]
    (file,) = (file for file in EXAMPLES if file.stem == name)
    config = parse(["--yaml-cfg", str(file), *RUN]).config
    model, moe = build_model(config, vocab_size, Mesh()), config.model.moe
    assert moe.num_experts is not None
    residual = sum(p.numel() for n, p in model.named_parameters() if "residual" in n)
    sizes = {n: p.numel() for n, p in model.named_parameters() if "residual" not in n}
    idle = sum(size for n, size in sizes.items() if ".experts." in n) * (1 - moe.moe_router_topk / moe.num_experts)
    assert round(sum(sizes.values()) / 1e9, 1) == whole
    assert round((sum(sizes.values()) - idle) / 1e9, 1) == active
    assert of_residual in (None, residual)


def test_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Megatron-LM's names: means in the console, layers in the sinks; a line's numbers are means of its steps."""
    file = tmp_path / "metrics.jsonl"
    flags = f"""--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --micro-batch-size 2 --lr 1e-3
        --train-iters 4 --log-interval 2 --eval-iters 0 --num-workers 0 --mock-data --tokenizer-type ByteTokenizer
        --num-experts 4 --moe-aux-loss-coeff 0.1 --moe-z-loss-coeff 0.1 --moe-per-layer-logging --moe-layer-freq 2
        --metrics-jsonl {file} --device cpu"""
    train(parse(flags.split()))
    lines = [line for line in capsys.readouterr().out.splitlines() if " lm loss: " in line]
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == len(records) == 2
    for line, record in zip(lines, records, strict=True):
        for name in ("load_balancing_loss", "z_loss"):
            assert f"| {name}: {record[name]:.6E} |" in line
            assert record[f"moe/{name}_layer_0"] == record[name] and f"moe/{name}_layer_1" not in record
            assert tags_of(record)[name] == name and f"moe/{name}_layer_0" in tags_of(record)
        assert 1 - 1e-6 < record["load_balancing_loss"] < 2
