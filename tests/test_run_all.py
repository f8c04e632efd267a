"""Test run_all.sh: the grids, wrong settings, failures, signals, and finding the packages."""

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pytest

import alignfreeze

ROOT = Path(alignfreeze.__file__).parent
MODELS = ("distilbert-base-multilingual-cased", "bert-base-multilingual-cased", "xlm-roberta-base")
STRATEGIES = ("baseline", "full", "front", "back")
SEEDS = (31, 42, 66, 23, 17)
SETTINGS = "METHODS MODELS TASKS STRATEGIES SCHEDULES ALIGNERS SEEDS".split()
SETTINGS += "FLAGS VALIDATE OUT LINKS PYTHON JOBS".split()

# A stand-in for the Python interpreter, which only logs its arguments. HAS says whether it has the
# packages (0 or 1). Its `-m venv` makes another stand-in, which has them once its `-m pip` has run.
# PIP, RUN and WORLD are shell commands for installing, for a run, and for building the toy world.
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


def heed_signals() -> None:
    """Reset signals: bash cannot trap those that `nohup` or `&` made the tests ignore."""
    for name in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_DFL)


@pytest.fixture
def run_all(tmp_path):
    """Return a function that calls run_all.sh with the stand-in and with settings."""
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
        pipes |= {"preexec_fn": heed_signals, "start_new_session": True}
        done = subprocess.run(command, cwd=tmp_path, env=environment, timeout=120, **pipes)
        asked = [
            line.replace(str(stand_in), "PYTHON") for line in log.read_text("utf-8").splitlines()
        ]
        return Result(done.returncode, done.stdout, done.stderr, asked)

    return call


