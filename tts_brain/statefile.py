"""Any nested state as one safetensors file: tensors as tensors, everything else as JSON in the file's metadata.

No pickle, so reading a file runs no code. A file is written whole or not at all, and read whole or not at all.

Stored exactly, type and value: None, bool, int of any size, float (nan and infinities too), str, list, tuple, dict
with str, int, bool or None keys, OrderedDict, Counter, dense torch tensors of any dtype, numpy arrays and scalars of
number, bool and time dtypes. That covers the states of modules, optimizers, schedulers, ``random.getstate()`` and
numpy's generators. Not kept: a tensor's device (all come back on the CPU), ``requires_grad``, memory format.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# How the skeleton says things; the `version` of `save_state` is the caller's and says what the state means.
_LAYOUT = "1"
_MARK = "tts_brain_layout"

# Known to every safetensors since 0.5. Any other dtype travels as bytes, with its name in the skeleton.
_NATIVE = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_MAX_HEADER = 100_000_000  # bytes; safetensors refuses to read a longer one
# Only these: any other subclass (defaultdict, say) would come back as something that acts otherwise.
_DICTS: dict[type, str] = {dict: "dict", OrderedDict: "ordered", Counter: "counter"}
_DICT_TYPES = {tag: kind for kind, tag in _DICTS.items()}
_NUMPY_KINDS = "biufcMm"


class StateFileError(ValueError):
    """A state file is missing, torn, or not the one asked for; the message says what to do."""


def save_state(path: Path, state: Any, *, kind: str, version: int) -> None:
    """Write ``state`` to ``path``, atomically: a reader sees the old file or the new one, also after a power cut.

    Args:
        path: its folder is made when missing.
        kind: what the state is of, such as ``"brain"``; ``load_state`` refuses another one.
        version: of the meaning of the state; raise it when older readers would misread.

    Raises:
        TypeError: something in the state cannot be stored; the message says where, as ``optimizer.state[3].exp_avg``.
        ValueError: all that is not a tensor comes to more than 100 MB of JSON.
        OSError: the file cannot be written; a file that was there stays as it was.
    """
    tensors, skeleton = pack(state, copy=False)
    write_packed(path, tensors, skeleton, kind=kind, version=version)


def load_state(path: Path, *, kind: str, version: int) -> Any:
    """The state that ``save_state`` wrote, in memory of its own.

    Raises:
        StateFileError: no such file, torn, not written by tts-brain, or of another kind or version.
        OSError: the file is there but cannot be read.
    """
    tensors, metadata = _open(path, kind=kind, version=version)
    try:
        return unpack(tensors, json.loads(metadata["state"]))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise StateFileError(
            f"{path}: the metadata does not fit the tensors ({error}); it was changed after tts-brain wrote it. "
            f"{_REMEDY}"
        ) from error


def check_state(path: Path, *, kind: str, version: int) -> None:
    """Raise what ``load_state`` would for a file that is missing, torn or another one, reading the header only."""
    _open(path, kind=kind, version=version)


def pack(state: Any, *, copy: bool = True) -> tuple[dict[str, Tensor], Any]:
    """Tensors by name, and the rest as a value that JSON can hold; ``unpack`` turns both back.

    The tensors are detached, contiguous, on the CPU, and share no storage with each other. With ``copy=False`` they
    may share the state's: to be used up before the state changes.

    Raises:
        TypeError: something cannot be stored; the message has its place in the state.
    """
    packer = _Packer(copy)
    skeleton = packer.encode(state)
    return packer.tensors, skeleton


def unpack(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """The state that ``pack`` took apart; nothing in it shares memory with ``tensors``."""
    if isinstance(skeleton, list):
        return [unpack(tensors, item) for item in skeleton]
    if isinstance(skeleton, dict):
        ((tag, body),) = skeleton.items()
        return _DECODERS[tag](tensors, body)
    return skeleton


def packed_bytes(tensors: Mapping[str, Tensor], skeleton: Any, *, kind: str, version: int) -> int:
    """Size in bytes of the file that ``write_packed`` would write; raises as that does, but for OSError."""
    return len(_header(tensors, skeleton, kind, version)) + sum(t.nbytes for t in tensors.values())


def write_packed(path: Path, tensors: Mapping[str, Tensor], skeleton: Any, *, kind: str, version: int) -> None:
    """``save_state`` for a state that is packed already.

    Raises:
        ValueError: all that is not a tensor comes to more than 100 MB of JSON.
        OSError: the file cannot be written; a file that was there stays as it was.
    """
    header = _header(tensors, skeleton, kind, version)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps two writers of one path from writing into each other's file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        # By hand, not by `safetensors.torch.save_file`: that one cannot be told to fsync, leaves temporary files of
        # unknown name when killed, and hides the OSError of a full disk. The format is a header and then the bytes.
        with temporary.open("wb") as file:
            file.write(header)
            for _, tensor in _in_file_order(tensors):
                file.write(_as_bytes(tensor).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


_REMEDY = "Delete the file to start the brain afresh, or put back a copy of it."


def _open(path: Path, *, kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors still on the disk (mapped, to be cloned) and the metadata, once both are known to be ours."""
    if not path.is_file():
        raise StateFileError(f"{path}: no such state file; check the path, or start without one to begin afresh")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            _check(path, metadata, kind, version)
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise StateFileError(f"{path}: cut short, or not a safetensors file at all ({error}). {_REMEDY}") from error


