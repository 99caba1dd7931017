"""Errors of the middleware package.

AbreastError
├── SettingError   a setting has a value that can't be used; the middleware logs it and stays off
├── CaptureError   a capture can't be read
└── EffectError    an effect is declared in a way that can't hold it back; raised where it is written down wrong

Messages are lower case and say what, where and what to do. But for EffectError, none is ever raised into a request.
"""


class AbreastError(Exception):
    pass


class SettingError(AbreastError):
    pass


class CaptureError(AbreastError):
    pass


class EffectError(AbreastError):
    pass
