# What the batch scripts of this folder share: they source it, with the flags of pretrain_gpt.py as their arguments, and
# call run_job. Settings come from the environment of sbatch:
#
#   MEGATRON_HC_ROOT      the checkout (default: where sbatch was called)
#   MEGATRON_HC_ENV       a file to source first, such as .venv/bin/activate of the checkout
#   PYTHON                the interpreter (default: python)
#   PROCESSES_PER_NODE    for torchrun (default: the GPUs of a node, or 1)
#   MAX_RESTARTS          how often torchrun starts failed processes again within the job (default: 0)
#
# run_job LAUNCHER FLAGS... runs pretrain_gpt.py on all nodes of the job, with --load and --verify-checkpoint added where
# they are not given. How it ends (exit codes: docs/operations.md):
#   0                 finished: the job ends
#   85                saved because told to stop (time limit, preemption): the job goes back into the queue, as it does
#                     where the signal came while the processes were being loaded, and ended them
#   anything else     the job ends with that code
# A node that fails makes Slurm itself put the job back (--requeue). Two restarts in a row that find no newer checkpoint
# end the job: something stops it before it can save.

say() { echo "[$(date '+%F %T')] job ${SLURM_JOB_ID:-?}, start $((${SLURM_RESTART_COUNT:-0} + 1)): $*"; }

# The value of a flag among the arguments: flag_value --save "$@"
flag_value() {
  local name=$1 value=
  shift
  while [ $# -gt 0 ]; do
    case $1 in
      "$name") value=${2-} ;;
      "$name"=*) value=${1#*=} ;;
    esac
    shift
  done
  printf '%s' "$value"
}

# Whether it is given, with its value behind a space or a =, as --no-..., or in a file of --yaml-cfg, whose value a flag
# that is added would undo: has_flag --load "$@"
has_flag() {
  local name=$1 word file key=${1#--}
  shift
  for word in "$@"; do
    case $word in "$name" | "$name"=* | "--no-${name#--}") return 0 ;; esac
  done
  while read -r file; do
    grep -Eqs "(^|[{,])[[:space:]]*[\"']?(no[-_])?${key//-/[-_]}[\"']?[[:space:]]*:" -- "$file" && return 0
  done < <(yaml_files "$@")
  return 1
}

# The files of --yaml-cfg, one a line: yaml_files "$@"
yaml_files() {
  while [ $# -gt 0 ]; do
    case $1 in
      --yaml-cfg) [ $# -lt 2 ] || printf '%s\n' "$2" ;;
      --yaml-cfg=*) printf '%s\n' "${1#*=}" ;;
    esac
    shift
  done
}

# End the job if the run would not save at the signal that it will get: any other ends a process at once.
check_exit_signal() {
  local file
  has_flag --exit-signal "$@" || return 0
  case " $* " in *[\ =]SIGUSR1\ *) return 0 ;; esac
  while read -r file; do
    grep -qs SIGUSR1 -- "$file" && return 0
  done < <(yaml_files "$@")
  say "--exit-signal must hold SIGUSR1, which Slurm sends before the time limit: add it, or leave --exit-signal out"
  exit 2
}

# End the job if the last two restarts have brought nothing. requeue-JOB.txt holds "ITERATION RESTARTS-WITHOUT-PROGRESS".
check_progress() {
  local save=$1 state="$1/requeue-$SLURM_JOB_ID.txt" iteration last=-1 idle=0
  iteration=$(tr -cd 0-9 2>/dev/null <"$save/latest_checkpointed_iteration.txt") || true
  iteration=${iteration:-0}
  if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -f "$state" ]; then
    read -r last idle <"$state" || true
    if [ "$iteration" -le "${last:--1}" ]; then idle=$((${idle:-0} + 1)); else idle=0; fi
  fi
  if [ "$idle" -ge 2 ]; then
    say "stopping: two restarts in a row found no checkpoint newer than iteration $iteration in $save; see the log above"
    rm -f "$state"
    exit 1
  fi
  mkdir -p "$save" && printf '%s %s\n' "$iteration" "$idle" >"$state"
  say "starting from iteration $iteration of $save on ${SLURM_JOB_NODELIST:-?}"
}

