"""The shell loop: it prints the paper's grid, leaves out what is done, survives failures, and finds its packages."""

import csv
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import alignfreeze

ROOT = Path(alignfreeze.__file__).parent
MODELS = ("distilbert-base-multilingual-cased", "bert-base-multilingual-cased", "xlm-roberta-base")
STRATEGIES = ("baseline", "full", "front", "back")
SEEDS = (31, 42, 66, 23, 17)
SETTINGS = (
    "MODELS",
    "TASKS",
    "STRATEGIES",
    "SCHEDULES",
    "ALIGNERS",
    "SEEDS",
    "LANGUAGES",
    "FLAGS",
    "OUT",
    "PYTHON",
    "REALIGN_CACHE",
)

# A Python interpreter that only writes down what it is asked to run. $HAS: does it have the packages (0 or 1)? Its
# `-m venv` makes another one, which has them as soon as its `-m pip` has run; $PIP and $RUN are what these and the
# runs do, $WORLD what building the toy world does.
STAND_IN = r"""#!/usr/bin/env bash
here=$(dirname "$0")
case "$*" in
  *"-c "*version_info*) exit "${OLD:-0}" ;;
  "-c "*) [ -e "$here/installed" ] && exit 0; exit $((1 - ${HAS:-1})) ;;
esac
echo "$0 $*" >> "$LOG"
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && sed -i '2iHAS=0' "$3/bin/python" ;;
  "-m pip "*) eval "${PIP:-}"; touch "$here/installed" ;;
  tests/toy_world.py*) mkdir -p "$2"; eval "${WORLD:-}" ;;
  alignfreeze.py*) eval "${RUN:-}" ;;
esac
"""


class Result(NamedTuple):
    code: int
    out: str
    err: str
    log: list[str]  # what the stand-in was asked to run

    @property
    def commands(self) -> list[str]:
        return self.out.splitlines()


@pytest.fixture
def run_all(tmp_path):
    """Call run_all.sh with these settings in its environment; the interpreter is a stand-in unless PYTHON is given."""
    stand_in, log = tmp_path / "bin" / "python-stand-in", tmp_path / "log"
    stand_in.parent.mkdir()
    stand_in.write_text(STAND_IN, "utf-8")
    stand_in.chmod(0o755)

    def call(*arguments: str, script: Path = ROOT / "run_all.sh", **settings: object) -> Result:
        log.write_text("", "utf-8")
        clean = {key: value for key, value in os.environ.items() if key not in SETTINGS}
        here = {"PYTHON": stand_in, "LOG": log, "OUT": tmp_path / "runs"} | settings
        environment = clean | {key: str(value) for key, value in here.items()}
        command = ["bash", str(script), *arguments]
        pipes = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
        done = subprocess.run(command, cwd=tmp_path, env=environment, timeout=120, **pipes)
        asked = [line.replace(str(stand_in), "PYTHON") for line in log.read_text("utf-8").splitlines()]
        return Result(done.returncode, done.stdout, done.stderr, asked)

    return call


