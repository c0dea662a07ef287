# shellcheck shell=bash
# What the scripts share: where the project is, how they speak, how they end.
# Sourced with ROOT set.

say() { printf '%s\n' "$*"; }
note() { printf '%s\n' "$*" >&2; }

# Ends the script with one line; what this call started is stopped on the way out (see on_exit).
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

usage_error() {
    printf 'error: %s (see --help)\n' "$*" >&2
    exit 2
}

# Shows that something is still going on: one line that counts on a terminal, a line now and then elsewhere.
progress() { # TEXT, SECONDS
    if [[ -t 1 ]]; then
        printf '\r\033[K%s … %s s' "$1" "$2"
    elif [[ " 3 10 20 30 45 " == *" $2 "* ]] || (($2 > 0 && $2 % 60 == 0)); then
        printf '%s … %s s\n' "$1" "$2"
    fi
}

progress_end() {
    if [[ -t 1 ]]; then printf '\r\033[K'; fi
}

CHILD="" # a step that runs in the background for the sake of its progress

# Runs a command with its output in LOG, showing progress; the result is the command's.
run_step() { # TEXT, LOG, COMMAND…
    local text=$1 log=$2 began=$SECONDS shown=0 result=0
    shift 2
    "$@" >"$log" 2>&1 </dev/null 8>&- 9>&- &
    CHILD=$!
    while kill -0 "$CHILD" 2>/dev/null; do
        if ((SECONDS - began > shown)); then
            shown=$((SECONDS - began))
            progress "$text" "$shown"
        fi
        sleep 0.1
    done
    wait "$CHILD" || result=$?
    CHILD=""
    progress_end
    return "$result"
}

# Prints the line of a program's output that names the cause of its end: the exception under a traceback, else
# the last line. Passwords in addresses are masked.
reason_in() { # reads the output
    awk '
        NF { last = $0 }
        /^Traceback/ { traceback = 1 }
        traceback && /^([a-z_][a-z0-9_]*\.)*[A-Z][A-Za-z0-9]*[a-z][A-Za-z0-9]*(: |$)/ { named = $0 }
        END { print (named ? named : (last ? last : "it ended without a word")) }
    ' | sed -E 's#(://[^:/@ ]*):[^@ ]*@#\1:***@#g' | cut -c 1-400
}

# Reads KEY=VALUE lines and exports them; what the caller has set already, even to nothing, wins.
load_settings() { # FILE
    local line number=0 name value
    while IFS= read -r line || [[ -n $line ]]; do
        number=$((number + 1))
        line=${line%$'\r'}
        [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
        if [[ ! $line =~ ^[[:space:]]*(export[[:space:]]+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)$ ]]; then
            die "$1, line $number is not KEY=VALUE"
        fi
        name=${BASH_REMATCH[2]} value=${BASH_REMATCH[3]}
        if [[ $value =~ ^\"(.*)\"[[:space:]]*$ || $value =~ ^\'(.*)\'[[:space:]]*$ ]]; then
            value=${BASH_REMATCH[1]}
        else
            value=${value%%[[:space:]]#*}
            value=${value%"${value##*[![:space:]]}"}
        fi
        [[ -v $name ]] || export "$name=$value"
    done <"$1"
}

# One call at a time does what follows; the second one waits.
lock() { # FILE DESCRIPTOR, FILE, WHAT THE OTHER ONE DOES
    { eval "exec $1>>\"\$2\""; } 2>/dev/null || die "cannot write $2"
    flock -n "$1" && return
    say "waiting: another call $3"
    flock -w 300 "$1" || die "another call still $3 after 300 s"
}
