# The part of the probe that is about Python and packages. Functions only: script.sh follows behind, and runs them.

# One line for each: path, real path, version, release level, implementation, 64 bits, in an environment, venv,
# ensurepip, pip, conda, free-threaded, platform.
PYTHON='
import os, sys
def found(name):
    try:
        from importlib.machinery import PathFinder
        return int(PathFinder.find_spec(name) is not None)
    except Exception:
        return 0
try:
    if sys.platform.startswith("linux"):
        platform = "linux-" + os.uname()[4]
    else:
        import sysconfig
        platform = sysconfig.get_platform()
except Exception:
    platform = ""
facts = [sys.argv[1], os.path.realpath(sys.executable), "%d.%d.%d" % sys.version_info[:3], sys.version_info[3],
         sys.implementation.name, int(sys.maxsize > 2**32), int(sys.prefix != sys.base_prefix), found("venv"),
         found("ensurepip"), found("pip"), int(os.path.isdir(os.path.join(sys.prefix, "conda-meta"))),
         int("t" in getattr(sys, "abiflags", "")), platform]
print("\t".join(["python"] + [str(fact) for fact in facts]))
'

python_of() { # ENVIRONMENT: the interpreter of venv:PATH, conda:NAME, or a path of either; nothing for nothing
    path=$1
    case $path in
        '') return ;;
        venv:*) path=${path#venv:} ;;
        conda:*)
            name=${path#conda:}
            for path in "$name" "$HOME"/*conda3/envs/"$name" "$HOME"/*forge*/envs/"$name" "$HOME"/.conda/envs/"$name" \
                /opt/*/envs/"$name"; do
                [ -x "$path/bin/python" ] && break
            done ;;
    esac
    path=$(absolute "$path")
    [ -d "$path" ] && path=$path/bin/python
    printf '%s' "$path"
}

python_paths() {
    for name in python3 python3.10 python3.11 python3.12 python3.13 python3.14 python; do command -v "$name"; done
    for path in /usr/bin/python3.1? /usr/local/bin/python3.1? /opt/*/bin/python3 "$HOME"/.pyenv/versions/*/bin/python3 \
        "$HOME"/.local/share/uv/python/*/bin/python3 "$HOME"/*conda3/bin/python3 "$HOME"/*forge*/bin/python3; do
        [ -x "$path" ] && printf '%s\n' "$path"
    done
}

pythons() {
    fact named "$named_python"
    [ -n "$named_python" ] && { within 5 "$named_python" -I -c "$PYTHON" "$named_python" || fact unusable "$named_python" "$?"; }
    seen=:
    python_paths 2>/dev/null | while read -r path; do
        case $path in */shims/*) continue ;; esac # pyenv's shims are slow; what they stand for is found beside them
        real=$path
        [ -h "$path" ] && real=$(readlink -f "$path")
        case $seen in *":$real:"*) continue ;; esac
        seen=$seen$real:
        within 5 "$path" -I -c "$PYTHON" "$path" 2>/dev/null || fact unusable "$path" "$?"
    done
}

# Whether packages can be had here. Python asks the index that pip would ask, with pip's settings; to start pip itself
# takes ten times as long. Its own default is pip's to say, not ours, and stands in its source. Where there is no pip, uv
# is asked. What takes long to load is loaded only where it is needed: an air-gapped host is soon told.
INDEX='
import os, sys
told = dict((name[4:].lower().replace("_", "-"), value) for name, value in os.environ.items() if name[:4] == "PIP_")
def settings():
    home = os.path.expanduser("~")
    found = {}
    files = ["/etc/xdg/pip/pip.conf", "/etc/pip.conf", home + "/.pip/pip.conf", home + "/.config/pip/pip.conf",
             os.path.join(sys.prefix, "pip.conf"), told.get("config-file", "")]
    for path in files if told.get("config-file") != os.devnull else []:
        if not os.path.isfile(path):
            continue
        import configparser
        parser = configparser.RawConfigParser()
        try:
            parser.read(path)
            found.update(parser.items("global"))
        except (configparser.Error, UnicodeDecodeError):
            pass
    found.update(told)
    return found
def refused(error):
    said = str(getattr(error, "reason", "") or error) or type(error).__name__
    print("refused\tpip\t" + bare + "\t" + " ".join(said.split()))
    sys.exit()
chosen = settings()
url = os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("UV_INDEX_URL") or chosen.get("index-url")
def of_pip():
    from importlib.machinery import PathFinder
    for folder in getattr(PathFinder.find_spec("pip"), "submodule_search_locations", None) or ():
        try:
            with open(os.path.join(folder, "_internal", "models", "index.py")) as source:
                for line in source:
                    if line.startswith("PyPI = PackageIndex(") and line.count(chr(34)) >= 2:
                        return line.split(chr(34))[1].rstrip("/") + "/simple"
        except (OSError, UnicodeDecodeError):
            pass
    try:
        from pip._internal.models.index import PyPI
    except ImportError:
        sys.exit(3)
    return PyPI.simple_url
url = url or of_pip()
import socket, urllib.parse
parts = urllib.parse.urlsplit(url)
bare = urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")
if not [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]:
    try:
        socket.getaddrinfo(parts.hostname, parts.port or 443)
    except OSError as error:
        refused(error)
import base64, ssl, urllib.request
headers = {"Accept": "text/html, application/vnd.pypi.simple.v1+json", "User-Agent": "raylaunch"}
if parts.username:
    login = urllib.parse.unquote(parts.username) + ":" + urllib.parse.unquote(parts.password or "")
    headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
context = ssl.create_default_context()
for path in [chosen.get("cert"), os.environ.get("REQUESTS_CA_BUNDLE")]:
    if path and os.path.isfile(path):
        context.load_verify_locations(path)
if parts.hostname in (chosen.get("trusted-host") or "").split():
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
try:
    urllib.request.urlopen(urllib.request.Request(bare + "/pip/", headers=headers), timeout=4, context=context).read(1)
    print("reached\tpip\t" + bare)
except Exception as error:
    refused(error)
'

index() {
    asked=:
    for python in "$named_python" python3 python3.10 python3.11 python3.12 python3.13 python3.14; do
        [ -n "$python" ] && has "$python" || continue
        real=$(command -v "$python")
        [ -h "$real" ] && real=$(readlink -f "$real")
        case $asked in *":$real:"*) continue ;; esac
        [ "$python" = "$named_python" ] || asked=$asked$real: # an environment has a pip of its own
        within 6 "$python" -c "$INDEX" 2>/dev/null
        case $? in
            0) return ;;
            124) fact refused pip '' 'no answer within 6 s' && return ;;
        esac
    done
    has uv || return 1
    answer=$(echo pip | within 8 uv pip compile --quiet --no-cache --no-header --no-annotate - 2>&1)
    case $? in
        0) fact reached uv ;;
        124) fact refused uv '' 'no answer within 8 s' ;;
        *) fact refused uv '' "$(printf '%s\n' "$answer" | sed 's#//[^ @]*@#//***@#g' | tail -n 6 | head -c 2000)" ;;
    esac
}
