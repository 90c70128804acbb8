"""Lookup in the types of the settings document: which model belongs to a key.

Used for suggestions, and for variables that name a key. Pure.
"""

import types
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from gateway.config.document import SettingsDocument
from gateway.config.problems import Path


def unwrapped(annotation: Any) -> Any:
    """Return a type without its `Annotated` and without `| None`."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif get_origin(annotation) in (Union, types.UnionType):
            rest = [item for item in get_args(annotation) if item is not type(None)]
            if len(rest) != 1:
                return annotation
            annotation = rest[0]
        else:
            return annotation


def branch(annotation: Any) -> tuple[type[BaseModel] | None, Any]:
    """Return the model of a section, or the type of a mapping's values; neither for a leaf."""
    plain = unwrapped(annotation)
    if isinstance(plain, type) and issubclass(plain, BaseModel):
        return plain, None
    return None, get_args(plain)[1] if get_origin(plain) is dict else None


def is_list(annotation: Any) -> bool:
    """Return whether the type is that of a list."""
    return get_origin(unwrapped(annotation)) is tuple


def model_at(path: Path) -> type[BaseModel] | None:
    """Return the model of the section at `path`, None if there is none."""
    annotation: Any = SettingsDocument
    for part in path:
        model, item = branch(annotation)
        if model is not None and part in model.model_fields:
            annotation = model.model_fields[str(part)].annotation
        elif item is not None:
            annotation = item
        elif is_list(annotation):
            annotation = get_args(unwrapped(annotation))[0]
        else:
            return None
    return branch(annotation)[0]
