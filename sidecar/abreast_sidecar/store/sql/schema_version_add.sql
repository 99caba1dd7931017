insert into abreast.schema_version (version, name, digest) values (%(version)s, %(name)s, %(digest)s)
