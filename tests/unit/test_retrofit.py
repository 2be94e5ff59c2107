"""A plain checkpoint with another residual method: the same logits and next loss, and new parameters that move."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FORMS
from convert_models import saved, write_checkpoint
from helpers import assert_same_bits, random_tokens, small_config

sys.path[:0] = [str(Path(__file__).parents[2] / "tools"), str(Path(__file__).parents[1] / "train")]

import retrofit_residual  # noqa: E402
from train_runs import command, losses, tiny  # noqa: E402

from megatron_hc import checkpoint  # noqa: E402
from megatron_hc.config import ModelConfig, MoEConfig, ResidualConfig  # noqa: E402
from megatron_hc.convert.retrofit import reasons_against, retrofit  # noqa: E402
from megatron_hc.convert.rmsnorm import to_rmsnorm  # noqa: E402
from megatron_hc.inference import load_model  # noqa: E402
from megatron_hc.residual import RESIDUALS  # noqa: E402

CLAIMED = {
    "hyper": "--residual-connection hyper",
    "hyper-static": "--residual-connection hyper --static-residual --residual-streams 3",
    "frac": "--residual-connection frac",
    "mhc": "--residual-connection mhc",
    "mhc-single-pass": "--residual-connection mhc --mhc-single-pass",
    "mhc-lite": "--residual-connection mhc-lite --residual-streams 3",
    "kromhc": "--residual-connection kromhc",
    "virtual-width": "--residual-connection virtual-width --no-virtual-width-projections",
    "denseformer": "--residual-connection denseformer",
    "muddformer": "--residual-connection muddformer",
    "gated": "--residual-connection gated --gated-residual-rank 4",
    "laurel": "--residual-connection laurel --laurel-form lr",
    "laurel-pa": "--residual-connection laurel --laurel-form lr-pa",
    "sparse-aggregation": "--residual-connection sparse-aggregation",
    "rezero": "--residual-connection rezero",
    "layerscale": "--residual-connection layerscale",
    "learnable": "--value-residual learnable",
    "dense-mhc": "--value-residual dense --residual-connection mhc",
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt": {
        "normalization": "LayerNorm", "swiglu": False, "disable_bias_linear": False,
        "position_embedding_type": "learned_absolute",
    },
    "olmo": {"norm_placement": "reordered", "qk_layernorm": True},
    "moe": {"moe": MoEConfig(num_experts=4, moe_ffn_hidden_size=8)},
}  # fmt: skip
NOT = {"gpt": ("gated",), "olmo": ("gated", "muddformer")}


def logits(folder: Path) -> torch.Tensor:
    model = load_model(str(folder)).model
    with torch.no_grad():
        return model.output.logits(model(random_tokens()))


@pytest.mark.parametrize("shape", MODELS)
def test_logits_stay(shape: str, tmp_path: Path) -> None:
    before = write_checkpoint(tmp_path / "plain", small_config(**MODELS[shape]), "fp64")
    expected = logits(tmp_path / "plain")
    for name, flags in CLAIMED.items():
        if name in NOT.get(shape, ()):
            continue
        retrofit(str(tmp_path / "plain"), str(tmp_path / name), flags.split())
        # New tensors are fp32.
        torch.testing.assert_close(logits(tmp_path / name), expected, rtol=0, atol=1e-6, msg=name)
        after = load_model(str(tmp_path / name)).model
        new = dict(after.named_parameters())
        assert new.keys() - dict(before.named_parameters()).keys(), name
        kept = {key: value for key, value in before.named_parameters() if key in new and "norm" not in key}
        assert_same_bits({key: new[key] for key in kept}, {key: value.detach() for key, value in kept.items()})


REFUSED = {
    "attention": ("--residual-connection attention", "--norm-epsilon"),
    "sum": ("--residual-connection hyper --residual-readout sum", "use mean"),
    "megatron": ("--residual-connection mhc --mhc-convention megatron", "use paper"),
    "orthogonal": ("--residual-connection orthogonal", "at any weights"),
    "deep-delta": ("--residual-connection deep-delta", "at any weights"),
    "laurel-rw": ("--residual-connection laurel --laurel-form rw-lr", "use lr, pa or lr-pa"),
    "virtual-width": ("--residual-connection virtual-width", "use --no-virtual-width-projections"),
    "half": ("--value-residual half", "use learnable or dense"),
    "half-start": ("--value-residual learnable --value-residual-first-weight 0.5", "must start with"),
    "scale": ("--residual-scale completep --base-num-layers 1", "multiplies every output"),
    "nothing": ("", "nothing would change"),
    "shape": ("--residual-connection mhc --num-layers 7", "--num-layers cannot change here"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_such_start(name: str, tmp_path: Path) -> None:
    flags, message = REFUSED[name]
    write_checkpoint(tmp_path / "plain", small_config())
    with pytest.raises(ValueError, match=message):
        retrofit(str(tmp_path / "plain"), str(tmp_path / "new"), flags.split())
    assert not (tmp_path / "new").exists()


def test_only_plain_models(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", small_config({"residual_connection": "frac"}))
    with pytest.raises(ValueError, match="only a plain one can be retrofitted"):
        retrofit(str(tmp_path / "a"), str(tmp_path / "b"), ["--residual-connection", "mhc"])
    write_checkpoint(tmp_path / "post", small_config(norm_placement="hybrid"))
    with pytest.raises(ValueError, match="pre, peri, reordered"):
        retrofit(str(tmp_path / "post"), str(tmp_path / "c"), ["--value-residual", "learnable"])


def test_every_method_is_judged() -> None:
    """A new method is claimed above, or refused with a reason."""
    claimed = {flags.split()[1] for flags in CLAIMED.values()}
    for method in RESIDUALS.keys() - claimed - {"plain"}:
        residual = ResidualConfig(residual_connection=method, **FORMS[method][0][2])
        assert reasons_against(ModelConfig(residual=residual)), method


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A text, and a run of four iterations on it."""
    from megatron_hc.data import ByteTokenizer, IndexedDatasetWriter

    folder = tmp_path_factory.mktemp("plain")
    prefix = str(folder / "text")
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for paragraph in (Path(__file__).parents[2] / "LICENSE").read_text().split("\n\n"):
            writer.add_document([*ByteTokenizer().tokenize(paragraph), 256])
    assert command(tiny(prefix, folder, "--train-iters", 4, "--save", folder / "run")) == 0
    return prefix, folder / "run"


