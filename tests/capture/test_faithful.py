"""What tensors can be: every dtype, layout and class is staged right, or refused by path before anything is copied."""

from __future__ import annotations

import asyncio
import copy
import mmap
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed
from torch.testing._internal.two_tensor import TwoTensor

from aiostage import AsyncStager, UnsupportedLeafError
from aiostage._capture import leaves as leaves_module
from aiostage._capture import walk as walk_module
from aiostage._capture.composites import finder
from aiostage._capture.faithful import Inspection
from aiostage._capture.leaves import Leaves
from aiostage._capture.protocol import is_layout
from aiostage._capture.walk import Walk
from aiostage._loop.coroutines import exhausted
from aiostage.leaf import Attribute

DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)


def stage(tree: Any) -> Any:
    """Stage twice, so that the plan is replayed too."""

    async def run() -> Any:
        async with AsyncStager() as stager:
            first = await stager.stage(tree)
            del first
            return await stager.stage(tree)

    return asyncio.run(run())


def refused(leaf: Any) -> UnsupportedLeafError:
    async def run() -> UnsupportedLeafError:
        async with AsyncStager() as stager:
            with pytest.raises(UnsupportedLeafError) as caught:
                await stager.stage({"fine": torch.ones(3), "odd": [leaf]})
            assert stager.statistics().arenas == 0
            return caught.value

    error = asyncio.run(run())
    assert error.path == "state_dict['odd'][0]"
    assert error.remedy
    return error


def bytes_of(tensor: torch.Tensor) -> list[int]:
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    start = tensor.storage_offset() * tensor.dtype.itemsize
    return storage[start:].tolist()


