"""Flags, YAML, checkpoint arguments: values, origins, and every mistake reported at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hc import checkpoint_folder, cli, cli_options
from megatron_hc.cli_megatron import ALIASES, FAMILIES, NOT_NEEDED, REPLACED, VALUE, VALUES
from megatron_hc.config import TrainConfig, flag, leaf_fields

REQUIRED = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --lr 3e-4 --micro-batch-size 2".split()
)


def parse(*argv: str, **kwargs) -> cli.Parsed:
    return cli.parse([*REQUIRED, *argv], **kwargs)


def error_of(*argv: str, required: bool = True, **kwargs) -> str:
    with pytest.raises(cli.UsageError) as caught:
        cli.parse([*(REQUIRED if required else ()), *argv], **kwargs)
    return str(caught.value)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


# Values


def test_every_flag_sets_its_own_field_and_no_other() -> None:
    """Each option, given a value that is not its default, changes exactly the field of its name."""
    plain = cli.to_flat(parse().config)
    for name, option in cli_options.options().items():
        if option.kind is bool:
            argv, expected = ([flag("no_" + name)], False) if option.default else ([flag(name)], True)
        elif option.choices:
            choice = next(choice for choice in option.choices if choice != option.default)
            argv, expected = [flag(name), choice], (choice,) if option.many else choice
        else:
            number = {str: "text", int: 7, float: 0.125}[option.kind]
            expected = (number,) if option.many else number
            argv = [flag(name), str(number)]
        parsed = parse(*argv)
        flat = cli.to_flat(parsed.config)
        assert flat[name] == expected and type(flat[name]) is type(expected), name
        assert {other for other in flat if flat[other] != plain[other]} == {name}
        assert parsed.origins[name] == "command line"


def test_types_of_values() -> None:
    config = parse(
        *"--data-path 0.5 a 0.5 b --rampup-batch-size 2 2 100 --train-samples 1e6 --lr 1e-3 --min-lr=0".split(),
        *"--split 99,1,0 --residual-norm-weight --no-load-optim".split(),
    ).config
    assert config.data.data_path == ("0.5", "a", "0.5", "b")
    assert config.training.rampup_batch_size == (2, 2, 100)
    assert config.training.train_samples == 1_000_000 and type(config.training.train_samples) is int
    assert config.optimizer.lr == 1e-3 and config.optimizer.min_lr == 0.0
    assert config.data.split == "99,1,0"
    assert config.model.residual.residual_norm_weight is True
    assert config.checkpoint.load_optim is False
    assert parse("--no-residual-norm-weight").config.model.residual.residual_norm_weight is False
    assert parse().config.model.residual.residual_norm_weight is None


def test_the_last_flag_wins() -> None:
    assert parse("--lr", "1", "--lr", "2", "--bf16", "--no-bf16").config.optimizer.lr == 2.0


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--lr nan", "--lr: takes a finite number, not 'nan'"),
        ("--lr -inf", "--lr: takes a finite number, not '-inf'"),
        ("--lr 1e999", "--lr: takes a finite number, not '1e999'"),
        ("--num-layers 2.5", "--num-layers: takes a whole number, not '2.5'"),
        ("--num-layers two", "--num-layers: takes a whole number, not 'two'"),
        ("--num-layers inf", "--num-layers: takes a whole number, not 'inf'"),
        ("--num-layers", "--num-layers takes a value, and none follows"),
        ("--data-path", "--data-path takes one or more values, and none follows"),
        ("--num-layers 2 3", "--num-layers takes one value, but '2 3' follows"),
        ("--bf16 true", "--bf16 takes no value, but 'true' follows it"),
        ("--bf16=true", "--bf16 takes no value, but 'true' follows it"),
        ("--normalization RmsNorm", "--normalization: must be one of LayerNorm, RMSNorm, not 'RmsNorm' (did you mean"),
        ("--residual-connection hypr", "--residual-connection: must be one of plain, hyper, frac, "),
        ("--hiden-size 4", "--hiden-size is not a flag (did you mean --hidden-size?)"),
        ("--hidden_size 4", "--hidden_size is not a flag (did you mean --hidden-size?)"),
        ("--num-layer 4", "--num-layer is not a flag (did you mean --num-layers?)"),
        ("--no-load-optimizer", "--no-load-optimizer is not a flag (did you mean --no-load-optim?)"),
        ("--no-lr", "--no-lr is not a flag"),
        ("-x", "-x is not a flag"),
        ("--fp16", "--fp16 is not offered: use --bf16"),
        ("--optimizer sgd", "--optimizer sgd is not offered: AdamW is the only optimizer"),
        ("--optimizer", "--optimizer takes 1 value, not 0"),
        ("--use-flash-attn yes", "--use-flash-attn takes no value, not 1"),
        ("--multi-latent-attention", "--multi-latent-attention is not offered: attention is multi-head or"),
        ("--rotary-scaling-factor 40", "--rotary-scaling-factor is not offered: attention is multi-head or"),
        ("--retro-num-neighbors 2", "--retro-num-neighbors is not offered: all models are decoders"),
        ("--mtp-num-layers 1", "--mtp-num-layers is not offered: only the next token is predicted"),
        (
            "--spec megatron.core.models.x layers",
            "--spec megatron.core.models.x layers is not offered: layers are what",
        ),
        ("--optimizer-offload-fraction 0.5", "--optimizer-offload-fraction 0.5 is not offered: "),
        (
            "--no-position-embedding",
            "--no-position-embedding is not offered: give --position-embedding-type rope or none",
        ),
        ("--tokenizer-type Llama2Tokenizer", "--tokenizer-type: Llama2Tokenizer is not offered: use SentencePiece"),
        ("--position-embedding-type alibi", "--position-embedding-type: alibi is not offered: use rope, "),
        ("--moe-token-dispatcher-type flex", "--moe-token-dispatcher-type: flex is not offered: use alltoall"),
    ],
)
def test_one_mistake_is_one_sentence(argv: str, message: str) -> None:
    text = error_of(*argv.split())
    assert text.startswith(message) and "\n" not in text


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", "hiden_size: 3\nlr: high\n")
    text = error_of("stray", "--foo", "1", "--num-layers", "x", "--yaml-cfg", file, required=False)
    assert text.splitlines() == [
        "6 arguments to mend",
        "  'stray' stands before any flag",
        f"  hiden_size (yaml {file}): is not a setting (did you mean hidden_size?)",
        f"  lr (yaml {file}): takes a finite number, not 'high'",
        "  --foo is not a flag",
        "  --num-layers: takes a whole number, not 'x'",
        "  --hidden-size, --num-attention-heads, --seq-length, --micro-batch-size must be given",
    ]


# Megatron's flags


def test_flags_not_needed_are_listed_with_the_command_line_without_them() -> None:
    argv = "--use-flash-attn --cross-entropy-fusion-impl te --data-path".split() + ["a b", "--ckpt-format=torch"]
    lines = error_of(*argv, prog="pretrain_gpt.py").splitlines()
    assert lines[0] == "3 arguments to mend"
    assert "  --use-flash-attn is not needed here: only picks a kernel" in lines
    assert "  --cross-entropy-fusion-impl te is not needed here: fused kernels are picked by themselves" in lines
    assert lines[-1] == f"pretrain_gpt.py {' '.join(REQUIRED)} --data-path 'a b'"


def test_what_a_flag_beside_it_makes_unneeded(tmp_path: Path) -> None:
    """In Megatron-LM --no-position-embedding beside learned positions is an error, or means none, by its version."""
    for beside in ("--position-embedding-type rope", "--use-rotary-position-embeddings"):
        lines = error_of("--no-position-embedding", *beside.split()).splitlines()
        assert lines[0] == "--no-position-embedding is not needed here: --position-embedding-type says it"
        assert lines[-1] == f"pretrain_gpt.py {' '.join(REQUIRED)} {beside}"
    lines = error_of("--no-position-embedding", "--use-flash-attn").splitlines()
    assert "--position-embedding-type rope or none, not learned_absolute" in lines[1]
    assert lines[-1] == f"pretrain_gpt.py {' '.join(REQUIRED)} --no-position-embedding"
    file = write(tmp_path / "a.yaml", "no_position_embedding: true\n")
    message = f"no_position_embedding (yaml {file}) is not offered: give --position-embedding-type"
    assert error_of("--yaml-cfg", file).startswith(message)


def test_flags_that_take_any_number_of_words() -> None:
    for words in ("--spec local", "--high-priority-stream-groups ep_dp dp_cp", "--high-priority-stream-groups"):
        lines = error_of(*words.split(), "--bf16").splitlines()
        assert lines[0].startswith(f"{words} is not needed here: ")
        assert lines[-1] == f"pretrain_gpt.py {' '.join(REQUIRED)} --bf16"


def test_schedules_of_a_checkpoint_as_megatron_spells_them() -> None:
    """With an underscore. What would take the schedule of the checkpoint is not left out as if it changed nothing."""
    lines = error_of("--override-opt_param-scheduler", "--bf16", prog="pretrain_gpt.py").splitlines()
    assert lines[0] == "--override-opt-param-scheduler is not needed here: schedules always follow the command line"
    assert lines[-1] == f"pretrain_gpt.py {' '.join(REQUIRED)} --bf16"
    for name in ("--use-checkpoint-opt_param-scheduler", "--use-checkpoint-opt-param-scheduler"):
        assert "-opt-param-scheduler is not offered: schedules always follow the command line: give" in error_of(name)


def test_a_refused_value_stays_on_the_cleaned_command_line() -> None:
    text = error_of("--dataloader-type", "cyclic", "--use-mcore-models", "--dataloader-type", "single")
    assert "--dataloader-type cyclic is not offered" in text
    assert "--dataloader-type single is not needed here" in text


def test_tables_name_no_field_twice_and_only_real_fields() -> None:
    names = set(cli_options.options())
    assert not names & (ALIASES.keys() | NOT_NEEDED.keys() | REPLACED.keys())
    assert len(ALIASES.keys() | NOT_NEEDED.keys() | REPLACED.keys()) == len(ALIASES) + len(NOT_NEEDED) + len(REPLACED)
    for targets in ALIASES.values():
        for target, fixed in targets.items():
            option = cli_options.options()[target]
            if fixed is not VALUE and option.kind is not bool:
                cli_options.coerce(option, fixed)
    for prefix in FAMILIES:
        assert not any(name.startswith(prefix) for name in (*names, *ALIASES))
    for name, values in VALUES.items():
        assert not set(cli_options.options()[name].choices) & values.keys()
    for entry in NOT_NEEDED.values():
        if entry.beside is not None:
            assert set(entry.beside[1]) < set(cli_options.options()[entry.beside[0]].choices)
    for name in NOT_NEEDED:
        assert name == name.lower() and "-" not in name
        # a negative flag of a boolean field would never reach the table
        assert name.removeprefix("no_") not in names


def test_aliases(tmp_path: Path) -> None:
    config = parse("--use-rotary-position-embeddings", "--encoder-seq-length", "48", "--recompute-activations").config
    assert config.model.position_embedding_type == "rope"
    assert config.model.seq_length == 48
    assert config.parallel.recompute_granularity == "selective"
    file = write(tmp_path / "a.yaml", "use-rotary-position-embeddings: true\nlayernorm_epsilon: 1e-6\n")
    parsed = parse("--yaml-cfg", file)
    assert parsed.config.model.position_embedding_type == "rope"
    assert parsed.config.model.norm_epsilon == 1e-6
    assert parsed.origins["norm_epsilon"] == f"yaml {file}"
    assert "takes no value" in error_of("--use-rotary-position-embeddings", "yes")


@pytest.mark.parametrize(
    "words",
    [
        "--data-parallel-sharding-strategy optim_grads_params --use-distributed-optimizer",
        "--use-distributed-optimizer --data-parallel-sharding-strategy optim_grads_params",
        "--use-distributed-optimizer --use-torch-fsdp2",
        "--recompute-granularity full --recompute-activations",
    ],
)
def test_a_switch_does_not_undo_what_its_fields_flag_says(words: str) -> None:
    first, second = (word for word in words.split() if word.startswith("--"))
    message = error_of(*words.split())
    assert message.startswith(f"{second} (") and f") contradicts {first} (" in message
    assert message.endswith(", give one of them")


@pytest.mark.parametrize(
    "text",
    [
        "seq-length: 32\nmodel:\n  seq_length: 64\n",
        "load-optim: true\nno-load-optim: true\n",
        "data-parallel-sharding-strategy: optim_grads_params\nuse-distributed-optimizer: true\n",
    ],
)
def test_a_setting_twice_in_a_file(text: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", text)
    assert "is given twice, with different values" in error_of("--yaml-cfg", file)
    once = write(tmp_path / "b.yaml", text.split("\n")[0])
    assert parse("--yaml-cfg", once, "--yaml-cfg", write(tmp_path / "c.yaml", "lr: 1\n"), "--yaml-cfg", once)


def test_the_last_of_a_flag_counts(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "data-parallel-sharding-strategy: no_shard\n")
    words = "--encoder-seq-length 48 --encoder-seq-length 64 --bf16 --no-bf16 --use-distributed-optimizer".split()
    config = parse("--yaml-cfg", file, *words, "--data-parallel-sharding-strategy", "optim").config
    assert (config.model.seq_length, config.training.bf16) == (64, False)  # REQUIRED has --seq-length 32
    assert config.parallel.data_parallel_sharding_strategy == "optim"


def test_a_number_with_millions_of_digits_is_refused_at_once() -> None:
    assert "--seed: takes a whole number, not '1e3000000'" in error_of("--seed", "1e3000000")


def test_empty_text_is_refused(tmp_path: Path) -> None:
    """A script's variable that is not set: a folder with no name would be the current one."""
    file = write(tmp_path / "a.yaml", "load: ''\ntensorboard-dir: null\n")
    lines = error_of("--save", "", "--data-path", "1", "", "--yaml-cfg", file).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == [f"load (yaml {file})", "--save", "--data-path"]
    assert all(line.endswith("takes text, and this is empty: leave the flag out") for line in lines[1:])


