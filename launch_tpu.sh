#!/usr/bin/env bash
# Train on a Cloud TPU: a single machine or a pod. docs/tpu.md explains every step from an empty Google Cloud project.
#
#   ./launch_tpu.sh COMMAND --name=NAME --zone=ZONE [SETTINGS] [-- FLAGS]
#
# Commands, in the order of use. Each can be repeated; it skips what is already done.
#   create    request the TPU and wait until it is ready              (needs --type --version --bucket)
#   sync      copy the working tree to all workers, without the files that git ignores
#   install   install Python and the package, and mount the bucket      (needs --bucket)
#   run       start `python -m mqformer_jax.main FLAGS` on all workers, in the background (needs --bucket)
#   logs      follow the log of the run until it ends, and exit with its status
#   all       create, sync, install, run, logs
#   watch     like all, but start again after a preemption or a failure, until the run is finished
#   status    print the state of the TPU and of the run on each worker
#   stop      end the run; it saves a checkpoint first
#   delete    delete the TPU; the bucket stays
# A command that takes FLAGS first checks them on this machine, if Python can import mqformer_jax here.
#
# Settings
#   --type=v5litepod-16 --version=v2-alpha-tpuv5-lite   accelerator and runtime
#   --bucket=NAME     a bucket with a hierarchical namespace; for the run, it is the folder bucket/
#   --spot            cheaper; Google can take the TPU away at any time
#   --on_demand       get the TPU now or fail, instead of waiting in a queue
#   --project=ID      Google Cloud project; default: the current project of gcloud
#   --worker=0        the worker whose log is shown
#   --wait=60         seconds between checks of the TPU's state, and before watch tries again
#   --retries=10      watch gives up after so many failed tries in a row; a try of an hour or more resets the count
#   --grace=600       seconds that stop waits for the run to save a checkpoint before it kills the run
#   --skip_check      do not check FLAGS on this machine, for example because the recipe is in the bucket
#   --dry_run         print the gcloud commands and run none
set -euo pipefail

say() { echo "launch_tpu.sh: $1" >&2; }
die() { say "$1"; exit "${2:-1}"; } # MESSAGE [STATUS]

cloud() { # ARGUMENTS...; runs gcloud, or prints the command in a dry run
  local quote="'\\''"
  if [ "$dry_run" ]; then
    printf "'%s' " gcloud "${@//\'/$quote}" >&3
    echo >&3
    return
  fi
  gcloud "$@" < /dev/null 3>&- ||
    die "$step: \`gcloud $1 $2 $3 $4\` exited with status $?, see above. $step can be repeated." "$?"
}

tpus() { cloud compute tpus "$@" --zone="$zone" ${project:+"--project=$project"} --quiet; }

on() { # WORKERS FUNCTION ARGUMENTS...
  tpus tpu-vm ssh "$name" --worker="$1" --ssh-flag="-o ServerAliveInterval=30 -o ConnectTimeout=20" \
    --command="$worker_functions; $(printf '%q ' "${@:2}")"
}

# KIND FIELD; does not use `describe`, which fails in the same way if the TPU is absent or the connection is lost
listed() { tpus "$1" list --filter="name ~ /$name\$" --format="value($2)"; }

tpu_state() { # prints the state of the TPU; if there is none, of the request for it
  local state
  state=$(listed tpu-vm state) || exit
  [ "$state" ] || state=$(listed queued-resources state.state) || exit
  echo "${state:-ABSENT}"
}

is_lost() { [[ " PREEMPTED TERMINATED STOPPED UNKNOWN FAILED SUSPENDED " = *" $1 "* ]]; }

check_flags() ( # FLAGS...; on this machine, where a mistake costs nothing
  [[ ! $type || $type =~ ^[a-z0-9]+-[0-9]+$ ]] ||
    die "--type=$type is not a name and a number; give a TPU type such as v5litepod-16" 2
  devices=${type##*-}
  case $type in v4-* | v5p-*) devices=$((devices / 2)) ;; esac # v4 and v5p types count cores; a device has two
  cd "$root"
  for python in python3 .venv/bin/python; do
    "$python" -c 'import jax, mqformer_jax.main' > /dev/null 2>&1 || continue
    "$python" -m mqformer_jax.main "$@" --check_only ${devices:+"--num_devices=$devices"} >&2 ||
      die "$step: FLAGS are wrong; correct the error above. Nothing was started."
    exit 0
  done
  say "FLAGS are not checked: neither python3 nor .venv/bin/python can import mqformer_jax and jax."
)

create() {
  local state before=""
  # Orbax finishes a checkpoint by renaming its folder, which is atomic only with a hierarchical namespace.
  state=$(cloud storage buckets describe "gs://$bucket" --raw --format="value(hierarchicalNamespace.enabled)")
  [[ $dry_run || $state = [Tt]rue ]] ||
    die "create: gs://$bucket has no hierarchical namespace; docs/tpu.md shows how to create a bucket with one."
  state=$(tpu_state)
  if [ "$state" = ABSENT ] && [ "$on_demand" ]; then
    tpus tpu-vm create "$name" --accelerator-type="$type" --version="$version" ${spot:+--spot}
  elif [ "$state" = ABSENT ]; then
    tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$version" \
      ${spot:+--spot}
  fi
  while [ ! "$dry_run" ] && [ "$state" != READY ]; do
    state=$(tpu_state)
    if is_lost "$state" || [ "$state" = ABSENT ]; then die "create: $name is $state. Run delete, then create again."; fi
    [ "$state" = READY ] || sleep "$wait"
    [ "$state" = "$before" ] || say "$name is $state"
    before=$state
  done
}

