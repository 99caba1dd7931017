-- Pairs whose difference was drift of state, as asking both versions again told. Such a finding is no finding of the pair
-- any more, and counts apart.
alter table abreast.finding add drift bigint not null default 0;
alter table abreast.pair add drift bigint[];
create index pair_drift on abreast.pair using gin (drift) where drift is not null;
