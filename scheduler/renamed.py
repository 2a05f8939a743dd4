"""Attributes that had another name in the version before: they answer for one version more, with a warning."""

import operator
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar


class Renamed:
    """Answers to old attribute names.

    Attributes:
        RENAMED: old names, and the paths of the new ones (`"kv.reserved_bytes"`).
    """

    __slots__ = ()
    RENAMED: ClassVar[Mapping[str, str]] = {}

    def __getattr__(self, name: str) -> Any:
        kind = type(self).__name__
        if name not in self.RENAMED:
            raise AttributeError(f"{kind} has no {name!r}")
        new = self.RENAMED[name]
        warnings.warn(f"{kind}.{name} is deprecated: use {kind}.{new}", DeprecationWarning, stacklevel=2)
        return operator.attrgetter(new)(self)
