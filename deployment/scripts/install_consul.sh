#!/usr/bin/env bash
# Puts a consul program where start_user_service.sh and the tests find it.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
TARGET_DIR=$ROOT/.data/bin
SOURCES=(path release debian)
FORCE=no
# Any version will do: only the stable agent, health and blocking-query calls are used.
VERSION=${CONSUL_VERSION:-1.20.6}
RELEASES=${CONSUL_RELEASES_URL:-https://releases.hashicorp.com}
DEBIAN_SUITE=bullseye # the last Debian release with a consul package

usage() {
    cat <<TEXT
Usage: install_consul.sh [--from path|release|debian] [--to DIR] [--force]

Puts a consul program into .data/bin of this project. Tries, in this order:
  path     the one on PATH, linked
  release  HashiCorp's release archive, version $VERSION, checked against its SHA256SUMS
  debian   on Debian: the package of $DEBIAN_SUITE, from the mirror in this machine's apt
           configuration, its signature checked by apt. Nothing is installed on the
           system, and root is not needed.

  --from SOURCE  try only this source
  --to DIR       put it into DIR instead
  --force        replace one that is there already
  --help         this text

Environment: CONSUL_VERSION, CONSUL_RELEASES_URL (of the release archive or a copy of it).
TEXT
}

say() { printf 'consul: %s\n' "$*"; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

while (($#)); do
    case $1 in
    --from | --to)
        [[ $# -ge 2 ]] || fail "$1 needs a value (see --help)"
        if [[ $1 == --to ]]; then TARGET_DIR=$2; else SOURCES=("$2"); fi
        shift
        ;;
    --force) FORCE=yes ;;
    -h | --help)
        usage
        exit 0
        ;;
    *) fail "unknown argument '$1' (see --help)" ;;
    esac
    shift
done
[[ ${SOURCES[0]} =~ ^(path|release|debian)$ ]] || fail "unknown source '${SOURCES[0]}': path, release or debian"

mkdir -p "$TARGET_DIR" || fail "cannot write in $TARGET_DIR"
TARGET_DIR=$(cd "$TARGET_DIR" && pwd)
TARGET=$TARGET_DIR/consul
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
trap 'exit 130' INT TERM

# Prints the first line of what it says of itself, nothing when it does not run.
version_of() {
    local said
    said=$("$1" version 2>/dev/null) || return 0
    [[ $said == Consul* ]] && printf '%s\n' "${said%%$'\n'*}" || return 0
}

# Moves a program into its place in one step, so that nobody ever meets half of one.
put() { # FILE, WHERE IT CAME FROM
    local version
    chmod 755 "$1"
    version=$(version_of "$1")
    if [[ -z $version ]]; then
        say "the program from $2 does not run on this machine"
        return 1
    fi
    cp "$1" "$TARGET.$$" && mv -f "$TARGET.$$" "$TARGET"
    say "$version from $2 is now $TARGET"
}

from_path() {
    local found
    found=$(type -aP consul | grep -vxF "$TARGET" | sed -n 1p)
    if [[ -z $found || -z $(version_of "$found") ]]; then
        say "none on PATH that runs"
        return 1
    fi
    ln -sfn "$found" "$TARGET"
    say "$(version_of "$found") on PATH ($found) is now linked as $TARGET"
}

fetch() { # URL, FILE
    if command -v curl >/dev/null; then
        curl --fail --location --silent --connect-timeout 5 --max-time 300 --output "$2" "$1"
    else
        python3 - "$1" "$2" <<'PYTHON'
import shutil, sys, urllib.request

try:
    with urllib.request.urlopen(sys.argv[1], timeout=5) as answer, open(sys.argv[2], "wb") as file:
        shutil.copyfileobj(answer, file)
except OSError:
    sys.exit(1)
PYTHON
    fi
}

from_release() {
    local system machine archive sums expected found
    system=$(uname -s | tr '[:upper:]' '[:lower:]')
    case $(uname -m) in
    x86_64 | amd64) machine=amd64 ;;
    aarch64 | arm64) machine=arm64 ;;
    *)
        say "the release archive has none for $(uname -m)"
        return 1
        ;;
    esac
    archive=consul_${VERSION}_${system}_${machine}.zip
    sums=$WORK/SHA256SUMS
    say "asking the release archive for $VERSION"
    if ! fetch "$RELEASES/consul/$VERSION/consul_${VERSION}_SHA256SUMS" "$sums"; then
        say "the release archive cannot be reached, or does not have it"
        return 1
    fi
    say "downloading $archive"
    if ! fetch "$RELEASES/consul/$VERSION/$archive" "$WORK/$archive"; then
        say "$archive could not be downloaded"
        return 1
    fi
    expected=$(awk -v name="$archive" '$2 == name { print $1 }' "$sums")
    found=$(sha256sum "$WORK/$archive")
    if [[ -z $expected || ${found%% *} != "$expected" ]]; then
        say "$archive does not have the checksum that the archive names: not used"
        return 1
    fi
    python3 -m zipfile -e "$WORK/$archive" "$WORK/release" || return 1
    put "$WORK/release/consul" "the release archive"
}

