-- Both versions create and fill their own database with this; running it again changes nothing.
create table if not exists category (
    slug text primary key,
    name text not null
);

create table if not exists product (
    id integer primary key,
    name text not null,
    category text not null references category,
    price_cents integer not null, -- in euros
    stock integer not null
);

create table if not exists review (
    id integer primary key,
    product_id integer not null references product,
    stars integer not null,
    words text not null
);

create table if not exists placed_order (
    id uuid primary key,
    product_id integer not null references product,
    quantity integer not null,
    at timestamptz not null default now()
);

create index if not exists product_category on product (category);
create index if not exists review_product on review (product_id);

insert into category
values
    ('books', 'Books'), ('garden', 'Garden'), ('kitchen', 'Kitchen'),
    ('office', 'Office'), ('outdoor', 'Outdoor'), ('toys', 'Toys')
on conflict do nothing;

-- 6 categories × 4 things × 5 kinds of each. Every ninth product is out of stock.
insert into product
select
    n,
    (array['Plain', 'Sturdy', 'Folding', 'Little', 'Antique'])[(n - 1) % 5 + 1] || ' '
    || (array[
        'C++ Primer', 'Atlas', 'Cookbook', 'Novel',
        'Spade', 'Rake', 'Bench', 'Lantern',
        'Kettle', 'Pan', 'Ladle', 'Table',
        'Lamp', 'Chair', 'Stapler', 'Notebook',
        'Tent', 'Rucksack', 'Stove', 'Hammock',
        'Kite', 'Train', 'Puzzle', 'Drum'
    ])[(n - 1) / 5 + 1],
    (array['books', 'garden', 'kitchen', 'office', 'outdoor', 'toys'])[(n - 1) / 20 + 1],
    495 + n * 7919 % 19000,
    case when n % 9 = 0 then 0 else n * 37 % 60 + 1 end
from generate_series(1, 120) as n
on conflict do nothing;

insert into review
select
    n,
    n * 31 % 120 + 1,
    n * 7 % 5 + 1,
    (array['As described.', 'Would buy again.', 'Came late.', 'Smaller than it looks.'])[n % 4 + 1]
from generate_series(1, 400) as n
on conflict do nothing;
