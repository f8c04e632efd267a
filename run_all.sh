#!/usr/bin/env bash
# The paper's grid, the toy world, the tests. Needs bash and Python 3.10 or newer; whatever else is missing goes into .venv.
#
#   ./run_all.sh             every model, task, strategy, schedule, aligner and seed of the paper: 465 runs, the main results
#                            first; finished runs are skipped
#   ./run_all.sh --dry-run   only print the commands that are left, one a line, for several at a time or several machines:
#                            ./run_all.sh --dry-run >runs.txt; xargs -P 4 -I{} bash -c {} <runs.txt
#                            (README: GNU parallel, SLURM)
#   ./run_all.sh quick       a first look with the hub and a GPU, about ten minutes: distilmBERT, PoS, four strategies, a
#                            fifth of the paper's steps
#   ./run_all.sh toy         an invented world, from nothing to its table; no network, under 5 minutes on two cores
#   ./run_all.sh test        the tests
#
# From the environment, with the paper's values as defaults (lists are separated by spaces):
#   MODELS TASKS STRATEGIES SEEDS   what to loop over
#   SCHEDULES ALIGNERS    as well; by default all for PoS, and "before" and "dictionary" for the other tasks
#   LANGUAGES             target languages, if not all of the task's
#   FLAGS                 more flags for alignfreeze.py, such as "--precision fp32" or "--data-dir DIR"
#   OUT                   folder for the records (results/runs)
#   REALIGN_CACHE         folder where runs leave off realigning, and those of longer tasks go on (results/realign-cache, in
#                         the end 210 GB for the paper's grid; whatever is in it may be deleted at any time); "none": no
#                         such folder, and every run realigns from the first step
#   PYTHON                the Python interpreter (python3)
set -euof pipefail  # -f: the words of settings and commands are no file patterns
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() { sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p;}' run_all.sh; }

