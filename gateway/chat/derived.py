"""Attributes that are computed from the fields of a frozen struct when they are first read. Pure."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


class derived(Generic[T]):  # noqa: N801 - used as a decorator, like `property`
    """A property that is computed once. The struct has to be declared with `dict=True`.

    `functools.cached_property` takes a lock each time until Python 3.12. A copy with other fields
    (`structs.replace`) computes its own.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self._name = compute.__name__
        self.__doc__ = compute.__doc__

    @overload
    def __get__(self, struct: None, owner: type) -> "derived[T]": ...
    @overload
    def __get__(self, struct: object, owner: type) -> T: ...
    def __get__(self, struct: object | None, owner: type) -> "derived[T] | T":
        if struct is None:
            return self
        value = struct.__dict__[self._name] = self._compute(struct)
        return value
