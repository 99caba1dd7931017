update abreast.rule_state set listed = %(version)s
