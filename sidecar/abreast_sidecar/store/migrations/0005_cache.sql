-- What each version asked of its cache, where it did: a new version that misses more often is a finding.
alter table abreast.pair
    add column old_hits integer,
    add column old_misses integer,
    add column new_hits integer,
    add column new_misses integer;
