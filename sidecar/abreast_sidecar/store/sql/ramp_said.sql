update abreast.ramp set verdict = %(verdict)s, said = %(said)s, looked_at = clock_timestamp()
where id = %(id)s and state in ('progressing', 'paused')
