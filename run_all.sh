#!/usr/bin/env bash
# Both papers' grids, the toy world, the tests. Needs bash and Python 3.10 or newer; what else is missing goes into .venv.
#
#   ./run_all.sh             AlignFreeze: every model, task, strategy, schedule, aligner and seed of the paper, 465 runs, the
#                            main results first; then middle-layer alignment. Finished runs are skipped.
#   ./run_all.sh --dry-run   only print the commands that are left, one a line, for several at a time or several machines
#   ./run_all.sh quick       a first look with the hub and a GPU: distilmBERT, PoS, four strategies, a fifth of the steps
#   ./run_all.sh toy         an invented world, both methods, from nothing to tables; no network, under 5 minutes
#   ./run_all.sh test        the tests
#
# From the environment, lists separated by spaces, with the papers' values as defaults:
#   METHODS (alignfreeze mid-align)   MODELS   TASKS   STRATEGIES   SCHEDULES   ALIGNERS   SEEDS
#   FLAGS    more flags for alignfreeze.py, such as "--precision fp32" or "--data-dir DIR"
#   OUT      folder for the records (results/runs)      LINKS    for the links of fastalign and awesome (results/links)
#   PYTHON   the Python interpreter (python3)
set -euof pipefail  # -f: the words of settings and commands are no file patterns
cd "$(dirname "${BASH_SOURCE[0]}")"
: "${PYTHON:=python3}" "${OUT:=results/runs}" "${LINKS:=results/links}" "${FLAGS:=}" "${METHODS:=alignfreeze mid-align}"

die() { echo "run_all.sh: $1" >&2; exit 2; }

