insert into abreast.rule (source, name, definition, owner, reason, expires, created_by, began)
values (%(source)s, %(name)s, %(definition)s, %(owner)s, %(reason)s, %(expires)s, %(actor)s, %(version)s)
returning id