# Batch scripts get the signals first (#SBATCH --signal=B:USR1@...): hand them on to every process of the step.
tell_step_to_stop() {
  told=yes
  say "told to stop: the run saves and ends"
  kill -USR1 "$step" 2>/dev/null
}

# A job that is being cancelled is no longer in this state, while its processes still save.
is_running() { scontrol show job "$SLURM_JOB_ID" 2>/dev/null | grep -q 'JobState=RUNNING'; }

run_job() {
  local launcher=$1 root save code='' told='' how=saved
  shift
  cd "${MEGATRON_HC_ROOT:-$SLURM_SUBMIT_DIR}" || exit 2
  root=$PWD
  # shellcheck disable=SC1090
  [ -z "${MEGATRON_HC_ENV:-}" ] || . "$MEGATRON_HC_ENV"
  cd "${SLURM_SUBMIT_DIR:-.}" || exit 2 # what the flags name lies where sbatch was called
  save=$(flag_value --save "$@")
  if [ -z "$save" ]; then
    say "the flags must hold --save FOLDER, on a file system that all nodes share"
    exit 2
  fi
  check_exit_signal "$@"
  check_progress "$save"
  has_flag --load "$@" || set -- "$@" --load "$save"
  has_flag --verify-checkpoint "$@" || set -- "$@" --verify-checkpoint
  has_flag --exit-signal-handler "$@" || set -- "$@" --exit-signal-handler

  export PYTHON=${PYTHON:-python} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it from sbatch
  export MASTER_ADDR MASTER_PORT
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_PORT=$((10000 + SLURM_JOB_ID * 31 % 20000))
  export MEGATRON_HC_EXIT_CODE_FILE="$save/exit-code-$SLURM_JOB_ID.txt"
  rm -f "$MEGATRON_HC_EXIT_CODE_FILE"

  trap tell_step_to_stop USR1 TERM
  # --kill-on-bad-exit=0: the first process to end with 85 must not take those along that still save.
  if [ "$launcher" = torchrun ]; then
    # torchrun itself would die of the signal that is meant for the processes below it: it ignores it.
    # shellcheck disable=SC2016
    srun --kill-on-bad-exit=0 --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c \
      'trap "" USR1; exec "$PYTHON" -m torch.distributed.run --local-addr "$SLURMD_NODENAME" "$@"' torchrun \
      --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}" \
      --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$SLURM_JOB_ID" \
      --max-restarts "${MAX_RESTARTS:-0}" "$root/pretrain_gpt.py" "$@" &
  else
    srun --kill-on-bad-exit=0 "$PYTHON" "$root/pretrain_gpt.py" "$@" &
  fi
  step=$!
  wait "$step"
  code=$?
  while [ "$code" -gt 128 ] && kill -0 "$step" 2>/dev/null; do # a signal came, and the step goes on
    wait "$step"
    code=$?
  done
  trap - USR1 TERM
  # torchrun ends with 1 whatever its processes end with; they have left their own code.
  [ ! -s "$MEGATRON_HC_EXIT_CODE_FILE" ] || code=$(cat "$MEGATRON_HC_EXIT_CODE_FILE")
  rm -f "$MEGATRON_HC_EXIT_CODE_FILE"

  case $told$code in yes138 | yes143) # by the signal itself: nothing listened to it yet
    how="ended before it could train"
    code=85
    ;;
  esac
  case $code in
    0)
      rm -f "$save/requeue-$SLURM_JOB_ID.txt"
      say "finished"
      ;;
    85)
      if ! is_running; then
        say "$how; Slurm is ending this job. If it was cancelled, it stays out of the queue: submit it again to go on." \
          "If it was preempted or requeued, Slurm starts it again"
      else
        say "$how; back into the queue" # said first: Slurm may end this script at once
        if scontrol requeue "$SLURM_JOB_ID"; then
          sleep 300
        else
          say "the job could not be put back into the queue: submit it again"
        fi
      fi
      ;;
    *) say "ended with exit code $code" ;;
  esac
  exit "$code"
}
