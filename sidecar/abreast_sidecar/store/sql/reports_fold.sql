select abreast.fold_reports(%(days)s)
