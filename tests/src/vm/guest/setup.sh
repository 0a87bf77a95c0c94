#!/bin/sh
# What a quick boot of a guest sets up before its agent starts: the file systems that systemd would mount, and
# the loopback interface.
mount -o remount,rw /
for dir in /run /tmp; do mount -t tmpfs -o mode=1777,size=75% tmpfs $dir; done
mkdir -p /dev/pts /dev/shm /run/lock /run/postgresql
chown postgres:postgres /run/postgresql
mount -t devpts -o gid=5,mode=620 devpts /dev/pts
mount -t tmpfs -o mode=1777,size=75% tmpfs /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null
ln -sf /proc/self/fd /dev/fd
ln -sf /proc/self/fd/0 /dev/stdin
ln -sf /proc/self/fd/1 /dev/stdout
ln -sf /proc/self/fd/2 /dev/stderr
ip link set lo up
# Their device nodes are there only with them: nobody else makes nodes here.
modprobe -a loop fuse
hostname vm
