"""Which tensors copy right, and how: as dense memory, by value, as their parts, or not at all.

What was found out is remembered, from one staging of a stager to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import repeat
from operator import add, attrgetter, le, mul

import torch

from aiostage import _private
from aiostage._capture.strides import stride_of_values
from aiostage._warnings import without_warnings
from aiostage.errors import UnsupportedLeafError
from aiostage.format.parts import extent_of
from aiostage.leaf import Path, format_path

__all__ = [
    "PLAIN_CLASSES",
    "QUANTIZED_DTYPES",
    "WITHOUT_QUANTIZER",
    "Inspection",
    "LeafGuard",
    "Refusal",
    "Spec",
    "SpecTable",
    "copies_itself",
    "fit",
    "is_nested",
    "keys_tell_leaves_apart",
]

_FORMS = 8
"""How many forms of chunks are compared with the next one. One that is unlike shows it in the first few leaves."""

PLAIN_CLASSES = frozenset((torch.Tensor, torch.nn.Parameter))
"""The classes whose instances say all about themselves through their dispatch keys."""

_COMPRESSED_LAYOUTS = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


_WITHOUT_COPY = frozenset(
    getattr(torch, name)
    for name in (f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8))
    if hasattr(torch, name)
)
"""Dtypes for which torch has no copy kernel; their memory is copied as bytes."""

QUANTIZED_DTYPES = frozenset((torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4))
"""Dtypes whose elements mean nothing without a quantizer."""


WITHOUT_QUANTIZER = ("it has a quantized dtype, but no quantizer.", "Make it with torch.quantize_per_tensor().")
"""Why it is refused, and the way out."""


class Refusal(Exception):
    """A leaf cannot be staged faithfully, with the reason and the way out."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy

    def at(self, path: Path) -> UnsupportedLeafError:
        """Return the error for the leaf at a path."""
        return UnsupportedLeafError(self.reason, path=format_path(path), remedy=self.remedy)


@dataclass(frozen=True, slots=True, eq=False)
class Spec:
    """All that decides how a dense leaf is copied and rebuilt, except where its memory is.

    Specs are interned: two leaves of one stager are alike exactly when their specs are the same object, which makes
    comparing the specs of a whole tree a comparison of two lists.

    Attributes:
        cls: The class to rebuild.
        dtype: The dtype of the source.
        target: The dtype of the staged copy; differs from ``dtype`` when the leaf is cast.
        shape: The shape of source and copy.
        stride: The stride of the source, in elements.
        requires_grad: Whether source and copy require gradients.
        device: Where the source is; None for host memory.
        by_value: The memory is not the value (conjugate and negative views), so elements are copied, not bytes.
        staged_stride: The stride of the staged copy; those of the source if not given. The values of a conjugate or
            negative view come out dense.
        extent: How many elements of the staged copy's memory lie between the first and one past the last.
        dense: Whether these fill their extent in the order of their indices, and torch can copy them.
        nbytes: Size of the source's extent.
        staged_nbytes: Size of the staged copy's extent.
    """

    cls: type[torch.Tensor]
    dtype: torch.dtype
    target: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool
    device: torch.device | None
    by_value: bool
    staged_stride: tuple[int, ...] = ()
    extent: int = field(init=False)
    dense: bool = field(init=False)
    nbytes: int = field(init=False)
    staged_nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        """Derive the sizes."""
        staged_stride = self.staged_stride or self.stride
        count, ordered = 1, True
        for size, stride in zip(reversed(self.shape), reversed(staged_stride), strict=True):
            ordered = ordered and (size == 1 or stride == count)
            count *= size
        # Elements without gaps reach as far as there are of them.
        staged_extent = count if ordered else extent_of(self.shape, staged_stride)
        extent = staged_extent if staged_stride == self.stride else extent_of(self.shape, self.stride)
        # Frozen, because specs are shared by all leaves that are alike; these fields follow from the others, once.
        put = object.__setattr__
        put(self, "staged_stride", staged_stride)
        put(self, "extent", staged_extent)
        put(self, "dense", ordered and self.dtype not in _WITHOUT_COPY)
        put(self, "nbytes", extent * self.dtype.itemsize)
        put(self, "staged_nbytes", staged_extent * self.target.itemsize)


