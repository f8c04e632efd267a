"""--realign-cache: a run that goes on from where another one got realigns to the same bits as one that begins anew."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_cli import finish, flags, start
from test_processes import torchrun

import alignfreeze as af

DIFFERENT = ["--seed 42", "--strategy full", "--layer -1", "--temperature 0.2", "--realign-lr 1e-3"]
DIFFERENT += ["--realign-batch-size 8", "--realign-max-length 20", "--realign-languages qaa", "--aligner fastalign"]


@pytest.fixture
def go(world, tmp_path, capsys, monkeypatch):
    """Run the program; returns (encoder after realignment, record, what was printed)."""
    monkeypatch.setattr(af, "KEEP_SECONDS", -1)  # every 20 steps
    count = itertools.count()

    def call(steps: int, *more: str, model: str = "bert", task: str = "udpos", cache: str | None = "cache", code=0):
        folder = tmp_path / str(next(count))
        argv = flags(world, model, "--task", task, "--strategy", "front", "--realign-steps", steps, "--out", folder)
        argv += ["--save-model", str(folder / "model"), "--realign-batch-size", "4", *more]
        argv += ["--realign-cache", str(tmp_path / cache)] if cache else []
        capsys.readouterr()
        assert af.main(argv) == code
        out = "".join(capsys.readouterr())
        if code:
            return out
        (record,) = folder.glob("*.json")
        return load_file(folder / "model" / "model.safetensors"), json.loads(record.read_text("utf-8")), out

    return call


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, in all that both have (a task's classifier may add a pooler, which is not realigned)."""
    common = [name for name in one if name in other and "pooler" not in name]
    assert len(common) > 20
    return all(torch.equal(one[name], other[name]) for name in common)


@pytest.mark.parametrize("model", ["distilbert", "bert", "xlmr"])
def test_a_longer_run_goes_on_where_a_shorter_one_of_another_task_ended(go, model):
    anew, record, _ = go(7, model=model, cache=None)
    go(3, model=model, task="xnli")
    further, other, out = go(7, model=model)
    assert "goes on after step 3 of 7" in out and other["steps"].pop("realign_reused") == 3
    assert same(anew, further)
    for key in ("scores", "pairs", "config", "steps"):
        assert record[key] == other[key]


def test_a_run_of_as_many_steps_takes_the_encoder_as_it_is(go, monkeypatch):
    first, record, _ = go(5)
    monkeypatch.setattr(af, "contrastive_loss", None)  # would fail
    again, other, out = go(5, "--task", "wikiann")
    assert same(first, again) and record["pairs"] == other["pairs"] and other["steps"]["realign_reused"] == 5
    assert "goes on after step 5 of 5" in out


def test_a_shorter_run_after_a_longer_one_begins_anew_and_leaves_its_state_alone(go, tmp_path):
    go(6)
    shorter, _, out = go(2)
    assert "goes on after" not in out and same(shorter, go(2, cache=None)[0])
    assert sorted(path.name for path in tmp_path.glob("cache/*/*")) == ["resume-6.pt", "step-2.pt", "step-6.pt"]


def test_a_run_that_is_interrupted_goes_on_where_it_was(go, monkeypatch, tmp_path):
    anew, _, _ = go(50, cache=None)
    steps, loss = itertools.count(1), af.contrastive_loss

    def interrupted(*args):
        if next(steps) == 47:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(af, "contrastive_loss", interrupted)
    assert "interrupted" in go(50, code=130)
    assert [path.name for path in tmp_path.glob("cache/*/*")] == ["resume-40.pt"]
    monkeypatch.setattr(af, "contrastive_loss", loss)
    resumed, _, out = go(50)
    assert "goes on after step 40 of 50" in out and same(anew, resumed)


