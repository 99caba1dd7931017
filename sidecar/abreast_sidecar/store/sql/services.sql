select service from abreast.traffic
union select service from abreast.endpoint
union select service from abreast.process_report
union select service from abreast.envoy_report
order by service
