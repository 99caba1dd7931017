"""Integrations for libraries that services use. Each module needs its library, and this package imports none of them.

Drop-in replacements keep the name that the library uses, such as `AsyncConnection` or `SMTP`. Objects that you pass to
a library are called `Recording...`: they record effects in both versions, and hold them back in shadows. Classes called
`Shadow...` serve only shadow requests.
"""
