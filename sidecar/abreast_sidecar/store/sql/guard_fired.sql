update abreast.guard
set fired = fired || jsonb_build_object(%(rule)s::text, clock_timestamp()), state = 'breached', said = %(said)s,
    looked_at = clock_timestamp()
where service = %(service)s