@pytest.fixture
def copy(tmp_path) -> Path:
    """Copy the script and the files that it needs to a folder with a space in its name."""
    folder = tmp_path / "a copy"
    for name in (
        "run_all.sh",
        "alignfreeze.py",
        "requirements.txt",
        "tests/toy_world.py",
        "results/report.py",
        "results/records.py",
        "results/toy_tables.py",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def parsed(command: str):
    """Return the settings of a command, as alignfreeze.py parses them."""
    *_, argv = command.partition("alignfreeze.py ")
    return alignfreeze.parse_args(shlex.split(argv))


def runs_of(commands: list[str]) -> list[tuple]:
    """Return what distinguishes the runs among the commands."""
    runs = [parsed(command) for command in commands if "--write-links" not in command]
    return [
        (run.method, run.model, run.task, run.strategy, run.schedule, run.aligner, run.seed)
        for run in runs
    ]


def test_a_dry_run_prints_both_papers_grids(run_all):
    result = run_all("--dry-run")
    assert result.code == 0
    runs = runs_of(result.commands)
    assert len(set(runs)) == len(runs) == 465 + 36
    first = [run for run in runs if run[0] == "alignfreeze"]
    assert runs[:465] == first and sum(run[2] == "udpos" for run in first) == 285
    assert {run[1] for run in first} == set(MODELS) and {run[3] for run in first} == set(STRATEGIES)
    assert {run[6] for run in first} == set(SEEDS)
    others = [run for run in first if run[2] != "udpos"]
    assert {run[4:6] for run in others if run[3] != "baseline"} == {("before", "dictionary")}


def test_one_baseline_serves_every_schedule_and_aligner(run_all):
    runs = runs_of(run_all("--dry-run", TASKS="udpos", METHODS="alignfreeze").commands)
    assert sum(run[3] == "baseline" for run in runs) == len(MODELS) * len(SEEDS)


def test_links_are_written_once_before_they_are_read_under_the_aligners_name(run_all):
    settings = {
        "ALIGNERS": "fastalign",
        "SCHEDULES": "before",
        "SEEDS": 31,
        "MODELS": "m",
        "METHODS": "alignfreeze",
    }
    first, *others = run_all("--dry-run", TASKS="udpos", LINKS="links", **settings).commands
    assert "--write-links links/fastalign" in first and "--aligner fastalign" in first
    read = [parsed(command).aligner for command in others if "baseline" not in command]
    assert read == ["links/fastalign"] * 3 and Path(read[0]).name == "fastalign"


def test_the_script_accepts_every_command_of_the_grid(run_all, tmp_path):
    for name in ("fastalign", "awesome"):  # the commands that write links make these
        (tmp_path / "links" / name).mkdir(parents=True)
    settings = {"LINKS": tmp_path / "links", "OUT": tmp_path / "out", "SEEDS": 31}
    commands = run_all("--dry-run", METHODS="alignfreeze", **settings).commands
    tasks = "massive uner xsid"  # translation needs another package
    commands += run_all("--dry-run", METHODS="mid-align", TASKS=tasks, **settings).commands
    commands += run_all("quick", "--dry-run", OUT=tmp_path / "out").commands
    aligners = set()
    for command in commands:
        settings = parsed(command)
        alignfreeze.validate_settings(settings)
        aligners.add(Path(settings.aligner).name)
    assert len(commands) > 100 and aligners == {"dictionary", "fastalign", "awesome"}


@pytest.mark.parametrize(
    "task, value, expected",
    [("uner", None, 200), ("uner", "50", 50), ("uner", "", None), ("xsid", None, None),
     ("xsid", "50", 50)],
)  # fmt: skip
def test_how_often_the_second_method_validates(run_all, task, value, expected):
    settings = {"METHODS": "mid-align", "TASKS": task, "MODELS": "m"}
    settings |= {} if value is None else {"VALIDATE": value}
    commands = run_all("--dry-run", **settings).commands
    assert {parsed(command).validate for command in commands} == {expected}


def test_the_environment_narrows_the_grid_and_flags_reach_every_run(run_all):
    settings = {
        "MODELS": "m",
        "TASKS": "xnli",
        "STRATEGIES": "front",
        "SEEDS": "1 2",
        "METHODS": "alignfreeze",
    }
    commands = run_all("--dry-run", FLAGS="--precision fp32", **settings).commands
    runs = runs_of(commands)
    assert [run[1:4] + run[6:] for run in runs] == [("m", "xnli", "front", seed) for seed in (1, 2)]
    assert all(
        parsed(command).precision == "fp32" for command in commands if "--write" not in command
    )


@pytest.mark.parametrize("arguments", [[], ["--dry-run"], ["quick"], ["quick", "--dry-run"]])
def test_empty_and_wrong_settings_are_refused_in_one_line(run_all, arguments):
    wrong = {
        "MODELS": ["", " \n"],
        "TASKS": ["", "udpos pos"],
        "SEEDS": ["", "31 x", "1 -2", "0.5"],
    }
    wrong |= {
        "STRATEGIES": ["", "middle", "emb,", "0-", "front,baseline", "full,0-2", "baseline full *"]
    }
    wrong |= {"SCHEDULES": ["", "after"], "ALIGNERS": ["", "fast", "no/such/folder"]}
    wrong |= {"FLAGS": ["--lr 1\n--epochs 1", "--seed 7", "--lr 1 --out=runs"]}
    wrong |= {"VALIDATE": ["0", "often", "1 2"]}
    wrong |= {"METHODS": ["", "alignfreeze mid"]}
    if "quick" in arguments:  # it runs the first method only
        wrong["METHODS"] += ["mid-align", "alignfreeze mid-align"]
    for name, values in wrong.items():
        for value in values:
            result = run_all(*arguments, **{name: value})
            assert (result.code, result.out, result.log) == (2, "", []), (name, value)
            assert result.err.count("\n") == 1 and name in result.err


def test_layers_and_folders_of_links_are_accepted(run_all, tmp_path):
    settings = GRID | {"STRATEGIES": "emb,0-2 3 full front,emb", "ALIGNERS": tmp_path}
    commands = run_all("--dry-run", **settings).commands
    assert len(commands) == 8
    assert {parsed(command).strategy for command in commands} == {*settings["STRATEGIES"].split()}
    assert {parsed(command).aligner for command in commands} == {str(tmp_path)}


def test_printed_commands_are_quoted_for_the_shell(run_all, tmp_path):
    settings = GRID | {"MODELS": "$(touch${IFS}x) `touch,y`;touch", "OUT": "a b'c"}
    commands = run_all("--dry-run", **settings, FLAGS='--data-dir "$HOME"/*').commands
    environment = {**os.environ, "LOG": str(tmp_path / "log")}
    for command in commands:
        subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=True)
    logged = (tmp_path / "log").read_text("utf-8").splitlines()
    assert len(commands) == len(logged) == 2 and not (tmp_path / "x").exists()
    assert all(line.endswith("""--out a b'c --data-dir "$HOME"/*""") for line in logged)
    assert "--model $(touch${IFS}x) --task" in logged[0]


