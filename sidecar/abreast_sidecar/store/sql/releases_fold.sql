select abreast.fold_releases()