@pytest.fixture
def copy(tmp_path) -> Path:
    """The script in a fresh folder, whose name has a space, with the files that it needs."""
    folder = tmp_path / "a copy"
    for name in (
        "run_all.sh",
        "alignfreeze.py",
        "requirements.txt",
        "tests/toy_world.py",
        "results/report.py",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def parsed(command: str):
    """The flags of a command of the grid, by alignfreeze.py's own parser."""
    _, script, *argv = shlex.split(command)
    assert script == "alignfreeze.py"
    return alignfreeze.parse_args(argv)


def record_name(command: str) -> str:
    args = parsed(command)
    return f"{alignfreeze.record_name(args, alignfreeze.resolve(args))}.json"


def grid(commands: list[str]) -> list[tuple]:
    runs = map(parsed, commands)
    return [(run.model, run.task, run.strategy, run.schedule, run.aligner, run.seed) for run in runs]


# -------------------------------------------------------------------------------------------- the grid


def test_the_script_is_valid_and_executable():
    assert subprocess.run(["bash", "-n", ROOT / "run_all.sh"]).returncode == 0
    assert os.access(ROOT / "run_all.sh", os.X_OK)


def published() -> set[tuple]:
    """What the paper's authors ran: (model, task, strategy, schedule, aligner, seed), from their raw scores."""
    with open(ROOT / "results/paper.csv", encoding="utf-8") as file:
        return {tuple(list(row.values())[:5]) + (int(row["seed"]),) for row in csv.DictReader(file)}


def as_recorded(run: tuple) -> tuple:
    return (*run[:3], "none", "none", run[5]) if run[2] == "baseline" else run


def test_a_dry_run_prints_everything_that_the_paper_ran(run_all, tmp_path):
    """And 30 runs more: of partial freezing during fine-tuning with XLM-R, no scores are published."""
    result = run_all("--dry-run")
    runs = grid(result.commands)
    assert result.code == 0 and len(set(runs)) == len(runs) == 465
    assert published() < set(map(as_recorded, runs))
    more = itertools.product(
        [MODELS[2]], ["udpos"], ["front", "back"], ["during"], alignfreeze.ALIGNERS, SEEDS
    )
    assert set(map(as_recorded, runs)) - published() == set(more)
    assert {parsed(command).out for command in result.commands} == {tmp_path / "runs"}
    assert "465 runs" in result.err and result.log == []


def test_the_main_results_come_first(run_all):
    runs = grid(run_all("--dry-run").commands)
    main = list(
        itertools.product(MODELS, alignfreeze.TASKS, STRATEGIES, ["before"], ["dictionary"], SEEDS)
    )
    assert sorted(runs[: len(main)]) == sorted(main)
    assert sorted(runs[:60]) == sorted(run for run in main if run[1] == "udpos")


def test_a_quick_look_is_four_runs_of_a_fifth_of_the_papers_steps(run_all):
    runs = [parsed(command) for command in run_all("quick", "--dry-run").commands]
    assert [run.strategy for run in runs] == list(STRATEGIES)
    assert {(run.model, run.task, run.seed, run.aligner) for run in runs} == {
        (MODELS[0], "udpos", 31, "dictionary")
    }
    assert all(
        alignfreeze.resolve(run) == {"languages": "ar de fi hi tr".split(), "epochs": 1} for run in runs
    )


def test_a_quick_look_ends_with_its_tables(run_all, tmp_path):
    result = run_all("quick")
    assert len(result.log) == 5 and result.log[-1].endswith(f"results/report.py {tmp_path / 'runs'}")


def test_its_runs_have_the_papers_settings(run_all):
    for command in run_all("--dry-run").commands:
        assert alignfreeze.resolve(parsed(command)) == {}


def test_runs_whose_record_exists_are_left_out(run_all, tmp_path):
    commands = run_all("--dry-run").commands
    (tmp_path / "runs").mkdir()
    for command in commands[::3]:
        (tmp_path / "runs" / record_name(command)).touch()
    left = run_all("--dry-run")
    assert left.commands == [command for k, command in enumerate(commands) if k % 3]
    assert "155 done" in left.err and "310 left" in left.err
    for command in commands:
        (tmp_path / "runs" / record_name(command)).touch()
    nothing = run_all()
    assert (nothing.code, nothing.log) == (0, [])


def test_runs_of_tasks_that_realign_alike_share_a_cache_the_shortest_first(run_all):
    """Steps that the paper's runs take: PoS 1,965, NER 3,130, QA 18,010 or more, NLI 24,544."""
    runs = [parsed(command) for command in run_all("--dry-run").commands]
    shared = [run for run in runs if run.realign_cache]
    alike = [run for run in runs if (run.schedule, run.aligner) == ("before", "dictionary")]
    assert shared == [run for run in alike if run.strategy != "baseline"]
    assert list(dict.fromkeys(run.task for run in shared)) == ["udpos", "wikiann", "xquad", "xnli"]
    assert {run.realign_cache for run in shared} == {Path("results/realign-cache")}
    for settings in ({"TASKS": "udpos"}, {"REALIGN_CACHE": "none"}, {"SCHEDULES": "during"}):
        assert not any(
            parsed(command).realign_cache for command in run_all("--dry-run", **settings).commands
        )
    elsewhere = run_all(
        "--dry-run", TASKS="udpos xquad", STRATEGIES="full", ALIGNERS="awesome", REALIGN_CACHE="/there"
    )
    assert {str(parsed(command).realign_cache) for command in elsewhere.commands} == {"/there", "None"}
    assert all(
        (parsed(c).schedule == "before") == bool(parsed(c).realign_cache) for c in elsewhere.commands
    )


def test_a_record_made_in_bf16_is_left_out_too(run_all, tmp_path):
    (command, *_) = commands = run_all("--dry-run").commands
    args = parsed(f"{command} --precision bf16")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / f"{alignfreeze.record_name(args, alignfreeze.resolve(args))}.json").touch()
    assert run_all("--dry-run").commands == commands[1:]


