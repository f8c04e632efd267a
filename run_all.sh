#!/usr/bin/env bash
# Both papers' grids, a toy world, the tests. Needs bash and Python 3.10 or newer; what else is missing goes into .venv.
#
#   ./run_all.sh             AlignFreeze: every model, task, strategy, schedule, aligner and seed of the paper, 465 runs, the
#                            main results first; then middle-layer alignment, 36 runs. What is done is not done again.
#   ./run_all.sh --dry-run   only print the commands, one a line, for several at a time or several machines; those with
#                            --write-links are to end before the others begin
#   ./run_all.sh quick       a first look with the hub and a GPU: distilmBERT, PoS, four strategies, a fifth of the steps
#   ./run_all.sh toy         an invented world, both methods, from nothing to tables; no network, under 5 minutes
#   ./run_all.sh test        the tests
#
# From the environment, lists separated by spaces, with the papers' values as defaults:
#   METHODS (alignfreeze mid-align)   MODELS   TASKS   STRATEGIES   SCHEDULES   ALIGNERS   SEEDS
#   FLAGS    more flags for every command, such as "--precision fp32" or "--data-dir DIR"
#   OUT      folder for the records (results/runs)      LINKS   for the links of fastalign and awesome (results/links)
#   PYTHON   the Python interpreter (python3)
set -euof pipefail  # -f: the words of settings and commands are no file patterns
cd "$(dirname "${BASH_SOURCE[0]}")"

die() { echo "run_all.sh: $1" >&2; exit 2; }

# Run a command that ends when this script is ended.
call() { "$@" </dev/null & wait $!; }
end() { kill ${!-} 2>/dev/null && wait $! || :; exit $1; }
trap 'end 130' INT; trap 'end 143' TERM HUP

