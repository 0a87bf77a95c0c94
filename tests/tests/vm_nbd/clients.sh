# What blktests' group nbd checks of the kernel's client (001 to 005), with our server behind it, for each way to
# attach a volume: blkrepl map, nbd-client over netlink, nbd-client by ioctl. And the end of a device under I/O.
#
# $way is one of them.
device=/dev/nbd0
port=none

attach() {
    case $way in
        map) map $device ;;
        netlink) quick 20 nbd-client 127.0.0.1 "$port" $device -N $volume -b 4096 >/dev/null 2>&1 ;;
        ioctl) quick 20 nbd-client -L 127.0.0.1 "$port" $device -N $volume -b 4096 >/dev/null 2>&1 ;;
    esac
    within 10 has_size $((64 << 20))
}
has_size() { [ "$(bytes_of nbd0)" = "$1" ]; }
# The device is ended, whoever uses it.
detach() {
    case $way in
        map) unmap --force >/dev/null ;;
        netlink) quick 20 nbd-client -d $device >/dev/null ;;
        ioctl) quick 20 nbd-client -L -d $device >/dev/null ;;
    esac
    within 10 is_free nbd0
}
is_mounted() { grep -q "^$device " /proc/mounts; }

# A volume attached has its size, one detached has none; as often as it is done.
connects() {
    local round
    for round in 1 2; do
        attach
        dd if=/dev/urandom of=/tmp/data bs=64k count=16 status=none
        quick 10 dd if=/tmp/data of=$device bs=64k oflag=direct status=none
        detach
        attach
        cmp --bytes=1M /tmp/data $device || die "round $round: other data"
        detach
        [ "$(quick 5 dd if=$device bs=4k count=1 iflag=direct status=none | wc -c)" = 0 ] || die "it can still be read"
    done
}

# An entry of a table of partitions: the second MiB to the ninth, in blocks of 4 KiB.
partition_table() {
    head -c 446 /dev/zero
    printf '\0\0\0\0\x83\0\0\0\0\x01\0\0\0\x08\0\0'
    head -c 48 /dev/zero
    printf '\x55\xaa'
    head -c 3584 /dev/zero
}
has_partition() { [ -e /sys/block/nbd0/nbd0p1 ]; }
partition_is_over() {
    # Its partitions go when somebody opens the device that has none any more.
    : <$device
    ! has_partition || { [ "$max_part" = 0 ] && ! dd if=${device}p1 of=/tmp/gone bs=4k count=1 iflag=direct; }
}

# Partitions are there when the device is, and are gone with it. Where the driver is told to have none of its own
# (max_part=0), Linux 6.1 forgets those of a device that has gone only with the next one: then they have no content.
partitions() {
    local max_part=$1
    modprobe -r nbd
    modprobe nbd nbds_max=2 "max_part=$max_part"
    attach
    partition_table >/tmp/table
    quick 10 dd if=/tmp/table of=$device bs=4k oflag=direct conv=fsync status=none
    blockdev --rereadpt $device
    within 5 has_partition
    detach
    within 5 partition_is_over
    attach
    # Somebody has to look: here nobody is told by the kernel, as udev would be.
    : <$device
    within 5 has_partition
    [ "$(<"/sys/block/nbd0/nbd0p1/size")" = $((8 << 11)) ] || die "the partition has another size"
    echo here | dd of=/tmp/block bs=4k conv=sync status=none
    quick 10 dd if=/tmp/block of=${device}p1 bs=4k oflag=direct status=none
    cmp /tmp/block <(dd if=$device bs=4k skip=256 count=1 iflag=direct status=none) || die "the partition is elsewhere"
    detach
    within 5 partition_is_over
}

# By ioctl a device can be resized that was made so, and one that was made over netlink is left alone.
resizes() {
    attach
    local code=0
    set_size $((32 << 20)) || code=$?
    if [ "$way" = ioctl ]; then
        [ $code = 0 ] || die "the device takes no size"
        has_size $((32 << 20)) || die "the device has $(bytes_of nbd0) bytes"
        [ "$(blockdev --getsize64 $device)" = $((32 << 20)) ] || die "blockdev does not see the size"
        refused 'cannot skip' dd if=$device of=/dev/null bs=1M skip=33 count=1 status=none
        set_size $((64 << 20))
    else
        [ $code = 22 ] || die "an ioctl on a device of netlink gives $code"
    fi
    has_size $((64 << 20)) || die "the device has $(bytes_of nbd0) bytes"
    quick 10 dd if=$device of=/dev/null bs=1M skip=63 count=1 iflag=direct status=none
    detach
}
NBD_SET_SIZE=0xab02 NBD_CLEAR_SOCK=0xab04
# The exit code is the error's number.
device_ioctl() {
    python3 -c '
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
try:
    fcntl.ioctl(fd, int(sys.argv[2], 16), int(sys.argv[3]))
except OSError as error:
    sys.exit(error.errno)' $device "$@"
}
set_size() { device_ioctl $NBD_SET_SIZE "$1"; }

