"""Tasks of lm-evaluation-harness, whole validations and the service at several layouts: one process's numbers."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pool as pools
import pytest
from parity import move_off_initial_values
from pool import Pool
from processes import ROOT, Processes

from megatron_hc import train
from megatron_hc.cli import from_flat, parse
from megatron_hc.config import ParallelConfig
from megatron_hc.data import ByteTokenizer, IndexedDatasetWriter
from megatron_hc.inference.loading import checkpoint_arguments
from megatron_hc.mesh import Mesh, mesh_of

LAYOUTS = {
    "tp2": ("--tensor-model-parallel-size 2", 2),
    "tp2-sp": ("--tensor-model-parallel-size 2 --sequence-parallel", 2),
    "cp2": ("--context-parallel-size 2", 2),
    "cp2-pp2": ("--context-parallel-size 2 --pipeline-model-parallel-size 2", 4),
    "pp2": ("--pipeline-model-parallel-size 2", 2),
    "dp2": ("", 2),
    "tp2-dp2": ("--tensor-model-parallel-size 2", 4),
}
MODEL = """--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 128
    --position-embedding-type rope --residual-connection hyper --value-residual learnable --micro-batch-size 2
    --global-batch-size 4 --lr 1e-2 --train-iters 2 --eval-interval 2 --tokenizer-type ByteTokenizer --num-workers 0
    --device cpu --init-method-std 0.3 --fp64 --log-interval 1000"""
TASKS = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
"""


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two files of English bytes; neither ends with a whole sample."""
    tokenizer, folder = ByteTokenizer(), tmp_path_factory.mktemp("text")
    paragraphs = (ROOT / "LICENSE").read_text().split("\n\n")
    found = []
    for name, part in (("first", paragraphs[:8]), ("second", paragraphs[8:14])):
        found.append(str(folder / name))
        with IndexedDatasetWriter(found[-1], "uint16") as writer:
            for paragraph in part:
                writer.add_document([*tokenizer.tokenize(paragraph), tokenizer.eod])
    return found


# Whole validations


class Recorder:
    """In a logger's place."""

    def evaluation(self, split: str, iteration: int, consumed: int, loss: float, **others: Any) -> None:
        self.found = {"loss": loss, **others["details"]}

    def __getattr__(self, name: str) -> Any:
        from contextlib import nullcontext

        return (lambda: nullcontext()) if name == "pause" else (lambda *arguments, **options: None)


def whole_validation(flags: str, world_size: int) -> dict[str, float] | None:
    parsed = parse(flags.split())
    mesh = pools.mesh(parsed.config, world_size)
    if mesh is None:
        return None
    run = train.set_up(parsed, mesh)
    move_off_initial_values(run)
    run.logger = recorder = Recorder()  # type: ignore[assignment]
    train.evaluate(run, "validation")
    return recorder.found


def flags_of(prefixes: list[str], folder: Path, layout: str = "") -> str:
    first, second = prefixes
    return f"{MODEL} --train-data-path {first} --valid-data-path 3 {first} 1 {second} --data-cache-path {folder}/cache \
        --full-validation {layout}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_validation(pool: Pool, prefixes: list[str], layout: str, tmp_path: Path) -> None:
    extra, world_size = LAYOUTS[layout]
    whole = pool.run(whole_validation, flags_of(prefixes, tmp_path), 1)[0]
    assert set(whole) == {
        "loss", "lm_loss_validation_stderr", "validation_tokens", "validation/first/lm_loss",
        "validation/first/lm_loss_stderr", "validation/second/lm_loss", "validation/second/lm_loss_stderr",
    }  # fmt: skip
    for found in pool.run(whole_validation, flags_of(prefixes, tmp_path, extra), world_size)[:world_size]:
        assert found == pytest.approx(whole, rel=1e-9)


# Tasks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multiple choice, a perplexity and a task that has text written."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
    paragraphs = [" ".join(text.split()) for text in (ROOT / "LICENSE").read_text().split("\n\n")]
    documents = [
        {"question": text[:20], "choices": [text[20:32], "a licence", text[40:43]], "answer": 0, "text": text[:300]}
        for text in paragraphs
        if len(text) > 60
    ][:9]
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))

    def task(name: str, kind: str, more: str) -> None:
        head = TASKS.format(name=name, file=folder / "documents.jsonl", kind=kind)
        (folder / f"{name}.yaml").write_text(head + more)

    metric = "metric_list: [{{metric: {}, aggregation: {}, higher_is_better: true}}]\n".format
    task(
        "small_choice",
        "multiple_choice",
        'doc_to_choice: "{{choices}}"\ndoc_to_target: answer\n' + metric("acc", "mean"),
    )
    task(
        "small_text", "loglikelihood_rolling", 'doc_to_target: "{{text}}"\n' + metric("bits_per_byte", "bits_per_byte")
    )
    task(
        "small_writing",
        "generate_until",
        'doc_to_target: "x"\ngeneration_kwargs: {until: ["e"], max_gen_toks: 6}\n' + metric("exact_match", "mean"),
    )
    return folder