def test_with_other_flags_no_run_is_taken_for_done(run_all, tmp_path):
    commands = run_all("--dry-run").commands
    (tmp_path / "runs").mkdir()
    for command in commands:
        (tmp_path / "runs" / record_name(command)).touch()
    for settings in ({"FLAGS": "--epochs 1"}, {"LANGUAGES": "de fr"}):
        assert len(run_all("--dry-run", **settings).commands) == 465


def test_the_environment_narrows_the_grid(run_all):
    settings = {"TASKS": "udpos xnli", "SCHEDULES": "during", "ALIGNERS": "awesome fastalign"}
    more = {"MODELS": MODELS[2], "STRATEGIES": "full emb,0-2", "SEEDS": "31 42", "LANGUAGES": "de fr"}
    result = run_all("--dry-run", **settings, **more)
    varied = (["udpos", "xnli"], ["full", "emb,0-2"], ["during"], ["awesome", "fastalign"], [31, 42])
    assert sorted(grid(result.commands)) == sorted(itertools.product([MODELS[2]], *varied))
    assert all(parsed(command).languages == ["de", "fr"] for command in result.commands)


def test_more_flags_reach_every_run(run_all):
    for command in run_all("--dry-run", FLAGS="--epochs 1 --data-dir here").commands:
        assert (parsed(command).epochs, parsed(command).data_dir) == (1, Path("here"))


@pytest.mark.parametrize("aligners", ["dictionary links", " links  dictionary "])
def test_one_baseline_serves_every_aligner(run_all, aligners):
    few = {"MODELS": MODELS[0], "TASKS": "udpos", "SCHEDULES": "before", "SEEDS": "31 42"}
    commands = run_all("--dry-run", ALIGNERS=aligners, **few).commands
    assert len(commands) == 2 * (1 + 3 * 2)
    assert len(set(map(record_name, commands))) == len(commands)


def test_an_interpreter_of_ones_own_is_in_every_command(run_all):
    commands = run_all("--dry-run", PYTHON=sys.executable).commands
    assert len(commands) == 465 and all(
        shlex.split(command)[0] == sys.executable for command in commands
    )


def test_its_lines_are_commands_for_a_shell(run_all, tmp_path):
    printed = run_all("--dry-run", STRATEGIES="front", TASKS="xquad", SEEDS="31 42")
    lines, environment = "\n".join(printed.commands), os.environ | {"LOG": str(tmp_path / "log")}
    shell = ["xargs", "-P", "2", "-I{}", "bash", "-c", "{}"]
    subprocess.run(shell, input=lines, text=True, check=True, env=environment)
    assert sorted((tmp_path / "log").read_text("utf-8").splitlines()) == sorted(printed.commands)


@pytest.mark.parametrize("arguments", [["faster"], ["--dry"], ["--dry-run", "all"]])
def test_an_unknown_argument_ends_in_one_line_and_exit_code_2(run_all, arguments):
    result = run_all(*arguments)
    assert (result.code, result.out, result.log) == (2, "", [])
    assert len(result.err.splitlines()) == 1 and arguments[-1] in result.err


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_names_every_command_and_setting(run_all, flag):
    result = run_all(flag)
    assert result.code == 0 and result.log == []
    for name in ("--dry-run", "quick", "toy", "test", *SETTINGS):
        assert name in result.out
    assert "set -" not in result.out and "#" not in result.out


# --------------------------------------------------------------------------------------------- running


def test_runs_are_done_one_after_the_other(run_all):
    few = {"TASKS": "wikiann xnli", "SEEDS": "31 42"}
    printed, result = run_all("--dry-run", **few), run_all(**few)
    assert result.code == 0
    assert result.log == [line.replace(shlex.split(line)[0], "PYTHON", 1) for line in printed.commands]


