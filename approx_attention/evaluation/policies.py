"""Policies: the method of each key head of each layer of a model, and their files."""

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from approx_attention.core import InputError, hashable, unknown
from approx_attention.evaluation.atomic import write_atomically
from approx_attention.registry import HeadMethods, bind

VERSION = 1


@dataclasses.dataclass(frozen=True)
class HeadChoice:
    """The method of a key head, with its errors and cache bytes.

    Attributes:
        method: name of the method.
        hyperparameters: arguments of the method.
        predicted_error: relative error on the calibration queries.
        error_bound: predicted upper bound of the error on other queries.
        held_out_error: relative error on the held-out queries.
        relative_error: relative error on all queries of the file.
        cache_bytes: cache bytes of the head per sequence; for exact attention the bytes of its keys and values, to
            which a decoder adds two blocks.
        seconds: share of the head in a call of its layer in which all heads have the method, if time is limited, on the
            machine that made the plan.
    """

    method: str
    hyperparameters: Mapping[str, Any]
    predicted_error: float
    error_bound: float
    held_out_error: float
    relative_error: float
    cache_bytes: int
    seconds: float | None = None

    @property
    def label(self) -> str:
        """The method with its hyper-parameters."""
        given = ", ".join(f"{name}={value}" for name, value in self.hyperparameters.items())
        return f"{self.method}({given})" if given else self.method


@dataclasses.dataclass(frozen=True)
class LayerPolicy:
    """The choices of a layer, one for each key head, with the attention options of the layer.

    Attributes:
        heads: one `HeadChoice` for each key head.
        is_causal: whether query t sees keys j <= t only.
        scale: factor of the logits, if it is not ``1/sqrt(D)``.
    """

    heads: tuple[HeadChoice, ...]
    is_causal: bool
    scale: float | None = None

    @property
    def methods(self) -> HeadMethods:
        """The methods as an argument for `attention`, layers and decoders."""
        return HeadMethods.of((head.method, head.hyperparameters) for head in self.heads)


