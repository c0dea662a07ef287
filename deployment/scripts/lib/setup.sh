# shellcheck shell=bash
# The Python environment: found, made, filled from a lock file. Sourced after common.sh.
#
# VENV chooses another environment than .venv; one that the caller names is used as it is, nothing is
# installed into it.

VENV_IS_OURS=yes
[[ -n ${VENV:-} ]] && VENV_IS_OURS=no
VENV=${VENV:-.venv}
[[ $VENV == /* ]] || VENV=$ROOT/$VENV
PY=$VENV/bin/python

# Prints a Python that is new enough.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    if candidate=$(command -v python3) && "$candidate" --version >/dev/null 2>&1; then
        die "Python 3.11 or newer is needed; python3 here is $("$candidate" --version 2>&1)"
    fi
    die "Python 3.11 or newer is needed, and there is no python3 on PATH"
}

# Makes sure that the environment holds what a lock file names. A checksum of the lock file that was installed
# last lies in the environment, so that this costs nothing the next time.
ensure_venv() { # LOCK FILE
    local lock_file=$1 log=$ROOT/.data/setup.log installed=""
    if [[ $VENV_IS_OURS == no ]]; then
        [[ -x $PY ]] || die "VENV=$VENV holds no bin/python"
        return
    fi
    mkdir -p "$ROOT/.data" || die "cannot write in $ROOT"
    lock 8 "$ROOT/.data/setup.lock" "installs the Python packages"
    if [[ -x $PY ]] && "$PY" -c '' 2>/dev/null; then
        [[ -r $VENV/.installed ]] && installed=$(<"$VENV/.installed")
        holds "$installed" "$lock_file" || fill_venv "$lock_file" "$log" "$installed"
    else
        make_venv "$log"
        fill_venv "$lock_file" "$log" new
    fi
    exec 8>&-
}

# Whether what was installed last holds a lock file: each of these holds all of the one before, in the same versions.
holds() { # STAMP, LOCK FILE
    local each found=no
    for each in requirements.lock requirements-dev.lock requirements-bench.lock; do
        [[ $each == "$2" ]] && found=yes
        [[ $found == yes && $1 == "$(stamp "$each")" ]] && return
    done
    return 1
}

stamp() { # LOCK FILE
    local sum
    sum=$(sha256sum "$ROOT/$1") || die "$1 is missing"
    printf '%s %s' "$1" "${sum%% *}"
}

make_venv() { # LOG
    local python version package
    python=$(find_python) || exit 1
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    say "making ${VENV#"$ROOT/"} with Python $version"
    rm -rf "$VENV"
    if command -v uv >/dev/null; then
        run_step "making the environment" "$1" uv venv --quiet --python "$python" "$VENV" && return
    fi
    if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        package="the modules venv and ensurepip of Python $version"
        command -v apt-get >/dev/null && package="the package python$version-venv (apt-get install python$version-venv)"
        die "the environment cannot be made: $package is missing"
    fi
    if ! run_step "making the environment" "$1" "$python" -m venv "$VENV"; then
        rm -rf "$VENV"
        die "the environment cannot be made: $(reason_in <"$1")"
    fi
}

# Without WHAT IT HOLDS an installation may have broken off: each package is put there anew, whatever is found.
fill_venv() { # LOCK FILE, LOG, WHAT IT HOLDS
    local count again=()
    count=$(grep -c '==' "$ROOT/$1")
    say "installing $count Python packages from $1"
    rm -f "$VENV/.installed"
    [[ -n $3 ]] || again=(--force-reinstall)
    if ! install_packages "$ROOT/$1" "$2" "${again[@]}"; then
        die "the packages could not be installed: $(reason_in <"$2") (see $2)"
    fi
    stamp "$1" >"$VENV/.installed"
}

install_packages() { # LOCK FILE, LOG, OPTION…
    local lock_file=$1 log=$2
    shift 2
    if command -v uv >/dev/null; then
        run_step "installing" "$log" uv pip install --quiet --compile-bytecode --python "$PY" --require-hashes \
            "$@" -r "$lock_file" && return
        note "uv could not install them ($(reason_in <"$log")); trying pip"
    fi
    if ! "$PY" -m pip --version >/dev/null 2>&1; then
        run_step "installing pip" "$log" "$PY" -m ensurepip || return 1
    fi
    run_step "installing" "$log" "$PY" -m pip install --disable-pip-version-check --no-input \
        --progress-bar off --require-hashes "$@" -r "$lock_file"
}

# Adds to a reason what to do, where a package is missing that was installed.
with_hint() { # reads the reason
    local reason
    reason=$(cat)
    if [[ $reason == *ModuleNotFoundError* && $VENV_IS_OURS == yes ]]; then
        reason+="; delete $VENV to have the packages installed again"
    fi
    printf '%s\n' "$reason"
}
