"""The average of several checkpoints' weights: uniform and greedy model soups (Wortsman et al., 2203.05482).

::

    python tools/average_checkpoints.py runs/a runs/b runs/c --output runs/soup                  of all, uniformly
    python tools/average_checkpoints.py runs/a/iter_000{8,9}000 runs/a --output runs/soup --score
    python tools/average_checkpoints.py runs/a runs/b runs/c --output runs/soup --method greedy --data-path valid_text

A greedy soup starts with the checkpoint of least validation loss; the others follow in the order of their loss, and
each stays in if the average with it has no larger loss than the average without (Recipe 1 of the paper). ``--score``
gives the losses for a uniform soup too. Validation data is ``--data-path``, all of it, or the validation split of the
first checkpoint's run.

Averages help where checkpoints share a beginning: steps of one run, or runs fine-tuned from one checkpoint. They must
be of one model; the layouts that saved them make no difference. Expert biases are averaged like weights, optimizer
states are left out: go on from the result with ``--finetune`` or ``--no-load-optim``. Averages are computed in float64,
tensor by tensor; about 2 GB are in memory at a time, and with a validation loss a model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hc.cli import exit_on_user_error
from megatron_hc.folders import check_folder

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_hc.checkpoint import Reader
    from megatron_hc.validation import Validation

TRAINING_ONLY = {
    *("init_method_std", "attention_dropout", "hidden_dropout", "make_vocab_size_divisible_by", "fused_residual"),
    *("moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_router_bias_update_rate", "moe_input_jitter_eps"),
    *("moe_expert_capacity_factor", "moe_pad_expert_input_to_capacity", "moe_token_drop_policy", "moe_grouped_gemm"),
    *("fused_residual_backend", "attention_backend", "attention_softmax_in_fp32", "fp32_residual_connection"),
    *("seq_length", "max_position_embeddings"),  # learned positions are weights, whose shapes must be equal
}
"""Settings of the model in which the checkpoints of one soup may differ: the weights' function does not."""


def folder_of(path: str) -> Path:
    """A checkpoint's own folder, or the latest in a folder of checkpoints."""
    from megatron_hc import checkpoint

    folder = Path(path)
    return folder if (folder / "state.json").exists() else checkpoint.find(folder)


def check_output(output: str) -> None:
    """Only a new folder that can be made: nothing there can be overwritten, or taken for the result."""
    if Path(output).exists():
        raise ValueError(f"--output {output} exists: choose a folder that does not")
    check_folder("--output", output)


def add_validation_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-path", nargs="+", default=[], metavar="PREFIX", help="validation data (default: the run's own)"
    )
    parser.add_argument("--num-samples", type=int, default=256, help="sequences to score (default: 256)")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="sequences at a time (default: 8)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to score (default: cpu)")
    parser.add_argument("--tokenizer-model", help="the tokenizer's file, if it has moved since training")


def refuse_validation_options(options: argparse.Namespace, given: str) -> None:
    """Of ``add_validation_options``, where ``given`` reads no data."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_validation_options(parser)
    defaults = vars(parser.parse_args([]))
    idle = [f"--{name.replace('_', '-')}" for name, value in defaults.items() if getattr(options, name) != value]
    if idle:
        raise ValueError(f"{' and '.join(idle)} would do nothing with {given}, which reads no data: leave it out")


def validation_of(folder: Path, options: argparse.Namespace) -> Validation:
    from megatron_hc.validation import Validation

    return Validation(
        folder,
        data_path=options.data_path,
        num_samples=options.num_samples,
        micro_batch_size=options.micro_batch_size,
        device=options.device,
        tokenizer_model=options.tokenizer_model,
    )


def mean_of(readers: Sequence[Reader]) -> Callable[[str], Tensor]:
    """Name -> the mean over checkpoints, in the first one's dtype."""

    def read(name: str) -> Tensor:
        first = readers[0].read(name)
        total = first.double()
        for reader in readers[1:]:
            total += reader.read(name).double()
        return (total / len(readers)).to(first.dtype)

    return read


