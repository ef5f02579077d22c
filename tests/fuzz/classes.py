"""Classes whose objects are copied in every way that Python and PyTorch know."""

from __future__ import annotations

import copy
import copyreg
import enum
import functools
from collections import OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map

__all__ = [
    "HOLDERS",
    "Announcing",
    "Cloning",
    "Color",
    "Drifting",
    "Keyed",
    "Loyal",
    "LoyalTensor",
    "Marked",
    "MarkedParameter",
    "OwnCopy",
    "Pair",
    "SlotTensor",
    "Summing",
    "SummingArguments",
    "SummingState",
    "Tagged",
    "WithoutMemo",
    "Wrapper",
]


class Pair(NamedTuple):
    first: Any
    second: Any


class Color(enum.Enum):
    RED = 1
    GREEN = 2


class Plain:
    def __init__(self, value: Any) -> None:
        self.value = value


class Tagged(Plain):
    """Hashed by identity, and found again by its tag."""

    def __init__(self, tag: int, value: Any = None) -> None:
        super().__init__(value)
        self.tag = tag


@dataclass
class Record:
    value: Any
    items: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Frozen:
    value: Any


class Slotted:
    __slots__ = ("absent", "value")

    def __init__(self, value: Any) -> None:
        self.value = value


class SlottedAndMore(Slotted):
    def __init__(self, value: Any) -> None:
        super().__init__(value)
        self.more = [value]


class Reduced:
    """Is rebuilt from an argument."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        return type(self), (self.value,)


class ReducedEx(Plain):
    """Is rebuilt from nothing, and given its state and items afterwards."""

    @classmethod
    def of(cls, value: Any) -> ReducedEx:
        made = cls(value)
        made.items = [value, 1]
        return made

    def __init__(self, value: Any = None) -> None:
        super().__init__(value)
        self.items: list[Any] = []

    def append(self, item: Any) -> None:
        self.items.append(item)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return ReducedEx, (), {"value": self.value}, iter(self.items)


class Stateful:
    """Has a state that is made when it is asked for."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __getstate__(self) -> Any:
        return {"kept": self.value}

    def __setstate__(self, state: Any) -> None:
        self.value = state["kept"]


class StateAsTuple(Stateful):
    def __getstate__(self) -> Any:
        return (self.value, "state")

    def __setstate__(self, state: Any) -> None:
        self.value = state[0]


class NewArguments:
    def __new__(cls, value: Any) -> NewArguments:
        made = super().__new__(cls)
        made.value = value  # type: ignore[attr-defined]
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (self.value,)  # type: ignore[attr-defined]


