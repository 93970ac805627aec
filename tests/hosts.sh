#!/usr/bin/env bash
# Several hosts on one machine, for tests and benchmarks of runs over a network.
#
#   tests/hosts.sh up DIR N [FOLDER ...]   starts hosts node0 ... ; DIR keeps what they need and their
#                                          logs; a FOLDER (absolute path) is another disk on each
#   tests/hosts.sh exec DIR I COMMAND ...  runs a command on host I, in this folder
#   tests/hosts.sh cut|join DIR I          takes host I off the network, and back
#   tests/hosts.sh off|boot DIR I          power off at once (nothing is said to the others), and on
#   tests/hosts.sh down DIR                ends all of it; may be called at any time, and again
#
# A host has its own network card, hostname, process ids, /dev/shm, /run, /etc/hosts (DIR/nodeI.hosts)
# and sshd, which root's ssh reaches from every other host; all else is this machine's. The hosts and
# the switch between them live in namespaces that end with their first process, so nothing is left
# behind and nothing of the machine's own network is touched. HOSTS_OWNER=PID: they also end with
# that process. Needs root, iproute2, util-linux, procps and openssh-server.
set -euo pipefail

self="$(realpath "${BASH_SOURCE[0]}")"
NETWORK=10.77.0

fail() {
    echo "hosts.sh: $*" >&2
    exit 1
}

# ---- the first process of a host, and of the switch --------------------------------------------

first_process() { # NAME FOLDER ...: runs inside the new namespaces as process 1
    local name=$1 folder
    shift
    ip link set lo up
    mount -t proc proc /proc
    if [[ $name == switch ]]; then
        ip link add bridge type bridge
        ip link set bridge up
        touch "$dir/$name.ready"
        exec -a "bash $self first $dir $name" sleep infinity
    fi
    hostname "$name"
    mount -t sysfs sysfs /sys
    mount -t tmpfs tmpfs /dev/shm
    mount -t tmpfs tmpfs /run
    mount -t tmpfs tmpfs /etc/ssh/ssh_config.d
    cp "$dir/ssh_config" /etc/ssh/ssh_config.d/hosts.conf
    mount --bind "$dir/$name.hosts" /etc/hosts
    for folder in "$@"; do
        mount --bind "$dir/$name/$folder" "$folder"
    done
    mkdir /run/sshd
    touch "$dir/$name.ready"
    # It adopts and reaps what others leave, as process 1 must, and starts a killed sshd again.
    while true; do
        /usr/sbin/sshd -D -e -f "$dir/sshd_config" || true
        sleep 0.2
    done
}

# ---- seen from outside -------------------------------------------------------------------------

processes() { # NAME: its first process and, before the namespaces, the one that started it
    pgrep -f "^bash $self first $dir $1( |$)|unshare .* first $dir $1( |$)" || true
}

pid_of() { # NAME: its first process, as seen from here; fails where it does not run
    local pid
    for pid in $(processes "$1"); do
        [[ "$(readlink "/proc/$pid/ns/pid")" == "$(readlink /proc/self/ns/pid)" ]] ||
            { echo "$pid" && return; }
    done
    return 1
}

inside() { # NAME [nsenter options] COMMAND
    local pid
    pid="$(pid_of "$1")" || fail "$1 does not run in $dir: $0 up, or boot"
    shift
    nsenter -t "$pid" "$@"
}

start_first_process() { # NAME FOLDER ...
    local name=$1 outer tries
    rm -f "$dir/$name.ready"
    setsid unshare --net --uts --ipc --mount --pid --fork --kill-child --propagation private \
        bash "$self" first "$dir" "$@" >>"$dir/$name.log" 2>&1 </dev/null &
    outer=$!
    for ((tries = 0; tries < 1200; tries++)); do
        [[ -e $dir/$name.ready ]] && return
        [[ -d /proc/$outer ]] || break
        sleep 0.05
    done
    fail "$name did not come up: $(tail -n 3 "$dir/$name.log")"
}

