insert into abreast.late as known (service, entries)
select service, sum(entries)
from json_to_recordset(%(given)s::json) as given (service text, day integer, entries bigint)
where date '1970-01-01' + day <= (select until from abreast.dropped)
group by service
order by service
on conflict (service) do update set entries = known.entries + excluded.entries
