select version, name, digest from abreast.schema_version order by version
