select service, version, label, id
from abreast.release
join unnest(%(services)s::text[], %(versions)s::text[], %(labels)s::text[]) as wanted (service, version, label)
    using (service, version, label)
