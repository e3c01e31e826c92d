# The part of the probe that is about GPUs. Functions only: script.sh follows behind, and runs them.

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
        line_of "$device/vendor"
        [ "$line" = 0x10de ] || continue
        line_of "$device/class"
        case $line in 0x0300* | 0x0302*) fact pci "${device##*/}" "$(contents "$device/device")" ;; esac
    done
    line_of /proc/driver/nvidia/version
    fact module "$line"
    fact smi "$(command -v nvidia-smi)"
}

ask_smi() { # a driver that hangs does so each time: asked once, not five times
    [ -z "${smi_hangs-}" ] || return 124
    within 10 "$smi" "$@"
}

gpu_query() {
    answer=$(ask_smi "--query-gpu=$GPU_FIELDS,$MORE_GPU_FIELDS" --format=csv,nounits 2>&1)
    status=$?
    [ "$status" -eq 124 ] && smi_hangs=yes
    if [ "$status" -ne 0 ]; then # an older driver refuses the fields that it does not know
        retry=$(ask_smi "--query-gpu=$GPU_FIELDS" --format=csv,nounits 2>&1) && answer=$retry status=0
    fi
    printf '%s\n' "$answer"
    return "$status"
}

gpu_apps() {
    answer=$(ask_smi --query-compute-apps=gpu_uuid,pid,used_memory,process_name --format=csv,nounits) || return
    printf '%s\n' "$answer" | sed 's/^/app\t/'
    printf '%s\n' "$answer" | awk -F', *' 'NR > 1 { print $2 }' | sort -u | while read -r pid; do
        case $pid in *[!0-9]* | '') continue ;; esac
        ours=no
        within 2 grep -qsa 'RAYLAUNCH_NODE_ROOT=\|RAYLAUNCH_ATTEMPT_ID=\|RAYLAUNCH_CLUSTER_ID=' "/proc/$pid/environ" && ours=yes
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