@pytest.mark.filterwarnings(
    "ignore:ComplexHalf support is experimental",
    "ignore:BComplex32 support is experimental",
    "ignore:torch.quantize_per_tensor",
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_that_can_be_made(dtype: torch.dtype) -> None:
    source = torch.empty(12, dtype=dtype)
    if source.is_quantized:
        # This is half of one; those below are whole.
        assert "no quantizer" in refused(source).reason
        return
    raw = torch.empty(0, dtype=torch.uint8).set_(source.untyped_storage())
    # No pattern that a bool cannot have.
    raw.copy_(torch.arange(len(raw)) % 2 if dtype is torch.bool else torch.arange(len(raw)) * 37 % 251)
    staged = stage({"a": source, "view": source[3:7]})
    assert (staged["a"].dtype, staged["a"].shape) == (dtype, source.shape)
    assert bytes_of(staged["a"]) == raw.tolist()
    assert staged["view"].untyped_storage().data_ptr() == staged["a"].untyped_storage().data_ptr()
    raw.zero_()
    assert any(bytes_of(staged["a"]))


def test_a_memory_mapping_is_refused_with_a_way_out() -> None:
    """Of a memory-mapped TensorDict, whose class the caller cannot change."""

    class Mapped:
        def __init__(self) -> None:
            self.memory = mmap.mmap(-1, 10)

    async def run() -> UnsupportedLeafError:
        async with AsyncStager() as stager:
            with pytest.raises(UnsupportedLeafError) as caught:
                await stager.stage({"a": Mapped()})
            return caught.value

    error = asyncio.run(run())
    assert error.path == "state_dict['a'].memory"
    assert error.remedy is not None
    assert "clone()" in error.remedy


@pytest.mark.filterwarnings("ignore")
class TestQuantized:
    def test_memory_in_a_quantized_dtype_is_refused(self) -> None:
        """It has the dispatch keys of a plain tensor, and most of PyTorch's functions fail on it."""
        source = torch.zeros(8, dtype=torch.uint8).view(torch.quint8)
        assert not source.is_quantized
        assert "no quantizer" in refused(source).reason

    def test_a_view_of_quantized_memory_is_refused(self) -> None:
        """PyTorch itself ends the process if one asks for its quantizer."""
        source = torch.quantize_per_tensor(torch.ones(8), 0.5, 3, torch.quint8)
        made = [
            source.view(torch.uint8),
            source.view(torch.quint8),
            source.view(torch.uint8).view(torch.qint8),
            source.view(torch.quint8).detach(),
            torch.nn.Parameter(source.view(torch.quint8), requires_grad=False),
        ]
        with torch.inference_mode():
            made.append(source.view(torch.quint8))
        for view in made:
            assert "view of a quantized tensor" in refused(view).reason

    def test_other_views_of_quantized_memory_are_staged(self) -> None:
        source = torch.quantize_per_tensor(torch.arange(8.0), 0.5, 3, torch.quint8)
        for view in (source.view(2, 4), source[1:3], source.detach(), source.t()):
            staged = stage([view])[0]
            assert torch.equal(staged.dequantize(), view.dequantize())

    def test_per_tensor(self) -> None:
        source = torch.quantize_per_tensor(torch.arange(6.0).reshape(2, 3), 0.5, 3, torch.quint8)
        staged = stage([source])[0]
        assert (staged.q_scale(), staged.q_zero_point(), staged.qscheme()) == (0.5, 3, torch.per_tensor_affine)
        assert torch.equal(staged.dequantize(), source.dequantize())

    def test_per_channel(self) -> None:
        source = torch.quantize_per_channel(
            torch.arange(6.0).reshape(2, 3), torch.tensor([0.5, 0.25]), torch.tensor([0, 1]), 0, torch.qint8
        )
        staged = stage([source])[0]
        assert torch.equal(staged.q_per_channel_scales(), source.q_per_channel_scales())
        assert torch.equal(staged.int_repr(), source.int_repr())
        assert staged.q_per_channel_axis() == 0


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
class TestLayouts:
    dense = torch.tensor([[0.0, 1, 0, 0], [2, 0, 0, 3], [0, 0, 0, 0], [0, 4, 0, 0]])

    @pytest.mark.parametrize(
        "make",
        [
            lambda dense: dense.to_sparse(),
            lambda dense: torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (4, 4), check_invariants=True),
            lambda dense: dense.to_sparse_csr(),
            lambda dense: dense.to_sparse_csc(),
            lambda dense: dense.to_sparse_bsr((2, 2)),
            lambda dense: dense.to_sparse_bsc((2, 2)),
        ],
        ids=["coo", "uncoalesced", "csr", "csc", "bsr", "bsc"],
    )
    def test_sparse(self, make: Any) -> None:
        source = make(self.dense)
        staged = stage([source])[0]
        assert staged.layout is source.layout
        assert torch.equal(staged.to_dense(), source.to_dense())
        if source.layout is torch.sparse_coo:
            assert staged.is_coalesced() == source.is_coalesced()
            assert staged._nnz() == source._nnz()
            source._values().zero_()
        else:
            source.values().zero_()
        assert staged.to_dense().any()

    def test_jagged(self) -> None:
        source = torch.nested.nested_tensor([torch.ones(2), torch.arange(3.0)], layout=torch.jagged)
        staged = stage([source])[0]
        assert [part.tolist() for part in staged.unbind()] == [[1, 1], [0, 1, 2]]

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    def test_nested_in_strided_layout_is_refused(self) -> None:
        assert "strided" in refused(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])).reason

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    def test_nested_in_the_place_of_one_that_has_come_often(self) -> None:
        async def run() -> None:
            tree = {"leaf": torch.ones(3)}
            async with AsyncStager() as stager:
                for _ in range(4):
                    await stager.stage(tree)
                tree["leaf"] = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
                # What recognizes leaves at C speed would end the process here.
                with pytest.raises(UnsupportedLeafError, match="strided layout"):
                    await stager.stage(tree)

        asyncio.run(run())

    def test_without_data(self) -> None:
        assert "meta" in refused(torch.empty(3, device="meta")).reason

    def test_mkldnn(self) -> None:
        assert "mkldnn" in refused(torch.ones(2, 2).to_mkldnn()).reason

    def test_inside_a_transform(self) -> None:
        caught: list[UnsupportedLeafError] = []

        def inside(row: torch.Tensor) -> torch.Tensor:
            caught.append(refused(row))
            return row

        torch.func.vmap(inside)(torch.ones(2, 3))
        assert "torch.func" in caught[0].reason


