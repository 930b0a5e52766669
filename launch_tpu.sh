#!/usr/bin/env bash
# Trains on a Cloud TPU, a single machine or a pod. docs/tpu.md goes from an empty project to a training pod.
#
#   ./launch_tpu.sh COMMAND --name=NAME --zone=ZONE [SETTINGS] [-- FLAGS]
#
# Commands, in the order of use. Each may be repeated: what is done already is left as it is.
#   create    ask for the TPU and wait until it is there             (needs --type --version --bucket)
#   sync      copy the working tree, as git sees it, to all workers
#   install   Python, the package and the bucket on all workers      (needs --bucket)
#   run       start `python -m mqformer_jax.main FLAGS` on all workers, detached from this machine (needs --bucket)
#   all       create, sync, install, run
#   watch     all, then logs; where the TPU or the run was lost, all of it again, until the run has finished
#   logs      follow the run's log; ends with the run, and with its exit status
#   status    the state of the TPU, and of the run on each worker
#   stop      end the run; it saves a checkpoint first
#   delete    give the TPU back; the bucket stays
#
# Settings
#   --type=v5litepod-16 --version=v2-alpha-tpuv5-lite   accelerator and runtime, among those of the zone
#   --bucket=NAME     a bucket with hierarchical namespace; to the run it is the folder bucket/
#   --spot            cheaper, and may be taken away at any time
#   --on-demand       now or not at all, instead of a queued resource
#   --project=ID      instead of gcloud's own
#   --worker=0        whose log
#   --wait=60         seconds between two looks at the TPU, and before a new try
#   --retries=10      new tries of watch in a row; a try that lasted an hour gives them all back
#   --grace=600       seconds that stop gives the run to save
#   --dry-run         print the gcloud commands and run none
set -euo pipefail

# -- on a worker: `on` sends these. ~/mqformer holds tree, venv, log and what is known of the run; ~/bucket is the mount --

# A run, with all that it started, holds a lock, so that neither a reboot nor a reused pid is taken for a run.
worker_running() { mkdir -p ~/mqformer && ! flock --nonblock ~/mqformer/lock true; }

worker_refuse() { echo "$(hostname): $1" >&2; exit 3; }

worker_unpack() { # TREE
  if worker_running; then
    [ "$(cat ~/mqformer/tree/.synced)" = "$1" ] || worker_refuse "a run with other code is going on: stop it first"
    return 0
  fi
  cd ~/mqformer
  rm -rf tree.new tree.old
  mkdir tree.new
  tar -xzf ~/mqformer.tgz -C tree.new
  ln -s ~/bucket tree.new/bucket
  echo "$1" > tree.new/.synced
  [ ! -e tree ] || mv tree tree.old
  mv tree.new tree
  rm -rf tree.old # follows no link, so the bucket is safe
}

worker_mount() { # BUCKET; also after a reboot, and where gcsfuse died
  [ "$(findmnt --noheadings --output SOURCE ~/bucket)" != "$1" ] || return 0
  fusermount -uz ~/bucket 2> /dev/null || true
  mkdir -p ~/bucket
  # On TPU machines gcsfuse would trust for ever what it saw once; workers must see each other's files.
  gcsfuse --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "$1" ~/bucket
}

worker_install() { # BUCKET
  local key=/usr/share/keyrings/cloud.google.asc url=https://packages.cloud.google.com/apt wanted
  [ -e ~/mqformer/tree ] || worker_refuse "no code here: sync first"
  if ! command -v gcsfuse > /dev/null; then
    curl -fsSL "$url/doc/apt-key.gpg" | sudo tee "$key" > /dev/null
    echo "deb [signed-by=$key] $url gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
    sudo apt-get -qq -o DPkg::Lock::Timeout=600 update
    sudo DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 install --yes gcsfuse
  fi
  worker_mount "$1"
  cd ~/mqformer/tree
  wanted=$(cat setup.cfg pyproject.toml | sha256sum)
  [ "$(cat ../venv/installed 2> /dev/null)" != "$wanted" ] || return 0
  ! worker_running || worker_refuse "a run with other packages is going on: stop it first"
  # The images have Python 3.10; uv brings a newer one.
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  rm -rf ../venv
  ~/.local/bin/uv venv --quiet --python 3.11 ../venv
  ~/.local/bin/uv pip install --quiet --python ../venv/bin/python --editable '.[tpu,text]'
  echo "$wanted" > ../venv/installed
}

worker_may_run() { # BUCKET FLAGS...; asked of all before any of them starts
  [ -e ~/mqformer/tree ] && [ -e ~/mqformer/venv/installed ] || worker_refuse "not set up: sync and install first"
  ! worker_running || [ "$(cat ~/mqformer/flags)" = "$*" ] || worker_refuse "another run is going on: stop it first"
}