def test_an_alias_may_set_several_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    several = {"enable_it": {"residual_connection": "hyper", "static_residual": "true"}, "n_streams": {}}
    several["n_streams"] = {"residual_connection": "hyper", "residual_streams": VALUE}
    monkeypatch.setattr(cli, "ALIASES", several)
    residual = parse("--enable-it").config.model.residual
    assert residual.residual_connection == "hyper" and residual.static_residual is True
    residual = parse("--n-streams", "6").config.model.residual
    assert residual.residual_connection == "hyper" and residual.residual_streams == 6


# YAML


def test_yaml_flat_and_nested_with_dashes_or_underscores(tmp_path: Path) -> None:
    first = write(
        tmp_path / "first.yaml",
        "num-layers: 3\nlr: 3e-4\ntrain_samples: 1e6\nno-load-optim: true\nmodel:\n  hidden-size: 96\n"
        "  residual:\n    residual_streams: 2\n  static_residual: true\nresidual: {residual-readout: sum}\n"
        "data:\n  data_path: [0.3, a, 0.7, b]\n  split: null\n",
    )
    second = write(tmp_path / "second.yaml", "num_layers: 5\nseq_length: 64\ndata_path: c\n")
    argv = ["--yaml-cfg", first, "--yaml-cfg", second, "--seq-length", "16"]
    argv += ["--num-attention-heads", "4", "--micro-batch-size", "2"]
    parsed = cli.parse(argv)
    config, origins = parsed.config, parsed.origins
    assert (config.model.num_layers, config.model.hidden_size, config.model.seq_length) == (5, 96, 16)
    assert config.optimizer.lr == 3e-4 and config.training.train_samples == 1_000_000
    assert config.checkpoint.load_optim is False
    assert config.model.residual.residual_streams == 2 and config.model.residual.static_residual is True
    assert config.model.residual.residual_readout == "sum"
    assert config.data.data_path == ("c",) and config.data.split is None
    assert origins["hidden_size"] == f"yaml {first}" and origins["num_layers"] == f"yaml {second}"
    assert origins["seq_length"] == "command line" and origins["swiglu"] == "default"
    config = cli.parse([*argv[:2], *argv[4:]]).config
    assert config.data.data_path == ("0.3", "a", "0.7", "b")