_dtype = attrgetter("dtype")
_shape = attrgetter("shape")
_is_cpu = attrgetter("is_cpu")
_is_leaf = torch.Tensor.is_leaf.__get__  # type: ignore[attr-defined]
is_nested = torch.Tensor.is_nested.__get__  # type: ignore[attr-defined]
_itemsize = attrgetter("dtype.itemsize")
_nbytes = attrgetter("nbytes")
_requires_grad = attrgetter("requires_grad")
_DENSE = {"dense"}


class SpecTable:
    """Interns specs, and remembers what each set of dispatch keys means.

    Args:
        device_of: Answers which device a tensor is on, None for host memory. None: every tensor is in host memory.

    Attributes:
        known: The specs, by what makes them.
    """

    def __init__(self, device_of: Callable[[torch.Tensor], torch.device | None] | None) -> None:
        self._device_of = device_of or _on_host
        self._host_only = device_of is None
        self.known: dict[object, Spec] = {}
        self._plain_specs: dict[object, Spec] = {}
        self._meanings: dict[int, str | Refusal] = {}

    def meanings(self, tensors: Sequence[torch.Tensor]) -> list[str | Refusal]:
        """Return for each tensor how it is handled: "dense", "value", "sparse", ..., or why it is refused."""
        if not keys_tell_leaves_apart():
            return list(map(_meaning, tensors))
        dispatch_keys, raw_repr = _private.dispatch_keys, _private.raw_repr
        assert dispatch_keys is not None and raw_repr is not None  # noqa: S101, PT018 - without them they do not tell
        numbers = list(map(raw_repr, map(dispatch_keys, tensors)))
        known = self._meanings
        if not known.keys() >= set(numbers):
            # One of each kind is asked, and its answer remembered: the keys say all that the questions are about.
            for number, tensor in zip(numbers, tensors, strict=True):
                if number not in known:
                    known[number] = _meaning(tensor)
        return list(map(known.__getitem__, numbers))

    def are_dense(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether each tensor is one piece of strided memory."""
        dispatch_keys, raw_repr = _private.dispatch_keys, _private.raw_repr
        if dispatch_keys is None or raw_repr is None or not keys_tell_leaves_apart():
            return set(self.meanings(tensors)) == _DENSE
        # In bulk: for plain tensors this is all that is asked of each, and the calls are C's.
        numbers = set(map(raw_repr, map(dispatch_keys, tensors)))
        if not self._meanings.keys() >= numbers:
            return set(self.meanings(tensors)) == _DENSE
        return all(self._meanings[number] == "dense" for number in numbers)

    def specs(self, tensors: Sequence[torch.Tensor], storage_sizes: Sequence[int]) -> list[Spec] | None:
        """Return the specs of dense tensors without gradients, found in bulk; None if one needs a closer look.

        Args:
            tensors: Some of class Tensor or Parameter.
            storage_sizes: The sizes of their storages, in bytes.
        """
        if any(map(_requires_grad, tensors)) or (self._host_only and not all(map(_is_cpu, tensors))):
            return None
        strides = map(torch.Tensor.stride, tensors)
        devices = repeat(None, len(tensors)) if self._host_only else map(self._device_of, tensors)
        classes, dtypes, shapes = map(type, tensors), map(_dtype, tensors), map(_shape, tensors)
        keys = list(zip(classes, dtypes, shapes, strides, devices, strict=True))
        # Comparing is cheaper than hashing, and neighbours are often alike.
        alike = keys.count(keys[0]) == len(keys)
        # Read once: keys that are put in below are found there, also if another event loop puts in the same.
        table = self._plain_specs
        for key, tensor in zip(keys[:1] if alike else keys, tensors, strict=False):
            if key not in table:
                try:
                    table[key] = self.spec(tensor)
                except Refusal:
                    # The closer look tells which of them it is.
                    return None
        specs = [table[keys[0]]] * len(keys) if alike else list(map(table.__getitem__, keys))
        return specs if fit(specs, tensors, storage_sizes) else None

    def spec(self, tensor: torch.Tensor, *, by_value: bool = False) -> Spec:
        """Return the spec of a dense tensor.

        Raises:
            Refusal: If its storage is smaller than its elements need, or its memory cannot be copied from.
        """
        if self._host_only and not tensor.is_cpu:
            raise Refusal(
                f"it is on {tensor.device}, and torch.accelerator knows no such device.",
                "Move it to the host first, or pass a backend for its device to AsyncStager.",
            )
        dtype, stride = tensor.dtype, tensor.stride()
        device = self._device_of(tensor)
        # Autograd history does not travel; only a graph leaf comes out requiring a gradient.
        requires_grad = tensor.requires_grad and tensor.is_leaf
        staged_stride = stride_of_values(tensor) if by_value else stride
        key = (type(tensor), dtype, tensor.shape, stride, requires_grad, device, by_value, staged_stride)
        spec = self.known.get(key)
        if spec is None:
            if dtype in QUANTIZED_DTYPES:
                # Its dispatch keys are those of a plain tensor. One with a quantizer is taken apart before this.
                raise Refusal(*WITHOUT_QUANTIZER)
            shape = tuple(tensor.shape)
            spec = Spec(type(tensor), dtype, dtype, shape, stride, requires_grad, device, by_value, staged_stride)
            self.known[key] = spec
        # Not part of the spec, so it is asked of each leaf: two that are alike may lie in storages of different sizes.
        nbytes = tensor.untyped_storage().nbytes()
        if spec.nbytes and nbytes < tensor.storage_offset() * dtype.itemsize + spec.nbytes:
            raise Refusal(
                f"its storage of {nbytes} bytes is smaller than its elements, which need {spec.nbytes} (FSDP1 frees "
                f"parameters like this between uses).",
                "Stage inside FSDP.summon_full_params or take a state_dict() of the wrapped module.",
            )
        return spec

    def cast(self, spec: Spec, target: torch.dtype) -> Spec:
        """Return the spec of the same leaf, cast while copied."""
        key = (spec, target)
        found = self.known.get(key)
        if found is None:
            found = self.known[key] = Spec(
                spec.cls,
                spec.dtype,
                target,
                spec.shape,
                spec.stride,
                spec.requires_grad,
                spec.device,
                spec.by_value,
                spec.staged_stride,
            )
        return found


class LeafGuard:
    """Recognizes a chunk of leaves at C speed: what they looked like last time.

    Args:
        specs: Of the leaves.
        addresses: Where they begin.
        sizes: Of their storages.
        tensors: The leaves, in the step in which their specs were found. They make the guard, which costs less than a
            look at each.
        like: A chunk of the same form, whose guard does for this one, as it says nothing of addresses.
    """

    __slots__ = ("addresses", "check", "requires_grad", "sizes", "specs")

    def __init__(
        self,
        specs: list[Spec],
        addresses: list[int],
        sizes: list[int],
        tensors: Sequence[torch.Tensor],
        like: LeafGuard | None,
    ) -> None:
        self.specs = specs
        self.addresses = addresses
        self.sizes = sizes
        _private.untrack_all((specs, addresses, sizes))
        # Once for the chunk, and not asked of each tensor each time.
        self.requires_grad = any(map(_requires_grad, set(specs)))
        self.check: Callable[..., bool] | None = None
        if like is not None:
            self.check = like.check
            return
        shapes = {spec: list(spec.shape) for spec in set(self.specs)}
        strides = {spec: list(spec.stride) for spec in shapes}
        # Checks class, dispatch keys, dtype, device, sizes, strides and requires_grad of each, and that they differ.
        try:
            check = _private.TensorGuards(
                *tensors,
                dynamic_dims_sizes=list(map(shapes.__getitem__, self.specs)),
                dynamic_dims_strides=list(map(strides.__getitem__, self.specs)),
            ).check
            # A guard that knows anything is none. One that does not know what it was made from costs time only.
            # Tried on a tensor that it must refuse.
            usable = check(torch.empty(0, device="meta"), *tensors[1:]) is False
        except Exception:
            usable = False
        self.check = check if usable else None

    def recognizes(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Return whether tensors, of which none is nested, are like those that the specs are of.

        The guard asks for strides before it looks at the class, and a nested tensor ends the process for that.
        """
        return (
            self.check is not None
            and len(tensors) == len(self.specs)
            and self.check(*tensors)
            # Nor does the guard see whether one that requires a gradient is a leaf of the autograd graph.
            and not (self.requires_grad and not all(map(_is_leaf, tensors)))
        )


class Inspection:
    """How a stager looks at leaves, and what it remembers of the last look.

    Args:
        device_of: Answers which device a tensor is on, None for host memory. None: every tensor is in host memory.
        needs_versions: Whether leaves are compared with what was noted of them, so that a PyTorch that counts no
            versions will not do.
    """

    def __init__(
        self, device_of: Callable[[torch.Tensor], torch.device | None] | None, *, needs_versions: bool = True
    ) -> None:
        self.needs_versions = needs_versions
        self._device_of = device_of
        self.table = SpecTable(device_of)
        self.chunks: dict[int, LeafGuard] = {}
        self.forms: list[LeafGuard] = []
        """Chunks of different forms, the one met last at the end: layers repeat, so the next is often like one."""
        self.apart: tuple[list[LeafGuard], bool] = ([], True)
        """Some chunks, and whether no two leaves of them begin at one address."""

    def forget(self) -> None:
        """Begin anew, as when tensors have had other shapes at each of very many stagings."""
        # New ones, and nothing is emptied: stagings that are under way, in other event loops too, go on with what they
        # have. That two of their leaves which are alike may then have two specs costs them a run of their own.
        self.table, self.chunks, self.forms, self.apart = SpecTable(self._device_of), {}, [], ([], True)

    def form_of(self, tensors: Sequence[torch.Tensor]) -> LeafGuard | None:
        """Return a chunk that consisted of tensors like some others, wherever they are, or None."""
        # Read once, and replaced as a whole: loops of other threads may use it too.
        forms = self.forms
        if forms and keys_tell_leaves_apart() and not any(map(is_nested, tensors)):
            for form in reversed(forms):
                if form.recognizes(tensors):
                    self.forms = [*(other for other in forms if other is not form), form]
                    return form
        return None

    def remember(
        self,
        start: int,
        tensors: Sequence[torch.Tensor],
        specs: list[Spec],
        addresses: list[int],
        sizes: list[int],
        like: LeafGuard | None = None,
    ) -> None:
        """Keep what a chunk looks like, to be recognized at capture and at the next staging.

        Args:
            start: The index of its first leaf.
            tensors: Its leaves.
            specs: Of the leaves.
            addresses: Where they begin.
            sizes: Of their storages, in bytes.
            like: What :meth:`form_of` has found.
        """
        if _private.TensorGuards is None:
            return
        known = self.chunks.get(start)
        if like is None and known is not None and known.specs == specs and known.recognizes(tensors):
            like = known
        made = LeafGuard(specs, addresses, sizes, tensors, like)
        self.chunks[start] = made
        if like is None and made.check is not None:
            self.forms = [*self.forms[1 - _FORMS :], made]


def fit(specs: Sequence[Spec], tensors: Sequence[torch.Tensor], storage_sizes: Sequence[int]) -> bool:
    """Return whether the elements of dense tensors lie within their storages, whose sizes are in bytes."""
    offsets = map(torch.Tensor.storage_offset, tensors)
    first = specs[0]
    if specs.count(first) == len(specs):
        return not first.nbytes or max(offsets) * first.dtype.itemsize + first.nbytes <= min(storage_sizes)
    starts = map(mul, offsets, map(_itemsize, specs))
    # One without elements may begin anywhere: then a closer look tells.
    return all(map(le, map(add, starts, map(_nbytes, specs)), storage_sizes))


def _on_host(tensor: torch.Tensor) -> None:
    return None


def keys_tell_leaves_apart() -> bool:
    """Return whether tensors that are handled differently have different dispatch keys, as far as samples tell.

    Dispatch keys are private to PyTorch. They only save asking each tensor what it is, so they are not relied upon
    where they cannot be had, or do not tell a sample of one kind from a plain tensor.
    """
    dispatch_keys, raw_repr = _private.dispatch_keys, _private.raw_repr
    if dispatch_keys is None or raw_repr is None:
        return False
    return _keys_are_proven()


@cache
def _keys_are_proven() -> bool:
    """Return whether samples of tensors that are handled differently have different dispatch keys."""
    dispatch_keys, raw_repr = _private.dispatch_keys, _private.raw_repr
    if dispatch_keys is None or raw_repr is None:
        return False
    try:
        with without_warnings(), torch.no_grad():
            plain = torch.ones(2, device="cpu")
            conjugate = torch.ones(2, dtype=torch.complex64, device="cpu").conj()
            # Made without a kernel. The first staging of a process does this in the event loop, and
            # quantize_per_tensor waits for OpenMP's threads, which it starts: 10 to 38 ms.
            samples = [
                plain,
                conjugate,
                conjugate.imag,
                torch.empty(2, 2, layout=torch.sparse_coo, device="cpu"),
                torch.empty(2, 2, layout=torch.sparse_csr, device="cpu"),
                torch.empty(2, dtype=torch.quint8, device="cpu"),
                torch.empty(2, device="meta"),
            ]
            # If all samples differ, and a second plain tensor has the key of the first, keys are taken to tell. A
            # PyTorch that changes this is asked tensor by tensor instead.
            numbers = [raw_repr(dispatch_keys(sample)) for sample in samples]
            same = raw_repr(dispatch_keys(torch.zeros(3, 4, device="cpu")))
            return len(set(numbers)) == len(samples) and numbers[0] == same and same == int(same)
    except Exception:
        return False


def _meaning(tensor: torch.Tensor) -> str | Refusal:
    """Return how a tensor is handled, asking it what it is."""
    with _private.without_torch_function():
        for asks, reason, remedy in _REFUSED:
            if asks(tensor):
                return Refusal(reason, remedy)
        if tensor.layout in _COMPRESSED_LAYOUTS:
            return "sparse_compressed"
        if tensor.layout is torch.sparse_coo:
            return "sparse"
        if tensor.layout is not torch.strided:
            return Refusal(f"its layout {tensor.layout} is not supported.", "Stage it in another layout.")
        if tensor.is_quantized:
            return "quantized"
        if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            return Refusal(
                "it is a wrapper subclass without __tensor_flatten__, so its inner tensors cannot be found.",
                "Give the class __tensor_flatten__ and __tensor_unflatten__, or stage its inner tensors.",
            )
        if not _private.has_storage(tensor):
            return Refusal("it has no memory of its own.", "Stage its clone(), outside of any transform.")
        if tensor.is_conj() or tensor.is_neg():
            return "value"
    return "dense"


def _asked(name: str, tensor: torch.Tensor) -> bool:
    """Ask one of PyTorch's private predicates; what it would have refused has no storage, which is found later."""
    predicate = getattr(_private, name)
    return predicate is not None and bool(predicate(tensor))


_REFUSED: tuple[tuple[Callable[[torch.Tensor], bool], str, str], ...] = (
    (
        partial(_asked, "is_functorch_wrapped"),
        "it is inside a torch.func transform.",
        "Stage outside of the transform.",
    ),
    (partial(_asked, "is_functional"), "it is a functionalization wrapper.", "Stage outside of the transform."),
    (
        attrgetter("is_meta"),
        "it is a meta tensor and has no data.",
        "Give its module memory with to_empty() and values first.",
    ),
    (
        attrgetter("is_mkldnn"),
        "it is in the mkldnn layout, whose memory has no defined order.",
        "Stage its to_dense().",
    ),
    (partial(_asked, "is_zero_tensor"), "it is an autograd zero tensor without memory.", "Stage its clone()."),
    (
        lambda tensor: tensor.is_nested and tensor.layout is torch.strided,
        "it is a nested tensor in the strided layout.",
        "Use torch.jagged, or stage its unbind().",
    ),
)
"""What means that a tensor cannot be copied, why, and the way out."""


def copies_itself(tensor: torch.Tensor, kind: type) -> bool:
    """Return whether a tensor in host memory is of a class with a __deepcopy__ that is not PyTorch's."""
    if kind in PLAIN_CLASSES:
        return False
    own = getattr(kind, "__deepcopy__", None)
    return not str(getattr(own, "__module__", "")).startswith("torch") and not _private.is_wrapper(tensor)


# Asked here and kept: the first use of these kernels of torch takes 3 to 8 ms, and in the first staging of a process
# the event loop would wait for it.
if not _keys_are_proven():
    # A mode that makes other tensors of the samples, such as FakeTensorMode, may be active now and not then.
    _keys_are_proven.cache_clear()
