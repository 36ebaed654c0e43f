"""Frozen dataclasses as pytrees."""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def dataclass(cls: type[T]) -> type[T]:
    """A frozen dataclass that is a pytree of its fields, with `replace(**changes)` for a changed copy."""

    def replace(self: T, **changes: Any) -> T:
        """A copy with these fields changed."""
        return dataclasses.replace(self, **changes)

    made = dataclasses.dataclass(frozen=True)(cls)
    made.replace = replace
    return jax.tree_util.register_dataclass(made)
