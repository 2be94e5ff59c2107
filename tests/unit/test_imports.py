"""Who may import whom, and that optional libraries are imported only inside the function that needs them."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_hc"

MAY_IMPORT: dict[str, set[str]] = {
    "backends": {"config", "kernels", "mesh", "model", "optim", "packages", "parallel", "stored"},
    "packages": set(),
    "cpu_memory": set(),
    "config": {"pipeline_layout"},
    "pipeline_layout": set(),
    "cli_megatron": set(),
    "cli_options": {"config"},
    "cli_help": {"config", "cli_options"},
    "cli": {"config", "cli_help", "cli_options", "cli_megatron", "checkpoint_folder"},
    "mesh": {"config", "pipeline_layout", "place"},
    "log": {"config", "log_files", "log_sinks"},
    "log_sinks": {"config", "folders", "log_files"},
    "log_files": set(),
    "folders": set(),
    "outputs": set(),
    "signals": {"config", "mesh", "parallel"},
    "spikes": {"config"},
    "save_lock": set(),
    "kernels": set(),
    "residual": {"config", "kernels"},
    "model": {"config", "residual", "kernels"},
    "parallel": {"mesh", "kernels", "config", "folders", "pipeline_layout", "stored"},
    "data": {"config", "mesh"},
    "optim": {"config", "mesh", "packages"},
    "checkpoint": {
        *("config", "mesh", "checkpoint_folder", "checkpoint_foreign", "checkpoint_ranks", "checkpoint_save", "stored")
    },
    "checkpoint_save": {"launch", "mesh", "checkpoint_folder", "checkpoint_ranks", "stored"},
    "launch": {"place"},
    "place": set(),
    "watchdog": {"config", "launch", "mesh"},
    "checkpoint_ranks": {"mesh", "stored"},
    "checkpoint_folder": {"checkpoint_foreign", "folders"},
    "checkpoint_foreign": set(),
    "checkpoint_access": {
        *("checkpoint_folder", "checkpoint_foreign", "checkpoint_ranks", "config", "mesh", "save_lock")
    },
    "stored": set(),
    "state": {"mesh", "model", "parallel", "stored"},
    "connections": {"model", "residual"},
    "residual_stats": {"mesh", "model", "parallel", "residual"},
    "inference": {
        "checkpoint",
        "cli",
        "cli_options",
        "config",
        "data",
        "launch",
        "mesh",
        "model",
        "parallel",
        "residual",
        "state",
        "stored",
    },  # fmt: skip
    "estimate": {"config", "kernels", "log", "mesh", "model", "outputs", "parallel", "pipeline_layout", "residual"},
    "evaluation": {"config", "data", "inference", "mesh", "model", "parallel"},
    "validation": {"checkpoint", "cli", "config", "data", "inference", "mesh", "parallel"},
    "convert": {
        "checkpoint",
        "checkpoint_folder",
        "cli",
        "cli_options",
        "config",
        "data",
        "inference",
        "mesh",
        "model",
        "parallel",
        "residual",
    },  # fmt: skip
}
"""Part of the package -> parts it may import, besides itself. ``run`` and ``train`` may import all."""

ONLY = {
    "parallel/plan.py": {"model", "residual"},
    # The rows of the plan: they replace or wrap modules of the model, and have to know their classes.
    "parallel/tensor.py": {"model"},
    "parallel/recompute.py": {"model", "residual"},
    "parallel/recompute_groups.py": {"model", "residual"},
    "parallel/recompute_reads.py": {"model", "residual"},
    "parallel/compiled.py": {"model"},
    "parallel/expert.py": {"model"},
    "parallel/fsdp.py": {"model"},
    "parallel/pipeline.py": {"model"},
    "parallel/stages.py": {"model", "residual"},
    "parallel/data.py": {"optim"},  # updates its shards
    "parallel/deepspeed.py": {"optim"},
    "parallel/deepspeed_state.py": {"optim"},
}
"""What single files may import beyond their part."""

ALWAYS_THERE = {"torch", "numpy", "packaging", "yaml", "safetensors", "sentencepiece", "tqdm"}
"""The libraries that setup.py installs without an extra."""

KERNEL_NAMES = ("boundary_triton", "boundary_triton_joint", "cross_entropy_triton", "norm_triton", "rope_triton")
KERNEL_NAMES += ("boundary_triton_backward_kernels", "boundary_triton_folds", "boundary_triton_joint_kernels")
KERNEL_NAMES += ("boundary_triton_kernels", "swiglu_triton", "triton_pieces")
KERNEL_FILES = {f"kernels/{name}.py": {"triton"} for name in KERNEL_NAMES}
"""Files that are kernels of an optional library, whose decorators need it; they are imported by functions only."""

TORCH_FREE = ("config", "pipeline_layout", "checkpoint_folder", "cli", "cli_help", "cli_options", "cli_megatron")
TORCH_FREE += ("checkpoint_foreign", "folders", "launch", "packages", "place")

COPIED = "convert/hf_code/"
"""Files that are copied beside exported weights and never imported here."""

FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
FILES = [file for file in FILES if not file.startswith(COPIED)]


def part_of(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


def imported(node: ast.AST, package: str) -> list[str]:
    """Dotted names of modules that an import statement may load; ``from megatron_hc import x`` gives both."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = (
            importlib.util.resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
        )
        assert base is not None
        return [f"{base}.{alias.name}" for alias in node.names] if base == "megatron_hc" else [base]
    return []