def test_printed_commands_can_be_run_by_xargs(run_all, tmp_path):
    result = run_all("--dry-run", **GRID | {"SEEDS": "1 2 3"})
    command, log = ["xargs", "-P", "4", "-I{}", "bash", "-c", "{}"], tmp_path / "log"
    environment = {**os.environ, "LOG": str(log)}
    subprocess.run(command, input=result.out, text=True, env=environment, check=True)
    assert sorted(log.read_text("utf-8").splitlines()) == sorted(result.commands)


@pytest.mark.parametrize("has", [0, 1])
def test_dry_runs_only_print_commands(run_all, copy, has):
    before = {*copy.rglob("*")}
    for command, count in {"toy": 26, "quick": 5, "test": 1}.items():
        result = run_all(command, "--dry-run", script=copy / "run_all.sh", HAS=has)
        assert (result.code, result.log, len(result.commands)) == (0, [], count)
        assert ("pip install" in result.err) == (not has)
    assert {*copy.rglob("*")} == before


def test_a_quick_look_is_four_runs_of_a_fifth_of_the_papers_steps_and_their_tables(run_all):
    result = run_all("quick")
    runs = [line for line in result.log if "--strategy" in line]
    assert result.code == 0 and len(runs) == 4 and all("--epochs 1 " in run for run in runs)
    assert "results/report.py" in result.log[-1]


GRID = {
    "MODELS": "a b",
    "TASKS": "udpos",
    "STRATEGIES": "front",
    "SEEDS": 31,
    "METHODS": "alignfreeze",
}
GRID |= {"SCHEDULES": "before", "ALIGNERS": "dictionary"}


@pytest.mark.parametrize("code", [1, 2, 137, 139])
def test_a_failed_run_is_reported_at_the_end_and_does_not_stop_the_others(run_all, code):
    result = run_all(RUN=f'case "$*" in *"--model a "*) exit {code} ;; esac', **GRID)
    assert (
        result.code == 1 and "1 of 2 commands failed" in result.err and "--model a " in result.err
    )
    assert sum("--model" in line for line in result.log) == 2


def test_a_killed_run_is_reported_and_does_not_stop_the_others(run_all):
    for jobs in (1, 3):
        result = run_all(RUN='case "$*" in *"--model a "*) kill -9 $$ ;; esac', JOBS=jobs, **GRID)
        assert result.code == 1 and "failed with exit code 137" in result.out
        assert sum("--model" in line for line in result.log) == 2


def test_a_run_that_is_not_repeated_is_not_said_to_be_finished(run_all):
    """With several jobs, its own line goes to a log."""
    line = "a.json exists: nothing to do (--overwrite repeats the run)"
    states = {line: "done before", f"{line}; another revision of alignfreeze.py made it": "NOT RUN"}
    for printed, state in states.items():
        result = run_all(RUN=f'echo "{printed}"', JOBS=2, **GRID)
        assert result.code == 0 and f" left] {state}" in result.out
        assert "finished:" not in result.out


# --- several jobs

MANY = GRID | {"SEEDS": "1 2 3 4"}
RECORD = 'name=$(cksum <<<"$*"); echo "$*" >"$OUT/${name%% *}.json"'


def records(folder: Path) -> dict[str, bytes]:
    """Return the records in a folder as {name: content}."""
    return {path.name: path.read_bytes() for path in folder.glob("*.json")}


def test_jobs_make_the_same_records(run_all, tmp_path):
    made = []
    for jobs in (1, 4):
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        (tmp_path / "runs").mkdir()
        result = run_all(RUN=f"sleep 0.0$((RANDOM % 9)); {RECORD}", JOBS=jobs, **MANY)
        assert result.code == 0 and "[0 left] finished" in result.out
        assert sum("left] finished: " in line for line in result.commands) == 8
        made.append(records(tmp_path / "runs"))
    assert made[0] == made[1] and len(made[0]) == 8