boot() { # I
    local name="node$1" folders
    mapfile -t folders <"$dir/folders"
    local folder
    for folder in "${folders[@]}"; do mkdir -p "$dir/$name/$folder"; done
    {
        echo "127.0.0.1 localhost"
        for ((other = 0; other < $(<"$dir/count"); other++)); do
            echo "$NETWORK.$((other + 1)) node$other"
        done
    } >"$dir/$name.hosts"
    start_first_process "$name" "${folders[@]}"
    inside switch -n ip link del "port$1" 2>/dev/null || true # of the life before
    inside switch -n ip link add "port$1" type veth \
        peer name eth0 address "02:00:00:77:00:$(printf %02x $(($1 + 1)))" netns "$(pid_of "$name")"
    inside switch -n ip link set "port$1" master bridge up
    inside "$name" -n ip addr add "$NETWORK.$(($1 + 1))/24" dev eth0
    inside "$name" -n ip link set eth0 up
    wait_for_ssh "$name"
}

wait_for_ssh() { # NAME, from node0
    local tries
    for ((tries = 0; tries < 600; tries++)); do
        inside node0 -a ssh -o ConnectTimeout=1 "$1" true 2>/dev/null && return
        sleep 0.05
    done
    fail "$1 does not answer to ssh: $(tail -n 3 "$dir/$1.log")"
}

up() { # N FOLDER ...
    local count=$1 i
    shift
    [[ ! -e $dir/count ]] || fail "$dir has hosts already: $0 down $dir"
    echo "$count" >"$dir/count"
    printf '%s\n' "$@" | sed '/^$/d' >"$dir/folders"
    if [[ -n ${HOSTS_OWNER:-} ]]; then
        setsid bash -c 'tail --pid="$1" -f /dev/null; [[ ! -e $3/count ]] || exec bash "$2" down "$3"' owner \
            "$HOSTS_OWNER" "$self" "$dir" >/dev/null 2>&1 </dev/null &
    fi
    rm -f "$dir/key" "$dir/key.pub"
    ssh-keygen -q -t ed25519 -N '' -f "$dir/key"
    printf '%s\n' 'Host node*' "IdentityFile $dir/key" 'StrictHostKeyChecking no' \
        'UserKnownHostsFile /dev/null' 'LogLevel ERROR' >"$dir/ssh_config"
    printf '%s\n' "HostKey $dir/key" "AuthorizedKeysFile $dir/key.pub" 'PidFile none' \
        'StrictModes no' 'UsePAM no' 'MaxStartups 100' 'PermitRootLogin yes' >"$dir/sshd_config"
    start_first_process switch
    for ((i = 0; i < count; i++)); do boot "$i"; done
}

down() {
    local pid
    for pid in $(processes "[^ ]*"); do
        kill -KILL "$pid" 2>/dev/null || true # with a first process its namespaces end
    done
    while [[ -n "$(processes "[^ ]*")" ]]; do sleep 0.05; done
    rm -f "$dir"/*.{ready,hosts} "$dir"/{count,folders,key,key.pub,ssh_config,sshd_config}
}

(($# >= 2)) || fail "usage: up DIR N | exec DIR I COMMAND | cut|join|off|boot DIR I | down DIR"
verb=$1
[[ $verb != up ]] || mkdir -p "$2"
dir="$(realpath -m "$2")"
shift 2
case $verb in
up) up "$@" ;;
down) down ;;
first) first_process "$@" ;;
boot) boot "$1" ;;
cut) inside switch -n ip link set "port$1" down ;;
join) inside switch -n ip link set "port$1" up ;;
off)
    pid="$(pid_of "node$1")" || fail "node$1 does not run"
    inside switch -n ip link set "port$1" down
    kill -KILL "$pid"
    ;;
exec)
    pid="$(pid_of "node$1")" || fail "node$1 does not run"
    shift
    exec nsenter -t "$pid" -a --wd="$PWD" "$@"
    ;;
*) fail "expected up, exec, cut, join, off, boot or down, got $verb" ;;
esac
