"""Several processes that train one model together compute what one process computes (gloo, on the CPU).

Two processes are started once; they make all runs, and leave the losses and gradients of each.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist

import alignfreeze as af
from alignfreeze import Alignment, Training

HERE = Path(__file__).resolve()
ENCODERS = ("distilbert", "bert", "xlm-roberta")
RUNS = ("realign", "realign front", "before", "during front", "alternate")
SENTENCE_RUNS = ("realign", "before", "alternate", "during 0")
STAY = Training(lr=0.0)  # so that every update sees the first weights


def losses_and_gradients(architecture: str, run: str, unit: str = "word", gather: bool = True) -> tuple:
    """(loss curves, gradients of every update) of batches of 5 sentence pairs and of 4, 4 and 1 examples."""
    model = tiny.build(architecture, torch.float32 if unit == "word" else torch.float64, 0.1)
    name, frozen, *_ = *run.split(), "none"
    pairs = tiny.word_pairs() if unit == "word" else tiny.text_pairs(7)
    how = Alignment(frozen, unit, batch_size=5, gather=gather, temperature=0.5)
    tokenizer = tiny.make_tokenizer()
    with tiny.updates(model) as gradients:
        if name == "realign":
            curves, _ = af.realign(model, tokenizer, pairs, 2, how, STAY)
        else:
            features = tiny.tagged(9) if architecture in tiny.ENCODERS else tiny.written(9)
            options = {"batch_size": 4, "schedule": name, "pairs": pairs, "how": how}
            curves, _ = af.finetune(model, tokenizer, features, 1, STAY, **options)
    return curves, gradients


def validation_loss() -> float:
    best: dict = {}
    args = af.argparse.Namespace(validate=1, batch_size=2, precision="fp32")
    model = tiny.build("llama", spread=0.1)
    af.keep_best(args, model, tiny.make_tokenizer(), tiny.written(5), best)(1)
    return best["loss"]


def of_a_process(world: str, out: str) -> dict[Any, Any]:
    """Everything that the tests look at, done by each of the processes that torchrun started."""
    found: dict[Any, Any] = {"loss": validation_loss()}
    for architecture in ENCODERS:
        for run in RUNS:
            found[architecture, run] = losses_and_gradients(architecture, run)
    for run in SENTENCE_RUNS:
        for gather in (True, False):
            found["llama", run, gather] = losses_and_gradients("llama", run, "sentence", gather)
    found["weights and seeds"] = weights_and_seeds()
    for name, flags in COMMANDS.items():
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            code = af.main([*command(world, *flags), "--out", out])
        found[name] = code, said.getvalue()
    return found


def weights_and_seeds() -> tuple[float, int]:
    """(By how much the weights of the processes differ after a training with dropout, how many seeds it has)."""
    model = tiny.build("bert", hidden_dropout_prob=0.3)
    training = Training(lr=1e-3, clip=1.0)
    af.realign(model, tiny.make_tokenizer(), tiny.word_pairs(), 3, Alignment(batch_size=5), training)
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    first = af.gather_objects(flat)[0]
    return (flat - first).abs().max().item(), len(set(af.gather_objects(torch.initial_seed())))


COMMANDS = {
    "run": ("--strategy", "front", "--realign-steps", "2", "--save-model", "MODEL"),
    "too many": ("--strategy", "baseline", "--batch-size", "1"),
    "odd": ("--unit", "sentence", "--realign-batch-size", "5"),
}


def command(world: str, *more: str) -> list[str]:
    """The command line of a toy run of a second."""
    flags = f"--model {world}/models/bert --data-dir {world}/data --languages qaa --realign-languages qaa qab"
    flags += " --epochs 1 --limit-train 40 --limit-test 10 --precision fp32 --device cpu"
    return [*flags.split(), *more]


@pytest.fixture(scope="module")
def started(world, tmp_path_factory) -> tuple[Path, list[dict]]:
    """(the folder of the records, what each process found)."""
    folder = tmp_path_factory.mktemp("processes")
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        HERE,
    ]
    paths = [str(HERE.parent.parent), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    paths = os.pathsep.join(filter(None, paths))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [*map(str, [*start, world, folder])],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return folder, [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def compare(found: tuple, expected: tuple, tolerance: float = 1e-6) -> None:
    assert found[0].keys() == expected[0].keys() and len(found[1]) == len(expected[1])
    for name, curve in expected[0].items():
        assert found[0][name] == pytest.approx(curve, abs=2e-6)  # they are rounded to 1e-6
    for one, other in zip(found[1], expected[1]):
        tiny.assert_same(one, other, tolerance)


@pytest.mark.parametrize("architecture", ENCODERS)
@pytest.mark.parametrize("run", RUNS)
def test_two_processes_have_the_losses_and_the_gradients_of_one(started, architecture, run):
    expected = losses_and_gradients(architecture, run)
    for found in started[1]:
        compare(found[architecture, run], expected)


@pytest.mark.parametrize("run", SENTENCE_RUNS)
def test_with_gather_the_candidates_are_the_sentences_of_all_processes(started, run):
    expected = losses_and_gradients("llama", run, "sentence")
    for found in started[1]:
        compare(found["llama", run, True], expected)


def test_without_gather_the_loss_is_the_mean_of_those_of_each_processs_own_sentences(started):
    """Of the 5 pairs of each batch, one process has 3 and the other 2."""
    model = tiny.build("llama", torch.float64, 0.1)
    pairs, tokenizer = tiny.text_pairs(7), tiny.make_tokenizer()
    how, expected = Alignment(unit="sentence", temperature=0.5), []
    for batch in (pairs[:5], pairs[5:] + pairs[:3]):
        losses = []
        for share in (batch[::2], batch[1::2]):
            whole = af.encode_texts(tokenizer, share, how)
            losses.append(af.alignment_loss(model.base_model, torch.nn.Identity(), whole, how))
        loss = sum(losses) / 2
        named = tiny.gradient_of(loss, model)
        expected.append((loss.item(), named))
    curve = sum(loss for loss, _ in expected) / 2
    for found in started[1]:
        compare(
            found["llama", "realign", False], ({"realign": [curve]}, [named for _, named in expected])
        )


def test_the_tasks_gradient_does_not_depend_on_gather(started):
    for run in ("before", "alternate"):
        first = [found["llama", run, False] for found in started[1]]
        assert first[0][0] == first[1][0]
        tasks = losses_and_gradients("llama", run, "sentence")
        step = 2 if run == "alternate" else 1  # in turn, the task first
        compare(({}, first[0][1][::step]), ({}, tasks[1][::step]))


def test_the_validation_loss_is_the_same_in_every_process(started):
    assert [found["loss"] for found in started[1]] == [pytest.approx(validation_loss(), abs=1e-6)] * 2


def test_the_weights_of_the_processes_stay_bit_identical_while_their_dropout_differs(started):
    assert [found["weights and seeds"] for found in started[1]] == [(0.0, 2)] * 2


def test_two_processes_write_one_record_whose_run_is_that_of_one_process(started, world, tmp_path):
    folder, (first, second) = started
    flags = COMMANDS["run"][:-2]
    assert af.main([*command(world, *flags), "--out", str(tmp_path)]) == 0
    (two,), (one,) = ([*path.glob("*.json")] for path in (folder, tmp_path))
    assert two.name == one.name and [first["run"][0], second["run"][0]] == [0, 0]
    assert first["run"][1].count("record:") == first["run"][1].count("fine-tune:") == 1
    assert not second["run"][1]  # one of them talks
    two, one = (json.loads(path.read_text("utf-8")) for path in (two, one))
    assert two["processes"] == 2 and one["processes"] == 1
    for key in ("config", "pairs", "steps"):
        assert two[key] == one[key]
    for code in ("en", "qaa"):  # dropout differs
        assert two["scores"][code]["accuracy"] == pytest.approx(one["scores"][code]["accuracy"], abs=0.1)
    assert (folder / "model/model.safetensors").exists()


def test_a_batch_that_cannot_be_shared_ends_in_one_line(started):
    for found in started[1]:
        for name, problem in (
            ("too many", "2 processes, but a batch is of 1"),
            ("odd", "--realign-batch-size 5: no multiple of 2 processes"),
        ):
            code, said = found[name]
            assert code == 2 and problem in said and len(said.splitlines()) == 1


if __name__ == "__main__":  # one of the processes that torchrun started
    world, folder = sys.argv[1:]
    os.chdir(folder)
    COMMANDS["run"] = (*COMMANDS["run"][:-1], f"{folder}/model")
    dist.init_process_group("gloo")
    found = of_a_process(world, folder)
    torch.save(found, f"{folder}/{dist.get_rank()}.pt")
    dist.barrier()
    os._exit(0)  # as alignfreeze.py does
