insert into abreast.webhook_receiver (url) select unnest(%(urls)s::text[]) on conflict do nothing
