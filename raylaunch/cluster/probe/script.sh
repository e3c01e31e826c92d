# What a host is and has, in one go: cat probe_*.sh | sh -s -- MARK ROOT STORE ENVIRONMENT
#
# Plain POSIX sh, without Python (one that is found is only asked what it is), and changes nothing. Everything that can
# hang runs under a limit, and all together under BUDGET seconds. Each section stands between two lines that bear MARK,
# so that what a login shell prints is no part of it; raylaunch/cluster/probe/probe.py reads them.
# A lost connection cuts the text off before its last line, and then nothing runs.

BUDGET=20
LONGEST_TEXT=65536
TAB=$(printf '\t')
NEWLINE='
'

main() {
    mark=$1
    set +e +u
    umask 077
    LC_ALL=C
    PATH=$PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:$HOME/.local/bin
    export LC_ALL PATH
    root=$(absolute "${2:-.raylaunch}")
    store=$(absolute "${3:-$root}")
    named_python=$(python_of "$4")
    user=$(id -un)
    uid=$(id -u)
    now
    deadline=$((seconds + BUDGET))

    section clock_first clock
    # What is slow runs beside the rest; its words wait in a pipe, so that no file is needed on the host.
    section index index </dev/null | {
        exec 4<&0
        gpu_sections </dev/null | {
            quick_sections </dev/null
            cat
        }
        cat <&4
    }
    section clock_last clock
    printf '@@%s complete\n' "$mark"
}

