delete from abreast.webhook_receiver where url <> all (%(urls)s::text[])
