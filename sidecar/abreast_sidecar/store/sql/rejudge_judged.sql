update abreast.rule_state set judged = listed
