# Makes one host of a test world, from the inside of its new namespaces, and becomes its first process.
#
# Run by tests/support/hosts.py:   bash hosts_boot.sh FOLDER NAME SHM_MIB LINKS HIDE SHARE
# LINKS are words "eth0=10.77.0.11/24,fd77::11/64", HIDE folders that the host must not see, SHARE "outside=inside" folders
# that it sees read-only. The outer /proc is still mounted here, so this pid is the one that the outside knows.
set -euo pipefail
folder=$1 name=$2 shm_mib=$3 links=$4 hide=$5 share=$6
root=$folder/root

mount -t overlay overlay -o "lowerdir=/,upperdir=$folder/upper,workdir=$folder/work" "$root"
mount -t sysfs -o ro,nosuid,nodev,noexec sysfs "$root/sys"
mount -t tmpfs -o mode=755,nosuid dev "$root/dev"
for device in null:3 zero:5 full:7 random:8 urandom:9; do
    mknod -m 666 "$root/dev/${device%:*}" c 1 "${device#*:}"
done
mknod -m 666 "$root/dev/tty" c 5 0
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
ln -s fd/0 "$root/dev/stdin"
ln -s fd/1 "$root/dev/stdout"
ln -s fd/2 "$root/dev/stderr"
mount -t tmpfs -o "mode=1777,size=${shm_mib}m" shm "$root/dev/shm"
mount -t tmpfs -o mode=1777 tmp "$root/tmp"
mount -t tmpfs -o mode=755 run "$root/run"
# What is shared is taken before anything is hidden, and put in place after.
number=0
for pair in $share; do
    number=$((number + 1))
    mkdir -p "$root/run/share/$number"
    mount --bind -o ro "${pair%%=*}" "$root/run/share/$number"
done
for place in $hide; do
    [ -d "$root$place" ] && mount -t tmpfs -o mode=755 hidden "$root$place"
done
mount --bind "$folder/disk/root" "$root/root"
mount --bind "$folder/disk/home" "$root/home"
number=0
for pair in $share; do
    number=$((number + 1))
    mkdir -p "$root${pair#*=}"
    mount --move "$root/run/share/$number" "$root${pair#*=}" 2>/dev/null ||
        mount --bind -o ro "$root/run/share/$number" "$root${pair#*=}"
done
hostname "$name"
read -r pid _ </proc/self/stat
echo "$pid" >"$folder/pid.new"
mv "$folder/pid.new" "$folder/pid"
mount -t proc -o nosuid,nodev,noexec proc "$root/proc"

ip link set lo up
for link in $links; do
    device=${link%%=*}
    until [ -e "$root/sys/class/net/$device" ]; do sleep 0.01; done
    ip link set "$device" up
    for address in $(tr , ' ' <<<"${link#*=}"); do
        case $address in
            *:*) ip addr add "$address" dev "$device" nodad || true ;; # a kernel may be without IPv6
            *) ip addr add "$address" dev "$device" ;;
        esac
    done
done
mkdir -p "$root/run/sshd" "$root/run/lock"
cd "$root"
exec chroot "$root" /bin/bash -c '
exec </dev/null >>/var/log/boot.log 2>&1
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
[ -x /usr/sbin/cron ] && [ -d /etc/cron.d ] && /usr/sbin/cron
/usr/sbin/sshd -D -e -f /etc/ssh/sshd_config 2>>/var/log/sshd.log &
while :; do sleep 3600 & wait "$!"; done
'
