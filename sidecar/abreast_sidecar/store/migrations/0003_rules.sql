-- What people declared about differences. A rule is never changed: it is ended, and another begins. `began` and `ended`
-- are versions of the rules, so that what holds at a version is known without a clock.
create table abreast.rule (
    id integer generated always as identity primary key,
    source text not null default '', -- the file that it was imported from
    name text not null,
    definition jsonb not null, -- the fields of a rule in a file, without name, owner, reason and expires
    owner text not null,
    reason text not null,
    expires timestamptz not null, -- the first moment at which it no longer holds
    created_at timestamptz not null default clock_timestamp(),
    created_by text not null,
    began bigint not null,
    ended bigint, -- null: it holds
    ended_at timestamptz,
    ended_by text -- `abreast` for one that expired
);

create unique index rule_name on abreast.rule (source, name) where ended is null;

-- `version` grows with every change of the rules, `listed` is the one for which the pairs to be judged again were last
-- listed, and `judged` the one by which all stored pairs are judged.
create table abreast.rule_state (
    one boolean primary key default true check (one),
    version bigint not null default 0,
    listed bigint not null default 0,
    judged bigint not null default 0
);

insert into abreast.rule_state default values;

-- Pairs that a change of the rules may concern, until they are judged again.
create table abreast.rejudge (
    day date not null,
    pair_id text not null,
    primary key (day, pair_id)
);

-- What each rule explains of each finding, by releases (as in finding_release): counters that would be the finding's
-- if the rule were not there, and are given back to it when the rule ends.
create table abreast.rule_finding (
    rule_id integer not null references abreast.rule,
    finding_id bigint not null references abreast.finding on delete cascade,
    old_release integer not null,
    new_release integer not null,
    count bigint not null default 0,
    baseline_count bigint not null default 0,
    explained bigint not null default 0,
    new_greater bigint not null default 0,
    new_smaller bigint not null default 0,
    unknown bigint not null default 0, -- pairs judged before the rule, whose answers are not kept
    primary key (rule_id, finding_id, old_release, new_release)
) with (fillfactor = 70);

create index rule_finding_finding on abreast.rule_finding (finding_id);

-- A pair's findings are those that no rule explains. What rules explain stands beside, with the rule at the same place.
alter table abreast.pair
    add explained bigint[],
    add explained_by integer[],
    add noise_explained bigint[],
    add noise_explained_by integer[],
    add rules bigint; -- version of the rules that it was judged by; null before there were any

create index pair_noise on abreast.pair using gin (noise) where noise <> '{}';
create index pair_explained on abreast.pair using gin (explained) where explained is not null;
create index pair_explained_by on abreast.pair using gin (explained_by) where explained_by is not null;
create index pair_noise_explained_by on abreast.pair using gin (noise_explained_by) where noise_explained_by is not null;

-- The rules' version, which stays what it is until the transaction ends: a worker's batch is committed under the rules
-- that it was judged by, or not at all.
create function abreast.hold_rules() returns bigint language plpgsql as $$
begin
    perform pg_advisory_xact_lock_shared(hashtext('abreast.rules'));
    return (select version from abreast.rule_state);
end $$;

-- Waits for those who hold the rules, and tells everyone at the commit.
create function abreast.change_rules() returns bigint language plpgsql as $$
declare
    changed bigint;
begin
    perform pg_advisory_xact_lock(hashtext('abreast.rules'));
    update abreast.rule_state set version = version + 1 returning version into changed;
    perform pg_notify('abreast_rules', changed::text);
    return changed;
end $$;