def resumed(prefix: str, load: Path, folder: Path) -> list[float]:
    """Losses of iterations 5 and 6, with the optimizer's state, all of the model's flags from the checkpoint."""
    folder.mkdir(exist_ok=True)
    shape = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --position-embedding-type rope --normalization"
    words = [str(word) for word in tiny(prefix, folder, "--train-iters", 6, "--load", load, "--save", folder / "run")]
    del words[words.index("--num-layers") : words.index("--micro-batch-size")]
    assert shape.split()[0] not in words
    assert command([*words, "--use-checkpoint-args"]) == 0
    return losses(folder)


IN_TURN = [pytest.param(name, marks=pytest.mark.slow) for name in ("muddformer", "frac", "laurel-pa", "mhc-lite")]


@pytest.mark.parametrize("name", ["mhc", "gated", "dense-mhc", *IN_TURN])
def test_training_goes_on(name: str, plain: tuple[str, Path], tmp_path: Path, capsys: Any) -> None:
    """The next loss is that of the plain run; new parameters move; old moments are there."""
    prefix, run = plain
    without = resumed(prefix, run, tmp_path / "without")
    argv = ["--load", str(run), "--save", str(tmp_path / "new"), "--check-logits", *CLAIMED[name].split()]
    assert retrofit_residual.main(argv) == 0
    assert "largest difference" in capsys.readouterr().out
    with_it = resumed(prefix, tmp_path / "new", tmp_path / "with")
    assert abs(with_it[0] - without[0]) < 1e-5 and abs(with_it[1] - without[1]) < 0.2
    start, end = checkpoint.find(tmp_path / "new", 4), checkpoint.find(tmp_path / "with" / "run", 6)
    with checkpoint.Reader(start) as a, checkpoint.Reader(end) as b, checkpoint.Reader(checkpoint.find(run)) as old:
        new = [key for key in a.shapes if key.startswith("model.") and key not in old.shapes]
        assert new
        still = [key for key in new if a.read(key).equal(b.read(key))]
        # What multiplies zeros moves from the third step on.
        assert all(key.endswith(("alpha", "scale_alpha", "scale_beta", "gate_down", "w1", "low")) for key in still), (
            still
        )
        kept = [key for key in old.shapes if key.startswith("optimizer.") and key in a.shapes]
        assert len(kept) >= 18 and all(a.read(key).equal(old.read(key)) for key in kept)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("experts", "bias"), [(False, True), (True, True), (False, False)])
def test_pre_rmsnorm(tied: bool, experts: bool, bias: bool, tmp_path: Path) -> None:
    moe = {"moe": MoEConfig(num_experts=4, moe_shared_expert_intermediate_size=8)} if experts else {}
    changes = {"untie_embeddings_and_output_weights": not tied, "disable_bias_layernorm": not bias}
    config = small_config(**MODELS["gpt"], **changes, **moe)
    write_checkpoint(tmp_path / "ln", config, "fp64")
    to_rmsnorm(str(tmp_path / "ln"), str(tmp_path / "rms"))
    found = load_model(str(tmp_path / "rms"))
    assert found.config.model.normalization == "RMSNorm" and found.config.model.rmsnorm_bias == bias
    torch.testing.assert_close(logits(tmp_path / "rms"), logits(tmp_path / "ln"), rtol=0, atol=1e-9)
    retrofit(str(tmp_path / "rms"), str(tmp_path / "mhc"), ["--residual-connection", "mhc"])
    torch.testing.assert_close(logits(tmp_path / "mhc"), logits(tmp_path / "ln"), rtol=0, atol=1e-6)


def test_pre_rmsnorm_refusals(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", small_config())
    with pytest.raises(ValueError, match="not --normalization RMSNorm"):
        to_rmsnorm(str(tmp_path / "a"), str(tmp_path / "b"))


def test_from_hugging_face(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    saved("qwen2", tmp_path / "hf")
    flags = ["--residual-connection", "mhc", "--value-residual", "learnable", "--check-logits"]
    assert retrofit_residual.main(["--load", str(tmp_path / "hf"), "--save", str(tmp_path / "mhc"), *flags]) == 0
    assert "largest difference" in capsys.readouterr().out
    assert load_model(str(tmp_path / "mhc")).config.model.value_weights == (0.0, 1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mhc"]
    shutil.rmtree(tmp_path / "mhc")
    with pytest.raises(SystemExit):
        retrofit_residual.main(
            ["--load", str(tmp_path / "hf"), "--save", str(tmp_path / "mhc"), "--residual-conection", "x"]
        )