pack() ( # packs the files that git tracks or would track, without changing the repository
  cd "$root" && mkdir -p "$tmp/objects" && cp "$(git rev-parse --git-path index)" "$tmp/index" &&
    objects=$(cd "$(git rev-parse --git-path objects)" && pwd) &&
    export GIT_INDEX_FILE="$tmp/index" &&
    export GIT_OBJECT_DIRECTORY="$tmp/objects" GIT_ALTERNATE_OBJECT_DIRECTORIES="$objects" &&
    git add --all . && tree=$(git write-tree) &&
    git archive --format=tar.gz --output="$tmp/mqformer.tgz" "$tree" && echo "$tree" > "$tmp/tree"
)

sync() {
  # watch packs only once, so that every try runs the same code
  [ -e "$tmp/tree" ] || pack || die "sync: git could not pack the working tree; correct the error above."
  tpus tpu-vm scp "$tmp/mqformer.tgz" "$name:" --worker=all
  on all worker_unpack "$(cat "$tmp/tree")"
}

install() { on all worker_install "$bucket"; }

run() { # FLAGS...
  on all worker_may_run "$bucket" "$@"
  on all worker_start "$bucket" "$@"
}

logs() {
  step=logs
  on "$worker" worker_follow
}

start() { for step in create sync install run; do "$step" "$@"; done; } # FLAGS...

all() { # FLAGS...
  start "$@"
  say "the run has started; Ctrl-C stops showing its log, but not the run"
  logs
}

stop() { on all worker_stop "$grace"; }

status() {
  local state
  state=$(tpu_state)
  [ "$dry_run" ] || echo "$name: $state"
  if [[ $dry_run || $state = READY ]]; then on all worker_state; fi
}

delete() {
  local state
  state=$(listed queued-resources state.state)
  if [[ $dry_run || $state ]]; then tpus queued-resources delete "$name" --force; fi # also deletes its TPU
  state=$(listed tpu-vm state)
  if [[ $dry_run || ($state && $state != DELETING) ]]; then tpus tpu-vm delete "$name"; fi
  [ "$dry_run" ] || say "$name is deleted"
}

try() { # FLAGS...; from any state of the TPU to the end of the run; fails unless the run is finished or stopped
  local state
  state=$(tpu_state)
  if is_lost "$state"; then delete; fi
  if [[ $state = READY && $(on 0 worker_state) = *": running" ]]; then run "$@"; else start "$@"; fi
  (logs) || true # fails even if only the connection is lost
  state=$(on 0 worker_state)
  [[ $dry_run || $state = *": finished" || $state = *": stopped" ]] ||
    die "the run did not finish; its state is: ${state:-unknown}"
}

watch() { # FLAGS...
  local left=$retries began code
  while :; do
    began=$SECONDS step=watch
    set +e # in an `if` or before `||`, bash ignores `set -e` and continues after a failure
    (set -e; try "$@")
    code=$?
    set -e
    [ "$code" != 0 ] || return 0
    ((SECONDS - began < 3600)) || left=$retries
    ((left-- > 0)) || die "watch gave up. $name may still cost money: delete it with ./launch_tpu.sh delete." "$code"
    say "watch tries again in $wait s"
    sleep "$wait"
  done
}

need() { # SETTING...
  local setting
  for setting; do [ "${!setting}" ] || die "$step needs --$setting=..., see --help" 2; done
}

root=$(cd "$(dirname "$0")" && pwd)
worker_functions=$(cat "$root/mqformer_jax/tools/tpu_worker.sh")
name="" zone="" project="" type="" version="" bucket="" worker=0 wait=60 retries=10 grace=600
spot="" on_demand="" skip_check="" dry_run=""
step=${1:---help}
[ $# = 0 ] || shift
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --name=* | --zone=* | --project=* | --type=* | --version=* | --bucket=*) declare "${1#--}" ;;
    --worker=* | --wait=* | --retries=* | --grace=*) declare "${1#--}" ;;
    --spot | --on_demand | --skip_check | --dry_run) declare "${1#--}=1" ;;
    --help) step=--help ;;
    *) die "$1 is not a setting, see --help; put flags of the training program after --" 2 ;;
  esac
  shift
done
[ $# = 0 ] || shift
bucket=${bucket#gs://}
case $step in
  create | all | watch) need name zone type version bucket ;;
  install | run) need name zone bucket ;;
  sync | logs | status | stop | delete) need name zone ;;
  --help) sed -n '2,/^set /{/^#/!d; s/^# \{0,1\}//; p;}' "$0"; exit ;;
  *) die "$step is not a command, see --help" 2 ;;
esac
case $step,$# in
  run,0 | all,0 | watch,0) die "$step needs the program's flags: -- --config=... --workdir=bucket/runs/NAME" 2 ;;
esac
[ $# = 0 ] || [ "$skip_check" ] || check_flags "$@"

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
exec 3>&1 # in a dry run, cloud prints to this
"$step" "$@"
