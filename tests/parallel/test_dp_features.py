"""Data parallelism beyond parity: overlap changes no bit, hybrid sharding, checks across ranks, refusals."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from cells import forms
from parity import Cell, Outcome, RandomSamples, Runs, run_cell
from pool import Pool, mesh
from torch import Tensor, nn

from megatron_hc import train
from megatron_hc.cli import parse
from megatron_hc.config import ParallelConfig
from megatron_hc.data.loader import build_loader
from megatron_hc.mesh import Mesh, build_mesh
from megatron_hc.optim import parameter_groups
from megatron_hc.parallel.gather import ParameterGatherer
from megatron_hc.parallel.gradients import GradientReducer
from megatron_hc.parallel.placement import whole
from megatron_hc.parallel.replicas import differing_weights, samples_not_finite
from megatron_hc.parallel.slots import Sharding, Slot, buckets_of, sharding_of
from megatron_hc.residual import RESIDUALS

TP2 = "--tensor-model-parallel-size 2"
HYPER = "--residual-connection hyper"
SMALL_BUCKETS = "--ddp-bucket-size 200"
OVERLAP = "--overlap-grad-reduce --overlap-param-gather"
STRATEGY = "--data-parallel-sharding-strategy"

# ---- overlap ----


def count_overlap(run: train.Run) -> None:
    """Fails the run where no reduction started before the end of the backward pass, or no parameter was awaited."""
    reducer, gatherer = run.optimizer.reducers[0], run.optimizer.gatherers[0]
    finish, start = reducer.finish, gatherer.start

    def finished() -> None:
        assert not reducer.overlap or len(reducer._started) > 1, "nothing was reduced early"
        finish()

    def started() -> None:
        start()
        assert not gatherer.overlap or len(gatherer._pending) > 1, "everything was gathered at once"

    reducer.finish, gatherer.start = finished, started  # type: ignore[method-assign]


def same_bits(one: Outcome, other: Outcome) -> None:
    assert one.losses == other.losses and one.grad_norms == other.grad_norms
    for mine, theirs in zip(one.gradients, other.gradients, strict=True):
        assert mine.keys() == theirs.keys()
        assert all((mine[name].low == theirs[name].low).all() for name in mine)
        assert all((mine[name].high == theirs[name].high).all() for name in mine)


@pytest.mark.parametrize("method", ["hyper", "denseformer", "muddformer"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_overlap_changes_no_bit(runs: Runs, method: str, precision: str) -> None:
    world_size, layout = (4, TP2) if precision == "bf16" else (2, "")
    cell = Cell(forms(method)[0], f"{layout} {SMALL_BUCKETS}", world_size=world_size, precision=precision)
    same_bits(runs.outcome(replace(cell, options=OVERLAP), count_overlap), runs.outcome(cell, count_overlap))


@pytest.mark.parametrize("strategy", [f"{STRATEGY} no_shard", "--num-distributed-optimizer-instances 2"])
def test_overlap_changes_no_bit_in_other_strategies(runs: Runs, strategy: str) -> None:
    cell = Cell(HYPER, f"{strategy} {SMALL_BUCKETS}", world_size=4, num_steps=2, precision="fp32")
    same_bits(runs.outcome(replace(cell, options="--overlap-grad-reduce"), count_overlap), runs.outcome(cell))


def test_parameters_are_awaited_by_whoever_uses_them(runs: Runs) -> None:
    """Without the wait in the layers, old weights are used: the test above would notice."""
    cell = Cell(HYPER, f"{SMALL_BUCKETS} {OVERLAP}", world_size=2)
    with pytest.raises(AssertionError):
        same_bits(runs.outcome(cell, never_wait), runs.outcome(cell))


def never_wait(run: train.Run) -> None:
    for layer in run.model.stage_layers():
        layer._forward_pre_hooks.clear()


def slots_of(parameters: dict[str, nn.Parameter], sharding: Sharding) -> list[Slot]:
    slots = []
    for name, parameter in parameters.items():
        rows = sharding.rows(parameter.shape[0])
        own = parameter.detach()[rows[0] : rows[1]]
        placement = whole(tuple(parameter.shape), 1, None)
        moments = torch.zeros_like(own), torch.zeros_like(own)
        slots.append(Slot(name, parameter, parameter.dtype, placement, True, 1.0, rows, own, *moments))
    return slots


def reduce_in_odd_orders(instances: int) -> None:
    """In a rank: gradients that arrive in another order on every rank, one parameter without, two micro-batches."""
    config = ParallelConfig(num_distributed_optimizer_instances=instances)
    parsed = parse(f"{' '.join(Cell().flags)} --num-distributed-optimizer-instances {instances}".split())
    own = mesh(parsed.config, 4)
    sharding, rank = sharding_of(config, own), own.world_rank
    generator = torch.Generator().manual_seed(1)
    parameters = {name: nn.Parameter(torch.zeros(rows, 2)) for name, rows in (("a", 5), ("b", 4), ("c", 1), ("d", 3))}
    slots = slots_of(parameters, sharding)
    slots[-1].placement = slots[-1].placement._replace(passes=2)  # as of a tied table at both ends of a V
    reducer = GradientReducer(list(buckets_of(slots, 1)), sharding, overlap=True)
    # [micro-batch, rank] gradients of every parameter: the same numbers on every rank.
    grads = {name: torch.randn(2, 4, *p.shape, generator=generator) for name, p in parameters.items()}
    reducer.begin(2)
    order = [name for name in parameters if name != "c"]
    for micro_batch in range(2):
        for name in order[rank % 3 :] + order[: rank % 3]:
            for _ in range(passes := 2 if name == "d" else 1):
                (parameters[name] * grads[name][micro_batch, rank] / passes).sum().backward()
    # "d" and then nothing: "c" got no gradient, so "b" and "a" behind it wait for finish.
    assert len(reducer._started) == 1
    with pytest.raises(AssertionError, match="d got a gradient after its bucket was reduced"):
        parameters["d"].sum().backward()
    reducer.finish()
    for slot in slots:
        expected = torch.zeros_like(slot.parameter) if slot.name == "c" else grads[slot.name].sum((0, 1))
        assert slot.grad is not None
        torch.testing.assert_close(slot.grad, expected[slot.rows[0] : slot.rows[1]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("instances", [1, 2])
def test_gradients_may_arrive_in_any_order_or_not_at_all(pool: Pool, instances: int) -> None:
    pool.run(reduce_in_odd_orders, instances)


def test_one_process_waits_for_nothing() -> None:
    sharding = sharding_of(ParallelConfig(), Mesh())
    slots = slots_of({"a": nn.Parameter(torch.ones(3, 2))}, sharding)
    reducer = GradientReducer([slots], sharding, overlap=True)
    gatherer = ParameterGatherer([slots], sharding, overlap=True, users=[])
    assert not reducer.overlap and not gatherer.overlap
    reducer.begin(1)
    slots[0].parameter.sum().backward()
    reducer.finish()
    assert slots[0].grad is slots[0].parameter.grad
    gatherer.start()
    gatherer.wait_outside()


def sum_bf16(flags: str, world_size: int) -> None:
    """In a rank: gradients of bf16 whose sums bf16 does not have, a parameter without, in two steps."""
    parsed = parse(Cell(HYPER, flags, precision="bf16").flags)
    own = mesh(parsed.config, world_size)
    if own is None:
        return
    optimizer = train.set_up(parsed, own).optimizer
    *slots, silent = [slot for slot in optimizer.slots if slot.is_mixed]
    small = 2.0**-9
    for _ in range(2):
        optimizer.begin(2)
        for value in (1.0 if own.world_rank == 0 else small, small):
            for slot in reversed(slots):
                (slot.parameter * value).sum().backward()
        optimizer.reduce_gradients()
        for slot in (*slots, silent):
            assert slot.grad is not None and slot.grad.dtype == torch.float32, slot.name
            assert (slot.grad == (0 if slot is silent else 1 + (2 * world_size - 1) * small)).all(), slot.name


@pytest.mark.parametrize("flags", ["", f"{STRATEGY} no_shard", "--num-distributed-optimizer-instances 2"])
def test_gradients_of_bf16_are_summed_in_fp32(pool: Pool, flags: str) -> None:
    """Over micro-batches and over ranks."""
    pool.run(sum_bf16, flags, 4)
    if not flags:
        pool.run(sum_bf16, "", 1)


def test_a_step_is_adamw_s_with_the_clipped_gradient() -> None:
    """What all layouts leave out, or a scale of gradients, which AdamW hardly sees, no comparison of layouts shows."""
    options = "--residual-scale depth-mup --base-num-layers 1 --adam-beta2 0.9 --adam-eps 1e-2 --log-params-norm"
    run = train.set_up(parse([*Cell(HYPER).flags, *options.split()]), Mesh())
    optimizer, rate, decay = run.optimizer, 1e-2, 0.5
    weights = {slot.name: slot.master.clone() for slot in optimizer.slots}
    squares = sum(float(weight.square().sum()) for weight in weights.values())
    assert optimizer.params_norm() == pytest.approx(squares**0.5, rel=1e-12)
    optimizer.begin(1)
    for slot in optimizer.slots:
        slot.parameter.grad = torch.full_like(slot.parameter, 2.0)
    optimizer.reduce_gradients()
    norm = optimizer.grad_norm()
    assert norm == pytest.approx(2 * sum(slot.master.numel() for slot in optimizer.slots) ** 0.5, rel=1e-12)
    in_layers = [sum(s.master.numel() for s in optimizer.slots if s.name.startswith(f"layers.{i}.")) for i in (0, 1)]
    assert optimizer.layer_grad_norms(2) == pytest.approx([2 * count**0.5 for count in in_layers], rel=1e-12)
    optimizer.step(norm, rate, decay)
    clipped = 2 * optimizer.config.clip_grad / norm
    decays = {name for group in parameter_groups(run.model) if group["weight_decay"] for name, _ in group["params"]}
    assert 0 < len(decays) < len(weights)
    for slot in optimizer.slots:
        ones, factor = torch.ones_like(slot.master), 2**-0.5 if slot.name.startswith("layers.") else 1.0
        expected = weights[slot.name] * (1 - rate * factor * (decay if slot.name in decays else 0.0))
        expected -= rate * factor * clipped / (clipped + 1e-2 * factor)
        torch.testing.assert_close(slot.exp_avg, 0.1 * clipped * ones, rtol=1e-6, atol=0)
        torch.testing.assert_close(slot.exp_avg_sq, 0.1 * clipped**2 * ones, rtol=1e-6, atol=0)
        torch.testing.assert_close(slot.master, expected, rtol=1e-9, atol=1e-9, msg=slot.name)


# ---- what is kept where ----


def kept(cell: Cell) -> tuple[int, int, int] | None:
    """(elements of master weights, of parameters, of gradients after the step) on this rank."""
    counts: list[tuple[int, int, int]] = []

    def count(run: train.Run) -> None:
        step = run.optimizer.step

        def counted(*arguments: object, **options: object) -> object:
            slots = run.optimizer.slots
            local = [slot.own_rows if slot.is_fully_sharded else slot.parameter for slot in slots]
            grads = [slot.grad for slot in slots if slot.grad is not None]
            counts.append(tuple(sum(t.numel() for t in ts) for ts in ([s.master for s in slots], local, grads)))  # type: ignore[arg-type]
            return step(*arguments, **options)  # type: ignore[arg-type]

        run.optimizer.step = counted  # type: ignore[method-assign, assignment]

    return None if run_cell(cell, count) is None else counts[0]


def test_every_strategy_shares_out_what_it_says(pool: Pool) -> None:
    """Fractions of the model that each of four ranks keeps of (master weights, parameters, reduced gradients)."""
    model = "--residual-connection plain --hidden-size 64 --num-attention-heads 4"
    (whole_masters, *_), *_ = pool.run(kept, Cell(model, num_steps=1))
    expected = {
        f"{STRATEGY} no_shard": (1, 1, 1),
        f"{STRATEGY} optim": (1 / 4, 1, 1 / 4),
        "--num-distributed-optimizer-instances 2": (1 / 2, 1, 1 / 2),
        f"{STRATEGY} optim_grads_params": (1 / 4, 1 / 4, 1 / 4),
        f"{STRATEGY} optim_grads_params --num-distributed-optimizer-instances 2": (1 / 2, 1 / 2, 1 / 2),
    }
    for layout, wanted in expected.items():
        for found in pool.run(kept, Cell(model, layout, world_size=4, num_steps=1)):
            shares = [count / whole_masters for count in found]
            assert shares == pytest.approx(wanted, abs=0.02), layout


# ---- FSDP2 ----


@pytest.mark.parametrize("method", list(RESIDUALS))
def test_fully_sharded_equals_one_process(runs: Runs, method: str) -> None:
    """Every method, with tensor and sequence parallelism, under recompute every other one."""
    index = list(RESIDUALS).index(method)
    layout = ["", "--num-distributed-optimizer-instances 2", TP2, f"{TP2} --sequence-parallel"][index % 4]
    recompute = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    runs.check(
        Cell(
            f"{forms(method)[-1]} {'--untie-embeddings-and-output-weights' if index % 3 else ''}",
            f"{STRATEGY} optim_grads_params {layout}",
            recompute if index % 2 else "",
            world_size=4 if layout else 2,
            num_steps=2,
        )
    )


def test_fully_sharded_in_bf16(runs: Runs) -> None:
    """Master weights are the fp32 shards; norms and residual parameters are never rounded."""
    cell = Cell(HYPER, f"{STRATEGY} optim_grads_params", world_size=2, precision="bf16")
    runs.check(cell)
    zero_one, fully = runs.outcome(replace(cell, layout="")), runs.outcome(cell)
    assert fully.losses == pytest.approx(zero_one.losses, rel=1e-3)
    for name, (expected, _) in zero_one.gradients[0].items():  # reduced in fp32
        found, bound = fully.gradients[0][name].low, 1e-5 * abs(expected).max()
        np.testing.assert_allclose(found, expected, atol=bound, err_msg=name)


# ---- checks across ranks ----


def set_up(flags: str, world_size: int) -> train.Run:
    cell = Cell(HYPER, flags, world_size=world_size)
    parsed = parse(cell.flags)
    own = mesh(parsed.config, world_size)
    assert own is not None
    return train.set_up(parsed, own)


def compare_replicas(flags: str, changed_rank: int) -> tuple[str | None, str | None]:
    run = set_up(flags, 4)
    before = differing_weights(run.optimizer.slots, run.optimizer.sharding, run.mesh)
    if run.mesh.world_rank == changed_rank:
        with torch.no_grad():
            for slot in run.optimizer.slots[-2:]:
                slot.own_rows.view(-1)[:1].add_(1e-3)
    return before, differing_weights(run.optimizer.slots, run.optimizer.sharding, run.mesh)


@pytest.mark.parametrize(
    "flags, rank, others",
    [
        ("", 2, "0, 1, 3"),
        (TP2, 3, "1"),
        (f"{STRATEGY} optim_grads_params --num-distributed-optimizer-instances 2", 3, "1"),
        ("--num-experts 4 --expert-model-parallel-size 2", 3, "1"),
    ],
)
def test_copies_that_have_come_apart_are_named(pool: Pool, flags: str, rank: int, others: str) -> None:
    """Every rank says the same: the first parameter, and which rank has another one than the rest."""
    found = pool.run(compare_replicas, flags, rank)
    assert found == [found[0]] * 4 and found[0][0] is None
    pattern = r"[\w.]+ \(and 1 more\) is not on rank {} what it is on rank {}"
    # Of two copies nobody knows which one is right.
    either = [pattern.format(rank, others), pattern.format(others, rank)]
    assert any(re.fullmatch(one, found[0][1] or "") for one in either), found[0]


def test_a_run_checks_its_copies(pool: Pool) -> None:
    assert pool.run(run_with_changed_copy, 3) == ["stopped"] * 2 + [None] * 2
    assert pool.run(run_with_changed_copy, 2) == ["went on"] * 2 + [None] * 2


def run_with_changed_copy(num_steps: int) -> str | None:
    """Weights come apart before step 1, and are looked at after step 3."""
    cell = Cell(HYPER, f"{STRATEGY} no_shard", world_size=2, num_steps=num_steps, precision="fp32")
    cell = replace(cell, options="--check-weight-hash-across-dp-replicas-interval 3")

    def change(run: train.Run) -> None:
        if run.mesh.world_rank == 1:
            run.optimizer.slots[0].master.view(-1)[0].add_(0.5)

    try:
        outcome = run_cell(cell, change)
    except train.TrainingStopped as stopped:
        assert re.search(
            r"copies of the weights came apart at iteration 3: embedding.weight is not on rank", str(stopped)
        )
        return "stopped"
    return None if outcome is None else "went on"


def meet_nan(kind: str, layout: str = "", token: int = 3) -> str:
    """A step in which rank 2's second micro-batch has a loss (or gradient) that is not finite: what the rank says.

    ``token``: whose loss it is.
    """
    run = set_up(f"--micro-batch-size 1 {layout}", 4)
    samples = RandomSamples(16, run.config.model.seq_length, run.tokenizer.vocab_size)
    loader = build_loader(samples, run.mesh, micro_batch_size=1)
    if run.mesh.world_rank == 2 and kind == "loss":
        forward_backward, count = run.pipeline.forward_backward, 0

        def spoiled(batches: list) -> Tensor:
            batches[1].weights.view(-1)[token] = float("nan")
            return forward_backward(batches)

        run.pipeline.forward_backward = spoiled  # type: ignore[method-assign, assignment]
    elif run.mesh.world_rank == 2:
        count = 0

        def hook(grad: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return grad * float("inf") if count == 2 else grad

        next(run.model.parameters()).register_hook(hook)
    with pytest.raises(train.TrainingStopped) as stopped:
        train.train_step(run, loader)
    return str(stopped.value)


def test_not_finite_names_the_samples_of_the_rank_that_has_them(pool: Pool) -> None:
    """Rank 2 has samples 2 and 6 of the first eight; all ranks say the same."""
    loss = pool.run(meet_nan, "loss")
    assert loss == [loss[0]] * 4
    assert re.search(r"loss nan and .* at iteration 1 are not both finite \(samples 6 of rank 2\)", loss[0])
    gradient = pool.run(meet_nan, "gradient")
    assert gradient == [gradient[0]] * 4
    assert re.search(r"loss \d\S+ and .* are not both finite \(samples 2, 6 of rank 2\)", gradient[0])


@pytest.mark.parametrize("token", [0, 3])
def test_not_finite_names_the_samples_of_ranks_that_share_them(pool: Pool, token: int) -> None:
    """Ranks 2 and 3 have samples 1, 3, 5 and 7: one has the loss, the other a gradient that came from it."""
    found = pool.run(meet_nan, "loss", "--context-parallel-size 2", token)
    assert found == [found[0]] * 4
    assert "not both finite (samples 3 of rank 2)" in found[0]


def test_nothing_finite_is_not_blamed() -> None:
    assert samples_not_finite(torch.ones(2), [], [1, 2], Mesh()) == {}
    assert samples_not_finite(torch.tensor([1.0, torch.inf]), [], [1, 2, 3, 4], Mesh()) == {0: [3, 4]}


# ---- refusals ----


@pytest.mark.parametrize(
    "flags, world_size, message",
    [
        (f"{STRATEGY} optim_grads", 2, "optim_grads is not offered: .* after every micro-batch .* take optim"),
        (f"{STRATEGY} no_shard --num-distributed-optimizer-instances 2", 4, "needs .* not no_shard"),
        (f"{STRATEGY} no_shard --overlap-param-gather", 2, "--overlap-param-gather needs .* no_shard"),
        ("--num-distributed-optimizer-instances 3", 4, r"\(3\) must divide the data-parallel size \(4\)"),
        (
            "--num-distributed-optimizer-instances 4",
            4,
            r"\(4\) must divide the data-parallel size \(4\), and be smaller",
        ),
        (f"{TP2} --num-distributed-optimizer-instances 4", 4, r"\(4\) must divide the data-parallel size \(2\)"),
        ("--optimizer-cpu-offload", 1, "--optimizer-cpu-offload needs --device cuda, not cpu"),
        ("--ddp-bucket-size 0", 1, "--ddp-bucket-size must be positive"),
        ("--check-weight-hash-across-dp-replicas-interval 0", 1, "must be positive"),
        (
            f"{STRATEGY} optim_grads_params --pipeline-model-parallel-size 2 --pipeline-schedule zbv",
            4,
            "optim_grads_params and --pipeline-schedule zbv exclude each other",
        ),
    ],
)
def test_refusals(flags: str, world_size: int, message: str) -> None:
    config = parse(Cell(HYPER, flags).flags).config
    with pytest.raises(ValueError, match=message):
        config.validate(world_size)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_offload_without_a_gpu_is_refused() -> None:
    config = parse([*Cell(HYPER, "--optimizer-cpu-offload --device auto").flags]).config
    with pytest.raises(ValueError, match="--optimizer-cpu-offload needs a GPU"):
        build_mesh(config)


def test_use_distributed_optimizer_is_optim() -> None:
    config = parse(Cell(HYPER, "--use-distributed-optimizer").flags).config
    assert config.parallel.data_parallel_sharding_strategy == "optim"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cpu_offload_keeps_state_on_the_cpu_and_trains_the_same(precision: str) -> None:
    losses = {}
    for offload in ("", "--optimizer-cpu-offload"):
        cell = Cell(HYPER, f"--device cuda {offload}", precision=precision)
        run = train.set_up(parse(cell.flags))
        samples = RandomSamples(32, run.config.model.seq_length, run.tokenizer.vocab_size)
        loader = build_loader(samples, run.mesh, micro_batch_size=2)
        found: list[float] = []
        run.logger.step = lambda loss, found=found, **others: found.append(loss)  # type: ignore[method-assign, misc]
        for _ in range(3):
            train.train_step(run, loader)
        kinds = {tensor.device.type for slot in run.optimizer.slots for tensor in (slot.master, slot.exp_avg)}
        assert kinds == ({"cpu"} if offload else {"cuda"})
        assert {parameter.device.type for parameter in run.model.parameters()} == {"cuda"}
        losses[offload] = found
    assert losses[""] == pytest.approx(losses["--optimizer-cpu-offload"], rel=1e-5 if precision == "fp32" else 1e-2)
