#!/bin/busybox sh
# The test guest's first process: a stock kernel, busybox and our own small programs. It takes its
# orders from the kernel's command line (`strake.ip=ADDRESS/BITS`) and then from whoever connects
# to its port 1000, where a shell answers: its host alone can reach it.
/bin/busybox --install -s /bin
export PATH=/strake:/usr/bin:/bin:/usr/sbin:/sbin HOME=/
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /tmp /run /mnt
mount -t devpts devpts /dev/pts
mount -t tmpfs tmp /tmp
hostname guest
while read -r module; do
    insmod "$module" || echo "guest: $module did not load"
done </guest/modules
for block in /sys/block/vd*; do
    [ -e "$block/serial" ] || continue
    mkdir -p /dev/disks
    ln -sf "/dev/${block##*/}" "/dev/disks/$(cat "$block/serial")"
done
ip link set lo up
for word in $(cat /proc/cmdline); do
    case $word in
    strake.ip=*)
        ip addr add "${word#strake.ip=}" dev eth0
        ip link set eth0 up ;;
    esac
done
# The power button asks for an orderly end.
mkdir -p /etc/acpi/PWRF
printf '#!/bin/sh\necho "guest: power button" >/dev/console\nsync\npoweroff -f\n' >/etc/acpi/PWRF/00000080
chmod 755 /etc/acpi/PWRF/00000080
acpid -l /tmp/acpid.log
nc -ll -p 1000 -e /bin/sh >/dev/null 2>&1 &
read -r uptime _ </proc/uptime
echo "guest: ready after $uptime s, $(nproc) vCPUs"
# The console answers too.
while :; do
    setsid cttyhack sh
done