class Bare(torch.Tensor):
    """A wrapper that does not tell what it wraps."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Bare:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError


class Named(torch.Tensor):
    pass


class TestClasses:
    def test_a_wrapper_is_taken_apart(self) -> None:
        source = TwoTensor(torch.arange(3.0), torch.ones(3))
        staged = stage({"w": source, "a": source.a})
        assert type(staged["w"]) is TwoTensor
        assert staged["w"].a.tolist() == [0, 1, 2]
        assert staged["w"].a is not source.a
        assert staged["w"].a is staged["a"]

    def test_a_wrapper_that_does_not_tell_is_refused(self) -> None:
        assert "__tensor_flatten__" in refused(Bare(torch.ones(2))).reason

    def test_a_subclass_stays_one(self) -> None:
        source = torch.arange(3.0).as_subclass(Named)
        source.note = {"scale": torch.ones(1)}  # type: ignore[attr-defined]
        staged = stage([source])[0]
        assert type(staged) is Named
        assert staged.tolist() == [0, 1, 2]
        assert staged.note["scale"] is not source.note["scale"]  # type: ignore[attr-defined]

    def test_uninitialized(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lazy = torch.nn.LazyLinear(3)
        staged = stage(dict(lazy.named_parameters()))
        assert type(staged["weight"]) is torch.nn.parameter.UninitializedParameter
        assert staged["weight"] is not lazy.weight

    def test_history_does_not_travel(self) -> None:
        leaf = torch.ones(2, requires_grad=True)
        staged = stage({"leaf": leaf, "made": leaf * 2})
        assert staged["leaf"].requires_grad
        assert not staged["made"].requires_grad
        assert staged["made"].grad_fn is None

    def test_gradients_come_along(self) -> None:
        leaf = torch.ones(2, requires_grad=True)
        (leaf * 3).sum().backward()
        staged = stage([leaf])[0]
        assert staged.grad.tolist() == [3, 3]
        assert staged.grad is not leaf.grad

    @pytest.mark.parametrize("data", [torch.zeros(2), torch.zeros(3, dtype=torch.float64)])
    def test_a_gradient_that_fits_no_more_is_refused(self, data: torch.Tensor) -> None:
        leaf = torch.ones(3)
        leaf.grad = torch.ones(3)
        leaf.data = data
        # PyTorch puts it on no copy.
        with pytest.raises(RuntimeError, match="attempting to assign a gradient"):
            copy.deepcopy(leaf)
        error = refused(leaf)
        assert "its gradient is torch.float32 (3,)" in str(error)
        assert "Set its grad to None" in str(error)


class TestMemory:
    def test_a_storage_that_is_too_small_is_refused(self) -> None:
        tensor = torch.ones(4)
        tensor.untyped_storage().resize_(8)
        error = refused(tensor)
        assert "storage of 8 bytes" in error.reason
        assert "16" in error.reason

    def test_what_torch_borrows_from_numpy(self) -> None:
        array = torch.arange(6).numpy()
        source = torch.from_numpy(array[1:5])
        staged = stage([source])[0]
        array[:] = 0
        assert staged.tolist() == [1, 2, 3, 4]
        assert staged.untyped_storage().nbytes() == 32


@pytest.fixture
def mesh() -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


class Deep:
    """Copies itself, and what it holds with copy.deepcopy."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Deep:
        return Deep(copy.deepcopy(self.value, memo))


