-- Tell a new database from the ledger of this code, from one that older code made, and from foreign tables.
select to_regclass('abreast.schema_version') is not null as versioned,
       to_regclass('abreast.migration') is not null as outdated,
       array(
           select relname::text
           from pg_class
           where relnamespace = to_regnamespace('abreast') and relkind in ('r', 'p', 'v', 'm', 'f')
           order by relname
           limit 3
       ) as tables
