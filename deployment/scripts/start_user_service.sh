#!/usr/bin/env bash
# Starts, stops and shows the services with everything they need.
set -uo pipefail

ROOT=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)
LIB=$ROOT/deployment/scripts/lib

usage() {
    cat <<'TEXT'
Usage: start_user_service.sh [-e ENV] COMMAND [SERVICE …]      options and command in any order

Commands:
  start     install what is missing, start Postgres and Consul, migrate, start the services, wait until
            they are healthy. What runs already is left as it is. If it fails, what it started is stopped.
  stop      end the services gracefully (30 s), then Consul and Postgres, if they were started by this script
  restart   stop and start; with a name only that one, the others go on
  status    a table of all; the exit code is 0 only when all are healthy, else 3
  logs      the end of the logs; -f goes on as they grow
  migrate   bring the database up to date, nothing else

Services:  session_service, relay (these two when none is named), consul, postgres

Options:
  -e, --env ENV   which deployment/environments/ENV.env to use (default: dev)
  -f, --follow    with logs: follow
  -h, --help      this text

Settings are read from deployment/environments/ENV.env; variables of the caller win. Besides the services'
own settings, explained in production.env.example, there are:
  DATA_DIR      data, logs and pid files (default: .data/ENV)
  VENV          a Python environment to use as it is, instead of .venv
  PYTHON        the Python to make .venv with
  START_CONSUL  no: never start a Consul agent (default: auto)

Exit codes: 0 done · 1 failed, one line says why · 2 wrong usage · 3 status: not all healthy
TEXT
}

# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$LIB/common.sh"

ENV=dev COMMAND="" FOLLOW=no NAMES=()
while (($#)); do
    case $1 in
    -e | --env)
        [[ $# -ge 2 ]] || usage_error "$1 needs the name of an environment"
        ENV=$2
        shift
        ;;
    --env=*) ENV=${1#*=} ;;
    -e?*) ENV=${1#-e} ;;
    -f | --follow) FOLLOW=yes ;;
    -h | --help)
        usage
        exit 0
        ;;
    start | stop | restart | status | logs | migrate)
        [[ -z $COMMAND ]] || usage_error "two commands: $COMMAND and $1"
        COMMAND=$1
        ;;
    session_service | relay | consul | postgres) NAMES+=("$1") ;;
    *) usage_error "unknown argument '$1'" ;;
    esac
    shift
done
[[ -n $COMMAND ]] || usage_error "no command: start, stop, restart, status, logs or migrate"
[[ $ENV =~ ^[A-Za-z0-9_-]+$ ]] || usage_error "'$ENV' is no name of an environment"

SETTINGS_FILE=$ROOT/deployment/environments/$ENV.env
if [[ ! -r $SETTINGS_FILE ]]; then
    hint=""
    [[ -r $SETTINGS_FILE.example ]] && hint="; copy $ENV.env.example beside it and fill it in"
    die "there are no settings for '$ENV': deployment/environments/$ENV.env is missing$hint"
fi
load_settings "$SETTINGS_FILE"
export ENVIRONMENT=$ENV
DATA_DIR=${DATA_DIR:-.data/$ENV}
[[ $DATA_DIR == /* ]] || DATA_DIR=$ROOT/$DATA_DIR
export DATA_DIR
export SERVICE_HOST=${SERVICE_HOST:-127.0.0.1} SERVICE_PORT=${SERVICE_PORT:-8205}
export RELAY_HOST=${RELAY_HOST:-127.0.0.1} RELAY_PORT=${RELAY_PORT:-8000} CONSUL_PORT=${CONSUL_PORT:-8500}
# The services give up on what is in flight a little before this script would kill them.
export GRACEFUL_STOP_SECONDS=${GRACEFUL_STOP_SECONDS:-25}
[[ -n ${REVISION:-} ]] || REVISION=$(git -C "$ROOT" rev-parse --short HEAD 2>/dev/null) && export REVISION
for setting in SERVICE_PORT RELAY_PORT CONSUL_PORT; do
    if [[ ! ${!setting} =~ ^[1-9][0-9]{0,4}$ ]] || ((${!setting} > 65535)); then
        die "$setting is '${!setting}', not a port: 1 to 65535"
    fi
done
RUN_DIR=$DATA_DIR/run
LOG_DIR=$DATA_DIR/logs

# shellcheck source-path=SCRIPTDIR source=lib/setup.sh
source "$LIB/setup.sh"
# shellcheck source-path=SCRIPTDIR source=lib/processes.sh
source "$LIB/processes.sh"
# shellcheck source-path=SCRIPTDIR source=lib/services.sh
source "$LIB/services.sh"
# shellcheck source-path=SCRIPTDIR source=lib/report.sh
source "$LIB/report.sh"

# Everything below changes something: one call at a time, and undone when it fails.
begin_work() {
    if ! command -v setsid flock >/dev/null || [[ ! -r /proc/self/stat ]]; then
        die "this script needs Linux with util-linux (setsid, flock)"
    fi
    local said
    said=$(mkdir -p "$RUN_DIR" "$LOG_DIR" 2>&1) || die "cannot write in $DATA_DIR (DATA_DIR): $(reason_in <<<"$said")"
    lock 9 "$RUN_DIR/lock" "starts or stops the services of '$ENV'"
    trap on_exit EXIT
    trap 'exit 129' HUP # a terminal that was closed
    trap 'exit 130' INT
    trap 'exit 143' TERM
}

is_named() { # SERVICE; naming none means all
    ((${#NAMES[@]} == 0)) || [[ " ${NAMES[*]} " == *" $1 "* ]]
}

start() {
    local service web=() all_run=yes
    ground_holds || all_run=no
    for service in "${WEB[@]}"; do
        is_named "$service" || continue
        web+=("$service")
        runs "$service" || all_run=no
    done
    if ((${#web[@]} == 0)) || [[ $all_run == no ]]; then
        check_ports "${web[@]}"
        ensure_venv requirements.lock
        if ((${#web[@]})) || is_named postgres; then ensure_postgres; fi
        ((${#web[@]})) && migrate
        if ((${#web[@]})) || is_named consul; then ensure_discovery; fi
        for service in "${web[@]}"; do start_web "$service"; done
    fi
    wait_until_healthy "${web[@]}"
    if ((${#web[@]})); then wait_until_ready; fi
}

stop() {
    local service
    for service in relay session_service consul postgres; do
        if is_named "$service"; then
            runs "$service" && say "stopping $service"
            stop_service "$service"
        fi
    done
    if is_named postgres && [[ -z ${DATABASE_URL:-} && -n $(embedded_pid) ]]; then
        say "Postgres in $POSTGRES_DIR was not started by this script and goes on"
    fi
}

case $COMMAND in
start | restart)
    begin_work
    [[ $COMMAND == restart ]] && stop
    start
    show_table
    if is_named relay; then show_first_steps; fi
    ;;
stop)
    begin_work
    stop
    ;;
migrate)
    begin_work
    ensure_venv requirements.lock
    ensure_postgres
    migrate
    say "the database is up to date"
    for service in "${STARTED[@]}"; do stop_service "$service"; done
    ;;
status)
    show_table || exit 3
    ;;
logs)
    ((${#NAMES[@]})) || NAMES=(session_service relay consul postgres)
    show_logs "$FOLLOW" "${NAMES[@]}"
    ;;
esac
exit 0
