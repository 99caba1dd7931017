select version, name, digest from abreast.migration order by version
