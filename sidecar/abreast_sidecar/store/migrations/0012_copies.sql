-- What old took for the baseline copy of a request that it answered itself. New's answer to it is a copy's too, so these two
-- times can be held against each other whatever it costs to be a copy, or spares.
alter table abreast.pair add column copy_us integer;
