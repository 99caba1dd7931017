select service, outcome, sum(pairs)::bigint as pairs from abreast.tally group by service, outcome order by service, outcome
