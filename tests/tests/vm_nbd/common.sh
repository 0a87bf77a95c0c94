# What the cases of vm_nbd.rs have in common: a cluster in the machine, its keeper, waiting, refusals. It stands before
# each case, and its functions end the case with what is wrong. Programs are started sparingly: each costs 40 ms in
# Linux as a program.
set -eu -o pipefail
home=/root/cluster
volume=vol0

die() {
    echo "FAILED: $*" >&2
    exit 1
}

# What led to a failure, also to one by the limit of the whole case: what programs said, and who waits. The commands
# are in the machine's log, which can be read when this cannot be told any more.
tell() {
    set +x
    [ "$1" -ne 0 ] || return 0
    {
        tail -n 20 /root/*.log
        dmesg | tail -n 30
        ps axo pid,stat,wchan:20,args | grep -v '\['
    } >&2 || true
}
trap 'tell $?' EXIT
trap 'exit 124' TERM
exec 7>/dev/vm-log
BASH_XTRACEFD=7
set -x

# Waits a tenth of a second without a program.
exec {never}<> <(:)
tick() { read -r -t 0.1 -u "$never" || true; }

# within SECONDS COMMAND...: repeats the command until it succeeds.
within() {
    local end=$((SECONDS + $1))
    shift
    set +x
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt "$end" ] || die "not in time: $*"
        tick
    done
    set -x
}

# refused TEXT COMMAND...: the command fails within ten seconds and says the text.
refused() {
    local text=$1 said code=0
    shift
    said=$(timeout 10 "$@" 2>&1) || code=$?
    [ "$code" -ne 0 ] || die "not refused: $*: $said"
    [ "$code" -ne 124 ] || die "hangs: $*: $said"
    [[ $said == *"$text"* ]] || die "$* says '$said', not '$text'"
}

# quick SECONDS COMMAND...: the command succeeds within that time.
quick() {
    local limit=$1 code=0
    shift
    timeout --kill-after=1 "$limit" "$@" || code=$?
    [ "$code" -eq 0 ] || die "exit code $code (124: not within $limit s): $*"
}

# cluster SIZE [OPTION...]: two data nodes and a witness, in sync.
cluster() {
    rm -rf "$home"
    blkrepl dev --dir "$home" --size "$@" >/root/dev.log 2>&1 &
    dev=$!
    within 40 serves
    addresses
    within 40 in_sync
}
serves() { grep -q ' serves ' /root/dev.log; }
addresses() {
    local said
    said=$(jq -r '.nodes[] | "\(.pid) \(.nbd_tcp)"' "$home/cluster.json")
    pids=() ports=(none)
    while read -r pid uri; do
        pids+=("$pid")
        uri=${uri##*:}
        ports+=("${uri%%/*}")
    done <<<"$said"
}
in_sync() {
    [ "$(blkrepl --admin "$home/n3/admin.sock" status --json | jq -c '.volumes[0].in_sync')" = '["n1","n2"]' ]
}
# The node that is primary, as the asked one sees it.
primary_of() { blkrepl --admin "$home/$1/admin.sock" status --json | jq -r '.volumes[0].primary'; }
has_primary() { [[ $(primary_of n3) == n* ]]; }

# Closes all connections of the client with what is unanswered, and keeps it out for a while.
try_to_cut() {
    local client
    client=$(blkrepl --admin "$home/n3/admin.sock" status --json | jq -r '.volumes[0].attached')
    [[ $client == n* ]] && timeout 10 blkrepl --admin "$home/n3/admin.sock" detach $volume --client "$client"
}

end_cluster() {
    kill -TERM "$dev"
    wait "$dev" || die "blkrepl dev: exit code $?: $(cat /root/dev.log)"
}

# map [OPTION...]: starts a keeper and waits for its device, in $device.
map() {
    : >/root/map.log
    blkrepl map $volume --node "127.0.0.1:${ports[1]}" --node "127.0.0.1:${ports[2]}" "$@" >>/root/map.log 2>&1 &
    keeper=$!
    within 20 is_mapped
    device=$(sed -n 's/.* is mapped as //p' /root/map.log)
}
is_mapped() { grep -q ' is mapped as ' /root/map.log; }
unmap() {
    quick 20 blkrepl unmap $volume "$@"
    within 10 no_process "$keeper"
    wait "$keeper" || die "the keeper ended with $?: $(cat /root/map.log)"
}

# lose_keeper [PROCESS...]: kills it, and what else is named, at once.
lose_keeper() {
    kill -KILL "$keeper" "$@"
    wait "$keeper" || true
}

bytes_of() { echo $(($(<"/sys/block/$1/size") * 512)); }
no_process() { ! kill -0 "$1"; }
# A device without a connection has no process and no size.
is_free() { [ ! -e "/sys/block/$1/pid" ] && [ "$(<"/sys/block/$1/size")" = 0 ]; }

# What a kernel says when it has caught itself at something, since the last look.
kernel_is_well() {
    local bad
    local signs='BUG|WARNING|Oops|Call Trace|blocked for more|cannot create duplicate|rcu.*stall'
    bad=$(dmesg | grep -E -A 20 "$signs" || true)
    [ -z "$bad" ] || die "the kernel: $bad"
}
