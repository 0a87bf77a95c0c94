# What a user of `blkrepl map` may run into: each is refused, or ends, with words that say what to do.
node() { echo "127.0.0.1:${ports[$1]}"; }
start_node() { blkrepl serve --config "$home/$1/node.toml" >>"/root/$1.log" 2>&1 & }
all_nodes() { kill "-$1" "${pids[@]}"; }
restart_all() {
    start_node n1
    start_node n2
    start_node n3
    within 40 in_sync
    within 20 has_primary
    addresses
}
# Ended by SIGTERM, the way systemd does it; the device stays.
end_keeper() {
    kill -TERM "$keeper"
    within 10 no_process "$keeper"
    wait "$keeper" || die "the keeper ended with $?"
}
connected() { [ "$(blkrepl mapped --json | jq -r '.[0].primary')" != null ]; }
waits() { [ "$(blkrepl mapped --json | jq -r '.[0].waiting')" != null ]; }

# A device in use goes only by force; whoever used it gets errors and does not hang.
mounted_device() {
    map
    mkfs.ext4 -q $device
    mount $device /mnt
    refused 'mounted at /mnt' blkrepl unmap $volume
    refused '--force' blkrepl unmap $device
    echo kept >/mnt/file
    sync /mnt/file
    unmap --force >/dev/null
    local code=0
    timeout 20 sh -c 'echo lost >/mnt/late && sync /mnt/late' 2>/tmp/said || code=$?
    [ $code != 0 ] && [ $code != 124 ] || die "a write to a device that is gone: exit code $code"
    quick 20 umount /mnt
    map
    quick 20 mount $device /mnt
    [ "$(</mnt/file)" = kept ] || die "what was synced is lost"
    quick 10 umount /mnt
    # Open, not mounted.
    sleep 50 <$device &
    local user=$!
    refused "process $user (sleep)" blkrepl unmap $volume
    kill $user
    wait $user || true
    # Neither mounted nor open in a process.
    local loop
    loop=$(losetup --find --show $device)
    refused "$loop shows it" blkrepl unmap $volume
    losetup -d "$loop"
    unmap >/dev/null
}

# The connection of an idle device dies while nobody keeps it: the kernel tells that once, and nobody hears it.
idle() {
    map
    : <$device
    lose_keeper
    within 20 try_to_cut
    map
    quick 20 dd if=/dev/zero of=$device bs=4k count=1 oflag=direct status=none
    unmap >/dev/null
}

# The trap of a process that nothing can end: no node is there, requests wait, and yet the device can be ended.
without_nodes() {
    map
    # Whoever opens a fresh device first reads its table of partitions, and waits in that, too.
    [ "$1" = fresh ] || : <$device
    all_nodes KILL
    (
        set +e
        dd if=/dev/zero of=$device bs=4k count=1 oflag=direct 2>/tmp/dd
        echo $? >/tmp/code
    ) &
    local user=$! begun
    within 20 waits
    [ -e /proc/$user ] && [ ! -e /tmp/code ] || die "the request does not wait: $(cat /tmp/dd)"
    # One that waits in its opening is none that has it open.
    [ "$1" = fresh ] || refused 'in use' blkrepl unmap $volume
    begun=$SECONDS
    unmap --force >/dev/null
    within 10 test -s /tmp/code
    [ "$(</tmp/code)" = 1 ] && [ -s /tmp/dd ] || die "dd: exit code $(</tmp/code): $(</tmp/dd)"
    rm /tmp/code
    echo "unmapped without nodes and with a request that waits in $((SECONDS - begun)) s"
    restart_all
}
# The same for a file system with pages to be written.
mounted_without_nodes() {
    local user begun
    map
    mkfs.ext4 -q $device
    mount $device /mnt
    all_nodes KILL
    # Making a file waits as well, for what it has to read.
    (echo lost >/mnt/file && sync /mnt/file) 2>/tmp/said &
    user=$!
    within 20 waits
    begun=$SECONDS
    unmap --force >/dev/null
    within 20 no_process $user
    quick 20 umount /mnt
    echo "unmapped a mounted file system without nodes in $((SECONDS - begun)) s"
    restart_all
}

# Requests wait for the time that was asked for, and fail then.
gives_up() {
    map --give-up-after 5
    all_nodes KILL
    # Buffered, it ends at once: what is asked for is on nobody's page.
    local begun=$SECONDS code=0
    timeout 60 dd if=/dev/zero of=$device bs=4k count=1 oflag=direct 2>/tmp/dd || code=$?
    local took=$((SECONDS - begun))
    [ $code = 1 ] && grep -q 'Input/output error' /tmp/dd || die "dd: exit code $code: $(cat /tmp/dd)"
    [ $took -ge 4 ] && [ $took -le 15 ] || die "it gave up after $took s, not 5"
    echo "gave up after $took s"
    # The device has a primary again when there is one.
    restart_all
    within 30 connected
    quick 20 dd if=/dev/zero of=$device bs=4k count=1 oflag=direct status=none
    unmap >/dev/null
}

