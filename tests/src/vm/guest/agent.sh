#!/bin/sh
# Runs the commands of a guest's host. Each line from the host is the number of a command, NUMBER.cmd in the shared
# directory, and its limit in seconds; when it has ended, its output and then its exit code lie beside it. Commands run
# side by side.
#
# It never judges what it runs: the limit is kept by `timeout`, whose exit code tells.
dir=/host/vm
word() {
    for pair in $(cat /proc/cmdline); do
        case $pair in "$1="*) echo "${pair#*=}" ;; esac
    done
}
export PATH=/host/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/lib/postgresql/15/bin
export HOME=/root LANG=C.UTF-8
cd /root || exit 1
ulimit -n 65536
ulimit -l unlimited
requests=/dev/$(word vm.requests)
# What is written there reaches the host at once, also if the machine dies right after.
ln -sf "$(word vm.log)" /dev/vm-log
# Open from here on: what arrives while nobody has the line open is lost.
exec 3<"$requests"
stty raw -echo <&3
stty -F /dev/vm-log raw
mkdir -p /run/vm

# Few programs, since starting one is what costs most here. Output goes to the host when it is complete: a file that
# somebody has open reaches a shared directory late. The line's end shows the host that the exit code is whole.
serve() {
    timeout --kill-after=5 "$2" bash "$dir/$1.cmd" </dev/null >"/run/vm/$1.out" 2>"/run/vm/$1.err"
    code=$?
    cp "/run/vm/$1.out" "/run/vm/$1.err" "$dir/"
    echo $code >"$dir/$1.code"
    rm "/run/vm/$1.out" "/run/vm/$1.err"
}

# This boot's name, so that no answer of an earlier one is taken for its own.
word vm.boot >"$dir/ready"
while read -r number seconds <&3; do
    # Twice in the background: whoever is the machine's first program reaps them.
    (serve "$number" "$seconds" 3<&- &)
done