absolute() { # PATH: as it is meant on the host
    case $1 in
        /*) printf '%s' "$1" ;;
        '~') printf '%s' "$HOME" ;;
        '~'/*) printf '%s' "$HOME/${1#??}" ;;
        *) printf '%s' "$HOME/$1" ;;
    esac
}

quick_sections() {
    section system system
    section user user
    section names names
    section pythons pythons
    section tools tools
    section memory memory
    section disks disks
    section mounts mounts
    section shared shared
    section ntp ntp
    section ports ports
    section rays rays
    section clusters clusters
    section proxies proxies
    section interfaces interfaces
    section infiniband infiniband
    section services services
    section limits limits
}

section() { # NAME COMMAND: what the command prints, between two marked lines; the second bears its exit status
    printf '\n@@%s begin %s\n' "$mark" "$1"
    "$2" 2>&1
    printf '\n@@%s end %s %s\n' "$mark" "$1" "$?"
}

within() { # SECONDS COMMAND…: exit status 124 when the limit ends it, or no time is left
    limit=$1
    shift
    now
    left=$((deadline - seconds))
    [ "$left" -lt "$limit" ] && limit=$left
    [ "$limit" -gt 0 ] || return 124
    if has timeout; then
        timeout -k 1 "$limit" "$@"
    else
        within_without_timeout "$limit" "$@"
    fi
}

within_without_timeout() (
    limit=$1
    shift
    "$@" &
    child=$!
    (sleep "$limit" && kill -9 "$child") >/dev/null 2>&1 &
    guard=$!
    wait "$child"
    status=$?
    kill "$guard" 2>/dev/null
    [ "$status" -eq 137 ] && status=124
    exit "$status"
)

now() { # seconds of some clock that nobody sets; without a fork, for it is asked often
    if read -r seconds _ 2>/dev/null </proc/uptime; then seconds=${seconds%%.*}; else seconds=$(date +%s); fi
}

has() { command -v "$1" >/dev/null 2>&1; }

fact() { # NAME VALUE…: one line, its parts separated by tabs
    line=$1
    shift
    for value in "$@"; do
        case $value in *"$TAB"* | *"$NEWLINE"*) value=$(printf '%s' "$value" | tr '\t\n' '  ') ;; esac
        line=$line$TAB$value
    done
    printf '%s\n' "$line"
}

# A process costs more than most of what is asked here: what the shell can do itself, it does.

line_of() { # FILE: its first line, or nothing, in `line`
    line=
    [ -r "$1" ] && read -r line <"$1" 2>/dev/null
    return 0
}

contents() { # FILE: the same, printed
    line_of "$1"
    printf '%s' "$line"
}

clock() { date '+%s.%N'; }

system() {
    about=$(uname -srm)
    arch=${about##* } about=${about% *}
    fact uname "${about%% *}" "${about#* }" "$arch"
    [ -r /etc/os-release ] && grep -E '^(ID|VERSION_ID|PRETTY_NAME)=' /etc/os-release | while read -r line; do
        fact os "$line"
    done
    [ -r /etc/dgx-release ] && grep -E '^DGX_(NAME|PRETTY_NAME|SWBUILD_VERSION|OTA_VERSION)=' /etc/dgx-release |
        while read -r line; do fact dgx "$line"; done
    libc=$(getconf GNU_LIBC_VERSION 2>/dev/null) || libc=$(ldd --version 2>&1 | head -n 1)
    fact libc "$libc"
    line_of /proc/sys/kernel/random/boot_id
    fact boot "$line"
    line_of /etc/machine-id
    fact machine "$line"
    [ -e /.dockerenv ] && fact container docker
    [ -e /run/.containerenv ] && fact container podman
    fact selinux "$(getenforce 2>/dev/null || contents /sys/fs/selinux/enforce)"
    if [ -e /run/reboot-required ] || [ -e /var/run/reboot-required ]; then
        fact reboot yes "$(head -c 500 /run/reboot-required.pkgs /var/run/reboot-required.pkgs 2>/dev/null | sort -u)"
    elif [ -d /etc/apt ]; then
        fact reboot no
    fi
}

user() {
    fact user "$user" "$uid" "$HOME" "${SHELL-}" "$(umask)"
    groups=" $(id -Gn) "
    fact groups "$groups"
    fact ssh "${SSH_CONNECTION-}"
    # sudo is asked only where it may say yes: else its refusal is reported to the administrator as an incident.
    if [ "$uid" = 0 ]; then
        fact sudo root
    elif ! has sudo; then
        fact sudo no
    else
        case $groups in
            *' sudo '* | *' wheel '* | *' admin '* | *' root '*)
                if within 3 sudo -n true >/dev/null 2>&1; then fact sudo yes; else fact sudo password; fi ;;
        esac
    fi
}

names() {
    name=$(uname -n)
    fact hostname "$name"
    has getent || return 1
    found=$(within 4 getent ahosts "$name")
    status=$?
    fact resolved "$status"
    printf '%s\n' "$found" | awk 'NF { print $1 }' | sort -u | while read -r address; do fact address "$address"; done
}

tools() {
    for name in bash tar sha256sum timeout uv conda mamba docker podman apptainer singularity enroot curl wget systemctl loginctl crontab; do
        has "$name" || continue
        path=$(command -v "$name")
        case $name in
            uv) fact uv "$path" "$(within 3 "$path" --version 2>/dev/null)" ;;
            docker) fact tool docker "$path" "$([ -w /var/run/docker.sock ] && echo usable)" ;;
            *) fact tool "$name" "$path" ;;
        esac
    done
    for path in "$HOME"/*conda3/bin/conda "$HOME"/*forge*/bin/conda /opt/*/bin/conda; do
        [ -x "$path" ] && fact tool conda "$path"
    done
}

memory() {
    grep -E '^(MemTotal|MemAvailable|SwapTotal):' /proc/meminfo | while read -r name amount unit; do
        fact "${name%:}" "$amount" "$unit"
    done
    fact cpus "$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"
    group=$(sed -n 's/^0:://p' /proc/self/cgroup 2>/dev/null)
    while [ -n "$group" ]; do
        line_of "/sys/fs/cgroup$group/memory.max"
        most=$line
        line_of "/sys/fs/cgroup$group/cpu.max"
        fact limit "$most" "$line"
        [ "$group" = / ] && break
        group=${group%/*}
        group=${group:-/}
    done
    [ -r /sys/fs/cgroup/memory/memory.limit_in_bytes ] &&
        fact limit "$(contents /sys/fs/cgroup/memory/memory.limit_in_bytes)" ''
    return 0
}

disks() {
    set --
    for place in "home $HOME" "root $root" "store $store" "tmp ${TMPDIR:-/tmp}" "raytmp /tmp" "shm /dev/shm"; do
        wanted=${place#* }
        path=$wanted
        while [ ! -e "$path" ] && [ "$path" != / ] && [ -n "$path" ]; do
            case $path in */*) path=${path%/*} ;; *) path= ;; esac
            path=${path:-/}
        done
        writable=no
        [ -w "$path" ] && writable=yes
        fact disk "${place%% *}" "$wanted" "$path" "$writable"
        case "$TAB$*$TAB" in *"$TAB$path$TAB"*) ;; *) IFS=$TAB; set -- "$@" "$path" ;; esac
    done
    IFS=' '$TAB$NEWLINE
    space "$@" || for path in "$@"; do space "$path"; done
    return 0
}

space() { # PATH…: size, free, inodes; then who owns it. All at once, and one by one where one of them hangs
    within 4 stat -f -c "space$TAB%n$TAB%S$TAB%b$TAB%a$TAB%c$TAB%d" "$@" 2>/dev/null &&
        within 4 stat -c "owner$TAB%n$TAB%U$TAB%a$TAB%m" "$@" 2>/dev/null
}

mounts() { head -c "$LONGEST_TEXT" /proc/self/mounts; }

shared() {
    awk '$3 ~ /^(nfs4?|lustre|beegfs.*|gpfs|cifs|smb3|ceph|glusterfs|fuse\.(sshfs|glusterfs|ceph.*|juicefs)|wekafs|panfs|orangefs|afs|9p|virtiofs)$/ {
        print $3, $1, $2 }' /proc/self/mounts | head -n 20 | while read -r kind source path; do
        about=$(within 2 stat -c '%U %G %a' "$path" 2>/dev/null) || about=
        writable=
        [ -n "$about" ] && { if [ -w "$path" ]; then writable=yes; else writable=no; fi; }
        fact shared "$kind" "$source" "$path" "$about" "$writable"
    done
}

booted_by_systemd() { [ -d /run/systemd/system ]; } # as sd_booted(3) finds it out; else its programs only fail

ntp() {
    if booted_by_systemd && has timedatectl; then
        synced=$(within 3 timedatectl show -p NTPSynchronized --value 2>/dev/null) && [ -n "$synced" ] &&
            { fact synced "$synced"; return; }
    fi
    if has chronyc; then
        within 3 chronyc -n tracking 2>/dev/null | grep -q '^Leap status *: Normal' && { fact synced yes; return; }
    fi
    return 1
}

ports() {
    read -r first last </proc/sys/net/ipv4/ip_local_port_range
    fact ephemeral "$first $last"
    cat /proc/net/tcp /proc/net/tcp6 2>/dev/null |
        awk '$4 == "0A" { n = split($2, part, ":"); if (!seen[part[n]]++) print "listens\t" part[n] }'
    has ss || return 0
    within 4 ss -ltnpH 2>/dev/null | # root sees every holder, others see their own
        sed -nE 's/^LISTEN +[0-9]+ +[0-9]+ +[^ ]*:([0-9]+) .*users:\(\("([^"[:cntrl:]]*)",pid=([0-9]+).*/\1 \3 \2/p' |
        sort -u | while read -r port pid program; do
        fact holder "$port" "$pid" "$program"
    done
}

