-- Of the pairs that show a finding, those in which new's number is more than twice old's, and in which it is less than half
-- of it; and the same of old's copies.
alter table abreast.finding
    add far_more bigint not null default 0,
    add far_less bigint not null default 0,
    add copies_far_more bigint not null default 0,
    add copies_far_less bigint not null default 0;
alter table abreast.finding_release
    add far_more bigint not null default 0,
    add far_less bigint not null default 0,
    add copies_far_more bigint not null default 0,
    add copies_far_less bigint not null default 0;
