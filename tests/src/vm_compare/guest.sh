# What tests/src/vm_compare does in its machine: sourced by every command that it runs there. Each function does one
# step of one system (plain, own, drbd) and fails where the step does. The sizes and the disks are in /host/compare.env.
set -eu -o pipefail
. /host/compare.env

state=/data
nbd=/dev/nbd0

# within SECONDS COMMAND...: waits until it succeeds.
within() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ $SECONDS -lt $end ] || { echo "not within the time: $*" >&2; return 1; }
        sleep 0.1
    done
}

now_us() { echo "${EPOCHREALTIME/./}"; }

nbd_module() { [ -b $nbd ] || modprobe nbd nbds_max=4; }
nbd_is_free() { [ "$(cat /sys/block/nbd0/size)" = 0 ]; }
nbd_is_there() { ! nbd_is_free; }

# --- one file over NBD, not replicated

plain_up() {
    nbd_module
    nbdkit --unix /run/plain.sock --pidfile /run/plain.pid file "$PLAIN"
    within 10 test -S /run/plain.sock
    nbd-client -unix /run/plain.sock $nbd -b 4096 >/dev/null 2>&1
}

# The device waits for its dead server until somebody disconnects it.
plain_kill() {
    kill -9 "$(cat /run/plain.pid)"
    sleep 8
    timeout 20 nbd-client -d $nbd
}

plain_down() {
    nbd_is_free || nbd-client -d $nbd >/dev/null 2>&1 || true
    kill "$(cat /run/plain.pid)" 2>/dev/null || true
    rm -f /run/plain.sock
    within 10 nbd_is_free
}

# --- blkrepl: two data nodes and a witness

own_start() {
    # In a session of its own: when a command's time is over, only what is in the command's is ended.
    setsid blkrepl serve --config $state/n$1/node.toml >>$state/n$1/log 2>&1 </dev/null &
    echo $! >$state/n$1/pid
}

own_runs() { kill -0 "$(cat $state/n$1/pid)" 2>/dev/null; }

own_gone() { ! own_runs "$1"; }

own_kill() {
    kill -"$2" "$(cat $state/n$1/pid)"
    within 20 own_gone "$1"
}

# As the first node says that answers.
own_ask() {
    local node
    for node in 1 2; do
        timeout 5 blkrepl --admin $state/n$node/admin.sock "$@" 2>/dev/null && return
    done
    return 1
}

own_primary() { own_ask status --json | jq -r '.volumes[0].primary | ltrimstr("n")'; }
own_secondary() { echo $((3 - $(own_primary))); }
own_in_sync() {
    own_ask status --json | jq -e '.volumes[0] | .serving and (.in_sync | length) == 2' >/dev/null
}

own_make() {
    local node
    mkfs.ext4 -q "$META"
    mkdir -p $state
    mount "$META" $state
    for node in 1 2 3; do
        mkdir $state/n$node
        cp /host/n$node.toml $state/n$node/node.toml
        blkrepl init --config $state/n$node/node.toml
    done
}

own_create() { own_ask volume create vol0 --size "${SIZE_MIB}MiB" --replicas n1,n2; }

own_up() {
    local node
    nbd_module
    mountpoint -q $state || own_make
    for node in 1 2 3; do own_start $node; done
    if [ ! -e $state/made ]; then
        within 40 own_create
        touch $state/made
    fi
    within 60 own_in_sync
    setsid blkrepl map vol0 $nbd --node 127.0.0.1:$PORT1 --node 127.0.0.1:$PORT2 >>$state/map.log 2>&1 </dev/null &
    within 20 nbd_is_there
}

own_down() {
    local node
    blkrepl unmap $nbd >/dev/null
    within 10 nbd_is_free
    for node in 1 2 3; do own_kill $node TERM; done
}

# own_client DEVICE CONNECTIONS: the kernel's client on a device of its own, beside the mapped one.
own_client() {
    nbd-client -unix $state/n$(own_primary)/nbd.sock "$1" -N vol0 -C "$2" -b 4096 >&2
}

own_client_ends() { nbd-client -d "$1" >&2; }

own_move() { own_ask move vol0 --to "n$(own_secondary)"; }

own_return() {
    own_start "$1"
    sleep 0.3
    within 120 own_in_sync
}

# How long the secondary is away from where it is started again to the end of its resync, in microseconds.
own_resync() {
    local node begun
    node=$(own_secondary)
    own_kill "$node" 9
    change $nbd "$1"
    begun=$(now_us)
    own_return "$node"
    blkrepl --admin $state/n$((3 - node))/admin.sock events --json |
        jq --argjson begun "$begun" \
            '[.[] | select(.kind == "resync_finished" and .time_ms * 1000 >= $begun)] | last.time_ms * 1000 - $begun'
}

# --- DRBD: both replicas in this kernel, minor 0 and minor 1, each the other's peer

