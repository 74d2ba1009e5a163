"""Exchange one base class of a live module's class, and keep the subclasses that are derived from it.

`torch.nn.utils.parametrize`, `fully_shard` and other programs set the class of a live module, too, to a subclass of the
class that it had. So the class to exchange may be any base of the module's class.
"""

from types import CellType, FunctionType
from typing import Any


def with_ancestor(cls: type, old: type, new: type, made: dict[type, type]) -> type:
    """`cls` with `new` instead of its base `old`: `new` if `cls` is `old`, else a new class.

    `made` caches the new classes, so that modules that share a class still do. Existing classes are not changed: other
    modules may have them, and parametrize adds properties to its own.
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
    """An attribute for the new class: `super()` without arguments finds its class in a cell of the closure."""
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
