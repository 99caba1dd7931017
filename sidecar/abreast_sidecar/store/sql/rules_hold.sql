select abreast.hold_rules() as version
