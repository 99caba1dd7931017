select abreast.change_rules() as version
