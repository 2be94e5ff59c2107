"""What the flags of back ends refuse, by themselves and by what is installed: one sentence with a mend."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest
import stand_ins
import torch

from megatron_hc import cli, packages
from megatron_hc.backends.check import CAPABILITIES, check_backends, check_fp8_device
from megatron_hc.config import BackendConfig, TrainConfig
from megatron_hc.optim import adam_update, adamw_step

BASE = (
    "--num-layers 4 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 4 --seq-length 128 "
    "--micro-batch-size 2 --train-iters 2 --lr 1e-3 --mock-data --tokenizer-type ByteTokenizer --bf16"
)
TE = "--transformer-impl transformer_engine"
FP8 = f"{TE} --fp8-format hybrid"
AO = "--fp8-format hybrid --fp8-backend torchao --fp8-recipe tensorwise"


def config(flags: str, world_size: int = 1) -> TrainConfig:
    """Later flags win; a flag that begins with ! is left out."""
    words = f"{BASE} {flags}".split()
    for left_out in [word[1:] for word in words if word.startswith("!")]:
        words = [word for word in words if word not in (left_out, f"!{left_out}")]
    found = cli.parse(words).config
    found.validate(world_size)
    return found


@pytest.mark.parametrize(
    "flags",
    [
        TE,
        FP8,
        f"{FP8} --fp8-amax-history-len 1024 --fp8-amax-compute-algo max",
        f"{FP8} --fp8-recipe blockwise --first-last-layers-bf16 --num-layers-at-end-in-bf16 2",
        f"{TE} --fp8-format e4m3 --fp8-recipe mxfp8",
        f"{AO} --compile",
        "--fp8-format e4m3 --fp8-backend torchao --fp8-recipe mxfp8 --residual-connection muddformer",
        "--optimizer-impl deepspeed --device cpu",
        "--optimizer-impl apex --norm-impl apex --gradient-accumulation-fusion",
        f"{FP8} --num-experts 4 --moe-ffn-hidden-size 128 --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1",
    ],
)
def test_what_goes_together(flags: str) -> None:
    config(flags)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--fp8-recipe tensorwise", "--fp8-recipe (tensorwise) needs --fp8-format"),
        ("--first-last-layers-bf16", "--first-last-layers-bf16 (True) needs --fp8-format"),
        ("--fp8-amax-history-len 4", "--fp8-amax-history-len (4) needs --fp8-format"),
        (f"{FP8} !--bf16", "--fp8-format hybrid needs --bf16"),
        (
            "--fp8-format hybrid",
            "--fp8-backend transformer_engine needs --transformer-impl transformer_engine, not local",
        ),
        (f"{AO} {TE}", "--fp8-backend torchao needs --transformer-impl local, not transformer_engine"),
        (f"{AO} --fp8-recipe delayed", "--fp8-backend torchao has no --fp8-recipe delayed: use tensorwise or mxfp8"),
        (f"{AO} --fp8-recipe blockwise", "--fp8-backend torchao has no --fp8-recipe blockwise"),
        (f"{AO} --fp8-recipe mxfp8", "with --fp8-format e4m3 only, not hybrid"),
        (f"{FP8} --fp8-recipe tensorwise --fp8-amax-compute-algo max", "needs --fp8-recipe delayed, not tensorwise"),
        (f"{FP8} --fp8-amax-history-len 0", "--fp8-amax-history-len must be positive, not 0"),
        (f"{FP8} --num-layers-at-start-in-bf16 2", "(2) needs --first-last-layers-bf16"),
        (f"{FP8} --first-last-layers-bf16 --num-layers-at-start-in-bf16 -1", "must not be negative, not -1"),
        (
            f"{FP8} --first-last-layers-bf16 --num-layers-at-end-in-bf16 3",
            "together (4) must be less than --num-layers (4)",
        ),
        (
            f"{FP8} --hidden-size 40",
            "needs matrices of multiples of 16, and channels on a process (40) are not: change",
        ),
        (f"{FP8} --ffn-hidden-size 72", "channels of the MLP on a process (72) are not: change --ffn-hidden-size"),
        (f"{FP8} --fp8-recipe blockwise --kv-channels 48", "multiples of 128, and queries on a process (192) are not"),
        (f"{FP8} --value-residual per-token", "a gate per key/value head on a process (772) are not: change --value"),
        (
            f"{FP8} --seq-length 20 --micro-batch-size 2",
            "of a multiple of 16 tokens on a process, and --micro-batch-size (2)",
        ),
        (f"{FP8} --num-experts 4 --moe-ffn-hidden-size 24", "channels of an expert on a process (24) are not"),
        (f"{TE} --device cpu", "--transformer-impl transformer_engine needs --device cuda, not cpu"),
        (f"{TE} !--bf16 --fp64", "has no float64: leave out --fp64"),
        (f"{TE} --compile", "and --compile exclude each other: its modules are not compiled"),
        (f"{TE} --data-parallel-sharding-strategy optim_grads_params", "its modules hold whole weights: use optim"),
        (f"{TE} --attention-softmax-in-fp32", "and --attention-softmax-in-fp32 exclude each other"),
        (
            f"{TE} --reset-attention-mask",
            "and --reset-attention-mask exclude each other: its fused attention takes no mask",
        ),
        (f"{TE} --residual-connection muddformer", "and --residual-connection muddformer exclude each other"),
        (
            f"{TE} --num-experts 4 --no-moe-grouped-gemm",
            "runs all experts in one call: leave out --no-moe-grouped-gemm",
        ),
        ("--norm-impl apex --device cpu", "--norm-impl apex needs --device cuda, not cpu"),
        ("--norm-impl transformer_engine --compile", "and --compile exclude each other: a compiler makes its own"),
        ("--norm-impl apex --normalization RMSNorm --rmsnorm-bias", "--norm-impl apex has no --rmsnorm-bias"),
        ("--norm-impl apex --disable-bias-layernorm", "--norm-impl apex has no --disable-bias-layernorm"),
        ("--norm-impl apex !--bf16 --fp64", "--norm-impl apex has no float64"),
        ("--optimizer-impl apex --device cpu", "--optimizer-impl apex needs --device cuda, not cpu"),
        (
            "--optimizer-impl apex --optimizer-cpu-offload",
            "keeps the optimizer in CPU memory: use --optimizer-impl torch or",
        ),
        ("--optimizer-impl deepspeed !--bf16 --fp64", "--optimizer-impl deepspeed has no float64"),
        ("--gradient-accumulation-fusion !--bf16", "--gradient-accumulation-fusion needs --bf16"),
        ("--gradient-accumulation-fusion --compile", "and --compile exclude each other: its kernel is not compiled"),
        (f"--gradient-accumulation-fusion {AO}", "--fp8-backend torchao exclude each other: torchao returns"),
        (
            f"{TE} --deepspeed",
            "and --deepspeed exclude each other: it needs whole weights: leave out --deepspeed",
        ),
        (f"{AO} --deepspeed", "--fp8-format hybrid and --deepspeed exclude each other"),
        ("--optimizer-impl deepspeed --deepspeed", "and --deepspeed exclude each other: DeepSpeed has its own"),
        ("--gradient-accumulation-fusion --deepspeed", "and --deepspeed exclude each other: DeepSpeed sums gradients"),
    ],
)
def test_what_does_not(flags: str, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        config(flags)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (TE, "its modules compute weight gradients at once: use 1f1b or interleaved"),
        (AO, "it computes weight gradients at once: use 1f1b or interleaved"),
        ("--gradient-accumulation-fusion", "that computes weight gradients outside of the backward pass"),
    ],
)
def test_zero_bubble_schedules_have_weight_gradients_of_their_own(flags: str, sentence: str) -> None:
    pipeline = "--pipeline-model-parallel-size 2 --pipeline-schedule zbv --global-batch-size 16"
    with pytest.raises(ValueError, match=sentence):
        config(f"{flags} {pipeline}", 2)
    with pytest.raises(ValueError, match="cannot share a norm among --tensor-model-parallel-size"):
        config("--norm-impl apex --norm-placement normformer --tensor-model-parallel-size 2", 2)


def test_first_and_last_layers() -> None:
    ends = {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 2, "num_layers_at_end_in_bf16": 1}
    options = BackendConfig(fp8_format="hybrid", **ends)
    assert [options.is_fp8_layer(layer, 5) for layer in range(5)] == [False, False, True, True, False]
    assert all(BackendConfig(fp8_format="e4m3").is_fp8_layer(layer, 5) for layer in range(5))
    assert not any(BackendConfig(**ends).is_fp8_layer(layer, 5) for layer in range(5))


# ---- what is installed ----

NEEDS = {
    "transformer_engine": (TE, "needs transformer-engine, which is not installed: pip install 'megatron_hc[te]'"),
    "apex": ("--norm-impl apex", "needs apex, which is not installed: build it with its CUDA extensions from https://"),
    "torchao": (AO, "needs torchao, which is not installed: pip install 'megatron_hc[fp8]'"),
    "deepspeed": (
        "--optimizer-impl deepspeed",
        "needs deepspeed, which is not installed: pip install 'megatron_hc[deepspeed]'",
    ),
}


@pytest.mark.parametrize("package", NEEDS)
def test_a_package_that_is_missing(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags, sentence = NEEDS[package]
    monkeypatch.setattr("megatron_hc.backends.check.is_gpu", lambda device: True)
    monkeypatch.setattr("megatron_hc.backends.check.check_fp8_device", lambda options, device: None)
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Without(package), *sys.meta_path])
    monkeypatch.setattr(packages, "folder_of", lambda module: None)
    with pytest.raises(ValueError) as caught:
        check_backends(config(flags), torch.device("cpu"))
    assert sentence in str(caught.value) and str(caught.value).startswith("--")


class _Without:
    """An import system in which a package does not exist."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_another_project_that_is_called_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's apex has no normalization."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match="is another project, which has that name on PyPI: pip uninstall apex, then"):
        packages.load("apex", "--norm-impl apex", "apex.normalization.fused_layer_norm")
    (tmp_path / "apex" / "normalization").mkdir()
    (tmp_path / "apex" / "normalization" / "__init__.py").write_text("import fused_layer_norm_cuda")
    with pytest.raises(ValueError, match="this one was built without fused_layer_norm_cuda: build it with its CUDA"):
        packages.load("apex", "--norm-impl apex", "apex.normalization")


