"""Errors of the middleware package.

AbreastError
├── SettingError   a setting has a value that can't be used; the middleware logs it and stays off
├── ShadowError    a shadow request asks for what could not be taken back; raised into it, and only into it
├── CaptureError   a capture can't be read
└── EffectError    an effect is declared in a way that can't hold it back; raised where it is written down wrong

Messages are lower case and say what, where and what to do. But for EffectError and ShadowError, none is ever raised
into a request.
"""


class AbreastError(Exception):
    pass


class SettingError(AbreastError):
    pass


class CaptureError(AbreastError):
    pass


class EffectError(AbreastError):
    pass


class ShadowError(AbreastError):
    pass
