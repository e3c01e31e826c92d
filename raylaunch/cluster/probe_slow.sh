# The part of the probe that takes longest: GPUs, and whether packages can be fetched. Functions only;
# probe_script.sh follows behind it, and runs them beside the rest.

GPU_FIELDS=index,uuid,name,memory.total,memory.used,utilization.gpu
MORE_GPU_FIELDS=driver_version,pci.bus_id,compute_cap,compute_mode,mig.mode.current,ecc.errors.uncorrected.volatile.total

gpu_sections() {
    section gpu_hardware gpu_hardware
    smi=$(command -v nvidia-smi) || return
    section gpu_query gpu_query
    section gpu_apps gpu_apps
    section gpu_list gpu_list
    section gpu_version gpu_version
    section xid xid
}

gpu_hardware() {
    for device in /sys/bus/pci/devices/*; do
        [ "$(contents "$device/vendor")" = 0x10de ] || continue
        case $(contents "$device/class") in 0x0300* | 0x0302*) fact pci "${device##*/}" "$(contents "$device/device")" ;; esac
    done
    fact module "$(contents /proc/driver/nvidia/version)"
    fact smi "$(command -v nvidia-smi)"
}

ask_smi() { # a driver that hangs does so each time: asked once, not five times
    [ -z "${smi_hangs-}" ] || return 124
    within 10 "$smi" "$@"
    status=$?
    [ "$status" -eq 124 ] && smi_hangs=yes
    return "$status"
}

gpu_query() {
    answer=$(ask_smi "--query-gpu=$GPU_FIELDS,$MORE_GPU_FIELDS" --format=csv,nounits 2>&1) ||
        answer=$(ask_smi "--query-gpu=$GPU_FIELDS" --format=csv,nounits 2>&1)
    status=$?
    printf '%s\n' "$answer"
    return "$status"
}

gpu_apps() {
    answer=$(ask_smi --query-compute-apps=gpu_uuid,pid,used_memory,process_name --format=csv,nounits) || return
    printf '%s\n' "$answer" | sed 's/^/app\t/'
    printf '%s\n' "$answer" | awk -F', *' 'NR > 1 { print $2 }' | sort -u | while read -r pid; do
        case $pid in *[!0-9]* | '') continue ;; esac
        ours=no
        within 2 grep -qsa '^RAYLAUNCH_\|RAYLAUNCH_NODE_ROOT=' "/proc/$pid/environ" && ours=yes
        fact pid "$pid" "$(owner_of "$pid")" "$ours"
    done
}

gpu_list() { ask_smi -L; }

gpu_version() {
    ask_smi --version 2>/dev/null | grep -i 'cuda.*version' || ask_smi 2>/dev/null | grep -i 'cuda.*version'
}

xid() { # the kernel's log may be closed to users: then nothing is known, and the status says so
    text=$(within 3 dmesg 2>/dev/null) || {
        case " $(id -Gn) " in *' root '* | *' adm '* | *' systemd-journal '*) ;; *) return 1 ;; esac
        text=$(within 4 journalctl -k -b -q --no-pager -o cat -g 'NVRM: Xid' 2>/dev/null) || [ -z "$text" ]
    }
    printf '%s\n' "$text" | grep 'NVRM: Xid' | tail -n 20
    return 0
}

# Whether packages can be had here is asked of the tool that would fetch them: it knows its own index, proxies,
# certificates and credentials.
index() {
    for python in "$named_python" python3 python3.10 python3.11 python3.12 python3.13 python3.14; do
        [ -n "$python" ] && has "$python" || continue
        within 3 "$python" -c 'import pip' >/dev/null 2>&1 || continue
        answer=$(within 10 "$python" -m pip --no-input --disable-pip-version-check --no-cache-dir \
            index versions --retries 0 --timeout 7 pip 2>&1)
        case $? in
            0) fact reached pip && return ;;
            124) answer='no answer within 10 s' ;;
        esac
        case $answer in *'unknown command'*) continue ;; esac # pip before 21.2
        refused pip "$answer"
        return
    done
    has uv || return 1
    answer=$(echo pip | within 10 uv pip compile --quiet --no-cache --no-header --no-annotate - 2>&1)
    case $? in
        0) fact reached uv ;;
        124) refused uv 'no answer within 10 s' ;;
        *) refused uv "$answer" ;;
    esac
}

refused() { # TOOL ANSWER: its last words, without the credentials that an index's address may bear
    fact refused "$1" "$(printf '%s\n' "$2" | grep -v '^WARNING: pip index is currently' | sed 's#//[^/@]*@#//***@#g' |
        tail -n 6 | head -c 2000)"
}
