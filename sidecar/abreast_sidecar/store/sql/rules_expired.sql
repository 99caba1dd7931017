-- By both clocks: a rule that ended because one of them had jumped would not begin again.
select id from abreast.rule where ended is null and expires <= least(clock_timestamp(), %(own)s)