def check_alike(readers: Sequence[Reader]) -> list[str]:
    """Names of the weights; ``ValueError`` unless all checkpoints are of one model."""
    first = readers[0]
    names, settings = _weights(first), _model_settings(first.folder)
    for other in readers[1:]:
        different = f"{other.folder} is of another model than {first.folder}"
        theirs = _model_settings(other.folder)
        for name, value in settings.items():
            if theirs[name] != value:
                raise ValueError(f"{different}: {name} is {theirs[name]} and {value}")
        only_one = sorted(names.keys() ^ _weights(other).keys())
        if only_one:
            raise ValueError(f"{different}: only one of them has {only_one[0]}")
        for name, shape in names.items():
            if _weights(other)[name] != shape:
                raise ValueError(f"{different}: {name} is {list(_weights(other)[name])} and {list(shape)}")
    return sorted(names)


def _weights(reader: Reader) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, (shape, _) in reader.shapes.items() if name.startswith("model.")}


def _model_settings(folder: Path) -> dict[str, Any]:
    """What a model's function depends on, beside its weights."""
    from megatron_hc import checkpoint
    from megatron_hc.cli import from_flat, to_flat
    from megatron_hc.config import TrainConfig

    model = from_flat(checkpoint.read_arguments(folder)).model
    return {name: value for name, value in to_flat(TrainConfig(model=model)).items() if name not in TRAINING_ONLY}


def soup_of(
    readers: Sequence[Reader], method: str, validation: Validation | None
) -> tuple[list[Reader], dict[str, Any]]:
    """The checkpoints to average, and what to remember of the choice."""
    if validation is None:
        return list(readers), {"method": method}

    def loss_of(some: Sequence[Reader]) -> float:
        validation.fill(mean_of(some))
        return validation.loss()

    losses = {}
    for reader in readers:
        losses[reader] = loss_of([reader])
        print(f"loss {losses[reader]:.6f}  {reader.folder}", flush=True)
    if method == "uniform":
        chosen = list(readers)
        best = loss_of(chosen)
    else:
        first, *others = sorted(readers, key=lambda reader: losses[reader])
        chosen, best = [first], losses[first]
        for reader in others:
            loss = loss_of([*chosen, reader])
            print(f"loss {loss:.6f}  with {reader.folder}: {'taken' if loss <= best else 'left out'}", flush=True)
            if loss <= best:
                chosen, best = [*chosen, reader], loss
    print(f"loss {best:.6f}  average of {len(chosen)} of {len(readers)}")
    found = {str(reader.folder): loss for reader, loss in losses.items()}
    return chosen, {"method": method, "loss": best, "losses": found}


def average(options: argparse.Namespace) -> str:
    """Write the soup; returns what was done."""
    from megatron_hc import checkpoint

    check_output(options.output)
    folders = [folder_of(path) for path in options.checkpoints]
    if len({folder.resolve() for folder in folders}) < max(len(folders), 2):
        raise ValueError(f"an average needs at least two different checkpoints, not {', '.join(map(str, folders))}")
    with ExitStack() as stack:
        readers = [stack.enter_context(checkpoint.Reader(folder)) for folder in folders]
        names = check_alike(readers)
        scored = options.method == "greedy" or options.score
        if not scored:
            refuse_validation_options(options, "--method uniform without --score")
        chosen, record = soup_of(readers, options.method, validation_of(folders[0], options) if scored else None)
        newest = max(chosen, key=lambda reader: checkpoint.read_state(reader.folder)["iteration"])
        state = checkpoint.read_state(newest.folder)
        for key in ("rng", "optimizer_steps"):
            state.pop(key, None)
        record["of"] = [str(reader.folder) for reader in chosen]
        written = checkpoint.save_one_by_one(
            options.output,
            state["iteration"],
            {name: chosen[0].shapes[name] for name in names},
            mean_of(chosen),
            state | {"average": record},
            checkpoint.read_origins(newest.folder),
        )
    return f"average of {len(chosen)} checkpoints in {written}"


def main(argv: list[str]) -> int:
    """Exit codes: 0, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoints", nargs="+", help="iter_N folders, or folders of them: the latest")
    parser.add_argument("--output", required=True, help="a new folder of checkpoints, for --load")
    parser.add_argument("--method", choices=("uniform", "greedy"), default="uniform", help="(default: uniform)")
    parser.add_argument("--score", action="store_true", help="validation losses of a uniform soup too")
    add_validation_options(parser)
    with exit_on_user_error("average_checkpoints.py"):
        print(average(parser.parse_args(argv)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
