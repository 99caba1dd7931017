select slug, name from category order by slug
