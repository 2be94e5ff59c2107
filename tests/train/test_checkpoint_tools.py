"""tools/average_checkpoints.py and tools/prune_experts.py on trained checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from train_runs import ROOT, command, losses, tiny

from megatron_hc import checkpoint
from megatron_hc.inference import load_model
from megatron_hc.model.gpt import GPT
from megatron_hc.model.router import routers_of
from megatron_hc.validation import Validation

sys.path.insert(0, str(ROOT / "tools"))
import average_checkpoints  # noqa: E402  (scripts, not part of the package)
import prune_experts  # noqa: E402

EXPERTS = """--num-experts 8 --moe-ffn-hidden-size 16 --moe-router-topk 2 --moe-router-score-function sigmoid
    --moe-router-enable-expert-bias --moe-router-num-groups 2 --moe-router-group-topk 1
    --moe-aux-loss-coeff 0.01""".split()


@pytest.fixture(scope="module")
def run(licence: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of iterations 2, 4 and 6 of a model with experts."""
    folder = tmp_path_factory.mktemp("run")
    flags = tiny(licence, folder, "--train-iters", 6, "--save-interval", 2, "--save", folder / "saved", *EXPERTS)
    assert command(flags) == 0
    return folder / "saved"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors by safetensors alone."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def changed(source: Path, target: Path, change: Any, **settings: object) -> Path:
    """A copy of a checkpoint with other tensors, and other arguments."""
    state, arguments = checkpoint.read_state(source), checkpoint.read_origins(source)
    for name, value in settings.items():
        arguments[name] = arguments[name] | {"value": value}
    tensors = {name: change(name, tensor) for name, tensor in tensors_of(source).items()}
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return checkpoint.save_one_by_one(
        target, state["iteration"], shapes, tensors.__getitem__, state, arguments, file_bytes=20_000
    )


def call(tool: Any, *words: object, code: int = 0) -> None:
    try:
        found = tool.main([str(word) for word in words])
    except SystemExit as stop:
        found = stop.code
    assert found == code


def test_saved_one_by_one(run: Path, tmp_path: Path) -> None:
    """Several files per kind, nothing lost; a reader and ``load`` find the same."""
    source = checkpoint.find(run)
    folder = changed(source, tmp_path / "copy", lambda name, tensor: tensor)
    assert len(list(folder.glob("model_*.safetensors"))) > 2 and len(list(folder.glob("optimizer_*.safetensors"))) > 2
    expected = tensors_of(source)
    with checkpoint.Reader(folder) as reader:
        assert reader.shapes.keys() == expected.keys()
        assert all(reader.read(name).equal(tensor) for name, tensor in expected.items())
    loaded = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
    checkpoint.load(folder, loaded)
    assert all(loaded[name].equal(tensor) for name, tensor in expected.items())
    assert checkpoint.find(tmp_path / "copy") == folder


def test_a_uniform_soup_is_the_mean(
    run: Path, licence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [run / f"iter_000000{iteration}" for iteration in (4, 2)] + [run]
    call(average_checkpoints, *sources, "--output", tmp_path / "soup", "--score", "--num-samples", 6)
    folder = checkpoint.find(tmp_path / "soup")
    assert folder.name == "iter_0000006"
    found, parts = tensors_of(folder), [tensors_of(run / f"iter_000000{iteration}") for iteration in (2, 4, 6)]
    assert found.keys() == {name for name in parts[0] if name.startswith("model.")}
    for name, tensor in found.items():
        expected = np.mean([part[name].double().numpy() for part in parts], axis=0)
        assert np.array_equal(tensor.numpy(), expected.astype(np.float32)), name
        assert tensor.dtype == parts[0][name].dtype
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out] == ["loss"] * 4 + ["average"]
    assert f"{Validation(folder, num_samples=6).loss():.6f}" in out[3]
    further = tiny(licence, tmp_path, "--train-iters", 7, *EXPERTS, "--load", tmp_path / "soup", "--no-load-optim")
    assert command(further) == 0 and len(losses(tmp_path)) == 1


def test_a_soup_of_other_kernels_and_lengths(run: Path, tmp_path: Path) -> None:
    """What does not change the weights' function keeps no checkpoint out."""
    settings = {"attention_backend": "unfused", "fused_residual_backend": "torch", "seq_length": 16}
    other = changed(run / "iter_0000002", tmp_path / "other", lambda name, tensor: tensor, **settings)
    call(average_checkpoints, run / "iter_0000002", other, "--output", tmp_path / "soup")
    other = changed(run / "iter_0000002", tmp_path / "more", lambda name, tensor: tensor, rotary_base=500.0)
    call(average_checkpoints, run / "iter_0000002", other, "--output", tmp_path / "none", code=2)


