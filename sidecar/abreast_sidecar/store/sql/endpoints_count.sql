with given as (
    select id, old_release, new_release, compared, baseline_compared
    from json_to_recordset(%(given)s::json) as given (
        id integer, old_release integer, new_release integer, compared bigint, baseline_compared bigint
    )
),
by_release as (
    insert into abreast.endpoint_release as known (endpoint_id, old_release, new_release, compared, baseline_compared)
    select id, old_release, new_release, compared, baseline_compared
    from given
    order by id, old_release, new_release
    on conflict (endpoint_id, old_release, new_release) do update
    set compared = known.compared + excluded.compared,
        baseline_compared = known.baseline_compared + excluded.baseline_compared
)
update abreast.endpoint
set compared = endpoint.compared + total.compared,
    baseline_compared = endpoint.baseline_compared + total.baseline_compared
from (
    select id, sum(compared) as compared, sum(baseline_compared) as baseline_compared from given group by id
) as total
where endpoint.id = total.id
