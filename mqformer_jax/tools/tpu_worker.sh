# shellcheck shell=bash
# Functions that launch_tpu.sh runs on the workers of a TPU. It sends this file, followed by a call of one function.
# ~/mqformer has the code, the virtual environment, the log and the state of the run; ~/bucket is the mounted bucket.
set -euo pipefail

# The run and its children hold a lock. Unlike a process id, it ends with a reboot and never belongs to another program.
worker_running() { mkdir -p ~/mqformer && ! flock --nonblock ~/mqformer/lock true; }

worker_refuse() { echo "$(hostname): $1" >&2; exit 3; }

worker_unpack() { # TREE
  mkdir -p ~/mqformer
  cd ~/mqformer
  [ "$(cat tree/.synced 2> /dev/null)" != "$1" ] || return 0
  ! worker_running || worker_refuse "a run with other code is active: stop it first"
  rm -rf tree.new tree.old
  mkdir tree.new
  tar -xzf ~/mqformer.tgz -C tree.new
  ln -s ~/bucket tree.new/bucket
  echo "$1" > tree.new/.synced
  [ ! -e tree ] || mv tree tree.old
  mv tree.new tree
  rm -rf tree.old # does not follow the link to the bucket
}

worker_mount() { # BUCKET; mounts it again after a reboot or a crash of gcsfuse
  [ "$(findmnt --noheadings --output SOURCE ~/bucket)" != "$1" ] || return 0
  fusermount -uz ~/bucket 2> /dev/null || true
  mkdir -p ~/bucket
  # On TPU machines, the cache of gcsfuse never expires by default. A worker would then miss files of other workers.
  gcsfuse --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "$1" ~/bucket
}

worker_install() { # BUCKET
  local key=/usr/share/keyrings/cloud.google.asc url=https://packages.cloud.google.com/apt source wanted
  [ -e ~/mqformer/tree ] || worker_refuse "there is no code: sync first"
  if ! command -v gcsfuse > /dev/null; then
    curl -fsSL "$url/doc/apt-key.gpg" | sudo tee "$key" > /dev/null
    source="deb [signed-by=$key] $url gcsfuse-$(lsb_release -cs) main"
    echo "$source" | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
    sudo apt-get -qq -o DPkg::Lock::Timeout=600 update
    sudo DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 install --yes gcsfuse
  fi
  worker_mount "$1"
  cd ~/mqformer/tree
  wanted=$(cat setup.cfg pyproject.toml | sha256sum)
  [ "$(cat ../venv/installed 2> /dev/null)" != "$wanted" ] || return 0
  ! worker_running || worker_refuse "a run with other packages is active: stop it first"
  # The images have Python 3.10; uv installs 3.11.
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  rm -rf ../venv
  ~/.local/bin/uv venv --quiet --python 3.11 ../venv
  ~/.local/bin/uv pip install --quiet --python ../venv/bin/python --editable '.[tpu,text]'
  echo "$wanted" > ../venv/installed
}

worker_may_run() { # BUCKET FLAGS...; called on all workers before any of them starts the run
  [ -e ~/mqformer/tree ] && [ -e ~/mqformer/venv/installed ] || worker_refuse "not set up: sync and install first"
  ! worker_running || [ "$(cat ~/mqformer/flags)" = "$*" ] || worker_refuse "another run is active: stop it first"
}

worker_start() { # BUCKET FLAGS...
  worker_mount "$1" # before the lock is taken, because gcsfuse would inherit it
  cd ~/mqformer
  exec 9> lock
  flock --nonblock 9 || { echo "$(hostname): this run is already active"; return 0; }
  echo "$*" > flags
  shift
  rm -f status stopped
  [ ! -e log ] || mv log log.before
  cd tree
  export PYTHONUNBUFFERED=1 TQDM_MININTERVAL=30 # few lines of progress, because the log is a file
  # In a shutdown, all processes get SIGTERM. The trap keeps the shell alive, so that it can write the exit status.
  nohup setsid bash -c 'trap : TERM; "$@"; echo $? > ../status' run ../venv/bin/python -m mqformer_jax.main "$@" \
    > ../log 2>&1 < /dev/null &
  echo $! > ../pid
}

worker_state() { # prints the state of the run, from its exit status
  local state=none code
  if worker_running; then
    state=running
  elif [ -e ~/mqformer/log ]; then
    cd ~/mqformer
    code=$(cat status 2> /dev/null || echo "without an exit status: the machine went down")
    state="failed $code"
    [ "$code" != 75 ] || state=preempted # PREEMPTED in mqformer_jax/interrupts.py
    [ ! -e stopped ] || state=stopped
    [ "$code" != 0 ] || state=finished
  fi
  echo "$(hostname): $state"
}

worker_follow() {
  [ -e ~/mqformer/log ] || worker_refuse "no run was started here"
  cd ~/mqformer
  if worker_running; then tail -c 4000 --pid="$(cat pid)" -f log; else tail -c 4000 log; fi
  worker_state >&2
  exit "$(cat status 2> /dev/null || echo 1)"
}

worker_stop() { # GRACE
  worker_running || { echo "$(hostname): no run is active"; return 0; }
  cd ~/mqformer
  touch stopped
  pkill -TERM --parent "$(cat pid)" || true # the run may just have ended
  flock --timeout "$1" lock true || { echo "$(hostname): killed after $1 s"; pkill -KILL --session "$(cat pid)"; }
}
