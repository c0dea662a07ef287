# shellcheck shell=bash
# What the user sees of it: the table, the lines to paste, the logs. Sourced after services.sh.

# Prints one word on a service's health; the result is whether it counts as healthy.
health_of() { # SERVICE
    case $1 in
    postgres)
        if [[ $EMBEDDED == no ]]; then
            if (cd "$ROOT" && "$PY" -m deployment.scripts.lib.check_database >/dev/null 2>&1); then
                printf healthy
            else
                printf 'no answer'
                return 1
            fi
        elif [[ -z $(embedded_pid) ]]; then
            printf stopped
            return 1
        elif grep -qs '^ready' "$POSTGRES_DIR/postmaster.pid"; then
            printf healthy
        else
            printf starting
            return 1
        fi
        ;;
    consul)
        if consul_answers; then
            printf healthy
        elif runs consul || [[ -n ${CONSUL_HOST:-} ]]; then
            printf 'no answer'
            return 1
        elif [[ ! -e $RUN_DIR/discovery || $(<"$RUN_DIR/discovery") == static ]]; then
            printf 'not used'
        else
            printf stopped
            return 1
        fi
        ;;
    *)
        if ! runs "$1"; then
            printf stopped
            return 1
        fi
        local status
        status=$(http_status "$(host_of "$1")" "$(port_of "$1")" /health)
        case $status in
        200) printf healthy ;;
        000) printf 'no answer' && return 1 ;;
        *) printf 'answers %s' "$status" && return 1 ;;
        esac
        ;;
    esac
}

# Prints the table; the result is whether all of it is healthy.
show_table() {
    local service health pid port log result=0
    printf '%-16s %-7s %-8s %-11s %s\n' SERVICE PORT PID HEALTH LOG
    for service in session_service relay consul postgres; do
        health=$(health_of "$service") || result=1
        pid=$(pid_of "$service") || pid=-
        log=$(log_of "$service")
        port=$(port_of "$service")
        if [[ $service == postgres && $EMBEDDED == no ]]; then
            port=- log="DATABASE_URL"
        elif [[ $service == consul && $health == 'not used' ]]; then
            port=- log="static addresses"
        elif [[ $service == consul && $pid == - && $health == healthy ]]; then
            log="$(host_of consul), not started here"
        elif [[ $service == postgres && $pid == - && $health == healthy ]]; then
            log="$log (not started here)"
        fi
        printf '%-16s %-7s %-8s %-11s %s\n' "$service" "$port" "$pid" "$health" "$log"
    done
    return "$result"
}

# Two lines to paste: a first message, and one that needs the first to be remembered.
show_first_steps() {
    local key url message
    [[ -r $DATA_DIR/api.key ]] || return 0
    key=$(<"$DATA_DIR/api.key")
    url=$(url_of relay)/v1/messages
    printf '\nDevelopment key: %s\n\nTry it:\n' "$key"
    for message in 'My name is Ada' 'What is my name?'; do
        printf "curl -sw '\\\\n' %s -H 'x-api-key: %s' -H 'content-type: application/json' -d '%s'\n" "$url" "$key" \
            '{"model":"demo","max_tokens":200,"metadata":{"session_id":"first-steps"},"messages":[{"role":"user","content":"'"$message"'"}]}'
    done
}

# Prints the end of the logs, names in front where there are several; with FOLLOW goes on as they grow.
show_logs() { # FOLLOW, SERVICE…
    local follow=$1 service log options=(-n 50) shown=0
    shift
    [[ $follow == yes ]] && options=(-n 20 -F)
    trap 'kill $(jobs -p) 2>/dev/null; exit 0' INT TERM
    for service in "$@"; do
        log=$(log_of "$service")
        if [[ ! -e $log && $follow == no ]]; then
            (($# > 1)) || say "no log of $service yet: $log"
            continue
        fi
        shown=1
        if (($# == 1)); then
            tail "${options[@]}" "$log" 2>/dev/null &
        else
            tail "${options[@]}" "$log" 2>/dev/null | sed -u "s/^/$(printf '%-15s' "$service") | /" &
        fi
        [[ $follow == yes ]] || wait
    done
    ((shown)) || (($# == 1)) || say "no logs yet in $LOG_DIR"
    wait
}
