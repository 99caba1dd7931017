-- Their findings are told from noise anew.
update abreast.endpoint set judged_compared = -1 where id = any(%(ids)s)
