insert into abreast.migration (version, name, digest) values (%(version)s, %(name)s, %(digest)s)