worker_start() { # BUCKET FLAGS...
  worker_mount "$1" # before the lock, which gcsfuse would keep
  cd ~/mqformer
  exec 9> lock
  flock --nonblock 9 || { echo "$(hostname): this run is going on already"; return 0; }
  echo "$*" > flags
  shift
  rm -f status stopped
  [ ! -e log ] || mv log log.before
  cd tree
  export PYTHONUNBUFFERED=1 TQDM_MININTERVAL=30 # a log is no terminal
  nohup setsid bash -c '"$@"; echo $? > ../status' run ../venv/bin/python -m mqformer_jax.main "$@" > ../log 2>&1 < /dev/null &
  echo $! > ../pid
}

worker_follow() {
  [ -e ~/mqformer/log ] || worker_refuse "no run was started here"
  cd ~/mqformer
  if worker_running; then tail -c 4000 --pid="$(cat pid)" -f log; else tail -c 4000 log; fi
  exit "$(cat status 2> /dev/null || echo 1)"
}

worker_state() {
  local state=none
  if worker_running; then
    state=running
  elif [ -e ~/mqformer/log ]; then
    cd ~/mqformer
    state="failed $(cat status 2> /dev/null || echo without a status: the machine went down)"
    if [ "$state" = "failed 0" ]; then
      state=finished
      # what the program says after a SIGTERM: without `stop`, a machine is about to go
      ! tail -c 4000 log | grep -q "Run the same command to resume" || state=interrupted
    fi
    [ ! -e stopped ] || state=stopped
  fi
  echo "$(hostname): $state"
}

worker_stop() { # GRACE
  worker_running || { echo "$(hostname): no run is going on"; return 0; }
  cd ~/mqformer
  touch stopped
  pkill -TERM --parent "$(cat pid)" || true # it may have ended just now
  flock --timeout "$1" lock true || { echo "$(hostname): killed, for it did not end within $1 s"; pkill -KILL --session "$(cat pid)"; }
}

# -- on this machine ---------------------------------------------------------------------------------------------------

say() { echo "launch_tpu.sh: $1" >&2; }
die() { say "$1"; exit "${2:-1}"; } # MESSAGE [STATUS]

show() { # a command as a shell would read it, past any $(...)
  local word quote="'\\''"
  for word; do
    case $word in "" | *[!A-Za-z0-9_.,:=/@%+-]*) word="'${word//\'/$quote}'" ;; esac
    printf '%s ' "$word"
  done >&3
  echo >&3
}

cloud() { # the one place that calls gcloud
  if [ "$dry" ]; then show gcloud "$@"; return; fi
  gcloud "$@" < /dev/null 3>&- || die "$step failed: \`gcloud $1 $2 $3 $4\` ended with status $?, see above; $step can be repeated." "$?"
}

tpus() { cloud compute tpus "$@" --zone="$zone" ${project:+"--project=$project"} --quiet; }

on() { # WORKERS FUNCTION ARGUMENTS...
  local workers=$1
  shift
  tpus tpu-vm ssh "$name" --worker="$workers" --ssh-flag="-o ServerAliveInterval=30 -o ConnectTimeout=20" \
    --command="set -euo pipefail; $(declare -f worker_running worker_refuse worker_mount "$1"); $(printf '%q ' "$@")"
}

listed() { tpus "$1" list --filter="name ~ /$name\$" --format="value($2)"; } # KIND STATE; `describe` fails alike for absent and offline

tpu_state() { # of the TPU, or else of the request for it
  local state
  state=$(listed tpu-vm state) || exit
  [ "$state" ] || state=$(listed queued-resources state.state) || exit
  echo "${state:-ABSENT}"
}

is_lost() { [[ " PREEMPTED TERMINATED STOPPED UNKNOWN FAILED SUSPENDED " = *" $1 "* ]]; }

create() {
  local state before=""
  # a checkpoint is finished by renaming its folder, which is atomic in such a bucket only
  state=$(cloud storage buckets describe "gs://$bucket" --raw --format="value(hierarchicalNamespace.enabled)")
  [ "$dry" ] || [[ $state = [Tt]rue ]] || die "create: gs://$bucket has no hierarchical namespace; docs/tpu.md makes a bucket that has."
  state=$(tpu_state)
  if [ "$state" = ABSENT ] && [ "$on_demand" ]; then
    tpus tpu-vm create "$name" --accelerator-type="$type" --version="$version" ${spot:+--spot}
  elif [ "$state" = ABSENT ]; then
    tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" --runtime-version="$version" ${spot:+--spot}
  fi
  while [ ! "$dry" ] && [ "$state" != READY ]; do
    state=$(tpu_state)
    if is_lost "$state" || [ "$state" = ABSENT ]; then die "create failed: $name is $state; delete, then create again."; fi
    [ "$state" = READY ] || sleep "$wait"
    [ "$state" = "$before" ] || say "$name is $state"
    before=$state
  done
}

