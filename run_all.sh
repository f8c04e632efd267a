#!/usr/bin/env bash
# Run the experiments of both papers, a toy world, or the tests. Missing Python packages are
# installed into .venv. Needs bash 4.4 and Python 3.10, or newer.
#
#   ./run_all.sh             the grids of AlignFreeze (465 runs, its main results first) and of
#                            middle-layer alignment (36); finished runs are skipped
#   ./run_all.sh quick       a first look with the hub and a GPU: distilmBERT on PoS with four
#                            strategies and a fifth of the steps
#   ./run_all.sh toy         both methods in an invented world, from data to tables; needs no
#                            network and 4 to 7 minutes on two cores
#   ./run_all.sh test        the tests
#
# With --dry-run, only the commands are printed, one on each line and quoted for the shell. Other
# machines can run those of the grid in any order after those with --write-links.
#
# Settings are environment variables. These are lists of words. The defaults are those of the
# papers, but the second one has a single seed, and the first one no frozen XLM-R with `during`.
# A list that is set holds for all runs: name METHODS, too, if it fits one method only.
#   METHODS      alignfreeze mid-align
#   MODELS       names on the hub, or folders
#   TASKS        udpos wikiann xquad xnli; massive uner translation, or xsid. For translation, run
#                `pip install 'sacrebleu[ja,ko]'` first
#   STRATEGIES   baseline full front back, or layers such as 0-5 or emb,0-2,11. A freezing rule of
#                your own: add its name to `part` in run_all.sh
#   SCHEDULES    before during; AlignFreeze only
#   ALIGNERS     dictionary fastalign awesome, or folders of links; AlignFreeze only. If neither
#                this nor SCHEDULES is set, tasks other than udpos have the first of both
#   SEEDS        numbers
#
# Other settings, of which `toy` uses PYTHON only:
#   FLAGS    more flags for every command, such as "--data-dir DIR"; quotes have no effect. Flags
#            that some of the commands refuse, such as --aligner-model, need commands of their own
#   VALIDATE updates between two validations of the second method (200, with xsid none, as most of
#            its languages have no other data to train on); if it is empty, there are none
#   OUT      folder of the records (results/runs; with `quick`, results/quick)
#   LINKS    folder of the links of fastalign and awesome (results/links)
#   PYTHON   the Python interpreter (python3)
#   JOBS     how many commands run at a time (1). With more than one, the output of each command
#            goes to a log file in OUT/logs, and runs on a CPU should share its cores: set
#            OMP_NUM_THREADS to their number divided by JOBS.
set -euof pipefail  # -f: words of settings are not file patterns
cd "$(dirname "${BASH_SOURCE[0]}")"

die() { echo "run_all.sh: $1" >&2; exit 2; }

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) ||
  die "bash $BASH_VERSION is too old: install bash 4.4 or newer (on macOS: brew install bash)"

# --- processes

running=()  # process id: command

# Start a command in the background. Its process group gets the id of the process, so that `stop`
# also ends what the command has started.
start() {
  set -m
  "$@" </dev/null &
  set +m
  running[$!]="$*"
}

# Run a command that ends when this script is ended.
call() {
  local code=0 pid
  start "$@"
  pid=$!
  wait $pid || code=$?
  unset "running[$pid]"
  return $code
}

# End all commands that are running and exit with a code.
stop() {
  local pid groups=()
  trap '' INT TERM HUP
  for pid in "${!running[@]}" ${!-}; do groups+=("-$pid"); done
  kill -TERM -- "${groups[@]}" 2>/dev/null || exit $1
  for _ in {1..50}; do
    kill -0 -- "${groups[@]}" 2>/dev/null || exit $1
    sleep 0.1
  done
  kill -KILL -- "${groups[@]}" 2>/dev/null || :  # some ignored SIGTERM for five seconds
  exit $1
}
trap 'stop 130' INT
trap 'stop 143' TERM HUP

# --- settings

