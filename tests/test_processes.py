"""Several processes that train one model together make the updates that one process makes.

Two processes are started once, by torchrun (gloo, on the CPU). They do all trainings, and two runs
of the command line, and leave what came out.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist

import alignfreeze as af

HERE = Path(__file__).resolve()
ARCHITECTURES = ("distilbert", "llama")
STAGES = ("realign", "before", "during", "alternate")
VARIANTS = {"accumulate 2": (2, 0), "accumulate 4": (4, 0), "adapters": (2, 2)}
DROPOUT = {"distilbert": "dropout", "llama": "attention_dropout"}
EPOCHS = {2: 5, 4: 9}  # of 9 examples in batches of 4: 8 or 7 updates, the last one not full


def weights_and_losses(architecture: str, stage: str, variant: str) -> tuple[torch.Tensor, dict]:
    """Train a tiny model with dropout in float64; return its weights, (N,), and the loss curves."""
    accumulate, rank = VARIANTS[variant]
    changes = {DROPOUT.get(architecture, "hidden_dropout_prob"): 0.2}
    model = tiny.build(architecture, torch.float64, 0.1, **changes)
    torch.manual_seed(1)
    if rank:
        af.add_lora(model, rank, 4.0, 0.2)
        model.to(torch.float64)
    is_decoder = architecture in tiny.DECODERS
    settings = af.Settings(
        strategy="0", schedule="before" if stage == "realign" else stage, lr=1e-3, realign_lr=1e-3,
        unit="sentence" if is_decoder else "word", layer=2 if is_decoder else -1, clip=1.0,
        batch_size=4, realign_batch_size=5, accumulate=accumulate, epochs=EPOCHS[accumulate],
        precision="fp32",
    )  # fmt: skip
    pairs = tiny.text_pairs() if is_decoder else tiny.word_pairs()
    features = tiny.written(9) if is_decoder else tiny.tagged(9)
    tokenizer = tiny.make_tokenizer()
    if stage == "realign":
        curves, _ = af.realign(model, tokenizer, pairs, 7, settings)
    else:
        curves, _ = af.finetune(model, tokenizer, features, settings, pairs)
    weights = [parameter.detach().flatten() for parameter in model.parameters()]
    return torch.cat(weights), curves


def command(world: Path, *more: str) -> list[str]:
    """Return the command line of a toy run of a few seconds."""
    flags = f"--model {world}/models/bert --data-dir {world}/data --languages qaa --epochs 1"
    flags += " --realign-languages qaa qab --limit-train 80 --limit-test 10 --precision fp32"
    flags += " --device cpu --realign-steps 2 --batch-size 20"
    return [*flags.split(), *more]


def in_a_process(world: Path, out: str) -> dict:
    """Return everything that the tests look at, as one of the processes sees it."""
    torch.set_default_dtype(torch.float64)  # of the projection
    results = {}
    for architecture in ARCHITECTURES:
        for stage in STAGES:
            for variant in VARIANTS:
                key = architecture, stage, variant
                results[key] = weights_and_losses(*key)
    torch.set_default_dtype(torch.float32)
    for name, accumulate in (("run", "2"), ("too many", "1")):
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            code = af.main([*command(world), "--accumulate", accumulate, "--out", out])
        results[name] = code, said.getvalue()
    return results


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory) -> Path:
    """Return the folder in which two processes have left their results."""
    folder = tmp_path_factory.mktemp("processes")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = [str(HERE.parent.parent), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [*start, str(HERE), str(world), str(folder)],
        capture_output=True, text=True, timeout=500, env=os.environ | more,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def results(folder) -> list[dict]:
    """Return the results of both processes."""
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture
def as_in_a_process():
    """Compute in float64 and, as the processes do, in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_processes_train_like_one(results, architecture, stage, variant, as_in_a_process):
    """After seven updates or more, with dropout; the last update of fine-tuning is not full."""
    limit = 1e-6 if architecture == "llama" else 1e-9  # its normalisation computes in float32
    expected, curves = weights_and_losses(architecture, stage, variant)
    for result in results:
        weights, found = result[architecture, stage, variant]
        assert (weights - expected).abs().max().item() < limit
        assert found.keys() == curves.keys()
        for name, curve in curves.items():
            assert found[name] == pytest.approx(curve, abs=2e-6)  # they are rounded to 1e-6


def test_every_training_moves_the_weights_and_has_its_losses(results):
    for architecture in ARCHITECTURES:
        names = {stage: set(results[0][architecture, stage, "adapters"][1]) for stage in STAGES}
        assert names["realign"] == {"align"} and names["before"] == {"task"}
        assert names["during"] == names["alternate"] == {"align", "task"}
        weights = [results[0][architecture, stage, "accumulate 2"][0] for stage in STAGES]
        for k, other in enumerate(weights):
            assert all((one - other).abs().max().item() > 1e-5 for one in weights[:k])


def test_two_processes_write_one_record_which_is_that_of_one_process(
    results, folder, world, tmp_path
):
    first, second = (result["run"] for result in results)
    assert first[0] == second[0] == 0
    assert first[1].count("record:") == 1 and not second[1]  # only one of them prints
    argv = [*command(world), "--accumulate", "2", "--out", str(tmp_path)]
    assert af.main(argv) == 0
    (two,), (one,) = (list(path.glob("*.json")) for path in (folder, tmp_path))
    assert two.name == one.name
    two, one = (json.loads(path.read_text("utf-8")) for path in (two, one))
    assert two["processes"] == 2 and one["processes"] == 1
    for key in ("config", "content", "pairs", "steps"):
        assert two[key] == one[key]
    for name, curve in one["losses"].items():
        assert two["losses"][name] == pytest.approx(curve, abs=1e-4)
    for code, scores in one["scores"].items():
        assert two["scores"][code]["accuracy"] == pytest.approx(scores["accuracy"], abs=0.02)


def test_more_processes_than_batches_of_an_update_are_refused_in_one_line(results):
    for result in results:
        code, said = result["too many"]
        assert code == 2 and "2 processes" in said and "--accumulate" in said
        assert len(said.splitlines()) == 1


if __name__ == "__main__":  # one of the processes that torchrun started
    world, out = sys.argv[1:]
    dist.init_process_group("gloo")
    torch.save(in_a_process(Path(world), out), f"{out}/{dist.get_rank()}.pt")
    dist.barrier()
    os._exit(0)  # as alignfreeze.py does