def test_whatever_changes_the_trajectory_has_a_folder_of_its_own(go, tmp_path):
    for count, flag in enumerate(["", *DIFFERENT], 1):
        _, record, _ = go(1, *flag.split())
        assert "realign_reused" not in record["steps"]
        assert len(list(tmp_path.glob("cache/*"))) == count, flag
    for flag in ("--lr 1e-3", "--epochs 2", "--languages qaa", "--max-length 40", "--limit-train 20"):
        _, record, _ = go(1, *flag.split())
        assert record["steps"]["realign_reused"] == 1, flag


def test_another_text_or_dictionary_has_a_folder_of_its_own(go, data, tmp_path):
    here = ["--data-dir", str(data), "--languages", "qaa", "--realign-languages", "qaa"]
    go(1, *here)
    for count, name in enumerate(["parallel/en-qaa.tsv", "dictionary/qaa-en.txt"], 2):
        lines = (data / name).read_text("utf-8").splitlines(keepends=True)
        (data / name).write_text("".join(lines[:-1]), "utf-8")
        go(1, *here)
        assert len(list(tmp_path.glob("cache/*"))) == count


def test_a_state_that_cannot_be_read_ends_the_run_in_one_line(go, tmp_path):
    go(1)
    (path,) = tmp_path.glob("cache/*/step-1.pt")
    path.write_bytes(path.read_bytes()[:1000])
    (line,) = go(1, code=2).splitlines()[-1:]
    assert line.startswith("alignfreeze: ") and "step-1.pt: cannot be read; " in line


def test_an_encoder_of_the_same_weights_and_another_configuration_has_a_folder_of_its_own(go, world, tmp_path):
    go(1)
    shutil.copytree(world / "models" / "bert", tmp_path / "bert")
    config = json.loads((tmp_path / "bert" / "config.json").read_text("utf-8"))
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}), "utf-8")
    _, record, _ = go(1, "--model", str(tmp_path / "bert"))
    assert "realign_reused" not in record["steps"] and len(list(tmp_path.glob("cache/*"))) == 2


def test_a_full_disk_costs_the_state_and_not_the_run(go, monkeypatch, tmp_path):
    def full(state, file):
        file.write(b"a part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    _, record, out = go(2)
    assert "step 2 is not kept ([Errno 28] No space left on device)" in out and record["scores"]
    assert not list(tmp_path.glob("cache/*/*"))


def test_a_cache_for_a_run_that_does_not_use_it_is_refused(go):
    for flag in ("--strategy baseline", "--schedule during"):
        assert "--realign-cache" in go(1, *flag.split(), code=2).splitlines()[-1]


def test_runs_at_the_same_time_do_not_disturb_each_other(world, tmp_path):
    more = ["--strategy", "front", "--realign-steps", "4", "--realign-cache", tmp_path / "cache"]
    runs = [start(flags(world, "bert", *more), tmp_path / name) for name in "ab"]
    assert [finish(run).code for run in runs] == [0, 0]
    one, other = (json.loads(next((tmp_path / name).iterdir()).read_text("utf-8")) for name in "ab")
    assert one["scores"] == other["scores"] and one["pairs"] == other["pairs"]
    assert sorted(path.name for path in tmp_path.glob("cache/*/*")) == ["resume-4.pt", "step-4.pt"]


def test_three_processes_go_on_where_three_processes_were(world, tmp_path):
    """With dropout: each of them needs its own random numbers back."""

    def go(steps: int, name: str, *more: object) -> dict[str, torch.Tensor]:
        argv = flags(world, "bert", "--realign-steps", steps, "--out", tmp_path, "--save-model", tmp_path / name, *more)
        done = torchrun(Path(af.__file__), *argv, processes=3)  # sums of three depend on their order
        assert done.returncode == 0, done.stderr
        return load_file(tmp_path / name / "model.safetensors")

    cache = "--realign-cache", tmp_path / "cache"
    anew = go(4, "anew")
    go(2, "shorter", *cache, "--task", "xnli")  # with a pooler
    assert same(anew, go(4, "further", "--overwrite", *cache))
