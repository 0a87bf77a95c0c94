# Nodes and the device that they serve on one machine with little memory: to make room the kernel writes pages of that
# device, and waits for the nodes to take them. More is written than there is memory, while others take what is left
# of it. It has to come to its end: without a hang, without an I/O error, and without an end of a process of ours.
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
# All but a little of what is free, kept and touched again and again, so that the kernel always looks for room.
hog=$(($(free_kib) / 1024 - 100))
[ $hog -gt 50 ] || die "there is no memory to be eaten: $(free_kib) KiB"
stress --quiet --vm 1 --vm-bytes ${hog}M --vm-keep --vm-hang 1 --timeout 300 >/root/stress.log 2>&1 &
hogging=$!
is_eaten() { [ "$(free_kib)" -lt $((144 << 10)) ]; }
within 60 is_eaten
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
# It is the largest of all, so that it is the one that a kernel without memory ends.
kill $hogging 2>/dev/null || echo "the kernel ended who took the memory"
wait $hogging || true
[ "$least" -lt $((112 << 10)) ] || die "at least $least KiB were available: that is no pressure"
echo "$write_mib MiB in $((SECONDS - begun)) s in a machine of $mib MiB, at the least $least KiB were available"
for pid in "${pids[@]}" "$keeper"; do kill -0 "$pid" || die "process $pid has ended"; done
dmesg >/tmp/kernel
! grep -E 'Out of memory|I/O error' /tmp/kernel | grep -v '(stress)' >/tmp/said || die "the kernel: $(</tmp/said)"
quick 60 umount /mnt
quick 30 mount $device /mnt
[ "$(stat -c %s /mnt/file)" = $((write_mib << 20)) ] || die "the file has another length"
cmp <(dd if=/mnt/file bs=1M skip=$((write_mib - 1)) status=none) /tmp/pattern || die "the file has other content"
quick 30 umount /mnt
unmap >/dev/null
end_cluster
# Its report of that, and of a packet that found no room and is sent again, has a trace in it.
grep -q -e 'Out of memory' -e 'page allocation failure.*GFP_ATOMIC' /tmp/kernel || kernel_is_well