# Set PYTHON to an interpreter that has the packages named; make .venv from requirements.txt if need be.
has() { "$1" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' "${@:2}"; }
set_up() {
  command -v "$PYTHON" >/dev/null || die "no '$PYTHON'; install Python 3.10 or newer, or set PYTHON"
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "'$PYTHON' is older than Python 3.10; set PYTHON"
  if has "$PYTHON" "$@"; then return; fi
  if ! { [ -x .venv/bin/python ] && has .venv/bin/python "$@"; }; then
    echo "run_all.sh: '$PYTHON' lacks $*: installing requirements.txt into .venv (once; several minutes)" >&2
    "$PYTHON" -m venv .venv && .venv/bin/python -m pip install --quiet --requirement requirements.txt >&2 ||
      die "could not make .venv; see above, or set PYTHON to an interpreter with the packages"
  fi
  PYTHON=.venv/bin/python
}

# All commands of a method's grid, one a line. The settings of the second paper's tables come after the first paper's.
alignfreeze() {
  local run schedule aligner task model seed strategy
  for schedule in ${SCHEDULES-before during}; do for aligner in ${ALIGNERS-dictionary fastalign awesome}; do
    local links=$aligner
    if [[ $aligner = fastalign || $aligner = awesome ]]; then  # aligned once, then read by every run
      links=$LINKS/$aligner
      echo "$PYTHON alignfreeze.py --aligner $aligner --write-links $links $FLAGS"
    fi
    for task in ${TASKS-udpos wikiann xquad xnli}; do
      for model in ${MODELS-distilbert-base-multilingual-cased bert-base-multilingual-cased xlm-roberta-base}; do
        for seed in ${SEEDS-31 42 66 23 17}; do for strategy in ${STRATEGIES-baseline full front back}; do
          run="$PYTHON alignfreeze.py --model $model --task $task --strategy $strategy --seed $seed --out $OUT"
          if [ $strategy != baseline ]; then
            # The paper has other schedules and aligners for PoS only.
            if [ $task != udpos ] && [ "$schedule $aligner" != "before dictionary" ]; then continue; fi
            run+=" --schedule $schedule --aligner $links"
          fi
          echo "$run $FLAGS"
        done; done
      done
    done
  done; done | awk '!seen[$0]++'  # one baseline serves every schedule and aligner
}
mid-align() {
  local task model seed strategy
  for task in ${TASKS-massive uner translation}; do
    for model in ${MODELS-meta-llama/Meta-Llama-3-8B-Instruct Qwen/Qwen2.5-7B-Instruct}; do
      for seed in ${SEEDS-1 2 3}; do for strategy in ${STRATEGIES-baseline full}; do
        echo "$PYTHON alignfreeze.py --method mid-align --model $model --task $task --strategy $strategy --seed $seed" \
          "--validate 200 --checkpointing --out $OUT $FLAGS"
      done; done
    done
  done
}
left() { for method in $METHODS; do $method; done | "$PYTHON" alignfreeze.py --left; }

# Run commands, one a line, one after the other; a failed one is reported at the end and does not stop the others. When
# this script is ended, so is the run under way.
run_commands() {
  local commands=() failed=() command count=0 code child=
  trap '[ ! "$child" ] || kill $child 2>/dev/null; exit 130' INT
  trap '[ ! "$child" ] || kill $child 2>/dev/null; exit 143' TERM HUP
  mapfile -t commands <<<"$1"
  [ "$1" ] || { echo "run_all.sh: nothing is left to do" >&2; return; }
  for command in "${commands[@]}"; do
    echo "[$((++count)) of ${#commands[@]}, ${#failed[@]} failed] $command"
    code=0
    $command </dev/null &
    child=$!
    wait $child || code=$?
    [ $code -ne 130 ] || exit 130  # Ctrl-C
    [ $code -eq 0 ] || failed+=("$command")
  done
  [ ${#failed[@]} -eq 0 ] && return
  printf 'run_all.sh: %d of %d runs failed:\n' ${#failed[@]} ${#commands[@]} >&2
  printf '  %s\n' "${failed[@]}" >&2
  return 1
}

toy() {
  local world=results/toy/world failed=0 common runs
  export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=2 OUT=results/toy/runs  # scores depend on the number of threads
  if [ ! -d $world ]; then  # made under another name first, so that it is whole or absent
    rm -rf $world.part
    "$PYTHON" tests/toy_world.py $world.part --models bert llama
    mv $world.part $world
  fi
  common="--data-dir $world/data --languages qaa qab qac --device cpu --precision fp32"
  FLAGS="$common --realign-languages qaa qab qac --epochs 4 --lr 2e-4 --realign-lr 2e-4"
  MODELS=$world/models/bert SEEDS=31 SCHEDULES=before ALIGNERS=dictionary
  runs=$(
    METHODS=alignfreeze TASKS=udpos left
    METHODS=alignfreeze TASKS="wikiann xnli xquad" STRATEGIES=front left
    METHODS=toy-mid-align MODELS=$world/models/llama FLAGS=$common left
  )
  run_commands "$runs" || failed=$?
  "$PYTHON" results/report.py $OUT
  echo "The toy world shows that the methods run, not that the papers are right: see the README."
  return $failed
}
toy-mid-align() {
  for strategy in baseline full; do
    echo "$PYTHON alignfreeze.py --method mid-align --model $MODELS --task xsid --strategy $strategy --out $OUT $FLAGS" \
      "--train-languages en qaa --realign-languages qab qac --layer 2 $TOY_MID_ALIGN"
  done
}
TOY_MID_ALIGN="--lora 0 --lr 1e-3 --epochs 3 --batch-size 16 --realign-batch-size 16 --accumulate 1"

command=grid
for argument; do
  case $argument in
    --dry-run) command=dry-run ;;
    -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p;}' run_all.sh; exit ;;
    quick | toy | test) command=$argument ;;
    *) die "no command '$argument'; ./run_all.sh --help shows them" ;;
  esac
done
if [ $command = test ]; then
  set_up torch transformers datasets pytest
  exec "$PYTHON" -m pytest tests -p no:cacheprovider --durations 10
fi
set_up torch transformers datasets
case $command in
  toy) toy ;;
  dry-run) left ;;
  grid) run_commands "$(left)" ;;
  quick)
    export OUT=results/quick METHODS=alignfreeze MODELS=distilbert-base-multilingual-cased TASKS=udpos SEEDS=31 \
      SCHEDULES=before ALIGNERS=dictionary FLAGS="--epochs 1 --languages ar de fi hi tr $FLAGS"
    run_commands "$(left)"
    "$PYTHON" results/report.py $OUT ;;
esac
