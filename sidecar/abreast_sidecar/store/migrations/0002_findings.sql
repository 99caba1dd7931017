-- Labels of code, in the order in which the ledger first saw them: of two, the one with the greater id is the later.
create table abreast.release (
    id integer generated always as identity primary key,
    service text not null,
    version text not null, -- old, new
    label text not null, -- empty where the service names none
    first_seen timestamptz not null default clock_timestamp(),
    unique (service, version, label)
);

-- `state` is told from noise by counts; `status` is what people said of it. Both are needed: a finding counts against a
-- verdict while it is not noise and nobody said that it is expected, or fixed in a later release than the one judged.
alter table abreast.finding
    add status text not null default 'open'
        check (status in ('open', 'confirmed', 'expected', 'fixed', 'reopened')),
    add status_since timestamptz, -- null: nobody ever said anything
    -- While it is fixed: the last release of new that may still show it. One with a greater id that does reopens it.
    add fixed_after integer,
    add replaced integer not null default 0; -- examples that gave way to smaller ones

-- Who said what of a finding, when and why.
create table abreast.finding_event (
    id bigint generated always as identity primary key,
    finding_id bigint not null references abreast.finding on delete cascade,
    at timestamptz not null default clock_timestamp(),
    actor text not null, -- a person, or `abreast` where it reopened by itself
    before text not null, -- statuses
    after text not null,
    release text not null default '', -- of new: in which it is fixed, or came back
    reason text not null
);

create index finding_event_finding on abreast.finding_event (finding_id, id desc);

-- The counters of endpoint and finding again, by releases (their ids; 0 where that capture is missing), so that what
-- begins in one release is not diluted by those before it. Copies to old are counted by its release.
create table abreast.endpoint_release (
    endpoint_id integer not null references abreast.endpoint,
    old_release integer not null,
    new_release integer not null,
    compared bigint not null default 0,
    baseline_compared bigint not null default 0,
    primary key (endpoint_id, old_release, new_release)
) with (fillfactor = 70);

create table abreast.finding_release (
    finding_id bigint not null references abreast.finding on delete cascade,
    old_release integer not null,
    new_release integer not null,
    count bigint not null default 0,
    baseline_count bigint not null default 0,
    explained bigint not null default 0,
    new_greater bigint not null default 0,
    new_smaller bigint not null default 0,
    first_seen timestamptz not null,
    last_seen timestamptz not null,
    primary key (finding_id, old_release, new_release)
) with (fillfactor = 70);

-- What a bounded number of requests had: names of parameters, headers and body fields with short values, never bodies.
-- Of each endpoint (finding 0) requests at random, and of each finding some that show it. A slot is taken over by a
-- later request, so that the table has a bound and forgets.
create table abreast.request_sample (
    endpoint_id integer not null references abreast.endpoint,
    finding_id bigint not null, -- 0: any request of the endpoint
    slot smallint not null,
    at timestamptz not null,
    findings bigint[] not null,
    features jsonb not null, -- {name: [values]}
    primary key (endpoint_id, finding_id, slot)
) with (fillfactor = 70);

-- What a person who decides about the new version has to look at: neither noise nor an addition, unless somebody
-- confirmed it, and not said to be expected or fixed.
create function abreast.open_regression(f abreast.finding) returns boolean language sql immutable as $$
    select (f.status = 'confirmed' or (f.impact <> 'additive' and f.state <> 'noise'))
       and f.status not in ('expected', 'fixed')
$$;
