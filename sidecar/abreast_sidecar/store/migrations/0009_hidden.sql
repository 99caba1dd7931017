-- Listings for a window count what rules and drift explain, too.
create index pair_hidden_at on abreast.pair (at) where explained is not null or drift is not null;