@pytest.mark.parametrize(
    "text, message",
    [
        ("bf16: 1", "bf16 (yaml FILE): takes true or false, not 1"),
        ("bf16: 'yes'", "bf16 (yaml FILE): takes true or false, not 'yes'"),
        ("num_layers: true", "num_layers (yaml FILE): takes a whole number, not True"),
        ("num_layers: 2.5", "num_layers (yaml FILE): takes a whole number, not 2.5"),
        ("num_layers: [1]", "num_layers (yaml FILE): takes one value, not [1]"),
        ("num_layers:", "num_layers (yaml FILE): a value is missing"),
        ("lr: .nan", "lr (yaml FILE): takes a finite number, not nan"),
        ("lr: true", "lr (yaml FILE): takes a finite number, not True"),
        ("wandb_exp_name: 2024-01-01", "wandb_exp_name (yaml FILE): takes text, not datetime.date(2024, 1, 1); put it"),
        ("model: 3", "model (yaml FILE): is a group of settings and takes 'name: value' lines below it"),
        ("model: {lr: 1}", "lr (yaml FILE): belongs to optimizer, not to model"),
        ("lr: 1\nlr: 2", "lr (yaml FILE): is given twice"),
        ("min-lr: 1\nmin_lr: 2", "min_lr (yaml FILE): is given twice"),
        ("seed: 010", "--yaml-cfg FILE: 010 is 8 in YAML: write 8, or quote it"),
        ("train-iters: 1:30", "--yaml-cfg FILE: 1:30 is 90 in YAML: write 90, or quote it"),
        ("lr: 1:30.5", "--yaml-cfg FILE: 1:30.5 is 90.5 in YAML: write 90.5, or quote it"),
        ("optimiser: {}", "optimiser (yaml FILE): is not a setting (did you mean optimizer?)"),
        ("use-flash-attn: true", "use-flash-attn (yaml FILE) is not needed here: only picks a kernel"),
        ("fp16: true", "fp16 (yaml FILE): is not offered: use --bf16"),
        ("dataloader_type: cyclic", "dataloader_type (yaml FILE): 'cyclic' is not offered"),
        ("- 1", "--yaml-cfg FILE: must hold 'name: value' lines, not [1]"),
        ("a: [", "--yaml-cfg FILE: is not YAML ("),
    ],
)
def test_yaml_mistakes(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "run.yaml", text + "\n")
    assert error_of("--yaml-cfg", file).startswith(message.replace("FILE", file))


