#!/bin/bash
# A stand-in for nvidia-smi on a test host. It answers from tables in /etc/nvidia-smi, written by support.fittings:
# gpus.csv (first line: names of fields; values with units), apps.csv, list (what -L prints), plain (what it prints
# without arguments); `says` and `status` make it fail, `hangs` makes it hang.
tables=/etc/nvidia-smi
[ ! -e $tables/hangs ] || sleep 86400
if [ -e $tables/says ]; then
    cat $tables/says
    exit "$(cat $tables/status)"
fi
query='' table='' format=csv only=''
while [ $# -gt 0 ]; do
    case $1 in
        --query-gpu=*) query=${1#*=} table=gpus.csv ;;
        --query-compute-apps=*) query=${1#*=} table=apps.csv ;;
        --format=*) format=${1#*=} ;;
        -i | --id) only=$2; shift ;;
        --id=*) only=${1#*=} ;;
        -L | --list-gpus) exec cat $tables/list ;;
        --version) exec cat $tables/version ;;
        *) echo "Invalid combination of input arguments. Please run 'nvidia-smi -h' for help." ; exit 6 ;;
    esac
    shift
done
[ -n "$query" ] || exec cat $tables/plain
exec awk -F', ' -v query="$query" -v format="$format" -v only="$only" '
NR == 1 { for (i = 1; i <= NF; i++) column[$i] = i
    count = split(query, wanted, /, */)
    for (i = 1; i <= count; i++) if (!(wanted[i] in column)) {
        printf "Field \"%s\" is not a valid field to query.\n", wanted[i]; exit 2 }
    if (format !~ /noheader/) { line = ""
        for (i = 1; i <= count; i++) line = line (i > 1 ? ", " : "") wanted[i]
        print line }
    next }
{ if (only != "" && $column["index"] != only && $column["uuid"] != only) next
    line = ""
    for (i = 1; i <= count; i++) { value = $column[wanted[i]]
        if (format ~ /nounits/) sub(/ (MiB|%|W|MHz)$/, "", value)
        line = line (i > 1 ? ", " : "") value }
    print line }' "$tables/$table"