@pytest.fixture(scope="module")
def checkpoint(pool: Pool, prefixes: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    flags = (
        f"{MODEL} --train-data-path {prefixes[0]} --data-cache-path {folder}/cache --save {folder}/run --eval-iters 0"
    )
    pool.run(trained, flags)
    return folder / "run"


def trained(flags: str) -> None:
    import torch.distributed as dist

    from megatron_hc.mesh import Mesh

    if dist.get_rank() == 0:
        run = train.set_up(parse(flags.split()), Mesh())
        move_off_initial_values(run)
        run.optimizer.update_parameters()
        train.save(run)


def mesh_for(load: str, layout: ParallelConfig, world_size: int) -> Mesh:
    """In a rank: its mesh at a layout for reading and writing; all ranks call together."""
    import torch.distributed as dist

    config = dataclasses.replace(from_flat(checkpoint_arguments(load)), parallel=layout)
    return mesh_of(dist.get_rank(), world_size, config, "cpu") if world_size > 1 else Mesh()


def harness_results(load: str, tasks: str, world_size: int, tp: int, pp: int) -> Any:
    """As tools/eval_harness.py has it, with every answer of the model."""
    os.environ.update(HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1")
    import torch.distributed as dist
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from megatron_hc.evaluation import flat_scores
    from megatron_hc.inference import inference_layout, load_model
    from megatron_hc.inference.harness import register

    layout = inference_layout(tp, pp)
    mesh = mesh_for(load, layout, world_size)
    if dist.get_rank() >= world_size:
        return None
    loaded = load_model(load, layout=layout, mesh=mesh)
    results = simple_evaluate(
        model=register().of(loaded.model, loaded.config, mesh, loaded.tokenizer, 2),
        tasks=["small_choice", "small_text", "small_writing"],
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
        verbosity="ERROR",
    )
    answers = {name: [one["resps"] for one in samples] for name, samples in results["samples"].items()}
    return answers, flat_scores(results["results"])


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2", pytest.param("tp2-dp2", marks=pytest.mark.slow)])
def test_tasks(pool: Pool, checkpoint: Path, tasks: Path, layout: str) -> None:
    sizes = {"tp2": (2, 2, 1), "pp2": (2, 1, 2), "dp2": (2, 1, 1), "tp2-dp2": (4, 2, 1)}[layout]
    world_size = sizes[0]
    answers, scores = pool.run(harness_results, str(checkpoint), str(tasks), 1, 1, 1, timeout_s=120)[0]
    assert all(len(found) == 9 for found in answers.values())
    assert {"small_choice/acc", "small_text/bits_per_byte", "small_writing/exact_match"} <= set(scores)
    for found in pool.run(harness_results, str(checkpoint), str(tasks), *sizes, timeout_s=120)[:world_size]:
        assert found[1] == pytest.approx(scores, rel=1e-9)
        assert found[0]["small_writing"] == answers["small_writing"]
        for ours, theirs in zip(found[0]["small_choice"], answers["small_choice"], strict=True):
            assert [x[0][0] for x in ours] == pytest.approx([x[0][0] for x in theirs], rel=1e-9)
            assert [x[0][1] for x in ours] == [x[0][1] for x in theirs]


# The service


def served(load: str, tp: int, pp: int) -> Any:
    """Texts of a service over two processes, asked for at different times; one is given up."""
    import torch.distributed as dist

    from megatron_hc.inference import Decoder, Engine, Request, inference_layout, load_model
    from megatron_hc.inference.service import Service, follow
    from megatron_hc.model.generate import Sampling

    layout = inference_layout(tp, pp)
    mesh = mesh_for(load, layout, tp * pp)
    if dist.get_rank() >= tp * pp:
        return None
    loaded = load_model(load, layout=layout, mesh=mesh)
    engine = Engine(Decoder(loaded.model, loaded.config, mesh, rows=2, max_length=40), loaded.tokenizer)
    if not mesh.is_first:
        return follow(engine)

    async def ask() -> list[str]:
        service = Service(engine, 10)
        service.start()

        async def one(number: int) -> str:
            await asyncio.sleep(0.02 * number)
            request = Request(
                prompt=(65 + number,) * 4, max_new_tokens=9, sampling=Sampling(seed=number), ignore_eod=True
            )
            (ticket,) = service.submit([request], True)
            text = ""
            while True:
                update = await ticket.next()
                text += update.text
                if number == 2:
                    service.give_up(ticket)
                    return "given up"
                if update.finish is not None:
                    return text

        texts = await asyncio.gather(*(one(number) for number in range(5)))
        service.close()
        assert service.error is None
        return texts

    return asyncio.run(ask())


def test_a_service_over_processes(pool: Pool, checkpoint: Path) -> None:
    alone = pool.run(served, str(checkpoint), 1, 1)[0]
    assert len(set(alone)) == 5
    for tp, pp in ((2, 1), (1, 2)):
        assert pool.run(served, str(checkpoint), tp, pp)[0] == alone


# Whole programs


def test_tasks_while_training(prefixes: list[str], tasks: Path, tmp_path: Path) -> None:
    """Two data-parallel processes; the scores are in the records, and the losses are those of a run without."""
    records = {}
    for name, extra in (
        ("with", f"--eval-harness-tasks small_choice small_text --eval-harness-include-path {tasks} "
         "--eval-harness-interval 1 --eval-harness-limit 3"),
        ("without", ""),
    ):  # fmt: skip
        file = tmp_path / f"{name}.jsonl"
        flags = f"{MODEL} --train-data-path {prefixes[0]} --data-cache-path {tmp_path}/cache --eval-iters 0 \
            --hidden-dropout 0.1 --metrics-jsonl {file} --log-interval 1 {extra}"
        with Processes(2, flags, tmp_path / name, environment={"HF_DATASETS_OFFLINE": "1"}) as run:
            assert run.wait(120) == [0, 0], run.output()
        records[name] = [json.loads(line) for line in file.read_text().splitlines()]
    scored = [record for record in records["with"] if "eval/small_choice/acc" in record]
    assert [record["iteration"] for record in scored] == [1, 2]
    assert all("eval/small_text/bits_per_byte" in record for record in scored)
    losses = {name: [r["lm_loss"] for r in found if "lm_loss" in r] for name, found in records.items()}
    assert losses["with"] == losses["without"] and len(losses["with"]) == 2