def _check(path: Path, metadata: Mapping[str, str], kind: str, version: int) -> None:
    layout, found_kind, found = (metadata.get(key) for key in (_MARK, "kind", "version"))
    if layout is None:
        raise StateFileError(
            f"{path}: a safetensors file, but not written by tts-brain; give the brain's own state file, "
            "not a model's weights"
        )
    if found_kind != kind:
        raise StateFileError(f"{path}: holds a state of kind {found_kind!r}, wanted was {kind!r}; give the right file")
    if (layout, found) != (_LAYOUT, str(version)):
        raise StateFileError(
            f"{path}: {kind} format {found} (layout {layout}) was found, this tts-brain reads {version} "
            f"(layout {_LAYOUT}); delete the file to start the brain afresh, or use the tts-brain that wrote it"
        )


def _header(tensors: Mapping[str, Tensor], skeleton: Any, kind: str, version: int) -> bytes:
    state = json.dumps(skeleton, allow_nan=False, separators=(",", ":"))
    entries: dict[str, Any] = {"__metadata__": {_MARK: _LAYOUT, "kind": kind, "version": str(version), "state": state}}
    end = 0
    for name, tensor in _in_file_order(tensors):
        start, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": _NATIVE[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER:
        raise ValueError(
            f"{kind} state: {len(text)} bytes of values outside tensors, at most {_MAX_HEADER} can be read back; "
            "keep long lists of numbers as tensors or numpy arrays"
        )
    return len(text).to_bytes(8, "little") + text


