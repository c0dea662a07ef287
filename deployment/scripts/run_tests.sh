#!/usr/bin/env bash
# Runs the whole suite against a real Postgres and a real Consul.
set -uo pipefail

ROOT=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)

usage() {
    cat <<'TEXT'
Usage: run_tests.sh [--setup-only] [PYTEST ARGUMENTS …]

Makes .venv from requirements-dev.lock and gets a consul program, where they are missing; then runs pytest on
two processes. Arguments go to pytest: run_tests.sh tests/relay -x, run_tests.sh -n 0 -k name.

Environment:
  TEST_DATABASE_URL        use this Postgres instead of an embedded one
  VENV                     a Python environment to use as it is, instead of .venv
TEXT
}

# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$ROOT/deployment/scripts/lib/common.sh"
# shellcheck source-path=SCRIPTDIR source=lib/setup.sh
source "$ROOT/deployment/scripts/lib/setup.sh"

case ${1:-} in
-h | --help)
    usage
    exit 0
    ;;
esac

ensure_venv requirements-dev.lock
export PATH=$ROOT/.data/bin:$PATH
if ! type -P consul >/dev/null; then
    "$ROOT/deployment/scripts/install_consul.sh" || exit 1
fi
[[ ${1:-} == --setup-only ]] && exit 0

# Settings of a running stack must not reach the tests.
unset DATABASE_URL DB_SCHEMA CONSUL_HOST CONSUL_PORT SESSION_SERVICE_URL SESSION_SERVICE_TOKENS ENVIRONMENT DATA_DIR
cd "$ROOT" || exit 1
# One file stays on one process: its fixtures are made once.
exec "$PY" -m pytest -n 2 --dist loadfile "$@"
