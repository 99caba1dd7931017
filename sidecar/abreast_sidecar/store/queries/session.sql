-- name: clock
select clock_timestamp() as now

-- name: lock_try
select pg_try_advisory_xact_lock(%(lock)s) as locked

-- name: leader_acquire
select pg_try_advisory_lock(%(lock)s) as acquired

-- name: leader_check
-- Check that this backend holds the lock. Behind a transaction-mode pooler another one may hold it.
select exists (
    select from pg_locks
    where locktype = 'advisory' and granted and pid = pg_backend_pid() and objsubid = 1
      and classid::bigint << 32 | objid::bigint = %(lock)s
) as is_leader
