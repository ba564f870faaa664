# Sourced by the other scripts: `prepare_venv EXTRA` creates $ROOT/.venv with the package and that extra.
# Sets ROOT and PYTHON. Needs Python only; prefers uv if it is installed.

ROOT=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P)
VENV=$ROOT/.venv
PYTHON=$VENV/bin/python

# For machines without ensurepip (Debian without python3-venv).
PIP_WHEEL_URL=https://files.pythonhosted.org/packages/07/25/ee8c38ae72d66b844ce8eb9711ba905dba21ca1a8a0c960057c41cd23337/pip-26.3-py3-none-any.whl
PIP_WHEEL_SHA256=f3b60b20ffaadd4415ed7957212a38ac63fa4c5fa375bd0f4a797777940fad13

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

fail() {
    say "error: $*"
    exit 1
}

# step NAME COMMAND...
step() {
    name=$1
    shift
    say "$name"
    started=$(date +%s)
    "$@" || fail "$name failed after $(($(date +%s) - started)) s"
    say "$name passed in $(($(date +%s) - started)) s"
}

# The comment at the head of the script is its help.
help_if_asked() {
    case ${1-} in
    -h | --help)
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
        exit
        ;;
    esac
}

# Python 3.14 is excluded until the MongoDB stand-in has wheels for it.
suits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; }

find_python() {
    for candidate in python3.13 python3.12 python3.11 python3 python; do
        if suits "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11, 3.12 or 3.13 found; install one of them, or uv (https://docs.astral.sh/uv)"
}

# quietly TITLE COMMAND...: print the title, show the progress, and print the end of the output only on failure.
quietly() {
    say "$1"
    shift
    output=$VENV.log
    : >"$output"
    failed=
    show_progress "$output" 9<&- &
    showing=$!
    # Cancels --quiet, so that pip prints the steps for show_progress.
    PIP_VERBOSE=1 "$@" >"$output" 2>&1 || failed=yes
    kill "$showing" 2>/dev/null || :
    wait "$showing" 2>/dev/null || :
    if [ -t 2 ]; then printf '\r\033[K' >&2; fi
    if [ -n "$failed" ]; then
        tail -n 40 "$output" >&2
        say "the full output is in $output"
        return 1
    fi
    rm -f "$output"
}

# show_progress OUTPUT: print the elapsed time and the current step of a command. On a terminal it is one line that
# changes every second, otherwise one line every PROGRESS_SECONDS. Ends when the script ends.
show_progress() {
    seconds=0
    while sleep 1 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
        seconds=$((seconds + 1))
        if [ -t 2 ]; then
            printf '\r\033[K%.79s' "${0##*/}: $seconds s $(current_step "$1")" >&2
        elif [ $((seconds % ${PROGRESS_SECONDS:-10})) -eq 0 ]; then
            say "$seconds s $(current_step "$1")"
        fi
    done
}

# current_step OUTPUT: print the last step that pip reported, such as "downloading duckdb-2.0.1 (20.1 MB)".
current_step() {
    sed -n \
        -e 's/^ *Collecting \([A-Za-z0-9._-]*\).*/looking for \1/p' \
        -e 's/^ *Downloading \(.*\/\)\{0,1\}\([^-/ ]*-[^- ]*\)[^ ]*/downloading \2/p' \
        -e 's/^ *Processing \(.*\/\)\{0,1\}\([^-/ ]*-[^- ]*\).*/reading \2/p' \
        -e 's/^ *Building wheel for \([^ ]*\).*/building \1/p' \
        -e 's/^ *Installing collected packages.*/installing the packages/p' \
        "$1" | tail -n 1
}

have_uv() { command -v uv >/dev/null 2>&1; }

make_venv() {
    if have_uv && quietly "making .venv with uv" uv venv --quiet --python '>=3.11,<3.14' "$VENV"; then return; fi
    rm -rf "$VENV"
    python=$(find_python) || exit 1
    if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        quietly "making .venv with $python" "$python" -m venv "$VENV" || fail "$python cannot make a venv"
    else
        quietly "making .venv with $python" "$python" -m venv --without-pip "$VENV" || fail "$python cannot make a venv"
    fi
}

add_pip() {
    quietly "fetching pip" "$PYTHON" - "$PIP_WHEEL_URL" "$PIP_WHEEL_SHA256" "$VENV" <<'PYTHON' || fail "pip could not be fetched"
import hashlib, pathlib, subprocess, sys, urllib.request

url, expected, venv = sys.argv[1:]
content = urllib.request.urlopen(url, timeout=60).read()
if hashlib.sha256(content).hexdigest() != expected:
    sys.exit(f"{url} does not have the expected sha256")
wheel = pathlib.Path(venv, url.rpartition("/")[2])
wheel.write_bytes(content)
code = subprocess.call([sys.executable, f"{wheel}/pip", "install", "--no-index", "--no-deps", str(wheel)])
wheel.unlink()
sys.exit(code)
PYTHON
}

# uv does not read pip's configuration (mirrors, certificates), so pip may succeed where uv fails.
install() {
    if have_uv && quietly "installing the package and its extra '$1' with uv" \
        uv pip install --quiet --python "$PYTHON" --constraint "$ROOT/constraints.txt" --editable "$ROOT[$1]"; then return; fi
    "$PYTHON" -c 'import pip' 2>/dev/null || add_pip
    quietly "installing the package and its extra '$1' (a minute or two the first time)" \
        "$PYTHON" -m pip install --quiet --disable-pip-version-check --constraint "$ROOT/constraints.txt" --editable "$ROOT[$1]" ||
        fail "the installation failed"
}

# Checksum of everything that an installation depends on. It includes the path, because a moved venv does not work.
fingerprint() { { printf '%s\n' "$VENV" && cat "$ROOT/setup.cfg" "$ROOT/pyproject.toml" "$ROOT/constraints.txt"; } | cksum; }

# is_installed EXTRA: the extra 'test' contains 'embedded'.
is_installed() {
    for extra in "$1" test; do
        if [ "$(cat "$VENV/installed-$extra" 2>/dev/null)" = "$current" ]; then return 0; fi
    done
    return 1
}

# Keep a .venv that these scripts did not make or finish, under another name: it may belong to a user.
put_aside() {
    if [ -e "$VENV" ] && [ ! -e "$VENV/made-at" ]; then
        aside=$VENV.$(date +%Y%m%d-%H%M%S)
        mv "$VENV" "$aside"
        say "moved the existing .venv to $aside"
    fi
    rm -rf "$VENV"
}

is_ours() { [ "$(cat "$VENV/made-at" 2>/dev/null)" = "$VENV" ] && suits "$PYTHON"; }

prepare_venv() {
    current=$(fingerprint)
    if is_ours && is_installed "$1"; then return; fi
    (
        # If two scripts run at once on a fresh checkout, the second one waits.
        exec 9<"$ROOT/scripts"
        if command -v flock >/dev/null 2>&1; then flock 9; fi
        if is_ours && is_installed "$1"; then exit; fi
        umask 022 # PostgreSQL of root runs as another user, who must be able to read .venv
        if ! is_ours; then
            put_aside
            make_venv
            printf '%s\n' "$VENV" >"$VENV/made-at"
        fi
        install "$1"
        printf '%s\n' "$current" >"$VENV/installed-$1"
    ) || exit 1
}
