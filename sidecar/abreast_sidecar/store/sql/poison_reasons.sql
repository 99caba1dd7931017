-- Why entries were put apart, the most frequent first; of those that are kept.
select reason, count(*) as count, max(at) as last
from abreast.poison
where service = %(service)s
group by reason
order by count(*) desc, reason
limit %(limit)s