def at_import_time(node: ast.AST) -> list[ast.AST]:
    """All nodes that run when the module is imported: not the bodies of functions, not ``if TYPE_CHECKING``."""
    found: list[ast.AST] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        found += [child, *at_import_time(child)]
    return found


def violations(file: str, source: str) -> list[str]:
    """The rules of the table that ``source``, lying at ``megatron_hc/file``, breaks."""
    part, tree = part_of(file), ast.parse(source)
    package = ".".join(["megatron_hc", *file.split("/")[:-1]])
    allowed = MAY_IMPORT.get(part, set()) | ONLY.get(file, set()) | {part, "__version__"}
    found: list[str] = []
    for node in ast.walk(tree):
        for name in imported(node, package):
            if name.startswith("megatron_hc.") and part not in ("run", "train", "__init__"):
                if name.split(".")[1] not in allowed:
                    found.append(f"{file}:{node.lineno} imports {name}")
            if part in TORCH_FREE and name.split(".")[0] in ("torch", "numpy"):
                found.append(f"{file}:{node.lineno} imports {name}, and must load fast")
    for node in at_import_time(tree):
        for name in imported(node, package):
            top = name.split(".")[0]
            allowed = ALWAYS_THERE | {"megatron_hc", "__future__"} | KERNEL_FILES.get(file, set())
            if top not in allowed and top not in sys.stdlib_module_names:
                found.append(f"{file}:{node.lineno} imports the optional {name} at module level")
    return found


@pytest.mark.parametrize("file", FILES)
def test_imports_follow_the_table(file: str) -> None:
    assert part_of(file) in MAY_IMPORT.keys() | {"run", "train", "__init__"}, f"{file} has no row in MAY_IMPORT"
    assert not violations(file, (PACKAGE / file).read_text())


@pytest.mark.parametrize(
    "file, source, count",
    [
        ("model/gpt.py", "from megatron_hc.parallel import plan", 1),
        ("model/gpt.py", "from megatron_hc import mesh, config", 1),
        ("model/gpt.py", "from ..parallel.plan import x", 1),
        ("model/gpt.py", "def f():\n    import megatron_hc.mesh", 1),
        ("model/gpt.py", "import torch\nfrom megatron_hc.model.layer import x\nfrom . import layer", 0),
        ("parallel/plan.py", "from megatron_hc.model.gpt import GPT", 0),
        ("parallel/data.py", "from megatron_hc.model.gpt import GPT", 1),
        ("config.py", "import torch", 1),
        ("cli.py", "def f():\n    import torch", 1),
        ("log.py", "import wandb", 1),
        ("log.py", "if True:\n    from tensorboard import x", 1),
        ("log.py", "def f():\n    import wandb", 0),
        ("train.py", "from megatron_hc import model, parallel, checkpoint", 0),
    ],
)
def test_the_check_itself(file: str, source: str, count: int) -> None:
    assert len(violations(file, source)) == count
