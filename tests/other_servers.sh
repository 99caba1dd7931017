#!/bin/sh
# Runs the tests that depend on a kind of server again: tests/other_servers.sh BIN JOBS
#
# Uses Redis 7, Postgres 15, PgBouncer and libfaketime, each if it is installed.
set -eu
bin=$1
jobs=$2
redis=/usr/bin/redis-server
postgres=/usr/lib/postgresql/15/bin
PATH=$PATH:/usr/sbin

# Runs the tests with a marker. Only files that contain the marker are collected, because collection is slow.
run_marked() {
    grep -rlE "pytest\.mark\.$1\b" tests --include='test_*.py' | xargs "$bin/pytest" -q -n "$jobs" -m "$1"
}

if [ -x "$redis" ] && "$redis" --version | grep -q 'v=7'; then
    echo "again on $($redis --version | cut -d' ' -f1-3):"
    (export ABREAST_TEST_REDIS="$redis" && run_marked redis)
fi
if [ -x "$postgres/initdb" ]; then
    echo "again on $("$postgres/postgres" --version):"
    (export ABREAST_TEST_POSTGRES="$postgres" && run_marked postgres)
fi
if command -v pgbouncer >/dev/null; then
    echo "through $(pgbouncer --version | head -n 1):"
    run_marked pooler
else
    echo "skipped: tests of a pooler, because pgbouncer is not installed"
fi
if ls /usr/lib/*/faketime/libfaketimeMT.so.1 >/dev/null 2>&1; then
    echo "with clocks that jump:"
    run_marked clocks
else
    echo "skipped: tests of clocks that jump, because libfaketime is not installed"
fi
