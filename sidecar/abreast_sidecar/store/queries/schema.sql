-- name: schema_state
-- Tell a new database from a ledger of this code, a ledger of older code, and foreign tables.
select to_regclass('abreast.schema_version') is not null as versioned,
       to_regclass('abreast.migration') is not null as outdated,
       array(
           select relname::text
           from pg_class
           where relnamespace = to_regnamespace('abreast') and relkind in ('r', 'p', 'v', 'm', 'f')
           order by relname
           limit 3
       ) as tables

-- name: schema_versions
select version, name, digest from abreast.schema_version order by version

-- name: schema_version_add
insert into abreast.schema_version (version, name, digest) values (%(version)s, %(name)s, %(digest)s)