class NewKeywords:
    def __new__(cls, *, value: Any) -> NewKeywords:
        made = super().__new__(cls)
        made.value = value  # type: ignore[attr-defined]
        return made

    def __getnewargs_ex__(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {"value": self.value}  # type: ignore[attr-defined]


class NewStrings(str):
    value: Any

    def __new__(cls, value: Any) -> NewStrings:
        made = super().__new__(cls, "text")
        made.value = value
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (self.value,)


class OwnCopy:
    """Copies itself as the manual says."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnCopy:
        made = OwnCopy.__new__(OwnCopy)
        memo[id(self)] = made
        made.value = copy.deepcopy(self.value, memo)
        return made


class Loyal(OwnCopy):
    """Copies to itself."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Loyal:
        return self


class LoyalTensor(torch.Tensor):
    """Copies to itself."""

    def __deepcopy__(self, memo: dict[int, Any]) -> LoyalTensor:
        return self


class WithoutMemo(OwnCopy):
    """Copies what it holds as if nothing else had been copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> WithoutMemo:
        return WithoutMemo(copy.deepcopy(self.value))


class Cloning(OwnCopy):
    """Makes copies of tensors by itself."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Cloning:
        plain = isinstance(self.value, torch.Tensor) and type(self.value) in (torch.Tensor, torch.nn.Parameter)
        made = Cloning(self.value.detach().clone() if plain else copy.deepcopy(self.value, memo))
        memo[id(self)] = made
        return made


class Announcing(OwnCopy):
    """Makes a copy of what it holds by itself, and puts it into memo for all that come after."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Announcing:
        made = Announcing(None)
        memo[id(self)] = made
        plain = type(self.value) in (torch.Tensor, torch.nn.Parameter)
        made.value = self.value.detach().clone() if plain else copy.deepcopy(self.value)
        if not isinstance(self.value, (torch.UntypedStorage, torch.TypedStorage)):
            memo[id(self.value)] = made.value
        return made


def _views(value: Any) -> list[Any]:
    """Return new views of a tensor."""
    plain = type(value) is torch.Tensor and value.layout is torch.strided and not value.is_quantized
    if not plain or not value.dim() or value.device.type != "cpu" or value.is_conj() or value.is_neg():
        return [value]
    views = value.detach()
    return [views[:1], views[1:], views[:1]]


class CopiesViews:
    """Copies views that are made for that, and go at once."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.views = _views(value)

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiesViews:
        made = CopiesViews(None)
        memo[id(self)] = made
        made.views = [copy.deepcopy(view, memo) for view in _views(self.value)]
        made.value = copy.deepcopy(self.value, memo)
        return made


class ReducedToViews:
    """Is made of views that are made when it is asked, and go at once."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.items = _views(value)

    @classmethod
    def bare(cls) -> ReducedToViews:
        made = cls(None)
        made.items = []
        return made

    def append(self, item: Any) -> None:
        self.items.append(item)

    def __reduce__(self) -> Any:
        return ReducedToViews.bare, (), {"value": self.value}, (view for view in _views(self.value))


class StateOfView(Stateful):
    """Has new views for its state."""

    def __init__(self, value: Any) -> None:
        super().__init__(value)
        self.views = _views(value)

    def __getstate__(self) -> Any:
        return [self.value, *_views(self.value)]

    def __setstate__(self, state: Any) -> None:
        self.value, *self.views = state


class Registered(Plain):
    """Is copied by a function that copyreg knows."""


def _reduce_registered(item: Registered) -> Any:
    return Registered, (None,), {"value": item.value}


copyreg.pickle(Registered, _reduce_registered)


def total(items: Any) -> float:
    """Add up all numbers that lie in a container as such."""
    return float(sum(_sum(item) if isinstance(item, torch.Tensor) else 1.0 for item in items))


def _sum(tensor: torch.Tensor) -> float:
    plain = (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_quantized
    )
    return float(tensor.detach().to(torch.complex128).sum().real) if plain and tensor.device.type == "cpu" else 1.0


class Summing:
    """Computes over a copy when it is copied."""

    def __init__(self, items: Any) -> None:
        self.items = items
        self.total = total(items)

    def __deepcopy__(self, memo: dict[int, Any]) -> Summing:
        return Summing(copy.deepcopy(self.items, memo))


class SummingArguments(Summing):
    __deepcopy__ = None  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        return SummingArguments, (self.items,)


class SummingState(SummingArguments):
    def __reduce__(self) -> Any:
        return SummingState.__new__, (SummingState,), (self.items,)

    def __setstate__(self, state: Any) -> None:
        (self.items,) = state
        self.total = total(self.items)


class Keyed:
    """Is hashed by what lies in a list."""

    def __init__(self, items: list[int]) -> None:
        self.items = items

    def __hash__(self) -> int:
        return hash(tuple(item for item in self.items if type(item) is int))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keyed) and self.items == other.items


class Drifting:
    """Has another state each time that it is asked."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __getstate__(self) -> Any:
        return dict(self.__dict__)


class ListKind(list[Any]):
    pass


class DictKind(dict[Any, Any]):
    pass


class TupleKind(tuple[Any, ...]):
    pass


class SetKind(set[Any]):
    pass


def _list_kind(value: Any) -> ListKind:
    made = ListKind([value, value])
    made.value = value  # type: ignore[attr-defined]
    return made


def _dict_kind(value: Any) -> DictKind:
    made = DictKind(a=value)
    made.value = [value]  # type: ignore[attr-defined]
    return made


class MappingKind(Mapping[str, Any]):
    def __init__(self, items: dict[str, Any]) -> None:
        self.items_within = items

    def __getitem__(self, name: str) -> Any:
        return self.items_within[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_within)

    def __len__(self) -> int:
        return len(self.items_within)


def _with_attributes(made: Any, value: Any) -> Any:
    made.note = [value]
    return made


class DequeKind(deque[Any]):
    pass


class DefaultDictKind(defaultdict[Any, Any]):
    pass


HOLDERS: list[Any] = [
    Plain,
    Record,
    Frozen,
    Slotted,
    SlottedAndMore,
    Reduced,
    ReducedEx.of,
    Stateful,
    StateAsTuple,
    NewArguments,
    lambda value: NewKeywords(value=value),
    NewStrings,
    OwnCopy,
    Drifting,
    _list_kind,
    _dict_kind,
    lambda value: TupleKind((value, 1)),
    lambda value: Pair(value, [value]),
    lambda value: Pair(1, value),
    lambda value: deque([value, 2], maxlen=5),
    lambda value: OrderedDict(a=value, b=1),
    lambda value: defaultdict(list, a=value),
    lambda value: UserDict({"a": value}),
    lambda value: UserList([value]),
    lambda value: slice(0, value),
    WithoutMemo,
    Cloning,
    Announcing,
    CopiesViews,
    ReducedToViews,
    StateOfView,
    Registered,
    lambda value: _with_attributes(TupleKind((value,)), value),
    lambda value: _with_attributes(DequeKind([value], 3), value),
    lambda value: DefaultDictKind(list, a=value),
    lambda value: _with_attributes(functools.partial(max, value, key=value), value),
    lambda value: defaultdict(functools.partial(list, [1]), a=value),
    lambda value: MappingKind({"a": value}),
]
"""Each makes something that holds a value."""


# Tensors


class Marked(torch.Tensor):
    """A subclass with memory of its own."""


class SlotTensor(torch.Tensor):
    __slots__ = ("value",)


class OwnCopyTensor(torch.Tensor):
    """Copies itself, and tells how often."""

    generation = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnCopyTensor:
        made = self.detach().clone().as_subclass(OwnCopyTensor)
        made.generation = self.generation + 1
        memo[id(self)] = made
        return made


class MarkedParameter(torch.nn.Parameter):
    pass


class Wrapper(torch.Tensor):
    """Two tensors that are one outside."""

    left: torch.Tensor
    right: torch.Tensor

    @staticmethod
    def __new__(cls, left: torch.Tensor, right: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls, left.shape, strides=left.stride(), dtype=left.dtype, device=left.device
        )

    def __init__(self, left: torch.Tensor, right: torch.Tensor) -> None:
        self.left, self.right = left, right

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["left", "right"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> Wrapper:
        return Wrapper(inner["left"], inner["right"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        left = func(*tree_map(lambda x: x.left if isinstance(x, Wrapper) else x, args), **kwargs)
        right = func(*tree_map(lambda x: x.right if isinstance(x, Wrapper) else x, args), **kwargs)
        return Wrapper(left, right) if isinstance(left, torch.Tensor) else left