# Prints the addresses that serve this system's own suite, as apt reads them from its configuration:
# no lists are needed, both forms of source files count, and nothing is downloaded.
debian_mirrors() {
    local suites
    # shellcheck disable=SC1091
    suites=$(. /etc/os-release && printf %s "${VERSION_CODENAME:-}")
    suites="${suites:+$suites|}stable|oldstable|testing|sid|unstable"
    apt-get -c "$WORK/apt.conf" -o Dir::Etc::sourcelist="$1" -o Dir::Etc::sourceparts="$2" update --print-uris |
        sed -nE "s#^'(.*)/dists/($suites)/(In)?Release' .*#\1#p" | awk '!seen[$0]++'
}

# An apt of its own below $WORK: it reads the machine's settings (proxy, logins) and touches none of its lists.
write_apt_settings() {
    mkdir -p "$WORK"/{state/lists/partial,cache/archives/partial,download}
    touch "$WORK/state/status"
    chmod 755 "$WORK" # apt downloads as a user of its own when it is run by root
    if ((EUID == 0)) && id _apt >/dev/null 2>&1; then
        chown -R _apt "$WORK/state/lists/partial" "$WORK/cache/archives/partial" "$WORK/download"
    fi
    cat >"$WORK/apt.conf" <<TEXT
Dir::State "$WORK/state";
Dir::State::lists "$WORK/state/lists";
Dir::State::status "$WORK/state/status";
Dir::Cache "$WORK/cache";
Acquire::Languages "none";
Acquire::Retries "1";
Acquire::http::Timeout "20";
Acquire::https::Timeout "20";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
TEXT
}

from_debian() {
    local mirror keyring keyrings=(/usr/share/keyrings/debian-archive-keyring.{gpg,pgp}) signed_by="" mirrors
    local sourcelist sourceparts
    if ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null; then
        say "this is not Debian"
        return 1
    fi
    write_apt_settings
    for keyring in "${keyrings[@]}"; do
        if [[ -r $keyring ]]; then
            signed_by="[signed-by=$keyring] "
            break
        fi
    done
    eval "$(apt-config shell sourcelist Dir::Etc::sourcelist/f sourceparts Dir::Etc::sourceparts/d)"
    mapfile -t mirrors < <(debian_mirrors "$sourcelist" "$sourceparts")
    for mirror in "${mirrors[@]}"; do
        say "asking the Debian mirror of this machine for $DEBIAN_SUITE"
        printf 'deb %s%s %s main\n' "$signed_by" "$mirror" "$DEBIAN_SUITE" >"$WORK/sources.list"
        if (
            mirror_only=(-c "$WORK/apt.conf" -o "Dir::Etc::sourcelist=$WORK/sources.list")
            mirror_only+=(-o Dir::Etc::sourceparts=/dev/null -qq)
            # A mirror that fails, or is signed by others, is an error here, not a warning.
            cd "$WORK/download" && apt-get "${mirror_only[@]}" -o APT::Update::Error-Mode=any update &&
                say "downloading the package" && apt-get "${mirror_only[@]}" download consul
        ) 2>"$WORK/apt.log" && dpkg -x "$WORK"/download/consul_*.deb "$WORK/package"; then
            put "$WORK/package/usr/bin/consul" "Debian $DEBIAN_SUITE" && return
        fi
        sed -n 's/^[EW]: /consul: apt says: /p' "$WORK/apt.log" | head -n 2
    done
    say "no mirror in the apt configuration has the package of Debian $DEBIAN_SUITE"
    return 1
}

if [[ $FORCE == no && -n $(version_of "$TARGET") ]]; then
    say "$(version_of "$TARGET") is already there: $TARGET"
    exit 0
fi
for source in "${SOURCES[@]}"; do
    case $source in
    path) from_path && exit 0 ;;
    release) from_release && exit 0 ;;
    debian) from_debian && exit 0 ;;
    esac
done
fail "no consul program could be installed: put one on PATH or into $TARGET_DIR, or go without (static addresses)"