class TestDTensor:
    @pytest.mark.parametrize("sharded", [True, False])
    def test_is_staged_over_the_same_mesh(self, mesh: Any, sharded: bool) -> None:
        from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

        placement = Shard(0) if sharded else Replicate()
        source = distribute_tensor(torch.arange(6.0).reshape(3, 2), mesh, [placement])
        staged = stage({"d": source, "local": source.to_local()})
        assert type(staged["d"]) is DTensor
        assert staged["d"].placements == (placement,)
        assert staged["d"].device_mesh == mesh
        assert torch.equal(staged["d"].full_tensor(), torch.arange(6.0).reshape(3, 2))
        source.to_local().zero_()
        assert staged["d"].to_local().sum() == 15

    def test_many_are_inspected_and_compared_in_small_steps(self, mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from torch.distributed.tensor import DTensor, Shard

        tree = [DTensor.from_local(torch.ones(2), mesh, [Shard(0)]) for _ in range(200)]
        seen: list[int] = []
        real_add, real_compare = Leaves._add_parts, leaves_module._same_parts

        def add_parts(self: Leaves, index: int, composite: Any) -> None:
            seen.append(index)
            real_add(self, index, composite)

        def same_parts(leaves: Leaves, index: int) -> bool:
            if index in leaves.composites:
                seen.append(index)
            return real_compare(leaves, index)

        monkeypatch.setattr(Leaves, "_add_parts", add_parts)
        monkeypatch.setattr(leaves_module, "_same_parts", same_parts)
        walk, inspection = Walk(), Inspection(None)
        exhausted(walk.run(tree))
        for work in (walk.leaves.inspect(inspection), leaves_module.changed(walk.leaves, inspection)):
            seen.clear()
            before = 0
            for _ in work:
                assert len(seen) - before <= 64
                before = len(seen)
            assert seen == list(range(200))

    def test_many_are_looked_into_in_small_steps(self, mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from torch.distributed.tensor import DTensor, Shard
        from torch.distributed.tensor._dtensor_spec import DTensorSpec

        count = 100
        tree = [DTensor.from_local(torch.ones(2), mesh, [Shard(0)]) for _ in range(count)]
        looked_into: list[object] = []
        reduced: list[object] = []
        real_composite, real_reduce = Leaves.composite_of, walk_module.reduce_object

        def composite_of(self: Leaves, index: int, tensor: torch.Tensor) -> Any:
            looked_into.append(tensor)
            return real_composite(self, index, tensor)

        def reduce_object(node: Any, changes: Any) -> Any:
            reduced.append(node.source)
            return real_reduce(node, changes)

        monkeypatch.setattr(Leaves, "composite_of", composite_of)
        monkeypatch.setattr(walk_module, "reduce_object", reduce_object)
        walk, inspection = Walk(), Inspection(None)
        seen = 0
        for _ in walk.run(tree):
            assert len(looked_into) - seen <= 4
            seen = len(looked_into)
        assert seen == count
        exhausted(walk.inspect(inspection))
        # Of each its spec, and not what never changes in it.
        assert sum(type(each) is DTensorSpec for each in reduced) == len(reduced) == count
        # The mesh, which all of them have, is read in the last step.
        reduced.clear()
        exhausted(walk.settle(inspection))
        assert len(reduced) < 10

    def test_what_is_set_on_a_placement_is_no_part_of_it(self, mesh: Any) -> None:
        from torch.distributed.tensor import DTensor, Shard

        placement = Shard(0)
        placement.note = "mine"  # type: ignore[attr-defined]
        source = DTensor.from_local(torch.ones(2), mesh, [placement])
        [staged] = stage([source])
        assert hasattr(staged.placements[0], "note") == hasattr(copy.deepcopy(placement), "note")
        assert staged.placements[0] is not placement

    def test_has_a_spec_of_its_own_with_the_parts_that_never_change(self, mesh: Any) -> None:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        shards = [DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)]) for _ in range(20)]
        nodes = []
        for count in (10, 20):
            walk = Walk()
            exhausted(walk.run(shards[:count]))
            nodes.append(len(walk._all))
        # The tensor, its spec and the attributes of that. They were eleven.
        assert nodes[1] - nodes[0] == 3 * 10
        (source, *_), expected = shards, copy.deepcopy(shards[0])
        walk, inspection = Walk(), Inspection(None)
        exhausted(walk.run([source]))
        exhausted(walk.inspect(inspection))
        assert exhausted(walk.changes.changed()) == []
        [staged] = stage([source])
        before = source._spec
        source._spec.placements = (Replicate(),)
        assert (0, Attribute("_spec"), Attribute("placements")) in exhausted(walk.changes.changed())
        assert staged._spec is not before
        assert staged._spec == expected._spec
        assert vars(staged._spec).keys() == vars(expected._spec).keys()
        assert staged.placements == (Shard(0),)

    def test_a_hash_that_its_spec_and_mesh_keep_meanwhile_is_no_change(self, mesh: Any) -> None:
        from torch.distributed.tensor import DTensor, Shard

        source = DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)])
        # Operations on other tensors of the mesh may have asked for it before.
        mesh._hash = None
        assert source._spec._hash is None
        walk, inspection = Walk(), Inspection(None)
        exhausted(walk.run([source, mesh]))
        exhausted(walk.inspect(inspection))
        assert hash(source._spec) == source._spec._hash
        assert mesh._hash is not None
        assert exhausted(walk.changes.changed()) == []
        # What has not been there is one.
        source._spec.other = 1
        assert exhausted(walk.changes.changed()) == [(0, Attribute("_spec"))]

    def test_a_layout_that_holds_what_may_change_is_copied(self) -> None:
        from torch.distributed.tensor import Replicate, Shard
        from torch.distributed.tensor._dtensor_spec import TensorMeta

        meta = TensorMeta(torch.Size([2]), (1,), torch.float32)
        for plain in (meta, Shard(0), (Shard(1), Replicate()), (meta,)):
            assert is_layout(plain)
            # Outside a spec it is an object like any other, which may get attributes.
            [copied] = stage([plain])
            assert copied is not plain
            assert copied == plain
        marked = Shard(0)
        marked.note = []  # type: ignore[attr-defined]
        inside: Any = [1]
        for other in (
            meta._replace(stride=inside),
            (Shard(0), inside),
            (meta._replace(stride=(1, inside)),),
            (marked,),
            (),
            (((Shard(0),),),),
        ):
            assert not is_layout(other)
        staged = stage([(Shard(0), inside), meta._replace(stride=inside)])
        assert staged[0][1] is staged[1].stride is not inside

    @pytest.mark.parametrize("first", [True, False])
    def test_what_else_leads_to_its_layout_has_the_same_copy(self, mesh: Any, first: bool) -> None:
        from torch.distributed.tensor import DTensor, Shard

        source = DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)])
        others = [source.placements, [source.placements[0]], Deep(source.placements), Deep(source._spec.tensor_meta)]
        for other in others:
            tree = [other, source] if first else [source, other]
            for copied in (stage(tree), copy.deepcopy(tree)):
                other_copy, tensor = copied if first else reversed(copied)
                inside = other_copy.value if isinstance(other_copy, Deep) else other_copy
                spec = tensor._spec
                assert inside is spec.placements or inside is spec.tensor_meta or inside[0] is spec.placements[0]

    def test_a_partial_one_is_refused(self, mesh: Any) -> None:
        from torch.distributed.tensor import DTensor, Partial

        source = DTensor.from_local(torch.ones(2), mesh, [Partial()])
        error = refused(source)
        assert "partial" in error.reason
        assert "Redistribute" in (error.remedy or "")


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:Sparse CSC tensor support")
def test_what_is_inside_is_not_taken_from_a_tensor_of_another_kind() -> None:
    eye = torch.eye(2)
    for sparse, count, other in ((eye.to_sparse_csr(), 3, eye.to_sparse_csc()), (eye.to_sparse(), 2, torch.eye(2))):
        find_parts = finder(sparse)
        assert [part.layout for part in find_parts()] == [torch.strided] * count
        torch.utils.swap_tensors(sparse, other)
        with pytest.raises(ValueError, match="its kind has changed"):
            find_parts()


