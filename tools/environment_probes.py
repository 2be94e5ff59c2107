"""The probes of tools/check_environment.py: small computations by each part, compared with plain torch.

A probe returns a few words about what it did. It raises ``Unusable`` where this machine has no such thing, and anything
else where something is there and does not work.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_hc.backends.check import CAPABILITIES, check_fp8_device
from megatron_hc.backends.norms import attach_norms
from megatron_hc.backends.torchao import multiply_of
from megatron_hc.backends.transformer_engine import FLAG, attach_linear, recipe_of
from megatron_hc.config import BackendConfig, ModelConfig
from megatron_hc.model.attention import chosen_kernels
from megatron_hc.model.linear import Linear, NormLayer
from megatron_hc.optim import adam_update, adamw_step
from megatron_hc.packages import PACKAGES, folder_of, load


class Unusable(Exception):
    """Not on this machine, and why."""


class Part(NamedTuple):
    """Something that a run may use."""

    name: str
    package: str
    """The distribution whose version is shown."""
    known: str
    """Versions that were run, and how."""
    flags: str
    """What needs it."""
    probe: Callable[[], str]
    is_base: bool = False
    """Whether every run needs it."""


def gpu() -> torch.device:
    """The GPU, or why there is none."""
    if torch.version.cuda is None:
        raise Unusable(f"torch {torch.__version__} is built without CUDA")
    if not torch.cuda.is_available():
        raise Unusable("torch has CUDA, and there is no GPU or no driver")
    return torch.device("cuda")


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def near(got: Tensor, expected: Tensor, bound: float) -> str:
    """The relative distance, if it is below ``bound``."""
    error = float((got.double() - expected.double()).norm() / expected.double().norm())
    if not error <= bound:
        raise AssertionError(f"is {error:.1e} from plain torch, more than {bound:.0e}")
    return f"{error:.0e} from plain torch"


def installed(package: str) -> None:
    """Refuse a package of ``PACKAGES`` that is not there, or is another project of its name."""
    if folder_of(PACKAGES[package].module) is None:
        raise Unusable(f"not installed: {PACKAGES[package].install}")


# ---- torch ----


def base() -> str:
    x = torch.randn(64, 64, dtype=torch.bfloat16)
    return f"bf16 product on the CPU {near(x @ x, x.float() @ x.float(), 1e-2)}"


def cuda() -> str:
    device = gpu()
    x = torch.randn(64, 64, device=device, dtype=torch.bfloat16)
    near(x @ x, x.float() @ x.float(), 1e-2)
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}, compute capability {capability}"


@contextlib.contextmanager
def group_of_one(backend: str) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def gloo() -> str:
    if not (dist.is_available() and dist.is_gloo_available()):
        raise Unusable(f"torch {torch.__version__} is built without gloo")
    with group_of_one("gloo"):
        x = torch.ones(4)
        dist.all_reduce(x)
        assert x.sum() == 4
    return "an all-reduce in a group of one process"


def nccl() -> str:
    device = gpu()
    if not dist.is_nccl_available():
        raise Unusable(f"torch {torch.__version__} is built without NCCL")
    with group_of_one("nccl"):
        x = torch.ones(4, device=device)
        dist.all_reduce(x)
        assert x.sum() == 4
    return f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}, an all-reduce in a group of one process"


def attention(backend: str) -> str:
    """One of torch's kernels of attention, forward and backward."""
    device = gpu() if backend == "fused" else best_device()
    q = torch.randn(1, 2, 64, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
    try:
        with chosen_kernels(backend, device):
            y = F.scaled_dot_product_attention(q, q, q, is_causal=True)
            y.sum().backward()
    except RuntimeError as error:
        raise Unusable(str(error).splitlines()[0]) from error
    wide = q.detach().float()
    return near(y.detach(), F.scaled_dot_product_attention(wide, wide, wide, is_causal=True), 2e-2)


def compiler() -> str:
    if best_device().type == "cpu" and shutil.which(os.environ.get("CXX") or "g++") is None:
        raise Unusable("needs a C++ compiler on a CPU: install g++ or set CXX")
    x = torch.randn(16)
    return near(torch.compile(lambda t: t.sin() * 2 + 1)(x), x.sin() * 2 + 1, 1e-5)


# ---- our kernels ----


def boundary(backend: str, device: torch.device) -> str:
    """The fused boundary of hyper-connections against the form in torch."""
    from megatron_hc.kernels.boundary import boundary as run
    from megatron_hc.kernels.boundary import check_backend
    from megatron_hc.kernels.coefficients import Form

    try:
        check_backend(backend, device)
    except ValueError as error:
        raise Unusable(str(error)) from error
    generator = torch.Generator().manual_seed(0)

    def made(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device)

    tensors = made(8, 4, 16), made(8, 1, 16), made(8, 1, 4), made(8, 4, 4), made(6, 16), made(16), None
    static = [made(4, 1), made(4, 4), made(4), made(1), made(1)]
    outputs = [
        run(Form("tanh", 4, 1, False, False, 1e-5, 20, "RMSNorm", 1e-5, kind), *tensors, static)[1]
        for kind in (backend, "torch")
    ]
    return near(outputs[0], outputs[1], 1e-5)


def cpp() -> str:
    return boundary("cpp", torch.device("cpu"))


def triton() -> str:
    if importlib.util.find_spec("triton") is None:
        raise Unusable("not installed: it comes with torch for CUDA")
    return boundary("triton", gpu())


# ---- packages ----


def deepspeed() -> str:
    installed("deepspeed")
    load("deepspeed", "it", "deepspeed")
    return "loads"


def adam(impl: str) -> str:
    """A step of a fused AdamW."""
    on_cpu = impl == "deepspeed" and not torch.cuda.is_available()
    device = torch.device("cpu") if on_cpu else gpu()
    installed({"transformer_engine": "transformer-engine"}.get(impl, impl))
    if on_cpu and not is_built("cpu_adam"):
        raise Unusable("its CPU kernel is not compiled yet, which takes minutes: --build compiles it")
    weights = [torch.randn(33, 7, device=device)]
    numbers: dict[str, Any] = {"step": 1, "lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    results = []
    for update in (adam_update(impl, device), adamw_step):
        own = [weight.clone() for weight in weights]
        update(own, [w.sin() for w in weights], [torch.zeros_like(w) for w in own], [torch.zeros_like(w) for w in own],
               **numbers)  # fmt: skip
        results.append(own[0])
    return f"AdamW {near(results[0], results[1], 1e-5)}"


def is_built(name: str) -> bool:
    """Whether DeepSpeed has compiled a kernel here before, or may do so now."""
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    return os.environ.get("CHECK_ENVIRONMENT_BUILD") == "1" or any(folder.rglob(f"{name}/{name}.so"))


def torchao(recipe: str) -> str:
    device = best_device()
    installed("torchao")
    kind = "e4m3" if recipe == "mxfp8" else "hybrid"
    options = BackendConfig(fp8_format=kind, fp8_backend="torchao", fp8_recipe=recipe)  # type: ignore[arg-type]
    if device.type == "cuda":
        _fp8_or_not(options, device)
    x = torch.randn(64, 128, device=device, dtype=torch.bfloat16)
    w = torch.randn(96, 128, device=device, dtype=torch.bfloat16)
    words = near(multiply_of(options, device)(x, w), F.linear(x, w), 0.06)
    return f"FP8 product {words}" + (", emulated: for tests only" if device.type == "cpu" else "")


def _fp8_or_not(options: BackendConfig, device: torch.device) -> None:
    try:
        check_fp8_device(options, device)
    except ValueError as error:
        raise Unusable(str(error)) from error


def transformer_engine(recipe: str | None) -> str:
    """A linear layer of ours run by transformer-engine, in bf16 or FP8, forward and backward."""
    installed("transformer-engine")
    device = gpu()
    names = ("transformer_engine.pytorch", "transformer_engine.common.recipe")
    modules, recipes = load("transformer-engine", FLAG, *names)
    options = BackendConfig(transformer_impl="transformer_engine")
    if recipe is not None:
        options = BackendConfig(transformer_impl="transformer_engine", fp8_format="hybrid", fp8_recipe=recipe)  # type: ignore[arg-type]
        _fp8_or_not(options, device)
    linear = Linear("fc1", 256, 512, bias=False, initials={}, parts=None).to(device, torch.bfloat16)
    nn.init.normal_(linear.weight, std=0.05)
    x = torch.randn(128, 256, device=device, dtype=torch.bfloat16, requires_grad=True)
    expected = F.linear(x.detach(), linear.weight.detach())
    attach_linear(modules, linear, fuses_accumulation=False)
    context: Any = contextlib.nullcontext()
    if recipe is not None:
        context = modules.autocast(enabled=True, recipe=recipe_of(options, recipes, reduces_amax=False))
    with context:
        y = linear(x)
    y.sum().backward()
    return near(y.detach(), expected, 1e-2 if recipe is None else 0.1)


def apex_norm() -> str:
    installed("apex")
    device = gpu()
    config = ModelConfig(hidden_size=64, normalization="RMSNorm")
    holder = nn.Sequential(NormLayer(config)).to(device)
    nn.init.normal_(holder[0].weight)
    x = torch.randn(16, 64, device=device, dtype=torch.bfloat16)
    expected = holder(x)
    attach_norms(holder, "apex")
    return f"RMSNorm {near(holder(x), expected, 1e-2)}"


def apex_accumulation() -> str:
    installed("apex")
    device = gpu()
    (module,) = load("apex", "--gradient-accumulation-fusion", "fused_weight_gradient_mlp_cuda")
    x, grad = (torch.randn(64, size, device=device, dtype=torch.bfloat16) for size in (32, 48))
    total = torch.zeros(48, 32, device=device)
    module.wgrad_gemm_accum_fp32(x, grad, total)
    return f"weight gradient {near(total, grad.float().t() @ x.float(), 1e-2)}"


def imports(module: str, extra: str) -> Callable[[], str]:
    """A library that is only imported."""

    def probe() -> str:
        if folder_of(module) is None:
            raise Unusable(f"not installed: pip install 'megatron_hc[{extra}]'")
        importlib.import_module(module)
        return "loads"

    return probe


def tokenizer() -> str:
    """sentencepiece trains a model of a few characters and takes a text there and back."""
    import sentencepiece

    text, model = "the cat sat on the mat", io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 20), model_writer=model, vocab_size=20, model_type="bpe", minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert processor.decode(processor.encode(text)) == text
    return "a text there and back"


def one_of(probe: Callable[[str], str], argument: str) -> Callable[[], str]:
    return lambda: probe(argument)


NOT_RUN = "2.20: signatures, not run"
APEX = "signatures, not run"

PARTS = (
    Part("torch", "torch", "2.11, 2.13 (CPU)", "every run", base, is_base=True),
    Part("gloo", "torch", "torch 2.11, 2.13", "several processes on CPUs", gloo),
    Part("CUDA", "torch", "torch 2.11 (H200)", "--device cuda", cuda),
    Part("NCCL", "torch", "not run", "several GPUs", nccl),
    Part("flash attention", "torch", "torch 2.13 (CPU)", "--attention-backend flash", one_of(attention, "flash")),
    Part("cuDNN attention", "torch", "torch 2.11 (H200)", "--attention-backend fused", one_of(attention, "fused")),
    Part("torch.compile", "torch", "torch 2.13 (CPU)", "--compile", compiler),
    Part("C++ kernels", "torch", "g++ 12", "--fused-residual-backend cpp", cpp),
    Part("Triton kernels", "triton", "3.6 (H200), 3.9 (interpreter)", "--fused-residual-backend triton", triton),
    Part("DeepSpeed", "deepspeed", "0.19.8 (CPU)", "--deepspeed", deepspeed),
    Part("DeepSpeed's Adam", "deepspeed", "0.19.8 (CPU)", "--optimizer-impl deepspeed", one_of(adam, "deepspeed")),
    *(
        Part(f"torchao {recipe}", "torchao", "0.18 (CPU)", f"--fp8-backend torchao --fp8-recipe {recipe}",
             one_of(torchao, recipe))
        for recipe in ("tensorwise", "mxfp8")
    ),
    Part("transformer-engine", "transformer-engine", NOT_RUN, FLAG, lambda: transformer_engine(None)),
    *(
        Part(f"transformer-engine {recipe}", "transformer-engine", NOT_RUN, f"--fp8-recipe {recipe}",
             one_of(transformer_engine, recipe))
        for recipe in CAPABILITIES
    ),
    Part("transformer-engine's Adam", "transformer-engine", NOT_RUN, "--optimizer-impl transformer_engine",
         one_of(adam, "transformer_engine")),
    Part("apex's Adam", "apex", APEX, "--optimizer-impl apex", one_of(adam, "apex")),
    Part("apex's norms", "apex", APEX, "--norm-impl apex", apex_norm),
    Part("apex's weight gradients", "apex", APEX, "--gradient-accumulation-fusion", apex_accumulation),
    Part("sentencepiece", "sentencepiece", "0.2.3", "SentencePieceTokenizer", tokenizer, is_base=True),
    Part("transformers", "transformers", "5.24", "HuggingFaceTokenizer, conversion", imports("transformers", "hf")),
    Part("tiktoken", "tiktoken", "0.14", "TikTokenizer", imports("tiktoken", "hf")),
    Part("datasets", "datasets", "5.2", "tools/preprocess_data.py --dataset", imports("datasets", "data")),
    Part("pyarrow", "pyarrow", "26.0", "parquet files", imports("pyarrow", "data")),
    Part("zstandard", "zstandard", "0.25", ".zst files", imports("zstandard", "data")),
    Part("lm-eval", "lm_eval", "0.4.13", "tools/eval_harness.py", imports("lm_eval", "eval")),
    Part("fastapi", "fastapi", "0.165", "tools/serve.py", imports("fastapi", "serve")),
    Part("tensorboard", "tensorboard", "2.21", "--tensorboard-dir", imports("tensorboard", "log")),
    Part("wandb", "wandb", "0.31", "--wandb-project", imports("wandb", "log")),
    Part("matplotlib", "matplotlib", "3.11", "plots", imports("matplotlib", "plot")),
)  # fmt: skip
"""In the order of the table."""

