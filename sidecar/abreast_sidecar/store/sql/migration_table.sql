create schema if not exists abreast;
create table if not exists abreast.migration (
    version integer primary key,
    name text not null,
    applied_at timestamptz not null default clock_timestamp(),
    digest text not null
);