# A file system is mounted, written and unmounted while its device goes away: by the client, or by an ioctl that every
# program may send. Whatever was lost, it is whole afterwards.
mount_races() {
    local round
    attach
    quick 30 mkfs.ext4 -q -b 4096 $device
    detach
    for round in 1 2 3; do
        attach
        # It fails somewhere, which is what is wanted; it must not hang.
        (
            set +e
            while [ -e /sys/block/nbd0/pid ]; do
                mount -o errors=continue $device /mnt && echo "$round" >"/mnt/file$round" && sync /mnt
                umount /mnt
            done
        ) >/dev/null 2>&1 &
        local user=$!
        for _ in $(seq $round); do tick; tick; done
        if [ $((round % 2)) = 0 ] && [ "$way" != map ]; then
            # Who opened the device may be refused in between; then it is the client's turn.
            device_ioctl $NBD_CLEAR_SOCK 0 || true
            [ ! -e /sys/block/nbd0/pid ] || detach
        else
            detach
        fi
        within 20 no_process $user
        ! is_mounted || quick 20 umount /mnt
        within 10 is_free nbd0
    done
    attach
    quick 20 mount $device /mnt
    quick 20 umount /mnt
    quick 20 e2fsck -f -n $device >/tmp/fsck 2>&1 || die "$(cat /tmp/fsck)"
    detach
}

# The driver is loaded and unloaded while devices come and go.
module_races() {
    local end=$((SECONDS + 20)) loader connects=0
    while :; do
        modprobe nbd nbds_max=2 || true
        modprobe -r nbd || true
    done >/dev/null 2>&1 &
    loader=$!
    while [ $connects -lt 3 ] && [ $SECONDS -lt $end ]; do
        case $way in
            map)
                # It keeps the device until that is over.
                timeout 0.7 blkrepl map $volume $device --node "127.0.0.1:$port" >/root/race.log || true
                ! grep ' is mapped as ' /root/race.log
                ;;
            netlink) ! timeout 5 nbd-client 127.0.0.1 "$port" $device -N $volume -b 4096 ;;
            ioctl) ! timeout 5 nbd-client -L 127.0.0.1 "$port" $device -N $volume -b 4096 ;;
        esac || connects=$((connects + 1))
        case $way in
            map) timeout 5 blkrepl unmap $volume --force || true ;;
            *) timeout 5 nbd-client -d $device || true ;;
        esac
    done >/dev/null 2>&1
    kill $loader
    wait $loader || true
    [ "$connects" -gt 0 ] || die "it never connected, so nothing was shown"
    modprobe nbd nbds_max=2
    [ ! -e /sys/block/nbd0/pid ] || detach
    within 10 modprobe -r nbd
    modprobe nbd nbds_max=2
    attach
    detach
}

# Requests are in flight when the device is ended: they fail, and whoever waits for them goes on.
end_in_flight() {
    attach
    kill -STOP "${pids[0]}" "${pids[1]}"
    local code=0 begun=$SECONDS
    (
        set +e
        timeout 60 dd if=/dev/zero of=$device bs=256k count=16 oflag=direct status=none 2>/tmp/dd
        echo $? >/tmp/code
    ) &
    local user=$!
    within 5 in_flight
    detach
    within 10 no_process $user
    [ "$(</tmp/code)" = 1 ] || die "dd: exit code $(</tmp/code)"
    grep -q 'Input/output error' /tmp/dd || die "dd: $(</tmp/dd)"
    kill -CONT "${pids[0]}" "${pids[1]}"
    within 60 in_sync
    within 30 has_primary
    echo "$way: ended with requests in flight within $((SECONDS - begun)) s"
}
in_flight() {
    local reads writes
    read -r reads writes </sys/block/nbd0/inflight
    [ $((reads + writes)) -gt 0 ]
}

# Whoever is primary serves the clients that do not look for it.
find_port() {
    local name
    within 30 has_primary
    name=$(primary_of n3)
    port=${ports[${name#n}]}
}

run_cases() {
    local case
    for case in connects 'partitions 16' 'partitions 0' resizes mount_races end_in_flight module_races; do
        local begun=$SECONDS
        find_port
        modprobe nbd nbds_max=2
        $case
        kernel_is_well
        echo "$way: $case in $((SECONDS - begun)) s"
    done
}

cluster 64M
run_cases
end_cluster
