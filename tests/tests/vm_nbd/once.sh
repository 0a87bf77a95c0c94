# A request that the kernel sends again, since its connection died, undoes nothing that was acknowledged in between.
# Counters go up in blocks of the device, while its primary, its keeper and its connections meet everything that the
# seed draws from; at the end the device has the last numbers, and both replicas have the same.
#
# $seed and $seconds are given.
RANDOM=$seed

node_pid() { jq -r ".nodes[] | select(.name == \"$1\").pid" "$home/cluster.json"; }
start_node() { blkrepl serve --config "$home/$1/node.toml" >>"/root/$1.log" 2>&1 & }
start_keeper() {
    blkrepl map $volume --node "127.0.0.1:${ports[1]}" --node "127.0.0.1:${ports[2]}" >>/root/map.log 2>&1 &
    keeper=$!
}
other() { echo n$((3 - ${1#n})); }
settled() { within 60 in_sync; within 30 has_primary; }

# Each begins with a primary and both replicas in sync, and leaves what heals by itself.
kill_primary() {
    local name
    name=$(primary_of n3)
    kill -KILL "$(node_pid "$name")"
    pause
    start_node "$name"
}
move_primary() {
    local name
    name=$(primary_of n3)
    quick 20 blkrepl --admin "$home/$name/admin.sock" move $volume --to "$(other "$name")" >/dev/null
}
# It comes back and must find that it is primary no more, though its socket is full of requests.
stop_primary() {
    local pid
    pid=$(node_pid "$(primary_of n3)")
    kill -STOP "$pid"
    tick
    for _ in $(seq 20); do tick; done
    kill -CONT "$pid"
}
# Stopped for less than its lease: it goes on where it was, and so does the device.
blink_primary() {
    local pid
    pid=$(node_pid "$(primary_of n3)")
    kill -STOP "$pid"
    tick
    kill -CONT "$pid"
}
cut_connections() { within 20 try_to_cut; }
kill_keeper() {
    lose_keeper
    pause
    start_keeper
}
# Nobody watches the device while its primary goes.
kill_keeper_and_primary() {
    local name
    name=$(primary_of n3)
    lose_keeper "$(node_pid "$name")"
    pause
    start_keeper
    start_node "$name"
}
kill_secondary() {
    local name
    name=$(other "$(primary_of n3)")
    kill -KILL "$(node_pid "$name")"
    pause
    start_node "$name"
}
pause() { for _ in $(seq $((RANDOM % 8))); do tick; done; }

FAULTS=(kill_primary move_primary stop_primary blink_primary kill_keeper kill_keeper_and_primary kill_secondary)

writes() { read -ra stat </sys/block/${device#/dev/}/stat && echo "${stat[4]}"; }
goes_on() { [ "$(writes)" -gt "$1" ]; }

cluster 64M
modprobe nbd nbds_max=2
map
# Behind everything else: there is one processor, and the faults are to come soon.
nice -n 19 counters $device 6 /tmp/end >/tmp/said 2>&1 &
counting=$!
end=$((SECONDS + seconds)) faults='' count=0
# Once each in an order that is drawn, and then as long as there is time; the one that takes longest last, once.
order=$(printf '%s\n' "${FAULTS[@]}" | while read -r name; do echo "$RANDOM $name"; done | sort -n | cut -d ' ' -f 2)
while [ $count -lt ${#FAULTS[@]} ] || [ $SECONDS -lt $end ]; do
    fault=$(sed -n "$((count % ${#FAULTS[@]} + 1))p" <<<"$order")
    $fault
    count=$((count + 1)) faults="$faults $fault"
    settled
    kill -0 $counting || die "after$faults: $(</tmp/said)"
    within 30 goes_on "$(writes)"
done
cut_connections
within 40 goes_on "$(writes)"
touch /tmp/end
within 30 no_process $counting
wait $counting || die "after$faults cut_connections: $(</tmp/said)"
echo "$(</tmp/said); seed $seed:$faults cut_connections"
settled
blkrepl mapped --json | jq -r '.[0] | "reconnected \(.reconnects) times, the last time in \(.last_reconnect_ms) ms"'
unmap >/dev/null
end_cluster
kill -TERM $(jobs -p) 2>/dev/null || true
for name in n1 n2 n3; do within 20 no_process "$(node_pid $name)"; done
cmp $home/n1/vol0.data $home/n2/vol0.data || die "the replicas differ after$faults cut_connections"
kernel_is_well
