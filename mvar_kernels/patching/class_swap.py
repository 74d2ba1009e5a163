"""Exchange one class among the ancestors of a live module's class, below whatever others have derived from it.

`torch.nn.utils.parametrize`, `fully_shard` and users' own programs give a live module another class, too: one that is
derived from the class that it had. So the class to exchange may lie anywhere below the module's own.
"""

from types import CellType, FunctionType
from typing import Any


def with_ancestor(cls: type, old: type, new: type, made: dict[type, type]) -> type:
    """`cls` with `new` in the place of its ancestor `old`: `new` for `old` itself, else classes made anew.

    `made` remembers the classes that were made, so that modules which shared a class share one again. Nothing that
    exists is written to: other modules may have these classes, and parametrize writes properties into its own.
    """
    if cls is old:
        return new
    if old not in cls.__mro__:
        return cls
    if cls not in made:
        bases = tuple(with_ancestor(base, old, new, made) for base in cls.__bases__)
        own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        cell = CellType()
        name = cls.__name__.replace(old.__name__, new.__name__)
        metaclass: Any = type(cls)
        made[cls] = metaclass(name, bases, {key: _rebound(value, cell) for key, value in own.items()})
        cell.cell_contents = made[cls]
    return made[cls]


def _rebound(value: Any, cell: CellType) -> Any:
    """A class's attribute for another class: `super()` without arguments finds its class in a cell of the closure."""
    match value:
        case staticmethod() | classmethod():
            return type(value)(_rebound(value.__func__, cell))
        case property():
            get, put, drop = (_rebound(f, cell) for f in (value.fget, value.fset, value.fdel))
            return type(value)(get, put, drop, value.__doc__)
        case FunctionType(__closure__=tuple(), __code__=code) if "__class__" in code.co_freevars:
            closure = tuple(
                cell if name == "__class__" else of_old
                for name, of_old in zip(code.co_freevars, value.__closure__ or (), strict=True)
            )
            copy = FunctionType(code, value.__globals__, value.__name__, value.__defaults__, closure)
            copy.__kwdefaults__, copy.__qualname__ = value.__kwdefaults__, value.__qualname__
            copy.__dict__.update(value.__dict__)
            return copy
    return value
