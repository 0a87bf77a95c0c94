# Nodes and the device that they serve on one machine with little memory: to make room the kernel writes pages of that
# device, and waits for the nodes to take them. More is written than there is memory, while others take what is left
# of it. It has to come to its end: without a hang, without an I/O error, and without a process that the kernel ends.
#
# $mib is the machine's memory, $write_mib what is written.

# The kernel's flag of processes that serve block I/O (PR_SET_IO_FLUSHER: PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE).
IO_FLUSHER=$((0x00080000 | 0x00100000))
is_flusher() {
    local stat
    stat=$(</proc/"$1"/stat)
    read -ra stat <<<"${stat##*) }"
    [ $((stat[6] & IO_FLUSHER)) = $IO_FLUSHER ]
}
locked_kib() { sed -n 's/^VmLck:[^0-9]*\([0-9]*\) kB/\1/p' "/proc/$1/status"; }
holds_memory() {
    is_flusher "$1" || die "process $1 ($2) is not marked as serving block I/O"
    [ "$(locked_kib "$1")" -gt 0 ] || die "process $1 ($2) has no memory locked"
}
free_kib() { sed -n 's/^MemAvailable: *\([0-9]*\) kB/\1/p' /proc/meminfo; }

cluster 1G
map
holds_memory "${pids[0]}" n1
holds_memory "${pids[1]}" n2
holds_memory "$keeper" "the keeper"
# What is not theirs must not be locked or marked, or the check says nothing.
! is_flusher $$ && [ "$(locked_kib $$)" = 0 ] || die "the shell is marked, too"
mkfs.ext4 -q $device
mount $device /mnt
# All but a little of what is free, touched again and again, so that the kernel always looks for room.
hog=$(($(free_kib) / 1024 - 90))
[ $hog -gt 50 ] || die "there is no memory to be eaten: $(free_kib) KiB"
stress --quiet --vm 1 --vm-bytes ${hog}M --vm-hang 1 --timeout 300 >/root/stress.log 2>&1 &
hogging=$!
begun=$SECONDS least=$(free_kib)
dd if=/dev/urandom of=/tmp/pattern bs=1M count=1 status=none
(
    dd if=/dev/zero of=/mnt/file bs=1M count=$((write_mib - 1)) conv=fsync
    dd if=/tmp/pattern of=/mnt/file bs=1M seek=$((write_mib - 1)) conv=notrunc,fsync
) >/root/dd.log 2>&1 &
writing=$!
while kill -0 $writing 2>/dev/null; do
    tick
    now=$(free_kib)
    [ "$now" -ge "$least" ] || least=$now
    [ $((SECONDS - begun)) -lt 200 ] || die "the writer hangs: $(</root/dd.log)"
done
wait $writing || die "the writer: $(</root/dd.log)"
kill -0 $hogging || die "who takes memory has ended: $(</root/stress.log)"
kill $hogging
wait $hogging || true
[ "$least" -lt $((mib * 1024 / 3)) ] || die "at least $least KiB were available: that is no pressure"
echo "$write_mib MiB in $((SECONDS - begun)) s in a machine of $mib MiB, of which $least KiB were available" \
    "at the least"
for pid in "${pids[@]}" "$keeper"; do kill -0 "$pid" || die "process $pid has ended"; done
! dmesg | grep -E 'Out of memory|oom-kill|I/O error|allocation failure' >/tmp/said || die "the kernel: $(</tmp/said)"
quick 60 umount /mnt
quick 30 mount $device /mnt
[ "$(stat -c %s /mnt/file)" = $((write_mib << 20)) ] || die "the file has another length"
cmp <(dd if=/mnt/file bs=1M skip=$((write_mib - 1)) status=none) /tmp/pattern || die "the file has other content"
quick 30 umount /mnt
unmap >/dev/null
end_cluster
kernel_is_well