@dataclasses.dataclass(frozen=True)
class Policy:
    """A method and a size for each key head of each layer of a model, for example from `plan_model`.

    `nnx.replace_attention` applies it to a model. The file is JSON.

    Attributes:
        layers: the `LayerPolicy` of each layer by path; layers of a stack are ``"path[0]"``, ``"path[1]"`` and so on.
        tolerance: the largest relative error allowed for a head.
        max_bytes: the budget of bytes for all caches of a sequence, if any.
        max_seconds: the budget of time for all layers, if any, on the machine that made the plan.

    Raises:
        InputError: there is no layer or no head, or a method is unknown or has no such hyper-parameter.

    Example:
        >>> from approx_attention.evaluation import HeadChoice, LayerPolicy, Policy
        >>> head = HeadChoice("favor", {"num_features": 64}, 0.08, 0.09, 0.08, 0.08, 4352)
        >>> policy = Policy({"attention": LayerPolicy((head, head), is_causal=True)}, tolerance=0.1)
        >>> policy.layers["attention"].methods.name, policy.cache_bytes
        ('favor', 8704)
    """

    layers: Mapping[str, LayerPolicy]
    tolerance: float
    max_bytes: int | None = None
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise InputError("a policy needs at least one layer, got none")
        for layer, own in self.layers.items():
            if not own.heads:
                raise InputError(f"layer {layer!r} of a policy needs at least one key head, got none")
            for number, head in enumerate(own.heads):
                try:
                    bind(head.method, head.hyperparameters)
                except (TypeError, ValueError, NotImplementedError) as error:
                    raise InputError(f"head {number} of layer {layer!r}: {error}") from None

    @property
    def cache_bytes(self) -> int:
        """The total cache bytes of all heads per sequence."""
        return sum(head.cache_bytes for own in self.layers.values() for head in own.heads)

    def of_layer(self, path: str) -> LayerPolicy | None:
        """The choices of the layer, or of the stack of layers, at a path; None if there are none.

        Args:
            path: path of the layer.

        Raises:
            ValueError: layers of the stack differ, although they run as one program.
        """
        stack = [own for layer, own in self.layers.items() if stack_of(layer) == path]
        if path in self.layers or not stack:
            return self.layers.get(path)
        if any(own.methods != stack[0].methods for own in stack):
            raise ValueError(
                f"the layers stacked at {path!r} run as one program and must have one policy, but theirs differ; plan "
                "them under the names that capture_attention gives them, or unstack them"
            )
        return stack[0]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy to a JSON file, atomically.

        Args:
            path: the file.

        Raises:
            InputError: JSON cannot represent a hyper-parameter, or the directory does not exist.
        """
        path = pathlib.Path(path)
        if not path.parent.is_dir():
            raise InputError(f"cannot write {path}: its directory does not exist")
        try:
            text = json.dumps({"version": VERSION, **dataclasses.asdict(self)}, indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise InputError(f"the policy cannot be written to {path}: {error}") from None
        write_atomically(path, lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Policy":
        """Read a policy from its file.

        Args:
            path: the file.

        Raises:
            InputError: the file cannot be read, has another version, or is not a valid policy.
        """
        path = pathlib.Path(path)
        try:
            document = json.loads(path.read_bytes())
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not JSON: {error}") from None
        try:
            version = document.get("version") if isinstance(document, dict) else None
            if version != VERSION:
                raise InputError(f"it has version {version!r}, but this library reads version {VERSION}")
            given = {name: x for name, x in document.items() if name != "version"}
            layers = _mapping(given.get("layers"), "layers")
            given["layers"] = {layer: _layer(layer, own) for layer, own in layers.items()}
            return _read(cls, given, "the policy")
        except InputError as error:
            raise InputError(f"{path}: {error}") from None


def stack_of(layer: str) -> str:
    """The path of the stack that a layer belongs to, or the path of the layer itself.

    Args:
        layer: the path of a layer, with its indices in brackets if it is in a stack.

    Example:
        >>> from approx_attention.evaluation import stack_of
        >>> stack_of("blocks.attention[3]"), stack_of("head")
        ('blocks.attention', 'head')
    """
    return re.sub(r"\[\d+(,\d+)*\]$", "", layer)


def _layer(layer: str, given: Any) -> LayerPolicy:
    given = _mapping(given, f"layer {layer!r}")
    heads = given.get("heads")
    if not isinstance(heads, list):
        raise InputError(f"heads of layer {layer!r} must be a list, got {heads!r}")
    read = []
    for number, head in enumerate(heads):
        where = f"head {number} of layer {layer!r}"
        own = dict(_mapping(head, where))
        own["hyperparameters"] = {
            name: hashable(x) for name, x in _mapping(own.get("hyperparameters", {}), where).items()
        }
        read.append(_read(HeadChoice, own, where))
    return _read(LayerPolicy, {**given, "heads": tuple(read)}, f"layer {layer!r}")


# The types that fields of a file can have.
_KINDS: Mapping[str, tuple[type, ...]] = {
    "float": (int, float),
    "int": (int,),
    "str": (str,),
    "bool": (bool,),
    "None": (type(None),),
}


def _read(kind: Any, given: Mapping[str, Any], where: str) -> Any:
    """Make a dataclass from an object of a file, whose numbers must be finite."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name, x in given.items():
        if name not in fields:
            raise InputError(f"{where}: {unknown('field', name, fields)}")
        known = [_KINDS[part] for part in re.split(r" \| ", _text(fields[name].type)) if part in _KINDS]
        if not known:
            continue
        allowed = tuple(one for part in known for one in part)
        is_odd = isinstance(x, bool) and bool not in allowed
        if is_odd or not isinstance(x, allowed) or (isinstance(x, float) and not math.isfinite(x)):
            raise InputError(f"{where}: {name} must be {_text(fields[name].type)}, got {x!r}")
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in given]
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}")
    return kind(**given)


def _text(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _mapping(x: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(x, dict):
        raise InputError(f"{where} must be an object, got {x!r}")
    return x
