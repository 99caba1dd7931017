-- Whether an Envoy or a capture has named the service.
select exists (select from abreast.traffic where service = %(service)s)
    or exists (select from abreast.endpoint where service = %(service)s)
    or exists (select from abreast.process_report where service = %(service)s)
    or exists (select from abreast.envoy_report where service = %(service)s) as named
