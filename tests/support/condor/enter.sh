#!/bin/sh
# The first process of a pool's own mount, PID, IPC and UTS namespaces: enter.sh ROOT DIRECTORY JOBS USER [MORE...]
# ROOT is a Debian with HTCondor, which is not changed; DIRECTORY has condor.conf; JOBS is mounted at the same
# path, and belongs to the user with the number USER; each of MORE, SOURCE:PLACE, is mounted at its place, read-only.
set -e
root=$1 directory=$2 jobs=$3 user=$4
shift 4

mount --make-rprivate /
hostname condorpool # a name that its /etc/hosts knows; else each daemon looks it up for a minute
mkdir "$directory/root"
mount -t tmpfs -o mode=755 tmpfs "$directory/root"
mkdir "$directory/root/upper" "$directory/root/work" "$directory/root/all"
all=$directory/root/all
mount -t overlay -o "lowerdir=$root,upperdir=$directory/root/upper,workdir=$directory/root/work" overlay "$all"

mount -t proc proc "$all/proc"
mount -t sysfs -o ro sysfs "$all/sys"
mount -t tmpfs -o mode=755 tmpfs "$all/dev"
for device in null zero full random urandom tty; do
    : >"$all/dev/$device"
    mount --bind "/dev/$device" "$all/dev/$device"
done
mkdir "$all/dev/shm" "$all/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$all/dev/shm"
mount -t devpts -o newinstance,ptmxmode=666 devpts "$all/dev/pts"
ln -s pts/ptmx "$all/dev/ptmx"
for link in fd fd/0:stdin fd/1:stdout fd/2:stderr; do
    ln -s "/proc/self/${link%:*}" "$all/dev/${link#*:}"
done
mount -t tmpfs -o mode=755 tmpfs "$all/run"
mkdir -p -m 1777 "$all/run/lock"
mkdir -p "$all$jobs"
mount --bind "$jobs" "$all$jobs"
for more in "$@"; do
    place=$all${more#*:}
    mkdir -p "$place"
    mount --bind "${more%%:*}" "$place"
    mount -o remount,bind,ro "$place"
done
echo 127.0.0.1 localhost condorpool >"$all/etc/hosts"
cp "$directory/condor.conf" "$all/etc/condor/config.d/50-test.config"

chroot "$all" useradd --create-home --uid "$user" pilotuser

mkdir "$all/.old"
cd "$all"
pivot_root . .old
umount -l /.old
cd /

install -d -o condor -g condor -m 775 /run/condor /run/lock/condor /var/lib/condor /var/log/condor /var/spool/condor
install -d -o condor -g condor -m 755 /var/lib/condor/execute
# Jobs inherit ignored signals: none may be ignored.
exec env -i --default-signal PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 condor_master -f