def test_a_killed_script_can_be_started_again(run_all, tmp_path):
    (tmp_path / "runs").mkdir()
    kill = 'case "$*" in *"--model b "*"--seed 2 "*) kill -9 $PPID ;; esac'
    assert run_all(RUN=f"{RECORD}; {kill}", JOBS=2, **MANY).code == -signal.SIGKILL
    assert run_all(RUN=RECORD, JOBS=2, **MANY).code == 0
    assert len(records(tmp_path / "runs")) == 8


@pytest.mark.parametrize("jobs", [1, 3])
def test_as_many_commands_run_at_a_time_as_there_are_jobs(run_all, tmp_path, jobs):
    events = tmp_path / "events"
    run_all(RUN=f"echo 1 >>{events}; sleep 0.3; echo -1 >>{events}", JOBS=jobs, **MANY)
    changes = [int(line) for line in events.read_text().split()]
    assert len(changes) == 16
    assert max(sum(changes[:i]) for i in range(16)) == jobs


@pytest.mark.parametrize("jobs", [1, 4])
def test_links_are_written_before_other_commands_start(run_all, tmp_path, jobs):
    events = tmp_path / "events"
    run = f'case "$*" in *--write-links*) sleep 0.3; e=link ;; *) e=run ;; esac; echo $e >>{events}'
    run_all(RUN=run, JOBS=jobs, **MANY | {"ALIGNERS": "fastalign awesome"})
    assert events.read_text().split() == ["link"] * 2 + ["run"] * 16


def test_the_output_of_several_jobs_goes_to_log_files(run_all, tmp_path):
    run = 'echo "said by $$"; case "$*" in *"--model /a "*) exit 3 ;; esac'
    result = run_all(RUN=run, JOBS=2, **GRID | {"MODELS": "/a b"})
    logs = tmp_path / "runs" / "logs"
    failed = logs / "a_udpos_front_before_dictionary_31.log"
    assert {path.name for path in logs.iterdir()} == {failed.name, failed.name.replace("a", "b", 1)}
    assert result.code == 1 and "said by" not in result.out and f"see {failed}" in result.err
    assert "said by" in failed.read_text() and "--model /a " in failed.read_text().splitlines()[0]


@pytest.mark.parametrize("jobs", ["", "0", "two", "-1", "1 2"])
def test_a_wrong_number_of_jobs_is_refused(run_all, jobs):
    result = run_all(JOBS=jobs)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1) and "JOBS" in result.err