# One keeper for a volume; one device for a volume; a device of somebody else is left alone.
twice() {
    map
    refused "$keeper" blkrepl map $volume --node "$(node 1)"
    # A keeper that was ended leaves the device, and the next one takes it over.
    end_keeper
    [ "$(blkrepl mapped --json | jq -c '.[] | [.volume, .device, .keeper]')" = "[\"$volume\",\"$device\",null]" ] ||
        die "$(blkrepl mapped --json)"
    blkrepl mapped | grep -q 'run blkrepl map again' || die "$(blkrepl mapped)"
    refused "is mapped as $device already" blkrepl map $volume /dev/nbd7 --node "$(node 1)"
    local before=$device
    map
    [ "$device" = "$before" ] || die "taken over as $device, not $before"
    unmap >/dev/null
    refused 'is not mapped' blkrepl unmap $volume
    refused 'is not an NBD device' blkrepl map $volume /dev/sda --node "$(node 1)"
    nbdkit --unix /run/nbdkit.sock --pidfile /run/nbdkit.pid memory 8M
    quick 20 nbd-client -unix /run/nbdkit.sock /dev/nbd3 >/dev/null
    refused '/dev/nbd3 is in use' blkrepl map $volume /dev/nbd3 --node "$(node 1)" --node "$(node 2)"
    refused '/dev/nbd3 is not mapped' blkrepl unmap /dev/nbd3
    [ "$(bytes_of nbd3)" = $((8 << 20)) ] || die "a device of somebody else was touched"
    quick 20 nbd-client -d /dev/nbd3 >/dev/null
    kill "$(</run/nbdkit.pid)"
}

# What is not there is told at once, not waited for.
unknown() {
    refused 'other' blkrepl map other --node "$(node 1)" --node "$(node 2)"
    refused '--node' blkrepl map $volume
    refused 'no-such-file' blkrepl map $volume --config /root/no-such-file
    [ ! -e /run/blkrepl/map/other.json ] || die "something was left of it"
}

# Content that may lack what was acknowledged is not put under a file system that knows of it.
other_lineage() {
    map
    quick 10 dd if=/dev/zero of=$device bs=4k count=1 oflag=direct status=none
    local first second
    first=$(primary_of n3)
    second=n$((3 - ${first#n}))
    kill -KILL "${pids[${second#n} - 1]}"
    # Acknowledged by the first alone, and then that one dies.
    quick 20 dd if=/dev/urandom of=$device bs=4k count=1 oflag=direct status=none
    kill -KILL "${pids[${first#n} - 1]}"
    start_node "$second"
    within 20 test -S "$home/$second/admin.sock"
    within 30 forced "$second"
    within 30 lineage_is_told
    [ "$(blkrepl mapped --json | jq -r '.[0].primary')" = null ] || die "it goes on"
    unmap --force >/dev/null
    start_node "$first"
    within 60 in_sync
    addresses
    map
    quick 10 dd if=$device of=/dev/null bs=4k count=1 iflag=direct status=none
    unmap >/dev/null
}
forced() { timeout 20 blkrepl --admin "$home/$1/admin.sock" promote $volume --force; }
lineage_is_told() { blkrepl mapped --json | jq -r '.[0].waiting' | grep 'another lineage' | grep -q -e --force; }

# A kernel without the driver.
without_module() {
    modprobe -r nbd
    local modules file
    modules=/lib/modules/$(uname -r)
    file=$(find "$modules" -name nbd.ko)
    mv "$file" /root/nbd.ko
    refused 'modprobe nbd' blkrepl map $volume --node "$(node 1)" --node "$(node 2)"
    refused 'nbdfuse' blkrepl map $volume --node "$(node 1)" --node "$(node 2)"
    mv /root/nbd.ko "$file"
    map
    unmap >/dev/null
}

run_cases() {
    local case
    for case in unknown twice mounted_device idle 'without_nodes fresh' 'without_nodes open' mounted_without_nodes \
        gives_up other_lineage without_module; do
        local begun=$SECONDS
        $case
        kernel_is_well
        echo "$case in $((SECONDS - begun)) s"
    done
}

cluster 64M --leases 700
run_cases
end_cluster
