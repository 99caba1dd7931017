-- New was tried first for the user and failed, so that old answered: `live` is old then.
alter table abreast.pair add column failed_over boolean not null default false;

-- What a change of the guard or of a ramp was about: {guard_before, guard_after, ramp_before, ramp_after}, each where it has one.
alter table abreast.traffic_event add column detail jsonb not null default '{}';
-- Names the event to receivers of webhooks, in whatever database it is.
alter table abreast.traffic_event add column uid uuid not null default gen_random_uuid();

create table abreast.guard (
    service text primary key,
    -- {mode: off, watching or acting; confidence, min_completeness; errors, mismatches, slower: {limit, min_pairs, window,
    -- cooldown}}; times in seconds
    policy jsonb not null,
    since timestamptz not null default clock_timestamp(), -- when the policy was set: evidence from before does not count
    fired jsonb not null default '{}', -- rule → when it last acted, or would have
    state text not null default 'waiting', -- idle, clear, breached or blind; waiting: no sidecar has looked yet
    said text not null default '', -- why, in words
    looked_at timestamptz
);

create table abreast.ramp (
    id bigint generated always as identity primary key,
    service text not null,
    state text not null, -- progressing, paused; ended: succeeded, failed, aborted, superseded
    steps integer[] not null, -- shares of users that new answers, in hundredths of a percent
    step integer not null default 0, -- index in `steps` of what is set
    hold float8 not null, -- seconds that each step lasts at least
    min_pairs integer not null, -- compared in a step before the next
    budget jsonb not null, -- {max_mismatch, max_error, max_slower, min_completeness, confidence}
    actor text not null,
    reason text not null,
    started_at timestamptz not null,
    step_at timestamptz not null, -- when the step was set, or the ramp resumed
    ended_at timestamptz,
    version bigint not null, -- of the traffic settings that the step made
    started_gap bigint, -- requests that Envoy had sampled and the ledger did not have, when it began; null: unknown
    step_gap bigint,
    verdict text not null default '', -- PASS, FAIL or INCONCLUSIVE, of the last look
    said text not null default '', -- what it waits for, or how it ended
    looked_at timestamptz,
    check (state in ('progressing', 'paused', 'succeeded', 'failed', 'aborted', 'superseded')),
    check (step >= 0 and step < cardinality(steps))
);

create index ramp_service on abreast.ramp (service, id desc);
create unique index ramp_active on abreast.ramp (service) where state in ('progressing', 'paused');

-- Where events are told, as the settings of the acting sidecar say; and how it went.
create table abreast.webhook_receiver (
    url text primary key,
    delivered bigint not null default 0,
    failed bigint not null default 0, -- attempts
    dropped bigint not null default 0 -- messages given up
);

-- What still has to be told: one row for each event and receiver, written together with the event.
create table abreast.webhook (
    id bigint generated always as identity primary key,
    event_id bigint not null,
    url text not null references abreast.webhook_receiver on delete cascade,
    attempts integer not null default 0,
    due timestamptz not null default clock_timestamp(),
    unique (event_id, url)
);

create index webhook_url on abreast.webhook (url, due);

create function abreast.record_event(
    service text, at timestamptz, actor text, action text, reason text, before jsonb, after jsonb, detail jsonb
) returns void language sql as $$
    with written as (
        insert into abreast.traffic_event (service, at, actor, action, reason, before, after, detail)
        values ($1, $2, $3, $4, $5, $6, $7, $8)
        returning id
    )
    insert into abreast.webhook (event_id, url)
    select written.id, receiver.url from written cross join abreast.webhook_receiver receiver where $4 <> 'create';
    select pg_notify('abreast_traffic', $1)
$$;