def test_a_greedy_soup(run: Path, licence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a plain loop over whole models in memory would choose; of three neighbours and one that is ruined."""
    source = checkpoint.find(run)
    generator = torch.Generator().manual_seed(1)
    noise = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in tensors_of(source).items()}

    def moved(scale: float) -> Any:
        return lambda name, tensor: tensor + scale * noise[name] if name.startswith("model.") else tensor

    scales = {"minus": -0.05, "plus": 0.05, "ruined": 2.0, "near": 0.02}
    folders = [changed(source, tmp_path / name, moved(scale)) for name, scale in scales.items()]
    options = ("--method", "greedy", "--num-samples", 6, "--micro-batch-size", 4, "--data-path", licence)
    call(average_checkpoints, *folders, "--output", tmp_path / "soup", *options)

    validation = Validation(source, num_samples=6, data_path=[licence])

    def loss_of(some: list[dict[str, Tensor]]) -> float:
        mean = {name: torch.stack([one[name].double() for one in some]).mean(0).float() for name in some[0]}
        validation.fill(mean.__getitem__)
        return validation.loss()

    whole = sorted(map(tensors_of, folders), key=lambda one: loss_of([one]))
    soup = whole[:1]
    for other in whole[1:]:
        if loss_of([*soup, other]) <= loss_of(soup):
            soup.append(other)
    assert 1 < len(soup) < 4
    found = tensors_of(checkpoint.find(tmp_path / "soup"))
    for name, tensor in found.items():
        expected = torch.stack([one[name].double() for one in soup]).mean(0).float()
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
    out = capsys.readouterr().out
    assert f"with {folders[2]}: left out" in out and f"average of {len(soup)} of 4" in out
    record = checkpoint.read_state(checkpoint.find(tmp_path / "soup"))["average"]
    assert len(record["of"]) == len(soup) and len(record["losses"]) == 4 and record["method"] == "greedy"


def test_a_validation_reads_as_its_run_did(run: Path, tmp_path: Path) -> None:
    """Positions and documents apart, masked tokens not counted, and no more samples than asked for."""
    flags = dict.fromkeys(("reset_position_ids", "reset_attention_mask", "eod_mask_loss"), True)
    folder = changed(checkpoint.find(run), tmp_path / "apart", lambda name, tensor: tensor, **flags)
    validation = Validation(folder, num_samples=19, micro_batch_size=8)
    total = count = 0.0
    for batch in validation._batches:
        micro_batch = validation._micro_batch(batch)
        assert micro_batch.position_ids is batch.position_ids and micro_batch.document_ids is batch.document_ids
        hidden = validation.model(batch.tokens, batch.position_ids, batch.document_ids)
        logprobs = validation.model.output.logits(hidden).log_softmax(-1).transpose(0, 1)  # [B, S, V]
        own = logprobs.gather(2, batch.labels.unsqueeze(2)).squeeze(2)
        total, count = total - float(own[batch.loss_mask > 0].sum()), count + float(batch.loss_mask.sum())
    assert [len(batch.tokens) for batch in validation._batches] == [8, 8, 3]
    assert count < 19 * 32, "documents end within samples"
    assert validation.loss() == pytest.approx(total / count, rel=1e-5)


def logits(model: GPT) -> Tensor:
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.output.logits(model(tokens))


def without(model: GPT, kept: dict[int, list[int]]) -> Tensor:
    """Logits where a huge bias keeps tokens from all other experts."""
    for router in routers_of([model]):
        assert router.expert_bias is not None
        gone = [expert for expert in range(8) if expert not in kept[router.layer]]
        router.expert_bias[gone] = -1e9
    return logits(model)


def test_pruned_by_the_change_of_the_routers(run: Path, licence: str, tmp_path: Path) -> None:
    """Of each group of four the two experts whose rows grew most; the function is that of the others left alone."""
    growth = {0: [0.1, 0.4, 0.2, 0.3, -0.05, 0.0, 0.3, 0.2], 1: [0.5, -0.05, 0.0, 0.1, 0.2, 0.3, 0.15, 0.1]}
    kept = {0: [1, 3, 6, 7], 1: [0, 3, 4, 5]}

    def grown(name: str, tensor: Tensor) -> Tensor:
        if not (name.startswith("model.") and name.endswith("router.weight")):
            return tensor
        norms = tensor.norm(dim=1, keepdim=True)
        return tensor * (norms + torch.tensor(growth[int(name.split(".")[2])]).unsqueeze(1)) / norms

    before = changed(checkpoint.find(run), tmp_path / "before", lambda name, tensor: tensor * 1.0)
    tuned = changed(before, tmp_path / "tuned", grown)
    call(prune_experts, tmp_path / "tuned", "--before", before, "--keep", 4, "--output", tmp_path / "pruned")
    pruned = load_model(str(tmp_path / "pruned"))
    assert pruned.config.model.moe.num_experts == 4
    assert checkpoint.read_state(pruned.folder)["pruned"]["kept"] == {str(layer): kept[layer] for layer in kept}
    expected = without(load_model(str(tmp_path / "tuned")).model, kept)
    torch.testing.assert_close(logits(pruned.model), expected, rtol=1e-6, atol=1e-6)
    one, whole = tensors_of(pruned.folder), tensors_of(tuned)
    for kind in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
        name = f"{kind}.layers.0.mlp.experts.linear_fc2.weight"
        assert one[name].equal(whole[name].unflatten(0, (8, -1))[kept[0]].flatten(0, 1))
    flags = [*EXPERTS[2:], "--num-experts", 4, "--load", tmp_path / "pruned", "--train-iters", 8]
    assert command(tiny(licence, tmp_path, *flags)) == 0 and len(losses(tmp_path)) == 2


def test_pruned_by_load(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where biases send all tokens to some experts, these stay and the loss with them."""

    def biased(name: str, tensor: Tensor) -> Tensor:
        if not name.endswith("expert_bias"):
            return tensor
        liked = [2, 3] if ".0." in name else [5, 6]
        return tensor + torch.tensor([100.0 if expert in liked else 0.0 for expert in range(8)])

    changed(checkpoint.find(run), tmp_path / "biased", biased)
    options = ("--by-load", "--keep", 4, "--output", tmp_path / "pruned", "--num-samples", 4)
    call(prune_experts, tmp_path / "biased", *options)
    kept = checkpoint.read_state(checkpoint.find(tmp_path / "pruned"))["pruned"]["kept"]
    assert {2, 3} <= set(kept["0"]) and {5, 6} <= set(kept["1"]) and len(kept["0"]) == len(kept["1"]) == 4
    line = capsys.readouterr().out.splitlines()[-1].split()
    assert line[0] == "loss" and float(line[1]) == pytest.approx(float(line[3]), abs=2e-6)


def test_mistakes_are_one_sentence(run: Path, licence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = tiny(licence, tmp_path, "--train-iters", 2, "--save", tmp_path / "dense")
    assert command(flags) == 0
    first, output = run / "iter_0000002", tmp_path / "out"
    damaged = changed(first, tmp_path / "damaged", lambda name, tensor: tensor)
    with (damaged / "model_00001.safetensors").open("ab") as file:
        file.write(b"x")
    average, prune = average_checkpoints, prune_experts
    capsys.readouterr()
    for tool, words, message in (
        (average, [run, run, "--output", output], "at least two different checkpoints"),
        (average, [run, "--output", output], "at least two different checkpoints"),
        (average, [run, tmp_path / "none", "--output", output], "is not a folder"),
        (average, [run, tmp_path / "dense", "--output", output], "is of another model than"),
        (average, [run, damaged, "--output", output], "is not a whole checkpoint"),
        (average, [run, first, "--output", run], "exists: choose a folder that does not"),
        (average, [run, first, "--output", damaged / "state.json" / "x"], "--output "),
        (average, [run, first, "--output", output, "--score", "--data-path", tmp_path / "x"], str(tmp_path / "x")),
        (average, [run, first, "--output", output, "--method", "greedy", "--num-samples", "0"], "--num-samples"),
        *(
            []
            if torch.cuda.is_available()
            else [(average, [run, first, "--output", output, "--score", "--device", "cuda"], "finds no CUDA device")]
        ),
        (prune, [run, "--by-load", "--keep", 8, "--output", output], "below the 8 experts"),
        (prune, [run, "--by-load", "--keep", 3, "--output", output], "multiple of the 2 groups"),
        (prune, [run, "--by-load", "--keep", 2, "--output", output], "--keep 2 is too few: "),
        (prune, [tmp_path / "dense", "--by-load", "--keep", 2, "--output", output], "has no experts"),
        (prune, [run, "--before", tmp_path / "dense", "--keep", 4, "--output", output], ", and none before"),
        (
            prune,
            [run, "--before", first, "--keep", 4, "--output", output, "--data-path", "x", "--num-samples", 3],
            "--data-path and --num-samples would do nothing with --before",
        ),
        (
            average,
            [run, first, "--output", output, "--data-path", "x"],
            "--data-path would do nothing with --method uniform",
        ),
        (prune, [damaged, "--before", run, "--keep", 4, "--output", output], "is not a whole checkpoint"),
    ):
        call(tool, *words, code=2)
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and "Traceback" not in error, error
        assert not output.exists()
    call(prune, run, "--keep", 4, "--output", output, code=2)
    assert "one of the arguments --before --by-load is required" in capsys.readouterr().err


def test_settings_of_training_alone_exist() -> None:
    from megatron_hc.cli_options import options

    assert average_checkpoints.TRAINING_ONLY <= options().keys()
