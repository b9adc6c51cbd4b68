"""Nested optimizer states as safetensors and JSON, exactly."""

import math
import struct
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from metaflowmaps.checkpoint.manifest import INSTEAD
from metaflowmaps.errors import InputError


def flatten_state(state: dict[Any, Any]) -> tuple[dict[str, Tensor], Any]:
    """A nested state_dict as named tensors and a JSON-able skeleton, for unflatten_state to make it again.

    Exact for dicts (any of these as keys), lists, tuples, tensors, numbers, strings, booleans and None.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _encode(state, "state", tensors)


def unflatten_state(tensors: Mapping[str, Tensor], document: Any) -> dict[Any, Any]:
    """The inverse of flatten_state."""
    try:
        state: dict[Any, Any] = _decode(document, tensors)
    except (LookupError, TypeError, ValueError, struct.error) as error:
        raise InputError(f"not a flattened state ({type(error).__name__}: {error}): {INSTEAD}") from error
    return state


def _encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    # containers become {"type": content}: JSON alone would turn int keys into strings and tuples into lists
    match value:
        case None | bool() | int() | str():
            return value
        case float():  # JSON writes a finite float so that it reads back bit for bit, and has no others
            return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
        case Tensor():
            name = str(len(tensors))
            tensors[name] = value
            return {"tensor": name}
        case list() | tuple():
            items = [_encode(item, f"{where}[{i}]", tensors) for i, item in enumerate(value)]
            return {"list" if isinstance(value, list) else "tuple": items}
        case dict():
            pairs = [
                [_encode(k, f"a key of {where}", tensors), _encode(v, f"{where}[{k!r}]", tensors)]
                for k, v in value.items()
            ]
            return {"dict": pairs}
    raise InputError(
        f"{where} is a {type(value).__name__}: a state is made of dicts, lists, tuples, tensors, numbers, "
        "strings, booleans and None"
    )


def _decode(document: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(document, dict):
        return document
    [(kind, content)] = document.items()
    match kind:
        case "float":
            return struct.unpack(">d", bytes.fromhex(content))[0]
        case "tensor":
            return tensors[content]
        case "list":
            return [_decode(item, tensors) for item in content]
        case "tuple":
            return tuple(_decode(item, tensors) for item in content)
        case "dict":
            return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
    raise ValueError(f"unknown kind {kind!r}")
