"""Takes objects of common packages apart, and makes them again.

No package is imported for a file that names its class: objects are made only of classes that the program has imported.
A private name of a package is used only where nothing public says the same; `tests/format/test_packages.py` runs all
of this with the installed versions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from aiostage.format.kinds import NotCarried

__all__ = ["PACKAGES", "Flattening"]


@dataclass(frozen=True, slots=True)
class Flattening:
    """How objects of a class are taken apart and made again.

    Attributes:
        flatten: Returns children and context of an object.
        unflatten: Makes an object of a class, of children and context.
        subclasses: Whether it is right for subclasses too.
    """

    flatten: Callable[[Any], tuple[Iterable[Any], Any]]
    unflatten: Callable[[type, list[Any], Any], Any]
    subclasses: bool = False


def _flatten_model_output(value: Any) -> tuple[Iterable[Any], Any]:
    return list(value.values()), list(value.keys())


def _make_model_output(cls: type, children: list[Any], context: Any) -> Any:
    return cls(**dict(zip(context, children, strict=True)))


def _flatten_batch_encoding(value: Any) -> tuple[Iterable[Any], Any]:
    # Through vars(), because a copy may lack attributes: BatchEncoding's own __getstate__ leaves some out.
    own = vars(value)
    encodings = own.get("_encodings")
    states = None if encodings is None else [encoding.__getstate__() for encoding in encodings]
    return list(value.data.values()), {
        "keys": list(value.data),
        "encodings": states,
        "n_sequences": own.get("_n_sequences"),
    }


def _make_batch_encoding(cls: Any, children: list[Any], context: Any) -> Any:
    encodings = context["encodings"]
    if encodings is not None:
        encoding_class = import_module("tokenizers").Encoding
        made = [encoding_class() for _ in encodings]
        for encoding, state in zip(made, encodings, strict=True):
            encoding.__setstate__(state)
        encodings = made
    data = dict(zip(context["keys"], children, strict=True))
    return cls(data, encoding=encodings, n_sequences=context["n_sequences"])


def _flatten_batch_feature(value: Any) -> tuple[Iterable[Any], Any]:
    return list(value.data.values()), list(value.data)


def _make_batch_feature(cls: Any, children: list[Any], context: Any) -> Any:
    return cls(dict(zip(context, children, strict=True)))


_PYDANTIC = ("__dict__", "__pydantic_extra__", "__pydantic_fields_set__", "__pydantic_private__")


def _flatten_model(value: Any) -> tuple[Iterable[Any], Any]:
    # With other keys, the class has a __getstate__ of its own, and only its own code knows what they mean.
    state = value.__getstate__()
    if set(state) != set(_PYDANTIC):
        raise NotCarried(
            "a pydantic model has a state of its own", "Register its class with aiostage.checkpoint.register()."
        )
    return [state[name] for name in _PYDANTIC], None


def _make_model(cls: Any, children: list[Any], context: Any) -> Any:
    made = cls.__new__(cls)
    made.__setstate__(dict(zip(_PYDANTIC, children, strict=True)))
    return made


def _flatten_config(value: Any) -> tuple[Iterable[Any], Any]:
    tools = import_module("omegaconf").OmegaConf
    flags = {name: value._get_node_flag(name) for name in ("readonly", "struct", "allow_objects")}
    # An interpolation such as ${..rate} may lead out of the part.
    if value._get_parent() is not None:
        raise NotCarried(
            "it is a part of another config, to which interpolations may refer",
            "Put the whole config into the state dict, or OmegaConf.to_container(config, resolve=True).",
        )
    if tools.get_type(value) not in (dict, list):
        raise NotCarried(
            "it is a structured config, which is typed by a class",
            "Put OmegaConf.to_container(config) into the state dict.",
        )
    return [tools.to_container(value, resolve=False)], flags


def _make_config(cls: type, children: list[Any], context: Any) -> Any:
    (container,) = children
    made = import_module("omegaconf").OmegaConf.create(container, flags={"allow_objects": True})
    for name in ("readonly", "struct", "allow_objects"):
        made._set_flag(name, context[name])
    return made


def _flatten_tensordict(value: Any) -> tuple[Iterable[Any], Any]:
    keys = list(value.keys())
    return [value.get(key) for key in keys], {
        "keys": keys,
        "batch_size": value.batch_size,
        "names": list(value.names) if value._has_names() else None,
        "locked": value.is_locked,
    }


def _make_tensordict(cls: Any, children: list[Any], context: Any) -> Any:
    made = cls(
        dict(zip(context["keys"], children, strict=True)),
        batch_size=context["batch_size"],
        names=context["names"],
    )
    return made.lock_() if context["locked"] is True else made


def _flatten_graph(value: Any) -> tuple[Iterable[Any], Any]:
    contents = value.to_dict()
    return list(contents.values()), list(contents)


def _make_graph(cls: Any, children: list[Any], context: Any) -> Any:
    return cls.from_dict(dict(zip(context, children, strict=True)))


def _flatten_quant_state(value: Any) -> tuple[Iterable[Any], Any]:
    attributes = vars(value)
    return list(attributes.values()), list(attributes)


def _make_quant_state(cls: type, children: list[Any], context: Any) -> Any:
    made: Any = object.__new__(cls)
    vars(made).update(zip(context, children, strict=True))
    return made


PACKAGES: dict[str, Flattening] = {
    "transformers.utils.generic.ModelOutput": Flattening(_flatten_model_output, _make_model_output, subclasses=True),
    "transformers.tokenization_utils_base.BatchEncoding": Flattening(_flatten_batch_encoding, _make_batch_encoding),
    "transformers.feature_extraction_utils.BatchFeature": Flattening(_flatten_batch_feature, _make_batch_feature),
    "pydantic.main.BaseModel": Flattening(_flatten_model, _make_model, subclasses=True),
    "omegaconf.dictconfig.DictConfig": Flattening(_flatten_config, _make_config),
    "omegaconf.listconfig.ListConfig": Flattening(_flatten_config, _make_config),
    "tensordict._td.TensorDict": Flattening(_flatten_tensordict, _make_tensordict),
    "torch_geometric.data.data.Data": Flattening(_flatten_graph, _make_graph),
    "torch_geometric.data.hetero_data.HeteroData": Flattening(_flatten_graph, _make_graph),
    "bitsandbytes.functional.QuantState": Flattening(_flatten_quant_state, _make_quant_state),
}
"""By full name of the class."""