def test_a_package_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchao.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        ValueError, match=r"does not load \(OSError: libcudart.so.12: cannot open shared object file\)$"
    ):
        packages.load("torchao", "--fp8-backend torchao", "torchao")


def test_no_extra_installs_the_other_apex() -> None:
    requirements = importlib.metadata.requires("megatron_hc") or [] if _is_installed() else []
    text = (Path(__file__).parents[3] / "setup.py").read_text()
    assert not [line for line in requirements if line.startswith("apex")] and '["apex' not in text


def _is_installed() -> bool:
    try:
        return bool(importlib.metadata.version("megatron_hc"))
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.mark.parametrize(
    "flags", [TE, FP8, "--norm-impl apex", "--optimizer-impl apex", "--gradient-accumulation-fusion"]
)
def test_a_machine_without_a_gpu(flags: str) -> None:
    with pytest.raises(ValueError, match=r"needs an NVIDIA GPU \(--device cuda\), and this run is on cpu"):
        check_backends(config(flags), torch.device("cpu"))


def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU X")
    monkeypatch.setattr(torch.version, "cuda", "12.8")

    def sentence(recipe: str, capability: tuple[int, int]) -> str:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        options = BackendConfig(fp8_format="e4m3", fp8_recipe=recipe)  # type: ignore[arg-type]
        try:
            check_fp8_device(options, torch.device("cuda"))
        except ValueError as error:
            return str(error)
        return ""

    assert CAPABILITIES["delayed"] == (8, 9)
    assert sentence("delayed", (8, 9)) == sentence("tensorwise", (9, 0)) == sentence("mxfp8", (10, 0)) == ""
    assert "needs a GPU of compute capability 8.9, and GPU X has 8.0: use --bf16 without" in sentence("delayed", (8, 0))
    assert "needs a GPU of compute capability 10.0, and GPU X has 9.0: use --fp8-recipe tens" in sentence(
        "mxfp8", (9, 0)
    )
    assert "for compute capability 12.0 (GPU X): use --fp8-recipe tensorwise" in sentence("mxfp8", (12, 0))
    assert "needs CUDA 12.9, and this torch has 12.8" in sentence("blockwise", (9, 0))


