"""Every registered residual method against an independent reference and against what the interface promises.

A method is tested by being registered: without a reference and a stated claim about its initial values it fails here.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    ADDITIONS,
    COMBINATIONS,
    FORMS,
    Case,
    all_combinations,
    cases,
    combined,
    every_case,
    is_allowed,
    main_cases,
)
from helpers import (
    VOCAB,
    assert_same_bits,
    build,
    full_recompute,
    gradients,
    loss_of,
    random_tokens,
    randomise,
    selective_recompute,
    small_config,
)
from reference import REFERENCES
from reference.compare import assert_equals_reference
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from megatron_hc.config import RESIDUAL_CONNECTIONS, ModelConfig, TrainConfig
from megatron_hc.mesh import Mesh
from megatron_hc.model.gpt import GPT, run_layers
from megatron_hc.parallel.plan import build_model, materialize, owned_parameters, placements
from megatron_hc.residual import (
    RESIDUALS,
    VALUE_RESIDUALS,
    Carry,
    LinearMix,
    Mix,
    Norm,
    Reads,
    Residual,
    base,
    carry_boundary,
    flatten,
    unflatten,
    value_boundary,
)
from megatron_hc.residual.base import stream_dtype_of


def test_every_method_has_a_reference_and_a_claim() -> None:
    assert set(RESIDUALS) == set(REFERENCES), "a registered method needs an independent reference"
    assert set(RESIDUALS) == set(FORMS), "a registered method needs a stated claim about its initial values"
    assert set(RESIDUALS) == set(RESIDUAL_CONNECTIONS), "config.py and the registry disagree"
    placements_of = typing.get_args(typing.get_type_hints(ModelConfig)["norm_placement"])
    tested = {name: {getattr(combined("plain", a).config(), name) for a in ADDITIONS} for name in AXES}
    assert tested["norm_placement"] == set(placements_of), "a norm placement needs a line in ADDITIONS"
    assert tested["value_residual"] == set(VALUE_RESIDUALS), "a value residual needs a line in ADDITIONS"
    assert all(is_allowed(combined(*pair)) for pair in COMBINATIONS)


AXES = ("norm_placement", "value_residual")


# Numbers


@every_case()
def test_outputs_and_gradients_equal_the_reference(case: Case) -> None:
    assert_equals_reference(randomise(build(case.config())))


@pytest.mark.parametrize(
    ("method", "residual"),
    [
        ("hyper", {"residual_streams": 8}),
        ("mhc", {"residual_streams": 8, "mhc_sinkhorn_iterations": 2}),
        ("gated", {}),
        ("deep-delta", {}),
    ],
)
def test_layernorm_and_many_streams(method: str, residual: dict[str, int]) -> None:
    """--normalization is of sublayers and hyper-connections; the norms of other methods' weights are RMSNorm."""
    residual = {"residual_connection": method, **residual}
    assert_equals_reference(randomise(build(small_config(residual, normalization="LayerNorm"))))


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in all_combinations()])
def test_every_combination_equals_the_reference(case: Case) -> None:
    test_outputs_and_gradients_equal_the_reference(case)
    test_three_stages_equal_one(case, "fp32")
    test_cached_decoding_equals_the_full_forward(case)