pack() ( # what git tracks or would track, without touching the repository
  cd "$(dirname "$0")" && mkdir -p "$tmp/objects" && cp "$(git rev-parse --git-path index)" "$tmp/index" &&
    objects=$(cd "$(git rev-parse --git-path objects)" && pwd) &&
    export GIT_INDEX_FILE="$tmp/index" GIT_OBJECT_DIRECTORY="$tmp/objects" GIT_ALTERNATE_OBJECT_DIRECTORIES="$objects" &&
    git add --all . && tree=$(git write-tree) &&
    git archive --format=tar.gz --output="$tmp/mqformer.tgz" "$tree" && echo "$tree" > "$tmp/tree"
)

sync() {
  [ -e "$tmp/tree" ] || pack || die "sync failed: git could not pack the working tree, see above." # watch keeps to what it began with
  tpus tpu-vm scp "$tmp/mqformer.tgz" "$name:" --worker=all
  on all worker_unpack "$(cat "$tmp/tree")"
}

install() { on all worker_install "$bucket"; }

run() { # FLAGS...
  on all worker_may_run "$bucket" "$@"
  on all worker_start "$bucket" "$@"
}

all() { for step in create sync install run; do "$step" "$@"; done; }

logs() { on "$worker" worker_follow; }

status() {
  local state
  state=$(tpu_state)
  [ "$dry" ] || echo "$name: $state"
  if [ "$dry" ] || [ "$state" = READY ]; then on all worker_state; fi
}

stop() { on all worker_stop "$grace"; }

delete() {
  local state
  state=$(listed queued-resources state.state)
  if [ "$dry" ] || [ "$state" ]; then tpus queued-resources delete "$name" --force; fi # and its TPU with it
  state=$(listed tpu-vm state)
  if [ "$dry" ] || [[ $state && $state != DELETING ]]; then tpus tpu-vm delete "$name"; fi
  [ "$dry" ] || say "$name is deleted"
}

try() { # FLAGS...: from whatever there is to the end of a run; fails unless that is the end for good
  local state
  state=$(tpu_state)
  if is_lost "$state"; then delete; fi
  if [[ $state = READY && $(on 0 worker_state) = *": running" ]]; then run "$@"; else all "$@"; fi
  step=logs
  (logs) || true # a lost connection says less than the worker does
  state=$(on 0 worker_state)
  [[ $dry || $state = *": finished" || $state = *": stopped" ]] || die "the run has not finished; ${state:-why is not known}"
}

watch() { # FLAGS...
  local left=$retries began code
  while :; do
    began=$SECONDS step=watch
    set +e # in an `if` or before `||`, bash would go on after a failure inside
    (set -e; try "$@")
    code=$?
    set -e
    [ "$code" != 0 ] || return 0
    ((SECONDS - began < 3600)) || left=$retries
    ((left-- > 0)) || die "watch gave up; $name may still cost money." "$code"
    say "watch tries again in $wait s"
    sleep "$wait"
  done
}

need() { # SETTING...
  local setting
  for setting; do [ "${!setting}" ] || die "$step needs --$setting=..., see --help" 2; done
}

name="" zone="" project="" type="" version="" bucket="" worker=0 wait=60 retries=10 grace=600 spot="" on_demand="" dry=""
step=${1:---help}
[ $# = 0 ] || shift
while [ $# -gt 0 ]; do
  case $1 in
    --name=* | --zone=* | --project=* | --type=* | --version=* | --bucket=* | --worker=* | --wait=* | --retries=* | --grace=*)
      declare "${1#--}" ;;
    --spot) spot=1 ;;
    --on-demand) on_demand=1 ;;
    --dry-run) dry=1 ;;
    --help) step=--help ;;
    --) shift; break ;;
    *) die "$1 is no setting, see --help; what belongs to the program comes after --" 2 ;;
  esac
  shift
done
bucket=${bucket#gs://}
case $step in
  create | all | watch) need name zone type version bucket ;;
  install | run) need name zone bucket ;;
  sync | logs | status | stop | delete) need name zone ;;
  --help) sed -n '2,/^set /{/^#/!d; s/^# \{0,1\}//; p;}' "$0"; exit ;;
  *) die "$step is no command, see --help" 2 ;;
esac
case $step in run | all | watch) [ $# -gt 0 ] || die "$step needs the program's flags: -- --config=... --workdir=bucket/runs/NAME" 2 ;; esac

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
exec 3>&1 # where show writes
"$step" "$@"