def nested_tensor() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(1)])


def freed() -> Any:
    tensor = torch.ones(2, dtype=torch.complex64)
    tensor.untyped_storage().resize_(0)
    return tensor


def with_gradient() -> Any:
    tensor = torch.ones(2, dtype=torch.complex64)
    tensor.grad = torch.full((2,), 3 + 1j)
    return tensor


ODD: dict[str, Any] = {
    "conjugate": lambda: torch.tensor([1 + 2j, 3 + 4j]).conj(),
    "imaginary": lambda: torch.tensor([1 + 2j, 3 + 4j]).conj().imag,
    "strided": lambda: torch.tensor([1 + 2j, 0j, 3 + 4j])[::2],
    "double": lambda: torch.ones(2, dtype=torch.complex128),
    "longer": lambda: torch.ones(3, dtype=torch.complex64),
    "parameter": lambda: torch.nn.Parameter(torch.ones(2, dtype=torch.complex64)),
    "computed": lambda: torch.ones(2, dtype=torch.complex64, requires_grad=True) * 2,
    "requires a gradient": lambda: torch.ones(2, dtype=torch.complex64, requires_grad=True),
    "gradient": with_gradient,
    "sparse": lambda: torch.ones(2, dtype=torch.complex64).to_sparse(),
    "of a larger storage": lambda: torch.ones(9, dtype=torch.complex64)[3:5],
    "nested": nested_tensor,
    "freed": freed,
    "meta": lambda: torch.ones(2, dtype=torch.complex64, device="meta"),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("repeated", [False, True])
def test_an_odd_tensor_among_many_that_are_alike(name: str, repeated: bool) -> None:
    odd = ODD[name]()
    alike = [torch.full((2,), complex(number, 1)) for number in range(800)]
    tree = [*alike[:600], odd, *alike[600:], *(alike[:2] if repeated else ())]
    if name in ("nested", "freed", "meta"):
        for given, index in ((tree, 600), ([*alike, *tree], 1400)):
            with pytest.raises(UnsupportedLeafError, match=rf"\[{index}\]"):
                stage(given)
        return
    staged = stage(tree)
    with torch.no_grad():
        wanted = [copy.deepcopy(item.detach() if name == "computed" else item) for item in tree[:601]]
    for one, other in zip(staged, wanted, strict=False):
        assert (type(one), one.dtype, one.layout, one.requires_grad) == (
            type(other),
            other.dtype,
            other.layout,
            other.requires_grad,
        )
        assert torch.equal(one.detach().to_dense(), other.detach().to_dense())
    assert (staged[600].grad is None) == (name != "gradient")
    if repeated:
        assert staged[-2] is staged[0]


def test_chunks_of_one_form_are_looked_at_as_one() -> None:
    walk, inspection = Walk(), Inspection(None)
    layers = [
        [torch.ones(3), torch.ones(2, 2), torch.tensor(1.0), torch.ones(4).to(torch.bfloat16)] for _ in range(512)
    ]
    exhausted(walk.run(layers, inspection))
    exhausted(walk.inspect(inspection))
    assert len(inspection.chunks) == 8
    assert len({id(chunk.check) for chunk in inspection.chunks.values()}) == len(inspection.forms) == 1