@pytest.mark.parametrize(
    "code", [1, 2, 137, 139], ids=["crashed", "refused", "out of memory", "segmentation fault"]
)
def test_a_failed_run_is_reported_at_the_end_and_does_not_stop_the_others(run_all, code):
    few = {"TASKS": "xnli", "STRATEGIES": "full", "SEEDS": "31 42"}
    result = run_all(MODELS="good bad better", **few, RUN=f'[ "$3" != bad ] || exit {code}')
    assert result.code == 1 and len(result.log) == 6
    report = result.err[result.err.index("failed") :]
    assert "2 of 6" in result.err and report.count("--model bad ") == 2 and "--model good" not in report


def test_an_interrupted_run_stops_the_others(run_all):
    result = run_all(STRATEGIES="full", SEEDS="31 42", RUN="exit 130")
    assert result.code == 130 and len(result.log) == 1


def test_a_run_does_not_swallow_the_list_of_runs(run_all):
    assert len(run_all(RUN="cat > /dev/null", TASKS="xquad", SEEDS="31 42").log) == 24


def test_a_real_run_goes_through_next_to_one_that_fails(run_all, world, tmp_path):
    models = f"{world}/models/bert {tmp_path}/nowhere"
    flags = f"--data-dir {world}/data --realign-languages qaa --limit-train 40 --limit-test 5 --epochs 1 --device cpu"
    grid = {
        "MODELS": models,
        "TASKS": "wikiann",
        "STRATEGIES": "front",
        "SEEDS": "31",
        "LANGUAGES": "qaa",
        "FLAGS": flags,
    }
    result = run_all(PYTHON=sys.executable, HF_HUB_OFFLINE=1, **grid)
    assert result.code == 1
    assert "1 of 2 runs failed" in result.err and f"--model {tmp_path}/nowhere" in result.err
    (record,) = (json.loads(path.read_text("utf-8")) for path in (tmp_path / "runs").glob("*.json"))
    assert (record["model"], record["strategy"], set(record["scores"])) == (
        "bert",
        "front",
        {"en", "qaa"},
    )


def test_two_shards_at_the_same_time_do_the_whole_grid(run_all, world, tmp_path):
    """As the README shows for a SLURM array: each takes every other line of one list."""
    flags = f"--data-dir {world}/data --realign-languages qaa --limit-train 40 --limit-test 5 --epochs 1 --device cpu"
    few = {
        "MODELS": world / "models/bert",
        "TASKS": "udpos wikiann",
        "STRATEGIES": "full front",
        "SEEDS": "31",
    }
    more = {"SCHEDULES": "before", "ALIGNERS": "dictionary", "LANGUAGES": "qaa", "FLAGS": flags}
    cache = tmp_path / "states"
    listed = run_all("--dry-run", PYTHON=sys.executable, REALIGN_CACHE=cache, **few, **more).commands
    (tmp_path / "runs.txt").write_text("".join(f"{command}\n" for command in listed), "utf-8")
    shard = f'awk "NR % 2 == $SLURM_ARRAY_TASK_ID" {tmp_path}/runs.txt | xargs -I{{}} bash -c {{}}'
    environments = [os.environ | {"SLURM_ARRAY_TASK_ID": str(k), "HF_HUB_OFFLINE": "1"} for k in (0, 1)]
    shards = [
        subprocess.Popen(["bash", "-c", shard], cwd=ROOT, env=environment)
        for environment in environments
    ]
    assert [process.wait(timeout=300) for process in shards] == [0, 0]
    records = [json.loads(path.read_text("utf-8")) for path in (tmp_path / "runs").glob("*.json")]
    assert sorted((r["task"], r["strategy"]) for r in records) == sorted(itertools.product(*map(str.split, (
        few["TASKS"], few["STRATEGIES"]))))  # fmt: skip
    assert [r["steps"].get("realign_reused") for r in records if r["task"] == "wikiann"] == [
        2,
        2,
    ]  # after udpos
    assert len(list(cache.iterdir())) == 2


# ------------------------------------------------------------------------------------ finding packages