def is_running(pid: str) -> bool:
    """Return whether a process exists and is not a zombie."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True)
    return state.stdout.strip()[:1] not in ("", "Z")


@pytest.mark.parametrize("trap", ["", "trap : TERM;"], ids=["heeded", "ignored"])
@pytest.mark.parametrize("jobs, name", [(1, "INT"), (3, "INT"), (3, "TERM")])
def test_a_signal_ends_all_runs_and_their_children(run_all, tmp_path, jobs, name, trap):
    """Ctrl-C sends SIGINT to the process group of the script; others send SIGTERM to the script."""
    pids = tmp_path / "pids"
    target = "-$PPID" if name == "INT" else "$PPID"
    kill = f"[ $(wc -l <{pids}) -lt {jobs} ] || kill -{name} -- {target}"
    run = f"{trap} sleep 60 & echo $$ $! >>{pids}; {kill}; while :; do wait; done"
    started = time.time()
    result = run_all(RUN=run, JOBS=jobs, **MANY)
    assert result.code == (130 if name == "INT" else 143) and time.time() - started < 30
    time.sleep(0.2)
    assert len(pids.read_text().split()) == 2 * jobs
    assert not any(map(is_running, pids.read_text().split()))


@pytest.mark.parametrize("name", ["TERM", "HUP", "INT"])
def test_a_signal_takes_the_run_under_way_along(run_all, tmp_path, name):
    pid = tmp_path / "pid"
    run = f"echo $$ >{pid}; kill -{name} $PPID; exec sleep 30"
    started = time.time()
    assert run_all(RUN=run, **GRID).code == (130 if name == "INT" else 143)
    assert time.time() - started < 20
    time.sleep(0.5)
    assert not is_running(pid.read_text().strip())


@pytest.mark.parametrize("arguments", [["faster"], ["--dry"], ["--dry-run", "all"]])
def test_an_unknown_argument_ends_in_one_line_and_exit_code_2(run_all, arguments):
    result = run_all(*arguments)
    assert result.code == 2 and result.err.count("\n") == 1 and not result.log


def test_help_names_every_command_and_setting(run_all):
    text = run_all("--help").out
    for word in ["--dry-run", "quick", "toy", "test", *SETTINGS]:
        assert word in text


# --- packages, toy, tests


def test_without_the_packages_it_says_so_and_makes_a_venv_once(run_all, copy):
    first, again = (run_all(script=copy / "run_all.sh", HAS=0, **GRID) for _ in "ab")
    assert (
        first.code == again.code == 0 and first.out == again.out and "requirements.txt" in first.err
    )
    assert sum("venv" in line and "-m venv" in line for line in first.log + again.log) == 1


@pytest.mark.parametrize("accident", ["exit 1", "kill -9 $PPID; exit 1"], ids=["failed", "killed"])
def test_an_interrupted_installation_is_taken_up_again(run_all, copy, accident):
    assert run_all(script=copy / "run_all.sh", HAS=0, PIP=accident, **GRID).code != 0
    assert run_all(script=copy / "run_all.sh", HAS=0, **GRID).code == 0


def test_an_interpreter_that_does_not_exist_or_is_too_old_is_named(run_all):
    for settings in ({"PYTHON": "python-that-is-not-there"}, {"OLD": 1}):
        result = run_all("--dry-run", **settings)
        assert result.code == 2 and result.err.count("\n") == 1 and "python" in result.err


def test_the_tests_run_with_the_same_interpreter(run_all):
    assert run_all("test").log[-1].startswith("PYTHON -m pytest tests")


def test_the_toy_world_is_built_once_run_and_summarised_without_a_network(run_all, copy):
    settings = {"RUN": "echo $HF_HUB_OFFLINE $OMP_NUM_THREADS $OMP_WAIT_POLICY"}
    first, again = (run_all("toy", script=copy / "run_all.sh", **settings) for _ in "ab")
    assert first.code == again.code == 0
    assert sum("toy_world.py" in line for line in first.log) == 1
    assert not any("toy_world.py" in line for line in again.log)
    runs = [parsed(line.removeprefix("PYTHON ")) for line in first.log if "--strategy" in line]
    made = {(run.method, run.task, run.strategy, run.seed) for run in runs}
    expected = {("alignfreeze", "udpos", name, seed) for name in STRATEGIES for seed in SEEDS[:3]}
    expected |= {("alignfreeze", task, "front", 31) for task in ("wikiann", "xnli", "xquad")}
    expected |= {("mid-align", "xsid", x, y) for x in ("baseline", "full") for y in (11, 12, 13)}
    assert made == expected and len(runs) == len(expected)
    assert "results/toy_tables.py results/toy/runs" in first.log[-1]
    logs = [path.read_text("utf-8") for path in (copy / "results/toy/runs/logs").iterdir()]
    assert len(logs) == len(runs) and all("\n1 1 PASSIVE\n" in log for log in logs)


def test_a_finished_run_of_the_toy_world_is_one_short_line(run_all, copy):
    lines = run_all("toy", script=copy / "run_all.sh").commands
    finished = [line for line in lines if "left] finished: " in line]
    assert len(finished) == 21 and max(map(len, finished)) < 100
    assert any("models/bert --task udpos --strategy full --seed 31" in line for line in finished)


def test_a_toy_world_that_was_not_finished_is_built_again_and_a_failed_run_fails_the_command(
    run_all, copy
):
    assert run_all("toy", script=copy / "run_all.sh", WORLD="exit 1").code != 0
    result = run_all("toy", script=copy / "run_all.sh", RUN="exit 1")
    assert result.code == 1 and any("toy_world.py" in line for line in result.log)
