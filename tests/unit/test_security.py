"""Nothing in the code runs what a file or a user's string says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for places in ("*.py", "tools/**/*.py", "megatron_hc/**/*.py", "examples/**/*.py")
    for path in ROOT.glob(places)
)
PICKLE_ASKED_FOR = {"megatron_hc/convert/torch_dist.py"}
"""Files that unpickle, where the user has said --allow-pickle."""


UNPICKLERS = ("pickle", "dill", "cloudpickle", "shelve", "marshal")


def dangers(source: str) -> list[str]:
    """What in a file could run code that a file or a string brings along."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [f"imports {name}" for name in modules if name.split(".")[0] in UNPICKLERS]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in ("eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"):
            found.append(f"calls {name}")
        if name == "torch.load" and keywords.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if name in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False":
            found.append("np.load with pickles")
        if name.endswith((".extractall", ".extract")) or name.endswith("unpack_archive"):
            found.append(f"{name}: an archive's names may leave the folder")
        if "shell" in keywords:
            found.append(f"{name} with a shell")
        if name in ("yaml.load", "yaml.load_all") and "SafeLoader" not in source:
            found.append("yaml.load without SafeLoader")
        if name in ("yaml.unsafe_load", "yaml.full_load"):
            found.append(name)
    return found


@pytest.mark.parametrize("file", FILES)
def test_nothing_runs_what_a_file_says(file: str) -> None:
    found = dangers((ROOT / file).read_text())
    if file in PICKLE_ASKED_FOR:
        found = [danger for danger in found if "pickle" not in danger and "torch.load" not in danger]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "import tarfile\ntarfile.open(f).extractall(d)",
        "subprocess.run(x, shell=True)",
        "eval(x)",
        "os.system(x)",
        "yaml.load(f, yaml.Loader)",
    ],
)
def test_the_check_itself(source: str) -> None:
    assert dangers(source)