def _in_file_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Widest dtype first, so that each tensor starts at a multiple of its item size, as readers need."""
    return sorted(tensors.items(), key=lambda item: -item[1].element_size())


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


class _Packer:
    def __init__(self, copy: bool) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._copy = copy
        self._storages: set[int] = set()
        self._path: list[Any] = []  # a stack, not a string per value: a list may hold a million floats

    def encode(self, value: Any) -> Any:
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            # Hexadecimal: Python refuses to read decimal numbers of more than 4300 digits.
            return value if value.bit_length() < 64 else {"int": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if kind is list:
            return self._encode_items(value)
        if kind is tuple:
            return {"tuple": self._encode_items(value)}
        if kind in _DICTS:
            return {_DICTS[kind]: self._encode_dict(value)}
        if kind is Tensor or kind is torch.nn.Parameter:
            return self._encode_tensor(value)
        if kind is np.ndarray:
            dtype = self._dtype_name(value)
            # Copied in any case: torch.from_numpy warns of read-only arrays.
            plain = value.reshape(-1).copy().view(np.uint8)
            name = self._add(torch.from_numpy(plain), copy=False)
            return {"array": [name, dtype, list(value.shape)]}
        if isinstance(value, np.generic):
            return {"scalar": [self._dtype_name(value), value.tobytes().hex()]}
        raise self._refusal(f"a {kind.__module__}.{kind.__qualname__}")

    def _encode_items(self, items: Iterable[Any]) -> list[Any]:
        return [self._encode_at(index, item) for index, item in enumerate(items)]

    def _encode_at(self, key: Any, value: Any) -> Any:
        self._path.append(key)
        encoded = self.encode(value)
        self._path.pop()
        return encoded

    def _encode_dict(self, value: Mapping[Any, Any]) -> list[Any]:
        for key in value:
            if type(key) not in (str, int, bool, type(None)):
                raise self._refusal(f"a dict with the key {key!r} (keys may be str, int, bool or None)")
        pairs = [[self.encode(key), self._encode_at(key, item)] for key, item in value.items()]
        # A module's state_dict carries its layers' versions in an attribute; load_state_dict looks at it.
        attributes = {k: self._encode_at(k, v) for k, v in getattr(value, "__dict__", {}).items()}
        return [pairs, attributes]

    def _encode_tensor(self, tensor: Tensor) -> Any:
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise self._refusal("a sparse, quantized or meta tensor (only dense ones with values can be)")
        # resolve_*: a conjugate or negative view holds other bytes than it shows.
        plain = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
        # A copy is needed only where none was made on the way here.
        copy = self._copy and plain.data_ptr() == tensor.data_ptr()
        if plain.dtype in _NATIVE:
            return {"tensor": self._add(plain, copy)}
        name = self._add(_as_bytes(plain), copy)
        return {"raw": [name, str(plain.dtype).removeprefix("torch."), list(plain.shape)]}

    def _add(self, tensor: Tensor, copy: bool) -> str:
        storage = tensor.untyped_storage().data_ptr()
        if copy or storage in self._storages:
            tensor = tensor.clone()
        self._storages.add(storage)
        # The number makes names unique; the rest is for whoever looks into the file.
        name = f"{len(self.tensors)}:{self._place()}"
        self.tensors[name] = tensor
        return name

    def _dtype_name(self, value: np.ndarray | np.generic) -> str:
        if value.dtype.kind not in _NUMPY_KINDS:
            raise self._refusal(f"a numpy value of dtype {value.dtype} (numbers, bools and times can be)")
        return value.dtype.str

    def _place(self) -> str:
        text = ""
        for key in self._path:
            named = isinstance(key, str) and key.isidentifier()
            text += (f".{key}" if text else key) if named else f"[{key!r}]"
        return text or "state"

    def _refusal(self, what: str) -> TypeError:
        return TypeError(
            f"{self._place()}: {what} cannot be stored; make it plain values, lists, tuples, dicts, tensors or arrays"
        )


def _decode_array(tensors: Mapping[str, Tensor], body: Any) -> np.ndarray:
    name, dtype, shape = body
    array = np.empty(shape, dtype=np.dtype(dtype))
    array.reshape(-1).view(np.uint8)[:] = tensors[name].numpy()
    return array


def _decode_scalar(tensors: Mapping[str, Tensor], body: Any) -> Any:
    dtype, data = body
    return np.frombuffer(bytes.fromhex(data), dtype=np.dtype(dtype))[0]


def _decode_raw(tensors: Mapping[str, Tensor], body: Any) -> Tensor:
    name, dtype, shape = body
    return tensors[name].clone().view(getattr(torch, dtype)).reshape(shape)


def _decode_dict(tag: str) -> Callable[[Mapping[str, Tensor], Any], Any]:
    def decode(tensors: Mapping[str, Tensor], body: Any) -> Any:
        pairs, attributes = body
        result = _DICT_TYPES[tag]()
        for key, item in pairs:
            result[unpack(tensors, key)] = unpack(tensors, item)
        for key, item in attributes.items():
            setattr(result, key, unpack(tensors, item))
        return result

    return decode


_DECODERS: dict[str, Callable[[Mapping[str, Tensor], Any], Any]] = {
    "int": lambda tensors, body: int(body, 16),
    "float": lambda tensors, body: float(body),
    "tuple": lambda tensors, body: tuple(unpack(tensors, item) for item in body),
    "tensor": lambda tensors, body: tensors[body].clone(),
    "raw": _decode_raw,
    "array": _decode_array,
    "scalar": _decode_scalar,
    **{tag: _decode_dict(tag) for tag in _DICT_TYPES},
}