# Set PYTHON to an interpreter that has the packages named; make .venv from requirements.txt if need be.
has() { "$1" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' "${@:2}"; }
set_up() {
  : "${PYTHON:=python3}"
  command -v "$PYTHON" >/dev/null || die "no '$PYTHON'; install Python 3.10 or newer, or set PYTHON"
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "'$PYTHON' is older than Python 3.10; set PYTHON"
  if has "$PYTHON" "$@"; then return; fi
  if ! { [ -x .venv/bin/python ] && has .venv/bin/python "$@"; }; then
    echo "run_all.sh: '$PYTHON' lacks $*: installing requirements.txt into .venv (once; several minutes)" >&2
    { call "$PYTHON" -m venv .venv && call .venv/bin/python -m pip install --quiet -r requirements.txt; } >&2 ||
      die "could not make .venv; see above, or set PYTHON to an interpreter with the packages"
  fi
  PYTHON=.venv/bin/python
}

# All commands of a paper, one a line; some of them again and again, to the letter.
alignfreeze() {
  for schedule in ${SCHEDULES:-before during}; do for aligner in ${ALIGNERS:-dictionary fastalign awesome}; do
    for task in ${TASKS:-udpos wikiann xquad xnli}; do
      # the paper has other schedules and aligners for PoS only
      [[ $task = udpos || "$schedule $aligner" = "before dictionary" || ${SCHEDULES:-}${ALIGNERS:-} ]] || continue
      links=$aligner
      if [[ $aligner = fastalign || $aligner = awesome ]]; then  # the whole text is aligned once, and read by every run
        links=$LINKS/$aligner
        echo "$PYTHON alignfreeze.py --aligner $aligner --write-links $links $FLAGS"
      fi
      for model in ${MODELS:-distilbert-base-multilingual-cased bert-base-multilingual-cased xlm-roberta-base}; do
        for seed in ${SEEDS:-31 42 66 23 17}; do for strategy in ${STRATEGIES:-baseline full front back}; do
          how=" --schedule $schedule --aligner $links"
          [ $strategy != baseline ] || how=  # one baseline serves all schedules and aligners
          echo "$PYTHON alignfreeze.py --model $model --task $task --strategy $strategy$how --seed $seed --out $OUT $FLAGS"
        done; done
      done
    done
  done; done
}
mid-align() {
  for task in ${TASKS:-massive uner translation}; do
    for model in ${MODELS:-meta-llama/Meta-Llama-3-8B-Instruct Qwen/Qwen2.5-7B-Instruct}; do
      for seed in ${SEEDS:-1 2 3}; do for strategy in ${STRATEGIES:-baseline full}; do
        echo "$PYTHON alignfreeze.py --method mid-align --model $model --task $task --strategy $strategy --seed $seed" \
          "--validate 200 --checkpointing --out $OUT $FLAGS"
      done; done
    done
  done
}
toy() {
  local run="$PYTHON alignfreeze.py --data-dir $WORLD/data --languages qaa qab qac --device cpu --precision fp32 --out $OUT"
  local encoder="$run --model $WORLD/models/bert --realign-languages qaa qab qac --epochs 4 --lr 2e-4 --realign-lr 2e-4"
  local generator="$run --method mid-align --model $WORLD/models/llama --train-languages en qaa --realign-languages qab qac"
  generator+=" --task xsid --layer 2 --lora 0 --lr 2e-3 --epochs 3 --batch-size 16 --realign-batch-size 16 --accumulate 1"
  for strategy in baseline full front back; do echo "$encoder --task udpos --strategy $strategy"; done
  for task in wikiann xnli xquad; do echo "$encoder --task $task --strategy front"; done
  for strategy in baseline full; do echo "$generator --strategy $strategy"; done
}

# Run the commands of $METHODS, one after the other; failures are reported at the end.
run_grid() {
  local failed=() list command code count=0 all
  list=$(for method in $METHODS; do $method || exit; done | awk '!seen[$0]++') || die "METHODS: alignfreeze mid-align"
  if [ $dry_run ]; then echo "$list"; exit; fi
  all=$(wc -l <<<"$list")
  while read -r command; do
    echo "[$((++count)) of $all, ${#failed[@]} failed] $command"
    code=0
    call $command || code=$?
    [ $code -ne 130 ] || exit 130  # interrupted
    [ $code -eq 0 ] || failed+=("$command")
  done <<<"$list"
  [ ${#failed[@]} -gt 0 ] || return 0
  printf 'run_all.sh: %d of %d commands failed:\n' ${#failed[@]} $all >&2
  printf '  %s\n' "${failed[@]}" >&2
  return 1
}

count=0 dry_run= command=grid
for argument; do
  case $argument in
    --dry-run) dry_run=1 ;;
    -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p;}' run_all.sh; exit ;;
    quick | toy | test) command=$argument ;;
    *) die "no command '$argument'; ./run_all.sh --help shows them" ;;
  esac
done
: "${LINKS:=results/links}" "${FLAGS:=}"
case $command in
  grid)
    : "${METHODS:=alignfreeze mid-align}" "${OUT:=results/runs}"
    set_up torch transformers datasets
    run_grid ;;
  quick)
    : "${MODELS:=distilbert-base-multilingual-cased}" "${TASKS:=udpos}" "${SCHEDULES:=before}" "${ALIGNERS:=dictionary}"
    : "${SEEDS:=31}" "${OUT:=results/quick}"
    METHODS=alignfreeze FLAGS="--epochs 1 --languages ar de fi hi tr $FLAGS"
    set_up torch transformers datasets
    run_grid
    "$PYTHON" results/report.py "$OUT" ;;
  toy)
    METHODS=toy WORLD=results/toy/world OUT=results/toy/runs failed=0
    export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=2  # the scores depend on the number of threads
    set_up torch transformers datasets
    if [ ! -d $WORLD ]; then  # made under another name first, so that it is whole or absent
      rm -rf $WORLD.part
      call "$PYTHON" tests/toy_world.py $WORLD.part --models bert llama
      mv $WORLD.part $WORLD
    fi
    run_grid || failed=$?
    "$PYTHON" results/report.py $OUT
    echo "The toy world shows that the methods run, not that the papers are right: see the README."
    exit $failed ;;
  test)
    set_up torch transformers datasets pytest
    exec "$PYTHON" -m pytest tests -p no:cacheprovider --durations 10 ;;
esac