# Does this interpreter have these packages? (Looks, does not import: importing takes seconds.)
has() { "$1" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' "${@:2}"; }

# Set PYTHON to an interpreter that has the packages named; make .venv from requirements.txt if need be.
set_up() {
  local wanted=${PYTHON:-python3}
  command -v "$wanted" >/dev/null || { echo "run_all.sh: no '$wanted'; install Python 3.10 or newer, or set PYTHON" >&2; exit 2; }
  "$wanted" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { echo "run_all.sh: '$wanted' is older than Python 3.10; set PYTHON to a newer one" >&2; exit 2; }
  if has "$wanted" "$@"; then PYTHON=$wanted; return; fi
  PYTHON=.venv/bin/python
  if ! { [ -x $PYTHON ] && has $PYTHON "$@"; }; then
    echo "run_all.sh: '$wanted' lacks $*: installing requirements.txt into .venv (once; several minutes)" >&2
    "$wanted" -m venv .venv && $PYTHON -m pip install --quiet --requirement requirements.txt >&2 ||
      { echo "run_all.sh: could not make .venv; see above, or set PYTHON to an interpreter with the packages" >&2; exit 2; }
  fi
}

# The commands of the grid that are left to do, one a line; how many are done goes to stderr.
grid() {
  local model task strategy schedule aligner seed name cache first=1 total=0 left=0 python=${PYTHON:-python3}
  for schedule in ${SCHEDULES:-before during}; do for aligner in ${ALIGNERS:-dictionary fastalign awesome}; do
    for task in $TASKS; do for model in $MODELS; do for seed in $SEEDS; do for strategy in $STRATEGIES; do
      name=${model##*/}_${task}_${strategy}_${schedule}_${aligner##*/}_$seed
      cache=
      if [[ $strategy != baseline && $schedule = before && $TASKS = *\ * && $REALIGN_CACHE != none ]]; then  # shared
        if [ "$ALIGNERS" ] || [ "$aligner" = dictionary ]; then cache=" --realign-cache $REALIGN_CACHE"; fi
      fi
      if [ "$strategy" = baseline ]; then  # one baseline serves every schedule and aligner
        [ $first ] || continue
        name=${model##*/}_${task}_baseline_none_none_$seed
      elif [ "$task" != udpos ]; then  # the paper has other schedules and aligners for PoS only
        [ "$SCHEDULES" ] || [ "$schedule" = before ] || continue
        [ "$ALIGNERS" ] || [ "$aligner" = dictionary ] || continue
      fi
      total=$((total + 1))
      if [ -z "$FLAGS$LANGUAGES" ]; then  # with flags, alignfreeze.py looks itself
        if [ -e "$OUT/$name.json" ] || [ -e "$OUT/${name}_precision=bf16.json" ]; then continue; fi
      fi
      left=$((left + 1))
      echo "$python alignfreeze.py --model $model --task $task --strategy $strategy --schedule $schedule" \
        "--aligner $aligner --seed $seed --out $OUT$cache${LANGUAGES:+ --languages $LANGUAGES}${FLAGS:+ $FLAGS}"
    done; done; done; done
    first=
  done; done
  echo "run_all.sh: $total runs in the grid, $((total - left)) done, $left left" >&2
}

# Run commands from stdin one after the other; a failed one is reported at the end and does not stop the others.
run_commands() {
  local command commands=() failed=()
  while IFS= read -r command; do commands+=("$command"); done  # all of them first: the count is shown
  for command in ${commands[@]+"${commands[@]}"}; do
    echo "[$((++count)) of ${#commands[@]}, ${#failed[@]} failed] $command"
    $command </dev/null || { [ $? -ne 130 ] || exit 130; failed+=("$command"); }  # 130: Ctrl-C
  done
  [ ${#failed[@]} -eq 0 ] && return
  printf 'run_all.sh: %d of %d runs failed:\n' ${#failed[@]} ${#commands[@]} >&2
  printf '  %s\n' "${failed[@]}" >&2
  return 1
}

toy() {
  local world=results/toy/world failed=0
  export HF_HUB_OFFLINE=1
  if [ ! -d $world ]; then  # made under another name first, so that it is whole or absent
    rm -rf $world.part
    "$PYTHON" tests/toy_world.py $world.part --models bert
    mv $world.part $world
  fi
  MODELS=$world/models/bert OUT=results/toy/runs LANGUAGES="qaa qab qac" SCHEDULES=before ALIGNERS=dictionary
  FLAGS="--data-dir $world/data --realign-languages $LANGUAGES --epochs 4 --lr 2e-4 --realign-lr 2e-4 --device cpu"
  FLAGS+=" --precision fp32" REALIGN_CACHE=none  # the same numbers on every machine
  { TASKS=udpos grid; TASKS="wikiann xnli xquad" STRATEGIES=front grid; } | run_commands || failed=$?
  [ $failed -ne 130 ] || exit 130
  set +f
  "$PYTHON" results/report.py $OUT/*_udpos_*.json
  echo
  "$PYTHON" - $OUT/*_{wikiann,xnli,xquad}_*.json <<'END'  # a line for each of the other tasks
import json, pathlib, sys
for record in (json.loads(path.read_text("utf-8")) for path in map(pathlib.Path, sys.argv[1:]) if path.exists()):
    english, *targets = record["scores"].values()
    means = {metric: sum(scores[metric] for scores in targets) / len(targets) for metric in english}
    shown = [f"{metric} {100 * mean:.1f} (English {100 * english[metric]:.1f})" for metric, mean in means.items()]
    print(f"{record['task']}, {record['strategy']}, average of the other languages:", ", ".join(shown[:2]))
END
  echo "The toy world shows that the method runs, not that the paper is right: see the README."
  return $failed
}

count=0 DRY_RUN= COMMAND=grid
for argument; do
  case $argument in
    --dry-run) DRY_RUN=1 ;;
    -h | --help) usage; exit ;;
    quick | toy | test) COMMAND=$argument ;;
    *) echo "run_all.sh: no command '$argument'; ./run_all.sh --help shows them" >&2; exit 2 ;;
  esac
done
if [ $COMMAND = quick ]; then
  : "${MODELS:=distilbert-base-multilingual-cased}" "${TASKS:=udpos}" "${SCHEDULES:=before}" "${ALIGNERS:=dictionary}"
  : "${SEEDS:=31}" "${LANGUAGES:=ar de fi hi tr}" "${OUT:=results/quick}"
  FLAGS="--epochs 1${FLAGS:+ $FLAGS}"  # a fifth of the fine-tuning steps, and as many of realignment
fi
: "${MODELS:=distilbert-base-multilingual-cased bert-base-multilingual-cased xlm-roberta-base}"
: "${TASKS:=udpos wikiann xquad xnli}"  # the shortest first: longer ones realign on from there
: "${STRATEGIES:=baseline full front back}" "${SCHEDULES:=}" "${ALIGNERS:=}" "${SEEDS:=31 42 66 23 17}" "${LANGUAGES:=}"
: "${FLAGS:=}" "${OUT:=results/runs}" "${REALIGN_CACHE:=results/realign-cache}"

case $COMMAND in
  test) set_up torch transformers datasets pytest; exec "$PYTHON" -m pytest tests ;;
  toy) set_up torch transformers datasets; SEEDS=31; toy ;;
  *)
    set_up torch transformers datasets
    if [ $DRY_RUN ]; then grid; exit; fi
    failed=0
    grid | run_commands || failed=$?
    if [ $COMMAND = quick ] && [ $failed -ne 130 ]; then "$PYTHON" results/report.py "$OUT"; fi
    exit $failed ;;
esac