# Check that all words of the list NAME match a pattern. Lists that are not set have defaults.
check() {
  local name=$1 pattern=$2 advice=$3 word words
  [[ -v $name ]] || return 0
  read -rd '' -a words <<<"${!name}" || :
  [[ ${#words[@]} -gt 0 ]] || die "$name is empty: unset it, or give $advice"
  for word in "${words[@]}"; do
    [[ $word =~ ^($pattern)$ || ($name = ALIGNERS && -d $word) ]] ||
      die "$name contains ${word@Q}: give $advice"
  done
}

check_settings() {
  local part="front|back|emb|[0-9]+(-[0-9]+)?"  # of STRATEGIES
  check METHODS "alignfreeze|mid-align" "alignfreeze or mid-align"
  check MODELS ".*" "names of models on the hub, or folders"
  check TASKS "udpos|wikiann|xquad|xnli|massive|uner|translation|xsid" \
    "udpos, wikiann, xquad, xnli, massive, uner, translation or xsid"
  check STRATEGIES "baseline|full|($part)(,($part))*" \
    "baseline, full, front, back, or layers such as 0-5 or emb,0-2,11"
  check SCHEDULES "before|during|alternate" "before, during or alternate"
  check ALIGNERS "dictionary|fastalign|awesome" \
    "dictionary, fastalign, awesome, or an existing folder of links"
  check SEEDS "[0-9]{1,9}" "numbers such as 31"
  [[ $FLAGS != *[$'\n\r']* ]] || die "FLAGS contains a line break: write all flags on one line"
  [[ ! " $FLAGS " =~ \ --(method|model|task|strategy|seed|out)[=\ ] ]] ||
    die "FLAGS contains --${BASH_REMATCH[1]}: set METHODS, MODELS, TASKS, STRATEGIES, SEEDS or OUT"
  [[ ${VALIDATE-} =~ ^([1-9][0-9]{0,8})?$ ]] ||
    die "VALIDATE is ${VALIDATE@Q}: give a number of updates, or nothing"
  [[ $JOBS =~ ^[1-9][0-9]{0,3}$ ]] || die "JOBS is ${JOBS@Q}: give a number from 1 to 9999"
}

# Set PYTHON to an interpreter that has the given packages. Installs requirements.txt into .venv if
# there is none, unless this is a dry run.
has() {
  "$1" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' \
    "${@:2}"
}
set_up() {
  local missing
  : "${PYTHON:=python3}"
  command -v "$PYTHON" >/dev/null ||
    die "command '$PYTHON' not found: install Python 3.10 or newer, or set PYTHON"
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "'$PYTHON' is older than Python 3.10: set PYTHON to a newer interpreter"
  if has "$PYTHON" "$@"; then return; fi
  if ! { [ -x .venv/bin/python ] && has .venv/bin/python "$@"; }; then
    missing="'$PYTHON' does not have all of these packages: $*"
    if [ $dry_run ]; then
      echo "run_all.sh: $missing. Before running these commands, install them:" \
        "'$PYTHON' -m venv .venv && .venv/bin/python -m pip install -r requirements.txt" >&2
    else
      echo "run_all.sh: $missing. Installing requirements.txt into .venv (several minutes)." >&2
      { call "$PYTHON" -m venv .venv &&
        call .venv/bin/python -m pip install --quiet -r requirements.txt; } >&2 ||
        die "could not install into .venv: see the messages above, or set PYTHON"
    fi
  fi
  PYTHON=.venv/bin/python
}

# --- commands

# Print a command, quoted so that a shell reads the same words again.
line() {
  local word text=
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
    text+=" $word"
  done
  echo "${text# }"
}

# Print all commands of a paper; the same command may appear more than once.
alignfreeze() {
  local schedule aligner task links model seed strategy alignment
  for schedule in ${SCHEDULES-before during}; do
    for aligner in ${ALIGNERS-dictionary fastalign awesome}; do
      for task in ${TASKS-udpos wikiann xquad xnli}; do
        # The paper has other schedules and aligners for PoS only.
        [[ $task = udpos || "$schedule $aligner" = "before dictionary" ||
          -v SCHEDULES || -v ALIGNERS ]] || continue
        links=$aligner
        if [[ $aligner = fastalign || $aligner = awesome ]]; then
          links=$LINKS/$aligner  # all text is aligned once, and every run reads the links
          line "$PYTHON" alignfreeze.py --aligner "$aligner" --write-links "$links" $FLAGS
        fi
        for model in ${MODELS-distilbert-base-multilingual-cased bert-base-multilingual-cased
          xlm-roberta-base}; do
          for seed in ${SEEDS-31 42 66 23 17}; do
            for strategy in ${STRATEGIES-baseline full front back}; do
              alignment=(--schedule "$schedule" --aligner "$links")
              # One baseline serves all schedules and aligners.
              [ "$strategy" != baseline ] || alignment=()
              line "$PYTHON" alignfreeze.py --model "$model" --task "$task" \
                --strategy "$strategy" "${alignment[@]}" --seed "$seed" --out "$OUT" $FLAGS
            done
          done
        done
      done
    done
  done
}
mid-align() {
  local task model seed strategy validate
  for task in ${TASKS-massive uner translation}; do
    validate=${VALIDATE-200}
    [ "$task" != xsid ] || validate=${VALIDATE-}
    for model in ${MODELS-meta-llama/Meta-Llama-3-8B-Instruct Qwen/Qwen2.5-7B-Instruct}; do
      for seed in ${SEEDS-1 2 3}; do
        for strategy in ${STRATEGIES-baseline full}; do
          line "$PYTHON" alignfreeze.py --method mid-align --model "$model" --task "$task" \
            --strategy "$strategy" --seed "$seed" ${validate:+--validate $validate} \
            --checkpointing --out "$OUT" $FLAGS
        done
      done
    done
  done
}
toy() {
  local run rest encoder decoder seed strategy task
  run=("$PYTHON" alignfreeze.py --model)
  rest=(--out $OUT --data-dir $WORLD/data --languages qaa qab qac --device cpu --precision fp32)
  encoder=("${rest[@]}" --realign-languages qaa qab qac --epochs 3 --lr 6e-4 --realign-lr 3e-3
    --realign-steps 180)
  decoder=("${rest[@]}" --method mid-align --train-languages en qaa --realign-languages qab qac
    --layer 2 --lora 0 --lr 4e-3 --epochs 3 --batch-size 32 --realign-batch-size 32
    --accumulate 1 --limit-test 100)
  for seed in 31 42 66; do
    for strategy in baseline full front back; do
      line "${run[@]}" $WORLD/models/bert --task udpos --strategy $strategy --seed $seed \
        "${encoder[@]}"
    done
  done
  for task in wikiann xnli xquad; do
    line "${run[@]}" $WORLD/models/bert --task $task --strategy front "${encoder[@]}" \
      --limit-train 320 --realign-steps 30
  done
  for seed in 11 12 13; do
    for strategy in baseline full; do
      line "${run[@]}" $WORLD/models/llama --task xsid --strategy $strategy --seed $seed \
        "${decoder[@]}"
    done
  done
}

# Print the name of a command's log file: the values of its flags, as in the name of the record.
log_of() {
  local words word name=
  read -ra words <<<"${1#*alignfreeze.py }"
  for word in "${words[@]}"; do
    [ "$word" != --out ] || break
    [[ $word = --* ]] || name+=_${word//[^A-Za-z0-9.,=-]/-}
  done
  name=${name#_}
  name=${name#-}  # of an absolute path
  echo "$OUT/logs/${name:0:200}.log"
}

# Run one line of the grid. With several jobs, append its output to a log file.
run_line() {
  if [ $JOBS -gt 1 ]; then exec >>"$(log_of "$1")" 2>&1; fi
  echo "$1"
  eval "exec $1"
}

# Wait until a command ends, report it, and note it if it failed.
finish_one() {
  local pid command code state
  while :; do
    for pid in "${!running[@]}"; do
      if kill -0 $pid 2>/dev/null; then continue; fi
      code=0
      wait $pid 2>/dev/null || code=$?
      command=${running[$pid]#run_line }
      unset "running[$pid]"
      : $((left--))
      if [ $code -eq 0 ]; then
        state=finished
        if [ $JOBS -gt 1 ]; then
          case $(tail -n 1 "$(log_of "$command")") in
            *"; another revision of alignfreeze.py made it") state="NOT RUN, its record is by other code" ;;
            *" exists: nothing to do ("*) state="done before" ;;
          esac
        fi
        echo "[$left left] $state: $command"
      else
        echo "[$left left] failed with exit code $code: $command"
        [ $JOBS -eq 1 ] || command+=$'\n'"    see $(log_of "$command")"
        failed+=("$command")
      fi
      return
    done
    sleep 0.1
  done
}

# Run the commands of $METHODS, JOBS at a time, and report failures at the end. Those that write
# links end before the others start.
run_grid() {
  local commands total left failed=() links others group command method
  commands=$(for method in $METHODS; do $method; done | awk '!seen[$0]++')
  links=$(grep -e ' --write-links ' <<<"$commands") || :
  others=$(grep -ve ' --write-links ' <<<"$commands") || :
  if [ $dry_run ]; then echo "$commands"; return; fi
  total=$(wc -l <<<"$commands")
  left=$total
  if [ $JOBS -gt 1 ]; then
    mkdir -p "$OUT/logs"
    echo "Running $total commands, $JOBS at a time; their output goes to $OUT/logs."
  fi
  for group in "$links" "$others"; do
    while read -r command; do
      [ "$command" ] || continue
      while [ ${#running[@]} -ge $JOBS ]; do finish_one; done
      start run_line "$command"
    done <<<"$group"
    while [ ${#running[@]} -gt 0 ]; do finish_one; done
  done
  [ ${#failed[@]} -gt 0 ] || return 0
  printf 'run_all.sh: %d of %d commands failed:\n' ${#failed[@]} $total >&2
  printf '  %s\n' "${failed[@]}" >&2
  return 1
}

# Run one command, or print it in a dry run.
step() {
  if [ $dry_run ]; then line "$@"; else call "$@"; fi
}

# --- command line

dry_run= command=grid
for argument; do
  case $argument in
    --dry-run) dry_run=1 ;;
    -h | --help) sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p;}' run_all.sh; exit ;;
    quick | toy | test) command=$argument ;;
    *) die "unknown argument ${argument@Q}: see ./run_all.sh --help" ;;
  esac
done
: "${LINKS:=results/links}" "${FLAGS:=}" "${JOBS=1}"
failed=0
case $command in
  grid)
    check_settings
    : "${METHODS=alignfreeze mid-align}" "${OUT:=results/runs}"
    set_up torch transformers datasets
    run_grid ;;
  quick)
    [[ ${METHODS-alignfreeze} = alignfreeze ]] ||
      die "METHODS is ${METHODS@Q}, but quick runs alignfreeze: unset METHODS"
    METHODS=alignfreeze
    check_settings
    : "${MODELS=distilbert-base-multilingual-cased}" "${TASKS=udpos}" "${SEEDS=31}"
    : "${SCHEDULES=before}" "${ALIGNERS=dictionary}" "${OUT:=results/quick}"
    FLAGS="--epochs 1 --languages ar de fi hi tr $FLAGS"
    set_up torch transformers datasets
    run_grid || failed=1
    step "$PYTHON" results/report.py "$OUT" || failed=1
    exit $failed ;;
  toy)
    METHODS=toy WORLD=results/toy/world OUT=results/toy/runs JOBS=2
    set_up torch transformers datasets
    # One thread each: a second one brings nothing to models this small, and would change the scores.
    settings=(HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE)
    if [ $dry_run ]; then echo "export ${settings[*]}"; fi
    export "${settings[@]}"
    if [ ! -d $WORLD ]; then  # built under another name first, so that it is complete or absent
      step rm -rf $WORLD.part
      step "$PYTHON" tests/toy_world.py $WORLD.part --models bert llama
      step mv $WORLD.part $WORLD
    fi
    if [ $dry_run ]; then
      run_grid
    else  # shorten the lines that say which run is finished
      run_grid > >(sed -u "s/: .* --model /: /; s/ --out .*//") || failed=1
    fi
    step "$PYTHON" results/toy_tables.py $OUT || failed=1
    exit $failed ;;
  test)
    set_up torch transformers datasets pytest
    [ $dry_run ] || exec "$PYTHON" -m pytest tests -p no:cacheprovider --durations 10
    step "$PYTHON" -m pytest tests -p no:cacheprovider --durations 10 ;;
esac