drbd_a=ipv4:127.0.0.1:7001
drbd_b=ipv4:127.0.0.1:7002

drbd_module() {
    [ -e /proc/drbd ] || modprobe drbd usermode_helper=/bin/true
    cat >/etc/drbd.d/r0.res <<END
resource r0 {
    device minor 0; disk $DRBD_A; meta-disk internal; protocol C;
    on vm { address 127.0.0.1:7001; }
    on other { address 127.0.0.1:7002; }
}
END
}

# The tools know one of the replicas only, as it is on each of two machines; the kernel is told of the other one
# directly. Options of the disk may follow.
drbd_peer_up() {
    drbdsetup new-resource r1
    drbdsetup new-minor r1 1 0
    # As drbdadm does it.
    drbdmeta 1 v08 "$DRBD_B" internal apply-al
    drbdsetup attach 1 "$DRBD_B" "$DRBD_B" internal "$@"
    drbdsetup connect r1 $drbd_b $drbd_a --protocol=C
}

drbd_in_sync() { [ "$(grep -c 'cs:Connected.*ds:UpToDate/UpToDate' /proc/drbd)" = 2 ]; }
drbd_connected() { [ "$(grep -c 'cs:Connected' /proc/drbd)" = 2 ]; }
drbd_alone() { ! grep -q '^ 0: cs:Connected' /proc/drbd; }

drbd_up() {
    drbd_module
    if [ ! -e /run/drbd.made ]; then
        drbdadm create-md --force r0
        drbdmeta 1 v08 "$DRBD_B" internal create-md --force
    fi
    drbdadm up r0
    drbd_peer_up
    if [ ! -e /run/drbd.made ]; then
        within 30 drbd_connected
        # Both disks are all zeroes.
        drbdsetup new-current-uuid --clear-bitmap 0
        touch /run/drbd.made
    fi
    within 90 drbd_in_sync
    drbdsetup primary 0
}

drbd_down() {
    drbdsetup secondary 0
    drbdadm down r0
    drbdsetup down r1
}

drbd_return() {
    drbd_peer_up "$@"
    within 120 drbd_in_sync
}

# Nothing arrives any more, as when the other machine loses its power.
drbd_silence() {
    tc qdisc add dev lo root netem loss 100%
    within 90 drbd_alone
}

drbd_sound() {
    tc qdisc del dev lo root
    within 120 drbd_in_sync
}

# drbd_resync MIB [OPTION...]: as own_resync. The options are for both disks.
drbd_resync() {
    local mib=$1 begun ended
    shift
    drbdsetup disk-options 0 --set-defaults "$@"
    drbdsetup down r1
    change /dev/drbd0 "$mib"
    begun=$(now_us)
    drbd_return "$@"
    ended=$(now_us)
    drbdsetup disk-options 0 --set-defaults
    echo $((ended - begun))
}

# The role goes to the other replica: how long there is no device, in microseconds. What is mounted has to be
# unmounted first.
drbd_move() {
    local begun ended
    mkfs.ext4 -q -F /dev/drbd0
    mount /dev/drbd0 /mnt
    echo kept >/mnt/file
    if drbdsetup secondary 0 2>/dev/null; then
        echo "a replica in use gave its role away" >&2
        return 1
    fi
    begun=$(now_us)
    umount /mnt
    drbdsetup secondary 0
    drbdsetup primary 1
    mount /dev/drbd1 /mnt
    ended=$(now_us)
    [ "$(cat /mnt/file)" = kept ]
    umount /mnt
    drbdsetup secondary 1
    drbdsetup primary 0
    echo $((ended - begun))
}

# --- what all have in common

# change DEVICE MIB: other content for so much of it.
change() { dd if=/dev/urandom of="$1" bs=1M count="$2" oflag=direct status=none; }

# load DEVICE RAMP SECONDS OPTION...: one load of fio; its report.
load() {
    local device=$1 ramp=$2 seconds=$3
    shift 3
    fio --name=load --filename="$device" --size="${SIZE_MIB}M" --direct=1 --time_based --ramp_time="${ramp}ms" \
        --runtime="${seconds}ms" --randrepeat=0 --output-format=json "$@"
}

# watched DEVICE SECONDS COMMAND...: the command while the writer writes, and what the writer saw.
watched() {
    local device=$1 seconds=$2 writer
    shift 2
    rm -f /run/writer.*
    vm_compare writer "$device" /run/writer >/run/writer.out 2>/run/writer.err &
    writer=$!
    within 20 test -e /run/writer.ready
    sleep 1
    echo "$EPOCHREALTIME" >/run/writer.mark
    "$@" >&2
    sleep "$seconds"
    touch /run/writer.stop
    wait $writer || { cat /run/writer.err >&2; return 1; }
    cat /run/writer.out
}
