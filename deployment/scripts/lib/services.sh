# shellcheck shell=bash
# What this project runs, and what each part needs. Sourced after common.sh, setup.sh and processes.sh.

WEB=(session_service relay)
HEALTHY_SECONDS=60

port_of() { # SERVICE; of one that runs: the port it was started with
    local port=""
    if runs "$1"; then read -r _ _ port <"$RUN_DIR/$1.pid"; fi
    case $1 in
    session_service) printf %s "${port:-$SERVICE_PORT}" ;;
    relay) printf %s "${port:-$RELAY_PORT}" ;;
    consul) printf %s "${port:-${CONSUL_PORT:?}}" ;;
    postgres) printf socket ;;
    esac
}

host_of() { # SERVICE; where to ask it, as seen from this machine
    local host=127.0.0.1
    case $1 in
    session_service) host=$SERVICE_HOST ;;
    relay) host=$RELAY_HOST ;;
    consul) host=${CONSUL_HOST:-127.0.0.1} ;;
    esac
    case $host in
    0.0.0.0 | '') printf 127.0.0.1 ;;
    ::) printf ::1 ;;
    *) printf %s "$host" ;;
    esac
}

url_of() { # SERVICE; an address of IPv6 stands in brackets there
    local host
    host=$(host_of "$1")
    [[ $host == *:* ]] && host="[$host]"
    printf 'http://%s:%s' "$host" "$(port_of "$1")"
}

port_setting_of() { # SERVICE
    case $1 in
    session_service) printf SERVICE_PORT ;;
    relay) printf RELAY_PORT ;;
    consul) printf CONSUL_PORT ;;
    esac
}

die_of_taken_port() { # SERVICE
    local port
    port=$(port_of "$1")
    die "port $port for $1 is taken by another program$(holder_of "$port"): end that one, or set $(port_setting_of "$1")"
}

