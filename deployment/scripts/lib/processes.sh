# shellcheck shell=bash
# Processes that outlive the script: started, found again, stopped. Sourced after common.sh, with RUN_DIR and
# LOG_DIR set.
#
# A pid file holds the process id, the moment the process began, so that another process which got the same id
# later is never taken for ours, and the port, which may be another one than the settings name now.

declare -A LOG_BEGAN=() # service -> size of its log when this call started it
STARTED=()              # what this call started, in order

began_at() { # PID; prints when it began, in clock ticks since boot; fails when it is gone or a zombie
    local stat fields
    { stat=$(<"/proc/$1/stat"); } 2>/dev/null || return 1
    read -ra fields <<<"${stat##*) }"
    [[ ${fields[0]} != Z ]] && printf '%s' "${fields[19]}"
}

# Prints the pid of a service that this script started and that still runs.
pid_of() { # SERVICE
    local pid began
    { read -r pid began _ <"$RUN_DIR/$1.pid"; } 2>/dev/null || return 1
    [[ -n $began && $(began_at "$pid") == "$began" ]] && printf '%s' "$pid"
}

runs() { pid_of "$1" >/dev/null; }

remember() { # SERVICE, PID
    printf '%s %s %s\n' "$2" "$(began_at "$2")" "$(port_of "$1")" >"$RUN_DIR/$1.pid"
    STARTED+=("$1")
}

log_of() { printf '%s/%s.log' "$LOG_DIR" "$1"; }

# Starts a command, detached, with its output added to the service's log.
spawn() { # SERVICE, COMMAND…
    local service=$1 log
    shift
    log=$(log_of "$service")
    if [[ -f $log && $(stat -c %s "$log") -gt 50000000 ]]; then mv -f "$log" "$log.1"; fi
    touch "$log"
    LOG_BEGAN[$service]=$(stat -c %s "$log")
    (cd "$ROOT" && exec setsid "$@" </dev/null >>"$log" 2>&1 9>&-) &
    remember "$service" $!
}

# What the service has written to its log since this call started it.
new_log() { # SERVICE
    tail -c "+$((${LOG_BEGAN[$1]:-0} + 1))" "$(log_of "$1")" 2>/dev/null
}

STOP_SECONDS=30

# Asks a service to end, waits, and ends it the hard way only when it does not.
stop_service() { # SERVICE
    local service=$1 pid signal=TERM shown=0 began=$SECONDS
    if ! pid=$(pid_of "$service"); then
        rm -f "$RUN_DIR/$service.pid"
        return
    fi
    [[ $service == postgres ]] && signal=INT # its word for: end the connections, then yourself
    kill -s "$signal" "$pid" 2>/dev/null || true
    while runs "$service"; do
        if ((SECONDS - began >= STOP_SECONDS)); then
            progress_end
            note "$service did not stop within $STOP_SECONDS s: killed"
            # Postgres recovers by itself from QUIT; its helpers would stay behind after KILL.
            if [[ $service == postgres ]]; then kill -QUIT "$pid"; else kill -KILL -- "-$pid"; fi
            began=$SECONDS
        fi
        if ((SECONDS - began > shown)); then
            shown=$((SECONDS - began))
            progress "stopping $service" "$shown"
        fi
        sleep 0.05
    done
    progress_end
    rm -f "$RUN_DIR/$service.pid"
}

# Leaves nothing half running: when the script fails, what it started is stopped again.
on_exit() {
    local result=$? index
    trap '' HUP INT TERM
    [[ -n $CHILD ]] && kill "$CHILD" 2>/dev/null
    if ((result != 0)); then
        for ((index = ${#STARTED[@]} - 1; index >= 0; index--)); do
            stop_service "${STARTED[index]}"
        done
    fi
    exit "$result"
}

# Prints the status code of GET http://HOST:PORT/PATH, 000 when nothing answers.
http_status() { # HOST, PORT, PATH
    local answer
    answer=$(
        exec 2>/dev/null # a refusal or a reset is an answer too
        exec 3<>"/dev/tcp/$1/$2" || exit
        printf 'GET %s HTTP/1.1\r\nHost: %s:%s\r\nConnection: close\r\n\r\n' "$3" "$1" "$2" >&3
        IFS= read -r -t 3 line <&3 && printf '%s' "$line"
        IFS= read -r -t 3 -d '' <&3 # the rest: hanging up earlier looks like a fault to the service
    ) || true
    if [[ $answer =~ ^HTTP/[0-9.]+\ ([0-9]{3}) ]]; then printf '%s' "${BASH_REMATCH[1]}"; else printf 000; fi
}

port_is_taken() { # HOST, PORT
    (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null
}

# Prints " (name, pid 123)" of the program that listens on a port, where that can be seen.
holder_of() { # PORT
    local seen
    command -v ss >/dev/null || return 0
    seen=$(ss -Hltnp "sport = :$1" 2>/dev/null | sed -nE '1,/users:/s/.*users:\(\("([^"]*)",pid=([0-9]+).*/\1, pid \2/p' | sed -n 1p)
    if [[ -n $seen ]]; then printf ' (%s)' "$seen"; fi
}
