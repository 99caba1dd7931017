-- What Envoy has sampled, and what the ledger ever got; null where no Envoy's count is known.
select (select sum((counted->>'sampled')::bigint)::bigint from abreast.envoy_report where service = %(service)s) as sampled,
       (select coalesce(sum(pairs), 0)::bigint from abreast.tally where service = %(service)s) as written
