"""Every example is accepted by the command line, and every residual method, and family of options, has one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from megatron_hc import cli
from megatron_hc.config import RESIDUAL_CONNECTIONS, TrainConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
RESIDUAL_EXAMPLES = sorted(path.name for path in (EXAMPLES / "residual").glob("*.yaml"))


def config_of(name: str) -> TrainConfig:
    files = [EXAMPLES / "quickstart.yaml", EXAMPLES / "residual" / name]
    layers = [part for file in files for part in ("--yaml-cfg", str(file))]
    config = cli.parse([*layers, "--mock-data", "--tokenizer-type", "ByteTokenizer", "--save", "run"]).config
    config.validate()
    return config


@pytest.mark.parametrize("name", RESIDUAL_EXAMPLES)
def test_an_example_is_accepted(name: str) -> None:
    config_of(name)


def test_every_method_has_an_example() -> None:
    models = [config_of(name).model for name in RESIDUAL_EXAMPLES]
    assert {model.residual.residual_connection for model in models} == set(RESIDUAL_CONNECTIONS)
    assert {model.norm_placement for model in models} >= {"deepnorm", "peri", "hybrid-star"}
    assert any(model.single_layer_value for model in models)
    assert any(model.value_residual != "none" for model in models)


def test_the_quick_start_with_a_text_of_ones_own(tmp_path: Path) -> None:
    """--output is, as --input, as seen from where the script was started; a prompt's last word is whole, without the
    space that begins the next. A stand-in for python notes its arguments."""
    (tmp_path / "python").write_text(f"#!/bin/sh\necho \"$*\" >>'{tmp_path}/called'\necho {tmp_path}\n")
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "text.txt").write_text("a text\n")
    run = subprocess.run(
        ["bash", str(EXAMPLES / "quickstart.sh"), "--output", "a folder", "--input", "text.txt"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VIRTUAL_ENV": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "a folder" / "source.txt").read_text() == f"{tmp_path}/text.txt\n"
    assert "--prompt The --max-new-tokens" in (tmp_path / "called").read_text()
