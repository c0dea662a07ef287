#!/usr/bin/env bash
# Measures the real stack on this machine, each figure beside its yardstick.
set -uo pipefail

ROOT=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)

# shellcheck source-path=SCRIPTDIR source=lib/common.sh
source "$ROOT/deployment/scripts/lib/common.sh"
# shellcheck source-path=SCRIPTDIR source=lib/setup.sh
source "$ROOT/deployment/scripts/lib/setup.sh"

ensure_venv requirements-bench.lock

# Settings of a running stack must not reach what is measured.
unset DATABASE_URL DB_SCHEMA CONSUL_HOST CONSUL_PORT SESSION_SERVICE_URL SESSION_SERVICE_TOKENS ENVIRONMENT DATA_DIR
cd "$ROOT" || exit 1
if [[ ${1:-} == peers ]]; then
    exec "$PY" -m benchmarks.peers "${@:2}"
fi
exec "$PY" -m benchmarks "$@"