FUSED = [case for case in cases() if issubclass(RESIDUALS[case.residual["residual_connection"]], LinearMix)]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in FUSED])
def test_what_runs_in_fp32_equals_the_plain_form(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where float64 goes as fp32 does, through the fused boundary or around it, every form has the same numbers."""
    model, tokens = randomise(build(case.config(norm_epsilon=0.01))), random_tokens()
    expected, expected_grads = gradients(model, tokens)
    monkeypatch.setattr(LinearMix, "is_fused", lambda self, stream: True)
    loss, grads = gradients(model, tokens)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    scale = max(float(grad.abs().max()) for grad in expected_grads.values())
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-9, atol=1e-11 * scale, msg=name)


@every_case()
def test_stated_equality_with_the_plain_residual_at_the_start(case: Case) -> None:
    if case.claim == "unstated":
        return
    changes = {"norm_epsilon": 0.0} if case.claim == "without eps" else {}
    model, tokens = build(case.config(**changes)), random_tokens()
    kept = ("residual_scale", "base_num_layers")
    residual = {name: case.residual[name] for name in kept if name in case.residual}
    plain = build(small_config(residual, **{**case.model, **changes}))
    difference = (model(tokens) - plain(tokens)).abs().max().item()
    if case.claim == "nothing":
        assert difference > 1e-6, "equals the plain residual: state it"
    else:
        assert difference <= 1e-10


@every_case()
def test_bf16_is_near_fp32(case: Case) -> None:
    """Relative root mean square difference of the hidden states of at most 3 % with the same (rounded) weights."""
    half = randomise(build(case.config(init_method_std=0.1), "bf16"), scale=0.1)
    single = build(case.config(init_method_std=0.1), "fp32")
    single.load_state_dict({name: p.float() for name, p in half.state_dict().items()})
    tokens = random_tokens()
    exact = single(tokens)
    assert half(tokens).dtype == torch.bfloat16
    assert (half(tokens).float() - exact).norm() <= 0.03 * exact.norm()


@every_case()
def test_coefficients_stay_fp32_under_bf16(case: Case) -> None:
    model = randomise(build(case.config(), "bf16"))
    for name, module, local_name in owned_parameters(model):
        if isinstance(module, Residual):
            assert getattr(module, local_name).dtype == torch.float32, name
    carry = model.open(random_tokens(), torch.arange(8).unsqueeze(0))
    for layer in model.stage_layers():
        for residual in (layer.attention_residual, layer.mlp_residual):
            x, carry = residual.read(carry, Norm(None))
            assert (x.q if isinstance(x, Reads) else x).dtype == torch.bfloat16
            assert carry.stream.dtype == torch.bfloat16
            if carry.mix is not None:
                assert {t.dtype for t in carry.mix if t is not None} == {torch.float32}
            carry = residual.write(carry, branch(x))


@pytest.mark.parametrize("method", ["hyper", "frac", "virtual-width"])
@pytest.mark.parametrize("name", ["static_read", "static_keep", "static_write"])
def test_a_static_weight_of_1003_is_seen_under_bf16(method: str, name: str) -> None:
    """bfloat16 knows no number between 1 and 1.0078: a weight held or applied in it would read 1."""
    options = {"virtual_width_projections": False} if method == "virtual-width" else {}
    config = small_config({"residual_connection": method, "static_residual": True, **options})
    residual = build(config, "bf16").stage_layers()[0].attention_residual
    hidden = torch.randn(400, 8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()

    def written(weight: float) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            getattr(residual, name).copy_(residual.initial(name, no_draw) * weight)
        x, carry = residual.read(residual.open(hidden), Norm(None))
        output = hidden if name == "static_write" else torch.zeros_like(hidden)
        if name == "static_write":
            carry = carry._replace(stream=torch.zeros_like(carry.stream))
        return x, residual.settle(residual.write(carry, output)).stream

    index = 0 if name == "static_read" else 1
    before, after = written(1.0)[index].double(), written(1.003)[index].double()
    assert abs(after.abs().sum() / before.abs().sum() - 1.003) < 2e-4


@pytest.mark.parametrize(("method", "name"), [("denseformer", "alpha"), ("muddformer", "static")])
def test_a_weight_over_depth_of_1003_is_seen_under_bf16(method: str, name: str) -> None:
    residual = build(small_config({"residual_connection": method}), "bf16").stage_layers()[1].attention_residual
    generator = torch.Generator().manual_seed(0)
    stream, earlier = (torch.randn(400, 8, 1, 16, generator=generator).bfloat16() for _ in range(2))
    with torch.no_grad():
        getattr(residual, name)[..., -1] = 1.003
    _, carry = residual.read(Carry(stream=stream, history=(earlier,)), Norm(None))
    assert abs(carry.stream.double().abs().sum() / stream.double().abs().sum() - 1.003) < 2e-4


def test_a_write_weight_of_1003_of_mhc_is_seen_under_bf16() -> None:
    residual = build(small_config({"residual_connection": "mhc"}), "bf16").stage_layers()[0].attention_residual
    hidden = torch.randn(400, 8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        residual.bias[4:8] = math.log(1.003 / (2 - 1.003))  # 2 sigmoid(b) = 1.003
    _, carry = residual.read(residual.open(hidden), Norm(None))
    carry = carry._replace(stream=torch.zeros_like(carry.stream))
    written = residual.settle(residual.write(carry, hidden)).stream.double()
    assert abs(written.abs().sum() / hidden.double().abs().sum() / 4 - 1.003) < 2e-4


ROUNDED_BEFORE = ("rezero", "layerscale", "laurel-rw")
"""Outputs are rounded once they are scaled."""
WIDE = [case for case in cases() if case.claim != "unstated" and not case.name.startswith(ROUNDED_BEFORE)]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in WIDE])
def test_reads_and_writes_of_bf16_are_rounded_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets the same bf16 carry as a float64 module with the same parameters, whose results are then rounded."""
    monkeypatch.setattr(LinearMix, "is_fused", lambda self, stream: False)
    narrow, exact = randomise(build(case.config(), "bf16")), build(case.config())
    with torch.no_grad():
        for (name, ours), theirs in zip(narrow.named_parameters(), exact.parameters(), strict=True):
            theirs.copy_(ours.zero_() if name.endswith("gate_up") else ours)  # the product with it is bf16's
    hidden = torch.randn(32, 4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    pairs: list[tuple[Tensor, Tensor]] = []

    def widened(carry: Carry) -> Carry:
        return torch.utils._pytree.tree_map_only(Tensor, Tensor.double, carry)

    def sublayers(model: GPT) -> list[Residual]:
        return [r for layer in model.stage_layers() for r in (layer.attention_residual, layer.mlp_residual)]

    carry = narrow.entry_residual.open(hidden)
    for ours, theirs in zip(sublayers(narrow), sublayers(exact), strict=True):
        x, after = ours.mixed(carry)
        wide_x, wide_after = theirs.mixed(widened(carry))
        if not isinstance(x, Reads):  # which are rounded before their norms, too
            pairs.append((x, wide_x))
        pairs.append((after.stream, wide_after.stream))
        if after.mix is not None:
            for found, expected in zip(after.mix, wide_after.mix, strict=True):
                if found is not None:
                    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
        output = branch(x)
        carry = ours.settle(ours.write(after, output))
        pairs.append((carry.stream, theirs.settle(theirs.write(widened(after), output.double())).stream))
        state = ours.state(carry)
        assert state.dtype == torch.float32
        torch.testing.assert_close(state.double(), theirs.state(widened(carry)), rtol=1e-5, atol=1e-5)
    if getattr(narrow.final_residual, "reduce", None) is None:
        pairs.append((narrow.final_residual.mixed(carry)[0], exact.final_residual.mixed(widened(carry))[0]))
    for found, expected in pairs:
        assert found.dtype == torch.bfloat16
        assert (found == expected.bfloat16()).double().mean() > 0.98


def test_one_kernel_folds_and_norms_where_the_read_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU. Whoever reads otherwise would get the plain residual's numbers from it."""
    monkeypatch.setattr(base, "is_one_pass_with_sum", lambda stream: True)
    norm = build(small_config(), "fp32").stage_layers()[1].mlp_norm
    carry = Carry(torch.zeros(1, 1, 1, 16), pending=(torch.zeros(1, 1, 16), None))
    found = set()
    for method in RESIDUALS:
        residual = build(small_config({"residual_connection": method}), "fp32").stage_layers()[1].mlp_residual
        if residual.parts_with_sum(carry, Norm(norm)) is not None:
            found.add(method)
    assert found == {"plain", "rezero", "layerscale"}

    plain = build(small_config(), "fp32").stage_layers()[1].mlp_residual
    for others in (Norm(None), Norm(norm, replaces_stream=True), Norm(norm, stream_scale=torch.nn.Identity())):
        assert plain.parts_with_sum(carry, others) is None
    assert plain.parts_with_sum(carry.replace(pending=None), Norm(norm)) is None
    norm.forward = norm.forward  # as recompute does
    assert plain.parts_with_sum(carry, Norm(norm)) is None


# Locality, recompute, stages, generation


def branch(x: Tensor | Reads) -> Tensor:
    """A sublayer in which no token sees another one."""
    mixed = x.q + 0.5 * x.k - x.v if isinstance(x, Reads) else x
    return torch.tanh(mixed).roll(1, -1)


def residual_path(model: GPT, hidden: Tensor) -> Tensor:
    """The residual path alone, from [S, B, C] to [S, B, C]: sublayers are ``branch``."""
    carry = model.entry_residual.open(hidden)
    for layer in model.stage_layers():
        for residual, norm in (
            (layer.attention_residual, layer.attention_read_norm),
            (layer.mlp_residual, layer.mlp_read_norm),
        ):
            x, carry = residual.read(carry, norm)
            carry = residual.write(carry, branch(x))
    return model.close(carry)


@every_case()
def test_no_token_looks_at_another(case: Case) -> None:
    model = randomise(build(case.config()))
    hidden = torch.randn(8, 2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = residual_path(model, hidden)
    halves = torch.cat([residual_path(model, hidden[:4]), residual_path(model, hidden[4:])])
    torch.testing.assert_close(whole, halves, rtol=1e-12, atol=1e-12)


@every_case()
def test_later_tokens_change_nothing_before_them(case: Case) -> None:
    model, tokens = randomise(build(case.config())), random_tokens()
    other = tokens.clone()
    other[:, 4:] = (other[:, 4:] + 1) % VOCAB
    first, second = model(tokens), model(other)
    torch.testing.assert_close(first[:4], second[:4], rtol=1e-12, atol=1e-12)
    assert (first[4:] - second[4:]).abs().max() > 1e-6


@every_case()
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recompute_changes_no_bit(case: Case, precision: str) -> None:
    tokens = random_tokens()
    results = [
        gradients(randomise(build(case.config(), precision, parallel=parallel)), tokens)
        for parallel in (None, full_recompute(), selective_recompute("residual", "layernorm"))
    ]
    for loss, found in results[1:]:
        assert loss.equal(results[0][0])
        assert_same_bits(found, results[0][1])


def run_in_stages(model: GPT, tokens: Tensor, cuts: tuple[int, ...], check: Callable[[Carry, int], Carry]) -> Tensor:
    """Hidden states, the carry passing through ``check(carry, layer)`` at each cut."""
    positions = torch.arange(tokens.shape[1]).unsqueeze(0)
    context = model.context(positions, None)
    carry = model.open(tokens, positions)
    for index, layer in enumerate(model.stage_layers()):
        if index in cuts:
            carry = check(carry, index)
        carry = run_layers([layer], carry, context)
    return model.close(carry)


@every_case()
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-fp32-residual"])
def test_three_stages_equal_one(case: Case, precision: str) -> None:
    """Through flatten and unflatten, bit for bit with all gradients; boundary() gives every shape and dtype."""
    fp32_stream = precision == "bf16-fp32-residual"
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32
    model = randomise(build(case.config(fp32_residual_connection=fp32_stream), precision.split("-")[0]))
    tokens = random_tokens()
    loss, expected = gradients(model, tokens)

    def through_a_stage_boundary(carry: Carry, layer: int) -> Carry:
        first = model.stage_layers()[layer].attention_residual
        tensors = flatten(first.settle(carry))
        specs = carry_boundary(first, layer)
        assert len(specs) == len(tensors)
        for tensor, spec in zip(tensors, specs, strict=True):
            assert tuple(tensor.shape) == (8, 2, *spec.shape), spec
            assert tensor.dtype == stream_dtype_of(spec, dtype, fp32_stream), spec
        return unflatten([t.clone().contiguous() for t in tensors], specs)

    model.zero_grad(set_to_none=True)
    hidden = run_in_stages(model, tokens, (1, 2), through_a_stage_boundary)
    split_loss = loss_of(model, tokens, hidden)
    split_loss.backward()
    assert split_loss.detach().equal(loss)
    assert_same_bits({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected)


@every_case()
def test_a_name_at_two_boundaries_is_one_tensor(case: Case) -> None:
    """What a pipeline process has from an earlier stage of its own it keeps by its name, and is not sent again."""
    model, tokens, positions = randomise(build(case.config(), "fp32")), random_tokens(), torch.arange(8).unsqueeze(0)
    context, carry = model.context(positions, None), model.open(tokens, positions)
    held: list[tuple[Tensor, str]] = []
    for index, layer in enumerate(model.stage_layers()):
        carry = layer.attention_residual.settle(carry)
        specs, tensors = carry_boundary(layer.attention_residual, index), flatten(carry)
        for spec, tensor in zip(specs, tensors, strict=True):
            if spec.kind == "values":  # without names
                continue
            same = [name for other, name in held if other is tensor]
            assert all(name == spec.name != "" for name in same), f"{spec} was {same}"
            assert not any(name == spec.name != "" for other, name in held if other is not tensor), spec
            held.append((tensor, spec.name))
        carry = layer(carry, context)


@every_case()
def test_cached_decoding_equals_the_full_forward(case: Case) -> None:
    model, tokens = randomise(build(case.config())).eval(), random_tokens()
    with torch.no_grad():
        whole = model(tokens)
        caches = model.new_caches(tokens.shape[1], tokens.shape[0])
        pieces = [model(tokens[:, a:b], caches=caches) for a, b in ((0, 3), (3, 4), (4, 6), (6, 7), (7, 8))]
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-11, atol=1e-11)


@main_cases()
def test_a_layer_compiles_without_a_graph_break(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives what the same code gives without the compiler, with all gradients."""
    torch._dynamo.reset()
    model, tokens = randomise(build(case.config(), "fp32")), random_tokens()
    positions = torch.arange(8).unsqueeze(0)
    context, carry = model.context(positions, None), model.open(tokens, positions)
    for layer in model.stage_layers()[:2]:  # the second one enters with a pending write
        got = torch.compile(layer, fullgraph=True, backend=checked_graph)(carry, context)
        with monkeypatch.context() as patch:
            # The list of streams and the formulas of a compiler's code, which test_boundary and test_compiled check.
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            expected = layer(carry, context)
        found = []
        for out in (got, expected):
            results = flatten(model.final_residual.settle(out))
            loss = sum((result.square().sum() for result in results), torch.zeros(()))
            grads = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True, allow_unused=True)
            found.append((*results, *(g for g in grads if g is not None)))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)
        carry = expected


def checked_graph(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
    """A backend that compiles nothing, and fails where torch 2.11 would make wrong gradients: see ``compiled.own``."""
    calls = [n for n in graph.graph.nodes if n.target is torch.ops.higher_order.autograd_function_apply]
    for call in calls:
        nodes = graph.get_submodule(call.args[0].target).graph.nodes
        (results, _), *_ = next(n.args for n in nodes if n.op == "output")
        handed_out = [n for n in nodes if n.meta.get("example_value") is results[0].meta["example_value"]]
        assert handed_out == [results[0]], f"forward of an autograd Function returns a tensor that {handed_out[0]} made"
    return graph


@pytest.mark.parametrize("method", ["hyper", "frac", "mhc"])
def test_a_layer_compiles_around_the_fused_operation(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: a boundary is one operation of the graph, forward and backward; numbers as without compiling."""
    torch._dynamo.reset()
    monkeypatch.setattr(base, "is_listed", lambda stream: False)
    model = randomise(build(small_config({"residual_connection": method}), "fp32"))
    positions = torch.arange(8).unsqueeze(0)
    context, carry = model.context(positions, None), model.open(random_tokens(), positions)
    operations: list[str] = []

    def listed(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        operations.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=listed, bw_compiler=listed)
    found: list[tuple[Tensor, ...]] = []
    for run in (torch.compile(model.stage_layers()[0], fullgraph=True, backend=backend), model.stage_layers()[0]):
        if found:  # the formulas of a compiler's code, which test_compiled checks
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        model.zero_grad(set_to_none=True)
        (stream,) = flatten(model.final_residual.settle(run(carry, context)).replace(values=()))
        stream.square().sum().backward(retain_graph=True)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append((stream, *grads))
    assert operations.count("megatron_hc.boundary.default") == 2
    assert operations.count("megatron_hc.boundary_backward.default") == 2
    assert len(found[0]) > 10
    for compiled, eager in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


@every_case()
def test_a_layer_makes_its_carry_by_replace(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 hands what a named tuple's ``_replace`` makes out of compiled code as an empty tuple."""
    model, tokens = build(case.config(), "fp32"), random_tokens()
    for kind in (Carry, Mix):
        monkeypatch.setattr(kind, "_replace", None)
    model(tokens)


# Initial values, counts, groups


def no_draw(part: str, shape: tuple[int, ...], std: float) -> Tensor:
    raise AssertionError("a static weight needs no random numbers")


@every_case()
def test_initial_values_are_the_same_in_every_build(case: Case) -> None:
    """Repeated builds agree, and a stage that holds one layer has that layer's values of the whole."""
    whole = build(case.config(), "fp32").state_dict()
    assert_same_bits(build(case.config(), "fp32").state_dict(), whole)
    with torch.device("meta"):
        stage = GPT(case.config(), VOCAB, layers=[1])
    materialize(stage, placements(stage, Mesh()), 1, Mesh(), torch.float32)
    part = stage.state_dict()
    assert part and all(name.startswith("layers.1.") for name in part)
    assert_same_bits(part, {name: whole[name] for name in whole if name.startswith("layers.1.")})
    other = build(case.config(), "fp32", seed=2).state_dict()
    name = "layers.0.mlp.linear_fc1.weight"
    assert not other[name].equal(whole[name])


def logits_of(shares: list[float]) -> list[float]:
    return [math.log(share / (1 - share)) for share in shares]


def low_start(rank: int) -> Tensor:
    """LAuReL's A: column c has 1 / sqrt(r C) in row c mod r."""
    return torch.tensor([[[(c % rank == i) / math.sqrt(rank * 16) for c in range(16)] for i in range(rank)]])


ONE, ZERO, EYE, OWN = torch.ones(()), torch.zeros(()), torch.eye(4), torch.tensor([-1.0, -1, -1, 1])
MHC_MATRIX = (-8 * (1 - EYE)).flatten().tolist()
STARTS: list[tuple[dict[str, Any], dict[str, Tensor]]] = [
    # fields of ResidualConfig, parameters of sublayer 3 (the MLP of layer 1) at the start; width 16
    (
        {"residual_connection": "hyper"},
        {
            "static_read": EYE[:, 3:],
            "static_keep": EYE,
            "static_write": ONE,
            "dynamic_weight": ZERO,
            "scale_alpha": 0.01 * ONE,
            "scale_beta": 0.01 * ONE,
        },
    ),
    ({"residual_connection": "hyper", "residual_streams": 3}, {"static_read": torch.eye(3)[:, :1]}),
    (
        {"residual_connection": "frac"},
        {"static_read": EYE, "static_write": ONE, "scale_alpha": 0.01 * ONE, "norm_weight": ONE},
    ),
    (
        {"residual_connection": "mhc"},
        {
            "bias": torch.tensor([*logits_of([0.1, 0.1, 0.1, 0.7]), *[0.0] * 4, *MHC_MATRIX]),
            "alpha": 0.01 * ONE,
            "projection": ZERO,
        },
    ),
    (
        {"residual_connection": "mhc", "mhc_single_pass": True, "mhc_init_gating_factor": 0.2},
        {
            "bias": torch.tensor([*logits_of([0.7, 0.1, 0.1, 0.1]), *[0.0] * 4, *MHC_MATRIX]),
            "alpha": 0.2 * ONE,
            "projection": ZERO,
        },
    ),
    (
        {"residual_connection": "mhc-lite"},
        {"bias": torch.cat([OWN, OWN, torch.tensor([0.0, *[-8.0] * 23])]), "alpha": 0.01 * ONE, "projection": ZERO},
    ),
    (
        {"residual_connection": "kromhc"},
        {"bias": torch.cat([OWN, OWN, torch.tensor([0.0, -8, 0, -8])]), "alpha": 0.01 * ONE, "projection": ZERO},
    ),
    (
        {"residual_connection": "virtual-width"},
        {
            "static_read": torch.eye(4, 2),
            "static_keep": EYE,
            "static_write": torch.eye(2).repeat(1, 2),
            "dynamic_weight": ZERO,
            "scale_alpha": ONE,
            "scale_beta": ONE,
            "norm_weight": ONE,
        },
    ),
    ({"residual_connection": "attention"}, {"query": ZERO, "key_norm_weight": ONE}),
    ({"residual_connection": "rezero"}, {"weight": ZERO}),
    ({"residual_connection": "laurel", "laurel_rank": 5}, {"low": low_start(5), "high": ZERO}),
    (
        {"residual_connection": "laurel", "laurel_form": "rw-lr-pa", "laurel_rank": 3},
        {"weights": ZERO, "gammas": ONE, "low": low_start(3), "high": ZERO},
    ),
    ({"residual_connection": "laurel", "laurel_form": "rw-pa"}, {"weights": ZERO, "gammas": ZERO}),
    ({"residual_connection": "sparse-aggregation"}, {"weights": torch.tensor([1.0, 0, 0])}),
    ({"residual_connection": "deep-delta"}, {"projection": ZERO, "bias": torch.tensor([0.0, 2])}),
]


@pytest.mark.parametrize(
    ("residual", "starts"), STARTS, ids=["-".join(map(str, residual.values())) for residual, _ in STARTS]
)
def test_parameters_start_as_published(residual: dict[str, Any], starts: dict[str, Tensor]) -> None:
    """Most of these change nothing in the first forward pass: streams are copies, and norms take factors away."""
    found = dict(build(small_config(residual), "fp32").stage_layers()[1].mlp_residual.named_parameters())
    for name, start in starts.items():
        torch.testing.assert_close(found[name].detach(), start.expand_as(found[name]), msg=name)


def test_the_wide_matrices_have_the_standard_deviation_of_the_others() -> None:
    residual = {"residual_connection": "virtual-width"}
    model = build(small_config(residual, hidden_size=64, init_method_std=0.05), "fp32")
    for matrix in (model.entry_residual.expand, model.final_residual.reduce):
        assert abs(matrix.std().item() / 0.05 - 1) < 0.05
    assert model.final_residual.group_weight.eq(1).all() and model.final_residual.group_bias.eq(0).all()


def added_parameters(residual: dict[str, object], **shape: object) -> int:
    """Parameters beyond those of the plain residual, counted on the meta device."""

    def count(connection: dict[str, object], **changes: object) -> int:
        config = small_config(connection, **changes)
        return sum(p.numel() for p in build_model(TrainConfig(model=config), VOCAB, Mesh()).parameters())

    plain = {name: value for name, value in shape.items() if name in OLMO_1B}
    return count(residual, **shape) - count({}, **plain)


OLMO_1B = {"num_layers": 16, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 16}


@pytest.mark.parametrize(
    ("residual", "shape", "expected"),
    [
        # Tables of arXiv 2409.19606 (norm without weight) and arXiv 2503.14125 (norm with weight), n = m = 4.
        ({"residual_connection": "hyper"}, OLMO_1B, 394_048),
        ({"residual_connection": "hyper", "residual_norm_weight": True}, OLMO_1B, 394_048 + 32 * 2048),
        ({"residual_connection": "hyper", "static_residual": True}, OLMO_1B, 768),
        ({"residual_connection": "frac"}, OLMO_1B, 165_056),
        ({"residual_connection": "frac", "static_residual": True}, OLMO_1B, 1_152),
        # Formulas: per sublayer n C K + K + 3 with K = n^2 + 2 n; n! + 2 n; 2 n + 2 log2 n.
        ({"residual_connection": "mhc"}, OLMO_1B, 32 * (96 * 4 * 512 + 27)),
        ({"residual_connection": "mhc-lite"}, OLMO_1B, 32 * (4 * 2048 * 32 + 32 + 3)),
        ({"residual_connection": "kromhc"}, OLMO_1B, 32 * (4 * 2048 * 12 + 12 + 3)),
        ({"residual_connection": "mhc", "static_residual": True}, OLMO_1B, 32 * 24),
        # n C + 2 n C r + n^2 C with r = C / 8 for 32 reads and one more without n^2 C; the norms (33 C) are gone.
        ({"residual_connection": "gated"}, OLMO_1B, 33 * (4 * 2048 * 513 - 2048) + 32 * 16 * 2048),
        # n (2 m + n) twice, (C / m) (2 m + n + 1); C^2 n / m twice, 2 C n / m.
        ({"residual_connection": "virtual-width"}, OLMO_1B, 32 * (64 + 9 * 1024) + 2 * 2048 * 4096 + 2 * 4096),
        ({"residual_connection": "attention"}, OLMO_1B, 32 * 2 * 2048),
        ({"residual_connection": "denseformer"}, OLMO_1B, 16 * 19 // 2),
        (
            {"residual_connection": "muddformer"},
            OLMO_1B,
            sum(4 * J * 2048 + 16 * J * J + 4 * J + 2 * 2048 for J in range(2, 17)) + 4 * 17 * 2048 + 4 * 17 * 17 + 17,
        ),
        ({"residual_connection": "rezero"}, OLMO_1B, 32),
        ({"residual_connection": "layerscale"}, OLMO_1B, 32 * 2048),
        ({"residual_connection": "laurel"}, OLMO_1B, 32 * 2 * 4 * 2048),
        ({"residual_connection": "laurel", "laurel_form": "pa"}, OLMO_1B, 1 + 2 + 30 * 3),
        ({"residual_connection": "laurel", "laurel_form": "lr-pa"}, OLMO_1B, (1 + 2 + 30 * 3) * (1 + 2 * 4 * 2048)),
        ({"residual_connection": "orthogonal"}, OLMO_1B, 0),
        # floor(log2(k + 1)) + 1 for the reads k = 1 .. 32
        ({"residual_connection": "sparse-aggregation"}, OLMO_1B, 2 * 2 + 4 * 3 + 8 * 4 + 16 * 5 + 2 * 6),
        ({"residual_connection": "deep-delta"}, OLMO_1B, 32 * (2 * 2048 + 2)),
    ],
)
def test_parameter_counts(residual: dict[str, object], shape: dict[str, object], expected: int) -> None:
    assert added_parameters(residual, **shape) == expected


@pytest.mark.parametrize(
    ("addition", "expected"),
    [
        # 3 layers, width 16, MLP 24, 4 query heads on 2 key/value heads of width 4.
        ("half", 0),
        ("learnable", 2 * 2),
        ("dense", 2 + 3),
        ("neutreno", 0),
        ("per-token", 2 * 2 * 16),
        ("single-layer-value", -2 * 2 * 4 * 16),
        ("post", -16),
        ("deepnorm", -16),
        ("peri", 16 + 3 * 2 * 16),
        ("hybrid", 3 * (3 * 4 - 16)),
        ("normformer", 3 * (16 + 24 + 4)),
        ("normformer-scale", 3 * (16 + 24 + 4 + 16)),
        ("res-post-cosine", 3 * 4),
    ],
)
def test_parameter_counts_of_additions(addition: str, expected: int) -> None:
    assert added_parameters({}, **ADDITIONS[addition]) == expected


def test_single_layer_value_almost_halves_the_cache() -> None:
    def size(config: ModelConfig) -> int:
        return sum(t.numel() for cache in build(config).new_caches(8, 2) for t in cache.tensors)

    L = 5
    usual, single = (size(small_config(num_layers=L, single_layer_value=flag)) for flag in (False, True))
    assert single * 2 * L == usual * (L + 1)


@pytest.mark.parametrize("variant", ["constant", "sparse", "learnable"])
@pytest.mark.parametrize("method", ["plain", "hyper"])
def test_value_weights_0_and_1_are_no_value_residual(variant: str, method: str) -> None:
    weights = {"value_residual_first_weight": 0.0, "value_residual_own_weight": 1.0}
    residual, tokens = {"residual_connection": method}, random_tokens()
    model = build(small_config(residual, value_residual=variant, **weights))
    assert (model(tokens) - build(small_config(residual))(tokens)).abs().max() <= 1e-12


DECAYS: dict[str, set[str]] = {
    "plain": set(),
    "hyper": {"dynamic_weight"},
    "frac": {"dynamic_weight"},
    "mhc": {"projection"},
    "mhc-lite": {"projection"},
    "kromhc": {"projection"},
    "gated": {"gate_down", "gate_up", "write_weight"},
    "virtual-width": {"dynamic_weight", "expand", "reduce"},
    "attention": set(),
    "denseformer": set(),
    "muddformer": {"w1", "w2"},
    "rezero": set(),
    "layerscale": set(),
    "laurel": {"low", "high"},
    "orthogonal": set(),
    "sparse-aggregation": set(),
    "deep-delta": {"projection"},
}
"""Matrices of token-dependent projections decay; static matrices, scales, biases and 1-D parameters do not."""


@every_case()
def test_weight_decay_groups(case: Case) -> None:
    decays = DECAYS[case.config().residual.residual_connection]
    for name, module, local_name in owned_parameters(build(case.config())):
        if isinstance(module, Residual):
            assert module.weight_decay(local_name) == (local_name in decays), name
            assert getattr(module, local_name).dim() > 0, f"{name}: FSDP2 refuses 0-d parameters"


# Sinkhorn


@pytest.mark.parametrize("convention", ["paper", "megatron"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("iterations", [1, 5, 20])
def test_sums_of_the_stream_matrix(convention: str, precision: str, iterations: int) -> None:
    """The sums normalised last are 1 within 1e-6; all are the float64 reference's after as many iterations (1e-5)."""
    config = small_config(
        {"residual_connection": "mhc", "mhc_convention": convention, "mhc_sinkhorn_iterations": iterations}
    )
    model = randomise(build(config, precision), scale=1.0)
    residual = model.stage_layers()[1].mlp_residual
    stream = torch.randn(8, 2, 4, 16, generator=torch.Generator().manual_seed(0))
    stream = stream.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    mix = residual.weights(stream)
    matrix = mix.keep.transpose(-1, -2)  # [S, B, new, old]
    rows, columns = matrix.sum(-1), matrix.sum(-2)
    last, first = (rows, columns) if convention == "paper" else (columns, rows)
    assert (last - 1).abs().max() <= 1e-6

    wide = {name: p.detach().double() for name, p in model.named_parameters()}
    reference = REFERENCES["mhc"](config, wide)
    _, _, entries = reference.coefficients([stream[:, :, i].double() for i in range(4)], 3)  # type: ignore[attr-defined]
    exact = torch.stack([torch.stack(row, -1) for row in entries], -2)
    assert (first - exact.sum(-1 if convention == "megatron" else -2)).abs().max() <= 1e-5
    assert (matrix - exact).abs().max() <= 1e-5
    if iterations == 1:
        assert (first - 1).abs().max() > 1e-3, "too easy: one iteration has converged"


@pytest.mark.parametrize("variant", ["half", "dense"])
def test_the_last_layer_records_no_value(variant: str) -> None:
    """Nobody would use it; it would stay in memory until the backward pass."""
    model, tokens = build(small_config(value_residual=variant)), random_tokens()
    positions = torch.arange(8).unsqueeze(0)
    carry = run_layers(model.stage_layers(), model.open(tokens, positions), model.context(positions, None))
    assert len(carry.values) == len(value_boundary(model.config, model.config.num_layers - 1))
