select abreast.fold_reports(%(oldest)s)