owner_of() { within 2 stat -c %U "/proc/$1" 2>/dev/null; }

rays() {
    for folder in /proc/[0-9]*; do
        comm=
        read -r comm <"$folder/comm" 2>/dev/null
        case $comm in raylet | gcs_server) ;; *) continue ;; esac
        pid=${folder#/proc/}
        cluster=$(within 2 cat "$folder/environ" 2>/dev/null | tr '\0' '\n' | sed -n 's/^RAYLAUNCH_CLUSTER_ID=//p')
        fact ray "$pid" "$comm" "$(owner_of "$pid")" "$cluster" "$(within 2 cat "$folder/cmdline" 2>/dev/null |
            tr '\0' '\n' | sed -nE 's/^--?((gcs_server|node_manager|object_manager|min_worker|max_worker|metrics-agent)_port|temp[-_]dir|session_dir|gcs-address|node_ip_address|node-ip-address)=/\1=/p')"
    done
    return 0
}

# A cluster of raylaunch: its controller runs, or its record lies below our own root.
clusters() {
    within 4 grep -lsa raylaunch.controller /proc/[0-9]*/cmdline | while read -r file; do
        config=$(tr '\0' '\n' <"$file" 2>/dev/null | awk 'before == "--config" { print; exit } { before = $0 }')
        case $config in */controller.json) ;; *) continue ;; esac
        pid=${file#/proc/}
        pid=${pid%/cmdline}
        fact cluster "$pid" "$(owner_of "$pid")" "${config%/controller.json}" "$(record "${config%/*}/cluster.json")" "$(since "$pid")"
    done
    for file in "$root"/clusters/*/cluster.json; do
        [ -e "$file" ] && fact cluster '' "$user" "${file%/cluster.json}" "$(record "$file")"
    done
    return 0
}

since() { # PID: when it was started
    age=$(within 2 ps -o etimes= -p "$1" 2>/dev/null | tr -d ' ')
    [ -n "$age" ] && echo $(($(date +%s) - age))
}

record() { [ -r "$1" ] && head -c "$LONGEST_TEXT" "$1" | tr -d '\n'; }

proxies() {
    env | grep -iE '^(https?|all|no)_proxy=' | sed 's#=\([a-z]*://\)\{0,1\}.*@#=\1***@#' | while read -r line; do fact proxy "$line"; done
    return 0
}

interfaces() {
    for folder in /sys/class/net/*; do
        [ -e "$folder/mtu" ] || continue
        kind=virtual
        [ -e "$folder/device" ] && kind=physical
        [ -d "$folder/bonding" ] && kind=bond
        [ -d "$folder/bridge" ] && kind=bridge
        [ -d "$folder/wireless" ] && kind=wireless
        set -- "${folder##*/}" "$kind"
        for name in type operstate mtu speed; do
            line_of "$folder/$name"
            set -- "$@" "$line"
        done
        fact interface "$@"
    done
    if has ip; then
        ip -o addr show 2>/dev/null | awk '{ print $2, $4 }' | while read -r name address; do
            fact address "${name%%@*}" "$address"
        done
        { ip -4 route show default; ip -6 route show default; } 2>/dev/null |
            sed -n 's/.* dev \([^ ]*\).*/\1/p' | sort -u | while read -r name; do fact default "$name"; done
    else
        for address in $(within 3 hostname -I 2>/dev/null); do fact address '' "$address"; done
        awk '$2 == "00000000" { print $1 }' /proc/net/route | sort -u | while read -r name; do fact default "$name"; done
    fi
}

