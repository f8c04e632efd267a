"""Several processes that train one model together compute what one process computes (gloo, on the CPU)."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_cli import ARCHITECTURES, LANGUAGES, flags
from transformers import AutoModelForTokenClassification, AutoTokenizer

import alignfreeze as af

HERE = Path(__file__).resolve()
SPECS = ("none", "front", "emb,1")


def torchrun(*command: object, processes: int = 2) -> subprocess.CompletedProcess:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, *command]
    more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), str(HERE.parent)])}
    return subprocess.run([*map(str, start)], capture_output=True, text=True, timeout=300, env=os.environ | more)


def model_of(world: Path, architecture: str):
    """Without dropout, which differs between processes."""
    torch.manual_seed(0)
    folder = world / "models" / architecture
    off = ["attention_dropout", "dropout"] if architecture == "distilbert" else None
    off = dict.fromkeys(off or ["hidden_dropout_prob", "attention_probs_dropout_prob"], 0.0)
    model = AutoModelForTokenClassification.from_pretrained(folder, num_labels=18, **off).train()
    return model, AutoTokenizer.from_pretrained(folder, add_prefix_space=True)


def losses_and_gradients(world: Path, architecture: str) -> dict[str, tuple[torch.Tensor, dict]]:
    """Of a realignment batch, of batches of examples (the last one of a single example), and of both together."""
    model, tokenizer = model_of(world, architecture)
    projection, results = af.projection_head(model.config.hidden_size), {}
    pairs = [next(af.linked_pairs(code, "dictionary", world / "data", seed)) for code in LANGUAGES for seed in range(5)]
    pairs[3] = pairs[3]._replace(source=pairs[3].source * 3)  # sentences of uneven length
    args = af.parse_args(["--data-dir", str(world / "data")])
    features = af.encode_tokens(tokenizer, af.load_udpos("en", "train", args)[:13], 96, True)

    def realignment(batch):
        return af.realignment_loss(model.base_model, projection, batch)

    shielded = af.shielded_loss(model, projection, "front", {})
    own = {"process": af.processes(), "parts": 3}
    batch = af.encode_pairs(tokenizer, pairs, **own)
    examples = {n: af.task_batch(features[:n], tokenizer.pad_token_id, **own) for n in (13, 1)}

    def measure(name, loss, modules, batch):
        model.zero_grad()
        projection.zero_grad()
        objective = af.parallel(af.Objective(loss, modules))
        value = objective(batch)
        (value * af.processes()[1]).backward()
        named = itertools.chain(model.named_parameters(), projection.named_parameters())
        results[name] = value.detach(), {key: p.grad.clone() for key, p in named if p.grad is not None}

    for spec in SPECS:
        af.freeze(model, spec)
        measure(f"realignment, {spec}", realignment, [model.base_model, projection], batch)
        model.requires_grad_(True)
    for n in examples:
        measure(f"task, {n} examples", lambda batch: af.task_loss(model, batch), [model], examples[n])
    both = lambda batch: af.task_loss(model, batch[0]) + shielded(batch[1])  # noqa: E731
    measure("during", both, [model, projection], (examples[13], batch))
    return results


@pytest.fixture(scope="module")
def of_two_processes(world, tmp_path_factory) -> dict[str, dict]:
    path = tmp_path_factory.mktemp("processes") / "results.pt"
    done = torchrun(HERE, world, path)
    assert done.returncode == 0, done.stderr
    return torch.load(path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_processes_have_the_loss_and_the_gradients_of_one(world, of_two_processes, architecture):
    found, expected = of_two_processes[architecture], losses_and_gradients(world, architecture)
    assert found.keys() == expected.keys()
    for name, (loss, gradients) in expected.items():
        assert abs(found[name][0] - loss) <= 1e-5, name
        assert found[name][1].keys() == gradients.keys(), name
        for key, gradient in gradients.items():
            assert (found[name][1][key] - gradient).abs().max() <= 1e-5, (name, key)
        assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-2  # 1e-5 is small beside them


@pytest.mark.parametrize("schedule", ["before", "during"])
def test_torchrun_writes_one_record_whose_run_is_that_of_one_process(world, tmp_path, schedule):
    argv = flags(world, "bert", "--strategy", "front", "--schedule", schedule, "--probe")
    saved = ["--save-model", tmp_path / "model"] if schedule == "before" else []
    done = torchrun(af.__file__, *argv, "--out", tmp_path / "two", *saved)
    assert done.returncode == 0, done.stderr
    assert af.main([*argv, "--out", str(tmp_path / "one")]) == 0
    (two,), (one,) = ([*(tmp_path / name).iterdir()] for name in ("two", "one"))
    assert two.name == one.name
    assert done.stdout.count("record:") == done.stdout.count("fine-tune:") == 1
    two, one = (json.loads(path.read_text("utf-8")) for path in (two, one))
    assert list(two["scores"]) == list(one["scores"])
    assert two["processes"] == 2 and one["processes"] == 1
    for key in ("config", "pairs", "steps"):
        assert two[key] == one[key]
    for code in ("en", *LANGUAGES):  # dropout differs
        assert two["scores"][code]["accuracy"] == pytest.approx(one["scores"][code]["accuracy"], abs=0.1)
    assert (tmp_path / "model" / "model.safetensors").exists() == bool(saved)


def test_more_processes_than_a_batch_has_sentences_end_in_one_line(world, tmp_path):
    done = torchrun(af.__file__, *flags(world, "bert", "--realign-batch-size", "1", "--out", tmp_path), processes=3)
    assert done.returncode != 0
    assert "3 processes, but a batch is of 2 sentences" in done.stderr
    assert not list(tmp_path.glob("*.json"))


if __name__ == "__main__":  # one of the processes that torchrun started
    world, path = sys.argv[1:]
    dist.init_process_group("gloo")
    results = {architecture: losses_and_gradients(Path(world), architecture) for architecture in ARCHITECTURES}
    if dist.get_rank() == 0:
        torch.save(results, path)
    os._exit(0)  # as alignfreeze.py does