def test_yaml_file_that_cannot_be_read(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.yaml")
    assert error_of("--yaml-cfg", missing) == f"--yaml-cfg {missing}: cannot be read (No such file or directory)"
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in error_of("--yaml-cfg", str(tmp_path / "bad.yaml"))
    assert error_of("--yaml-cfg") == "--yaml-cfg takes one file, not 0; give it once per file"


# Checkpoint arguments, dumps


def test_checkpoint_arguments_lie_under_the_command_line() -> None:
    first = parse("--swiglu", "--tokenizer-type", "ByteTokenizer", "--save", "somewhere", "--seed", "5")
    dumped = json.loads(json.dumps(cli.dump(first.config, first.origins)))
    base = cli.checkpoint_values(dumped)
    assert base["swiglu"] is True and base["tokenizer_type"] == "ByteTokenizer"
    assert not {"lr", "save", "seed", "micro_batch_size", "data_path"} & base.keys()
    argv = "--lr 1 --micro-batch-size 1 --load x --use-checkpoint-args --num-layers 6 --no-swiglu".split()
    asked: list[dict] = []

    def load(given: dict) -> dict:
        asked.append(given)
        return base

    parsed = cli.parse(argv, base=load)
    assert asked[0]["load"] == "x" and asked[0]["ckpt_step"] is None
    assert parsed.config.model.hidden_size == 64 and parsed.origins["hidden_size"] == "checkpoint"
    assert parsed.config.model.num_layers == 6 and parsed.origins["num_layers"] == "command line"
    assert parsed.config.model.swiglu is False
    assert parsed.config.training.seed == 1234 and parsed.origins["seed"] == "default"
    assert parsed.config.data.tokenizer_type == "ByteTokenizer"


def test_the_checkpoint_is_not_asked_without_the_flag_or_with_mistakes() -> None:
    def load(given: dict) -> dict:
        raise AssertionError("asked")

    assert parse(base=load).origins["hidden_size"] == "command line"
    text = error_of("--use-checkpoint-args", "--load", "x", "--foo", required=False, base=load)
    assert text == "--foo is not a flag"


def write_checkpoint(root: Path, *flags: str) -> None:
    """The files of a checkpoint that its arguments are found by."""
    folder = root / "iter_0000003"
    folder.mkdir(parents=True)
    parsed = parse(*flags)
    text = json.dumps(cli.dump(parsed.config, parsed.origins))
    write(folder / "arguments.json", text)
    manifest = {"format": checkpoint_folder.FORMAT, "files": {"arguments.json": len(text)}, "tensors": {}}
    write(folder / checkpoint_folder.MANIFEST, json.dumps(manifest))
    write(root / "latest_checkpointed_iteration.txt", "3")


def test_arguments_are_read_beside_the_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", "--swiglu", "--seed", "7")
    argv = ["--lr", "1", "--micro-batch-size", "1", "--use-checkpoint-args", "--load", str(tmp_path / "run")]
    parsed = cli.parse_with_checkpoint(argv)
    assert parsed.config.model.swiglu is True and parsed.origins["swiglu"] == "checkpoint"
    assert parsed.config.training.seed == 1234
    with pytest.raises(ValueError, match="--ckpt-step 4 is not in"):
        cli.parse_with_checkpoint([*argv, "--ckpt-step", "4"])
    with pytest.raises(cli.UsageError, match="--num-layers, .* must be given: --load .*empty holds no checkpoint"):
        cli.parse_with_checkpoint([*argv[:-1], str(tmp_path / "empty")])
    arguments = tmp_path / "run" / "iter_0000003" / "arguments.json"
    write(arguments, "{" * arguments.stat().st_size)
    with pytest.raises(ValueError, match="arguments.json cannot be read"):
        cli.parse_with_checkpoint(argv)
    arguments.unlink()
    with pytest.raises(ValueError, match="no whole checkpoint of iteration 3: .*arguments.json is missing"):
        cli.parse_with_checkpoint(argv)


def test_checkpoint_arguments_of_another_version() -> None:
    assert error_of(base={"gone": 1}) == "gone (checkpoint): is not a setting of this version"
    with pytest.raises(cli.UsageError, match="gone: not a setting of this version"):
        cli.from_flat({"gone": 1})


def test_dump_and_flat_round_trip() -> None:
    parsed = parse("--data-path", "1", "a", "--rampup-batch-size", "2", "2", "4", "--rotary-base", "500000.5")
    dumped = json.loads(json.dumps(cli.dump(parsed.config, parsed.origins)))
    assert cli.from_flat({name: entry["value"] for name, entry in dumped.items()}) == parsed.config
    assert cli.from_flat(cli.to_flat(parsed.config)) == parsed.config
    assert dumped["rotary_base"] == {"value": 500000.5, "origin": "command line"}
    assert list(cli.to_flat(parsed.config)) == [path[-1] for path, _ in leaf_fields(TrainConfig)]


def test_describe_shows_origins_that_are_not_the_default() -> None:
    parsed = parse()
    lines = cli.describe(parsed.config, parsed.origins).splitlines()
    assert "arguments" in lines[0] and "end of arguments" in lines[-1]
    assert lines[1:-1] == sorted(lines[1:-1]) and len(lines) == 2 + len(parsed.origins)
    assert any(line.startswith("  num_layers ..") and line.endswith("2  [command line]") for line in lines)
    assert any(line.startswith("  swiglu ..") and line.endswith(" False") for line in lines)


# Help, exit codes, imports


def test_help_documents_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.parse(["--foo", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in cli_options.options():
        assert f"  {flag(name)}" in text, name
    assert "Width d of the hidden vector. Required." in text
    assert "--normalization {LayerNorm,RMSNorm}\n      Kind of every norm. [LayerNorm]" in text
    assert "--check-for-nan-in-loss-and-grad, --no-check-for-nan-in-loss-and-grad" in text


def test_user_errors_exit_with_2_and_other_errors_pass(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEGATRON_HC_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as caught, cli.exit_on_user_error("tool.py"):
        raise ValueError("one sentence")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "tool.py: error: one sentence\n"
    with pytest.raises(AssertionError, match="a bug"), cli.exit_on_user_error("tool.py"):
        raise AssertionError("a bug")
    monkeypatch.setenv("MEGATRON_HC_TRACEBACK", "1")
    with pytest.raises(SystemExit), cli.exit_on_user_error("tool.py"):
        raise ValueError("one sentence")
    assert "Traceback" in capsys.readouterr().err


def test_output_that_nobody_reads_any_more_is_no_error() -> None:
    code = "with cli.exit_on_user_error('tool.py'):\n  for _ in range(100000): print('line')"
    command = f'{sys.executable} -c "from megatron_hc import cli\n{code}" | head -1'
    found = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert (found.stdout, found.stderr) == ("line\n", "")


def test_parsing_loads_no_torch() -> None:
    code = (
        "import sys; from megatron_hc import cli; "
        f"cli.parse({REQUIRED!r}); assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