check_ports() { # SERVICE…
    local service
    if (($# > 1)) && [[ $SERVICE_PORT == "$RELAY_PORT" && $(host_of session_service) == "$(host_of relay)" ]]; then
        die "SERVICE_PORT and RELAY_PORT are both $RELAY_PORT: each service needs a port of its own"
    fi
    for service in "$@"; do
        if ! runs "$service" && port_is_taken "$(host_of "$service")" "$(port_of "$service")"; then
            die_of_taken_port "$service"
        fi
    done
}

is_local_environment() { [[ $ENVIRONMENT == dev || $ENVIRONMENT == test ]]; }

# --- Postgres -------------------------------------------------------------------------------------------------

POSTGRES_DIR=$DATA_DIR/postgres
EMBEDDED=yes
[[ -n ${DATABASE_URL:-} ]] && EMBEDDED=no

# Prints the pid of the server that runs on our data directory, whoever started it.
embedded_pid() {
    local pid=""
    { read -r pid <"$POSTGRES_DIR/postmaster.pid"; } 2>/dev/null || return 1
    grep -qzxF -- "$POSTGRES_DIR" "/proc/$pid/cmdline" 2>/dev/null && printf %s "$pid"
}

# Sets DATABASE_URL to a database that answers, starting the embedded one when none is named.
ensure_postgres() {
    local found said
    if [[ $EMBEDDED == no ]]; then
        said=$(cd "$ROOT" && "$PY" -m deployment.scripts.lib.check_database 2>&1) ||
            die "$(reason_in <<<"$said" | with_hint)"
        return
    fi
    if ! is_local_environment; then
        die "DATABASE_URL is empty: the embedded Postgres is for dev and test; set it in $SETTINGS_FILE"
    fi
    found=$(embedded_pid) || found=""
    [[ -n $found ]] || say "starting Postgres in $POSTGRES_DIR"
    if ! DATABASE_URL=$(cd "$ROOT" && "$PY" -m shared.embedded_postgres start "$POSTGRES_DIR" 2>"$RUN_DIR/postgres.err"); then
        die "$(reason_in <"$RUN_DIR/postgres.err" | sed 's/^error: //' | with_hint)"
    fi
    cat "$RUN_DIR/postgres.err" # what root may want to know: whom it let pass where
    export DATABASE_URL
    ln -sfn "../$(basename "$POSTGRES_DIR")/server.log" "$(log_of postgres)"
    [[ -n $found ]] || remember postgres "$(embedded_pid)"
}

migrate() {
    local log
    log=$(log_of migrate)
    if ! (cd "$ROOT" && run_step "migrating" "$log" "$PY" -m alembic upgrade head); then
        die "the migration failed: $(reason_in <"$log" | sed 's/^FAILED: //' | with_hint) (see $log)"
    fi
}

# --- Consul ---------------------------------------------------------------------------------------------------

find_consul() {
    type -P consul || { [[ -x $ROOT/.data/bin/consul ]] && printf %s "$ROOT/.data/bin/consul"; }
}

consul_answers() { [[ $(http_status "$(host_of consul)" "$(port_of consul)" /v1/status/leader) == 200 ]]; }

start_consul() { # PROGRAM
    local ports began=$SECONDS options
    # The gossip and server ports cannot be switched off: any free ones will do for an agent of its own.
    ports=$("$PY" - <<'PYTHON'
import socket

sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(s.getsockname()[1] for s in sockets))
PYTHON
    )
    options=(-dev -bind 127.0.0.1 -client 127.0.0.1 -node "session-relay-$ENVIRONMENT" -http-port "$CONSUL_PORT")
    options+=(-dns-port -1 -grpc-port -1 -serf-wan-port -1 -serf-lan-port "${ports% *}" -server-port "${ports#* }")
    options+=(-hcl 'disable_update_check = true' -log-level info)
    if "$1" agent -help 2>&1 | grep -q -- -grpc-tls-port; then options+=(-grpc-tls-port -1); fi # not in old ones
    spawn consul "$1" agent "${options[@]}"
    until consul_answers; do
        runs consul || die "consul did not start: $(new_log consul | reason_in) (see $(log_of consul))"
        ((SECONDS - began < 20)) || die "consul did not answer within 20 s (see $(log_of consul))"
        sleep 0.1
    done
}

# Decides how relay finds session_service, and sets CONSUL_HOST or SESSION_SERVICE_URL. The decision holds as
# long as one of the services runs: they would not hear of another one.
ensure_discovery() {
    local program decided="" service
    [[ -n ${CONSUL_HOST:-} ]] && return
    for service in "${WEB[@]}"; do
        if runs "$service" && [[ -r $RUN_DIR/discovery ]]; then decided=$(<"$RUN_DIR/discovery"); fi
    done
    if runs consul; then
        decided=consul
    elif [[ $decided == static || ${START_CONSUL:-auto} == no ]] || ! is_local_environment; then
        decided=static
        say "Consul: none is set (CONSUL_HOST) and none is started here: static addresses are used"
    elif consul_answers; then
        [[ $decided == found ]] || say "Consul: using the agent that answers on port $CONSUL_PORT; stop will leave it alone"
        decided=found
    elif port_is_taken 127.0.0.1 "$CONSUL_PORT"; then
        die_of_taken_port consul
    elif program=$(find_consul); then
        start_consul "$program"
        decided=consul
    else
        decided=static
        say "Consul: no program found (install_consul.sh gets one): static addresses are used"
    fi
    printf %s "$decided" >"$RUN_DIR/discovery"
    if [[ $decided == static ]]; then
        export SESSION_SERVICE_URL=${SESSION_SERVICE_URL:-$(url_of session_service)}
    else
        export CONSUL_HOST=127.0.0.1
    fi
}

# Whether what the services stand on, as far as it is ours, is there.
ground_holds() {
    [[ $EMBEDDED == no || -n $(embedded_pid) ]] || return 1
    [[ -n ${CONSUL_HOST:-} || ! -r $RUN_DIR/discovery || $(<"$RUN_DIR/discovery") != consul ]] || runs consul
}

# --- session_service and relay --------------------------------------------------------------------------------

start_web() { # SERVICE
    runs "$1" || spawn "$1" "$PY" -m "services.$1.main"
}

is_healthy() { # SERVICE
    [[ $(http_status "$(host_of "$1")" "$(port_of "$1")" /health) == 200 ]]
}

die_of_death() { # SERVICE
    local reason
    reason=$(new_log "$1" | reason_in | with_hint)
    if [[ $reason == "$1 cannot start: "* ]]; then # it says itself, in one line, what is wrong
        reason=${reason#"$1 cannot start: "}
    else
        new_log "$1" | tail -n 15 | sed -E "s#^#$1 | #; s#(://[^:/@ ]*):[^@ ]*@#\1:***@#g" >&2
    fi
    die "$1 did not start: $reason (see $(log_of "$1"))"
}

wait_until_healthy() { # SERVICE…
    local began=$SECONDS shown=0 service waiting=("$@") still
    while ((${#waiting[@]})); do
        still=()
        for service in "${waiting[@]}"; do
            runs "$service" || die_of_death "$service"
            is_healthy "$service" || still+=("$service")
        done
        waiting=("${still[@]}")
        ((${#waiting[@]})) || break
        if ((SECONDS - began >= HEALTHY_SECONDS)); then
            progress_end
            die "not healthy within $HEALTHY_SECONDS s: ${waiting[*]} (see $(log_of "${waiting[0]}"))"
        fi
        if ((SECONDS - began > shown)); then
            shown=$((SECONDS - began))
            progress "waiting for ${waiting[*]}" "$shown"
        fi
        sleep 0.1
    done
    progress_end
}

# Gives relay a moment to see a session_service that has just come, so that the first request is served. Where
# that one does not run here it may come later.
wait_until_ready() {
    local began=$SECONDS
    until ((SECONDS - began >= 10)); do
        runs relay && runs session_service || return 0
        [[ $(http_status "$(host_of relay)" "$(port_of relay)" /health/ready) == 200 ]] && return
        sleep 0.1
    done
}