def test_without_the_packages_it_says_so_and_makes_a_venv_once(run_all, copy):
    few = {"MODELS": "one", "TASKS": "xnli", "STRATEGIES": "full", "SEEDS": "31"}
    settings = {"HAS": 0, "script": copy / "run_all.sh"} | few
    result = run_all(**settings)
    assert result.code == 0
    assert ".venv" in result.err and "requirements.txt" in result.err and "transformers" in result.err
    kinds = [re.match(r"(\S+) (-m \w+|\w+\.py)", line).groups() for line in result.log]
    venv = ".venv/bin/python"
    assert kinds == [("PYTHON", "-m venv"), (venv, "-m pip"), (venv, "alignfreeze.py")]
    assert "requirements.txt" in result.log[1]
    again = run_all(**settings)
    assert [line.split()[:2] for line in again.log] == [
        [venv, "alignfreeze.py"]
    ] and ".venv" not in again.err


def test_with_the_packages_it_makes_no_venv(run_all, copy):
    result = run_all(HAS=1, script=copy / "run_all.sh")
    assert result.code == 0 and len(result.log) == 465 and not (copy / ".venv").exists()


@pytest.mark.parametrize("accident", ["exit 1", "kill -9 $PPID; exit 1"], ids=["failed", "killed"])
def test_an_interrupted_installation_is_taken_up_again(run_all, copy, accident):
    settings = {"HAS": 0, "TASKS": "xnli", "SEEDS": "31", "script": copy / "run_all.sh"}
    first = run_all(**settings, PIP=accident)
    assert first.code == (2 if accident == "exit 1" else -9)
    assert not [line for line in first.log if "alignfreeze.py" in line]
    if accident == "exit 1":
        assert "could not make .venv" in first.err
    second = run_all(**settings)
    assert second.code == 0 and len([line for line in second.log if "alignfreeze.py" in line]) == 12


def test_a_dry_run_prints_nothing_but_commands_even_when_it_installs(run_all, copy):
    commands = run_all(
        "--dry-run", HAS=0, PIP="echo Collecting torch", script=copy / "run_all.sh"
    ).commands
    assert len(commands) == 465 and all(
        command.startswith(".venv/bin/python alignfreeze.py ") for command in commands
    )


def test_an_interpreter_that_does_not_exist_is_named(run_all):
    result = run_all("--dry-run", PYTHON="no-such-python")
    assert (result.code, result.out) == (2, "") and len(result.err.splitlines()) == 1
    assert "no-such-python" in result.err and "PYTHON" in result.err


def test_an_interpreter_that_is_too_old_is_refused(run_all):
    result = run_all("--dry-run", OLD=1)
    assert (
        (result.code, result.out) == (2, "")
        and len(result.err.splitlines()) == 1
        and "3.10" in result.err
    )


# -------------------------------------------------------------------------------- the toy world, tests


def test_the_tests_run_with_the_same_interpreter(run_all):
    assert run_all("test").log == ["PYTHON -m pytest tests"]


def test_the_toy_world_is_built_once_run_and_reported_without_a_network(run_all, copy):
    settings = {
        "script": copy / "run_all.sh",
        "RUN": '[ "$HF_HUB_OFFLINE" = 1 ] || exit 1',
        "SEEDS": "42 66",
    }
    result = run_all("toy", **settings)
    assert result.code == 0
    build, *runs, report, lines = result.log
    assert build.startswith("PYTHON tests/toy_world.py ") and report.startswith(
        "PYTHON results/report.py "
    )
    assert all(task in lines for task in ("wikiann", "xnli", "xquad"))
    runs = list(map(parsed, runs))
    others = [(task, "front") for task in ("wikiann", "xnli", "xquad")]
    assert [(run.task, run.strategy) for run in runs] == [
        ("udpos", strategy) for strategy in STRATEGIES
    ] + others
    assert len({run.seed for run in runs}) == 1
    assert {run.data_dir for run in runs} == {Path("results/toy/world/data")} and (
        copy / "results/toy/world"
    ).is_dir()
    again = run_all("toy", **settings)
    assert again.log == result.log[1:]  # the world stays


def test_a_toy_world_that_was_not_finished_is_built_again(run_all, copy):
    first = run_all("toy", script=copy / "run_all.sh", WORLD='touch "$2/half"; exit 1')
    assert first.code != 0 and len(first.log) == 1
    second = run_all("toy", script=copy / "run_all.sh")
    assert second.code == 0 and len(second.log) == 10
    assert not (copy / "results/toy/world/half").exists()


def test_a_toy_run_that_fails_fails_the_command(run_all, copy):
    assert run_all("toy", script=copy / "run_all.sh", RUN="exit 2").code == 1
