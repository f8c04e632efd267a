"""A GPU computes what a CPU computes, repeats it exactly, and is not waited for in a step.

Skipped without a GPU.
"""

import itertools
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

import alignfreeze as af
from alignfreeze import Settings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SENTENCES = Settings(unit="sentence", layer=2, realign_batch_size=5, strategy="full")
WORDS = Settings(realign_batch_size=5, strategy="full", realign_lr=1e-3)


@pytest.fixture(autouse=True)
def exact():
    """Set the GPU up as a run does, but do not round products of float32 to TF32."""
    af.set_up_device("cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.use_deterministic_algorithms(False)


def on(device: str, architecture: str, **options) -> torch.nn.Module:
    return tiny.build(architecture, spread=0.1, **options).to(device)


@pytest.mark.parametrize("settings", [WORDS, SENTENCES, replace(SENTENCES, pool_first=False)])
@pytest.mark.parametrize("architecture", tiny.CONFIGS)
def test_the_loss_of_alignment_and_its_gradient_are_those_of_a_cpu(architecture, settings):
    found = {}
    for device in ("cpu", "cuda"):
        model, tokenizer = on(device, architecture), tiny.make_tokenizer()
        torch.manual_seed(0)
        projection = af.projection_head(tiny.HIDDEN, settings.unit).to(device)
        pairs = tiny.word_pairs() if settings.unit == "word" else tiny.text_pairs()
        batch = next(af.pair_batches(tokenizer, pairs, settings, device))
        loss = af.alignment_loss(model.base_model, projection, batch, settings)
        gradient = tiny.gradient_of(loss, model)
        found[device] = loss.item(), {name: value.cpu() for name, value in gradient.items()}
    assert found["cuda"][0] == pytest.approx(found["cpu"][0], rel=1e-4)
    tiny.assert_same(found["cuda"][1], found["cpu"][1], 1e-3)


@pytest.mark.parametrize("architecture", tiny.CONFIGS)
def test_the_loss_of_a_task_and_its_gradient_are_those_of_a_cpu(architecture):
    found = {}
    rows = tiny.tagged(9) if architecture in tiny.ENCODERS else tiny.written(9)
    for device in ("cpu", "cuda"):
        model = on(device, architecture)
        batch = af.task_batch(rows, 1, model.device)
        loss = af.task_loss(model, batch)
        gradient = tiny.gradient_of(loss, model)
        found[device] = loss.item(), {name: value.cpu() for name, value in gradient.items()}
    assert found["cuda"][0] == pytest.approx(found["cpu"][0], rel=1e-4)
    tiny.assert_same(found["cuda"][1], found["cpu"][1], 1e-3)


@pytest.mark.parametrize("architecture", list(tiny.DECODERS))
def test_the_same_text_is_generated(architecture):
    prompts = [row["input_ids"][:3] for row in tiny.written(6)]
    texts = []
    for device in ("cpu", "cuda"):
        model = on(device, architecture).eval()
        texts.append(af.generate(model, tiny.make_tokenizer(), prompts, 8))
    assert texts[0] == texts[1] and len(set(texts[0])) > 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("spec", ["front", "back", "emb,1"])
def test_frozen_layers_stay_bit_by_bit(spec, precision):
    model = on("cuda", "bert")
    stays = set(af.freeze(on("cuda", "bert"), spec))
    before = tiny.weights(model)
    settings = replace(WORDS, strategy=spec, precision=precision)
    af.realign(model, tiny.make_tokenizer(), tiny.word_pairs(), 3, settings)
    moved = tiny.moved(before, model)
    assert moved and not moved & stays


def test_a_training_step_does_not_wait_for_the_gpu():
    """Losses are read every 20 updates and at the end.

    In between, only transformers waits, to look whether a mask masks anything.
    """
    model, tokenizer = on("cuda", "bert"), tiny.make_tokenizer()
    pairs = af.pair_batches(tokenizer, tiny.word_pairs(), WORDS, model.device)
    batches = [(None, batch) for batch in itertools.islice(pairs, 12)]
    af.optimize("first", model, iter(batches), 12, WORDS)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            af.optimize("test", model, iter(batches), 12, WORDS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [wait for wait in waits if "synchronizing" in str(wait.message)]
    waits = [wait for wait in waits if "transformers" not in wait.filename]
    # The two matrices of the projection are copied at first.
    assert len(waits) <= 3, [f"{wait.filename}:{wait.lineno}" for wait in waits]


def command(
    world: Path, out: Path, *more: str, model: str = "bert", device: str = "cuda"
) -> list[str]:
    flags = f"--model {world}/models/{model} --data-dir {world}/data --languages qaa qab --epochs 1"
    flags += f" --realign-languages qaa qab --limit-train 200 --limit-test 40 --device {device}"
    flags += f" --out {out}"
    return [*flags.split(), *more]


SECOND = "--method mid-align --task xsid --train-languages en --layer 1 --lora 2".split()
SECOND += ["--batch-size", "8", "--precision", "fp32"]
RUNS = {
    "words": ("--strategy", "front", "--realign-steps", "20"),
    "words, float32": ("--strategy", "full", "--realign-steps", "20", "--precision", "fp32"),
    "during": ("--strategy", "back", "--schedule", "during"),
    "sentences": ("--strategy", "full", "--unit", "sentence", "--probe"),
    "entities": ("--strategy", "front", "--task", "wikiann"),
    "sentence pairs": ("--strategy", "front", "--task", "xnli"),
    "questions": ("--strategy", "front", "--task", "xquad"),
    "alternate": (*SECOND, "--realign-batch-size", "8"),
    "alternate, checkpointing": (*SECOND, "--realign-batch-size", "8", "--checkpointing"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_the_same_record_again(world, tmp_path, name):
    found = []
    for k in range(2):
        more = [*RUNS[name]]
        model = "llama" if name.startswith("alternate") else "bert"
        if name == "sentences":
            more += ["--layer", "1"]
        assert af.main(command(world, tmp_path / str(k), *more, model=model)) == 0
        (path,) = (tmp_path / str(k)).glob("*.json")
        record = json.loads(path.read_text("utf-8"))
        record.pop("seconds")
        found.append(record)
    assert found[0] == found[1]
    assert "cpu" not in found[0]["device"]


@pytest.mark.parametrize("strategy", ["baseline", "full"])
def test_losses_of_a_run_are_near_those_of_a_cpu(world, tmp_path, strategy):
    """The classifier's first weights are the same, and these models have no dropout."""
    losses = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        more = ["--strategy", strategy, "--precision", "fp32", "--lr", "1e-3"]
        assert af.main(command(world, out, *more, device=device)) == 0
        (path,) = out.glob("*.json")
        losses[device] = json.loads(path.read_text("utf-8"))["losses"]
    for stage, curve in losses["cpu"].items():
        assert losses["cuda"][stage] == pytest.approx(curve, rel=0.1)


def test_one_process_of_torchrun_uses_nccl_and_gives_the_record_of_a_plain_run(world, tmp_path):
    more = ("--strategy", "full", "--realign-steps", "5")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    script = str(Path(af.__file__))
    one = [*start, script, *command(world, tmp_path / "one", *more)]
    assert subprocess.run(one, env=os.environ).returncode == 0
    plain = [sys.executable, script, *command(world, tmp_path / "plain", *more)]
    assert subprocess.run(plain, env=os.environ).returncode == 0
    (one,), (other,) = (list((tmp_path / name).glob("*.json")) for name in ("one", "plain"))
    one, other = json.loads(one.read_text("utf-8")), json.loads(other.read_text("utf-8"))
    assert (one["scores"], one["losses"]) == (other["scores"], other["losses"])
