-- Days that were dropped take none. A pair of which something came again after it had been moved has a second entry; over
-- midnight that is another key. In one order, so that two workers that were given the same entries never wait for each other.
insert into abreast.pair (
    day, id, at, endpoint_id, outcome, live, request, old_status, new_status, old_us, new_us, old_release, new_release,
    findings, baseline, noise, reason, explained, explained_by, noise_explained, noise_explained_by, rules,
    old_hits, old_misses, new_hits, new_misses, failed_over, copy_us
)
select (at at time zone 'UTC')::date, id, at, endpoint_id, outcome, live, coalesce(request, ''), old_status, new_status,
       old_us, new_us, coalesce(old_release, ''), coalesce(new_release, ''), coalesce(findings, '{}'), baseline,
       coalesce(noise, '{}'), coalesce(reason, ''), explained, explained_by, noise_explained, noise_explained_by, rules,
       old_hits, old_misses, new_hits, new_misses, coalesce(failed_over, false), copy_us
from json_to_recordset(%(given)s::json) as given (
    id text, ms bigint, endpoint_id integer, outcome text, live text, request text, old_status smallint,
    new_status smallint, old_us integer, new_us integer, old_release text, new_release text, findings bigint[],
    baseline boolean, noise bigint[], reason text, explained bigint[], explained_by integer[],
    noise_explained bigint[], noise_explained_by integer[], rules bigint, old_hits integer,
    old_misses integer, new_hits integer, new_misses integer, failed_over boolean, copy_us integer
), lateral (select timestamptz 'epoch' + ms * interval '1 ms') as moment (at)
where (at at time zone 'UTC')::date > (select until from abreast.dropped)
  and not (
      at < date_trunc('day', at, 'UTC') + interval '1 hour'
      and exists (select from abreast.pair p where p.id = given.id and p.day = (moment.at at time zone 'UTC')::date - 1)
  )
order by id, ms
on conflict do nothing
returning id, (at at time zone 'UTC')::date - date '1970-01-01'
