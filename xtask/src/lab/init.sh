#!/bin/busybox sh
# The lab's first process. It prepares a small Linux host, runs /lab/run once, reports on the
# control port (`up`, `beat`, `exit STATUS`), sends /out back as a tar and powers off.
/bin/busybox --install -s /bin
export PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm /tmp /run /out /root /var/tmp /var/lib /sys/fs/cgroup
mount -t devpts devpts /dev/pts
mount -t tmpfs tmp /dev/shm
mount -t cgroup2 cgroup /sys/fs/cgroup
ln -sf /proc/self/fd /dev/fd
hostname lab
while read -r module; do
    insmod "$module" $(cat "$module.parameters" 2>/dev/null) || echo "lab: $module did not load"
done </lab/modules

# Ports and disks are found by the names that the host gave them.
for port in /sys/class/virtio-ports/*; do
    ln -sf "/dev/${port##*/}" "/dev/lab-$(cat "$port/name")"
done
for block in /sys/block/vd*; do
    serial=$(cat "$block/serial")
    mkdir -p /dev/disks
    ln -sf "/dev/${block##*/}" "/dev/disks/$serial"
    case $serial in
    store-*)
        mkdir -p "/stores/${serial#store-}"
        mount -t ext4 -o noatime "/dev/${block##*/}" "/stores/${serial#store-}" ;;
    esac
done
[ -e /dev/net/tun ] || { mkdir -p /dev/net; mknod /dev/net/tun c 10 200; }
ip link set lo up
echo 1 >/proc/sys/kernel/printk

exec 3>/dev/lab-control
echo up >&3
(while sleep 3; do echo beat >&3; done) &
cd /root
setsid /lab/run </dev/null >/dev/lab-output 2>&1 3>&-
status=$?
echo "ended $status" >&3
tar -c -f /dev/lab-files -C /out .
echo "exit $status" >&3
sync
poweroff -f
