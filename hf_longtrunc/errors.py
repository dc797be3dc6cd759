"""The exceptions that callers can tell apart. Each is also the `ValueError` that it was before it had a name.

>>> from hf_longtrunc import HFLongtruncError, UnsupportedModelError
>>> issubclass(UnsupportedModelError, (HFLongtruncError, ValueError))
True
"""


class HFLongtruncError(Exception):
    """Base of the package's own exceptions: `except HFLongtruncError` catches all of them and no others."""


class UnsupportedModelError(HFLongtruncError, ValueError):
    """A technique cannot patch this model. The message says which property of the model prevents it."""


class CacheLawError(HFLongtruncError, ValueError):
    """A cache was filled under other settings than those that want to continue it. The message says which ones."""


class LeakingRowsError(HFLongtruncError, ValueError):
    """Tokens of one packed document would see those of another."""