infiniband() {
    for port in /sys/class/infiniband/*/ports/*; do
        [ -e "$port/state" ] || continue
        device=${port%/ports/*}
        fact infiniband "${device##*/}" "${port##*/}" "$(contents "$port/state")" "$(contents "$port/rate")" \
            "$(contents "$port/link_layer")" "$(ls "$device/device/net" 2>/dev/null)"
    done
    return 0
}

services() {
    line_of /proc/1/comm
    fact init "$line"
    if booted_by_systemd && has systemctl; then
        [ -z "${XDG_RUNTIME_DIR-}" ] && [ -d "/run/user/$uid" ] && export XDG_RUNTIME_DIR="/run/user/$uid"
        fact user_manager "$(within 3 systemctl --user is-system-running 2>&1 | tail -n 1)"
    fi
    if booted_by_systemd && has loginctl; then
        fact linger "$(within 3 loginctl show-user "$user" -p Linger --value 2>/dev/null)"
    fi
    [ -e "/var/lib/systemd/linger/$user" ] && fact linger yes
    if has crontab; then
        answer=$(within 3 crontab -l 2>&1 >/dev/null) && answer=
        case $answer in *'not allowed'*) fact crontab no ;; *) fact crontab yes ;; esac
    fi
    for file in /proc/[0-9]*/comm; do
        comm=
        read -r comm <"$file" 2>/dev/null
        case $comm in cron | crond | fcron | dcron) fact cron "$comm" ; break ;; esac
    done
    return 0
}

limits() {
    fact nofile "$(ulimit -Sn)" "$(ulimit -Hn)"
    fact processes "$(ulimit -Su 2>/dev/null || ulimit -Sp 2>/dev/null)"
    fact memlock "$(ulimit -Sl 2>/dev/null)"
}

main "$@"
