select coalesce(sum(delivered), 0)::bigint as delivered, coalesce(sum(failed), 0)::bigint as failed,
       coalesce(sum(dropped), 0)::bigint as dropped, (select count(*) from abreast.webhook) as waiting
from abreast.webhook_receiver
