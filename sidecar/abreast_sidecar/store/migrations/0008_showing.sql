-- Few pairs show a finding: a listing for a window goes through these once, and not through all pairs of the time.
create index pair_showing_at on abreast.pair (at) where findings <> '{}';