# ---- AdamW ----


def states(seed: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator) for shape in ((7, 5), (1,), (64, 33))]
    return [weights, [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]]


@pytest.mark.parametrize("impl", ["apex", "transformer_engine", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_fused_adam_is_adamw(impl: str) -> None:
    """deepspeed: its own CPU kernel, compiled at its first use (minutes)."""
    (ours, *moments), (theirs, *others) = states(0), states(0)
    with stand_ins.installed():
        update = adam_update(impl, torch.device("cpu"))
        for step in range(1, 6):
            grads = [torch.randn(w.shape, generator=torch.Generator().manual_seed(step)) for w in ours]
            numbers = {"step": step, "lr": 0.1 / step, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1 * step}
            adamw_step(ours, grads, *moments, **numbers)  # type: ignore[arg-type]
            update(theirs, grads, *others, **numbers)  # type: ignore[arg-type]
    for mine, other in zip((*ours, *moments[0], *moments[1]), (*theirs, *others[0], *others[1]), strict=True):
        torch.testing.assert_close(other, mine, rtol=2e-6, atol=1e-6)
    assert adam_update("torch", torch.device("cpu")) is adamw_step


def test_a_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, *arguments: object, **options: object) -> None:
            raise RuntimeError("requires the cpu_adam op") from OSError("c++: not found\nmore")

    modules = {
        "deepspeed.ops.adam": stand_ins.module("deepspeed.ops.adam", {"DeepSpeedCPUAdam": Broken}),
        "deepspeed.ops.op_builder": stand_ins.module("deepspeed.ops.op_builder", {}),
    }
    parents = {name: stand_ins.module(name, {}) for name in ("deepspeed", "deepspeed.ops")}
    for name, found in (modules | parents).items():
        monkeypatch.setitem(sys.modules, name, found)
    with pytest.raises(ValueError, match=r"did not compile \(OSError: c\+\+: not found\): install a C\+\+ compiler"):
        adam_update("deepspeed", torch.device("cpu"))


def test_defaults_of_delayed_scaling_are_megatrons() -> None:
    """Megatron-LM's arguments.py; transformer-engine's own are 1024 and max."""
    options = BackendConfig()
    assert (options.fp8_recipe, options.fp8_amax_history_len) == ("delayed", 1)
    assert options.fp8_amax_compute_algo == "most_recent"
