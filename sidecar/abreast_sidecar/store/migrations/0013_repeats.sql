-- From one pair that shows the finding to the next, as one worker sees them: how many such turns there were, and in how many
-- of them each version said again what it had said lately.
alter table abreast.finding
    add turns bigint not null default 0,
    add old_again bigint not null default 0,
    add new_again bigint not null default 0;
alter table abreast.finding_release
    add turns bigint not null default 0,
    add old_again bigint not null default 0,
    add new_again bigint not null default 0;
