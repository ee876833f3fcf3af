import copy
import json
import random
import string
from collections import Counter, OrderedDict, defaultdict, namedtuple
from enum import IntEnum
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import save_file

from tts_brain.statefile import StateFileError, check_state, load_state, pack, packed_bytes, save_state, unpack

TORCH_DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.complex64, torch.complex128),
]
in_tmp_path = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


def same(a, b) -> bool:
    """Equal in type, structure, order and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return (
            [(type(k), k) for k in a] == [(type(k), k) for k in b]
            and all(same(a[k], b[k]) for k in a)
            and getattr(a, "__dict__", None) == getattr(b, "__dict__", None)
        )
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return repr(a) == repr(b)  # tells -0.0 from 0.0, and nan equals nan
    return a == b


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@st.composite
def tensors(draw) -> torch.Tensor:
    dtype = draw(st.sampled_from(TORCH_DTYPES))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    count = int(np.prod(shape)) * dtype.itemsize
    raw = draw(st.binary(min_size=count, max_size=count))
    if dtype == torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    values = torch.tensor(list(raw), dtype=torch.uint8).view(dtype).reshape(shape)
    return values.transpose(0, -1) if values.ndim > 1 and draw(st.booleans()) else values


numbers = hnp.boolean_dtypes() | hnp.integer_dtypes() | hnp.floating_dtypes() | hnp.complex_number_dtypes()
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(2**62, 2**200),
    st.floats(),
    st.text(st.characters(exclude_categories=())),  # lone surrogates too
    tensors(),
    hnp.arrays(numbers, hnp.array_shapes(min_dims=0, min_side=0, max_dims=2, max_side=3)),
    hnp.from_dtype(np.dtype("float32")),
    hnp.from_dtype(np.dtype("int64")),
)
keys = st.text(max_size=5) | st.integers() | st.sampled_from(["__metadata__", "state", "dict", "tuple", None, "3", 3])
states = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4).map(OrderedDict),
    ),
    max_leaves=12,
)


@in_tmp_path
@given(state=states)
def test_whatever_is_stored_comes_back_the_same(tmp_path: Path, state) -> None:
    path = tmp_path / "state.safetensors"
    save_state(path, state, kind="test", version=1)
    assert same(load_state(path, kind="test", version=1), state)
    check_state(path, kind="test", version=1)
    packed, skeleton = pack(state)
    assert same(unpack(packed, json.loads(json.dumps(skeleton, allow_nan=False))), state)
    assert packed_bytes(packed, skeleton, kind="test", version=1) == path.stat().st_size


def test_states_of_generators_and_optimizers_come_back_the_same(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.RAdam(model.parameters())
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 9])
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    rng = np.random.default_rng(7)
    random.gauss(0, 1)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "generator": rng.bit_generator.state,
        "torch": torch.get_rng_state(),
        "milestones": Counter({3: 2}),
    }
    save_state(tmp_path / "s", state, kind="run", version=3)
    loaded = load_state(tmp_path / "s", kind="run", version=3)
    assert same(loaded, state)
    assert loaded["model"]._metadata == model.state_dict()._metadata  # the layers' versions
    random.setstate(loaded["python"])
    rng.bit_generator.state = loaded["generator"]


def test_an_integer_longer_than_python_reads_in_decimal(tmp_path: Path) -> None:
    save_state(tmp_path / "s", -(16**5000), kind="test", version=1)
    assert load_state(tmp_path / "s", kind="test", version=1) == -(16**5000)


def test_aliases_views_and_parameters(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "whole": base,
        "again": base,
        "row": base[1],
        "column": base[:, 2],
        "expanded": base[:1].expand(5, 4),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "transposed": base.numpy().T,
        "big_endian": np.arange(3, dtype=">i4"),
        "time": np.array(["2024-01-01"], dtype="datetime64[D]"),
    }
    save_state(tmp_path / "s", state, kind="test", version=1)
    loaded = load_state(tmp_path / "s", kind="test", version=1)
    for key, value in state.items():
        assert (loaded[key] == value).all() and loaded[key].dtype == value.dtype, key
    loaded["whole"].zero_()
    assert loaded["again"].sum() > 0 and loaded["row"].sum() > 0
    weight = torch.nn.Parameter(torch.ones(2))
    packed = unpack(*pack({"w": weight}))["w"]
    assert type(packed) is torch.Tensor and not packed.requires_grad


@given(states)
@settings(max_examples=30, deadline=None)
def test_packed_memory_is_nobody_elses(state) -> None:
    packed, skeleton = pack(state)
    before = copy.deepcopy(packed)
    for original in (state, unpack(packed, skeleton)):
        _overwrite(original)
    assert same(packed, before)


def _overwrite(value) -> None:
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            _overwrite(item)
    elif isinstance(value, torch.Tensor):
        value.reshape(-1).view(torch.uint8).fill_(1) if value.is_contiguous() else None
    elif isinstance(value, np.ndarray):
        value[...] = 1


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    save_state(path, {"a": torch.randn(5), "b": [1, 2.5, "x"], "c": np.arange(9)}, kind="test", version=1)
    data = path.read_bytes()
    for end in range(len(data)):
        path.write_bytes(data[:end])
        with pytest.raises(StateFileError, match=r"cut short.*Delete the file"):
            load_state(path, kind="test", version=1)
    path.write_bytes(data + b"\0")
    with pytest.raises(StateFileError, match="cut short"):
        check_state(path, kind="test", version=1)


def test_wrong_files_are_told_apart(tmp_path: Path) -> None:
    good, weights, text = tmp_path / "good", tmp_path / "weights", tmp_path / "text"
    save_state(good, {"a": 1, "t": torch.ones(1)}, kind="brain", version=2)
    save_file({"w": torch.ones(2)}, weights)
    text.write_text("kind: brain\n" * 20)
    for path, kind, version, message in [
        (tmp_path / "none", "brain", 2, "no such state file"),
        (tmp_path, "brain", 2, "no such state file"),
        (weights, "brain", 2, "not written by tts-brain"),
        (text, "brain", 2, "not a safetensors file"),
        (good, "snapshot", 2, "kind 'brain', wanted was 'snapshot'"),
        (good, "brain", 3, r"format 2 .*reads 3 .*delete the file.*or use the tts-brain that wrote it"),
        (good, "brain", 1, r"format 2 .*reads 1 "),
    ]:
        with pytest.raises(StateFileError, match=message) as error:
            load_state(path, kind=kind, version=version)
        assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "skeleton", ['{"tensor": "gone"}', '{"new": 1}', "{}", "[", '{"raw": ["0:state", "Size", [1]]}']
)
def test_a_changed_skeleton_is_refused(tmp_path: Path, skeleton: str) -> None:
    path = tmp_path / "s"
    metadata = {"tts_brain_layout": "1", "kind": "test", "version": "1", "state": skeleton}
    save_file({"0:state": torch.ones(1)}, path, metadata)
    with pytest.raises(StateFileError, match="does not fit"):
        load_state(path, kind="test", version=1)


class Level(IntEnum):
    LOW = 1


@pytest.mark.parametrize(
    "thing",
    [
        {1, 2},
        print,
        Level.LOW,
        defaultdict(int),
        namedtuple("Pair", "a b")(1, 2),
        np.array(["a"]),
        np.array([None]),
        np.str_("a"),
        b"bytes",
        {1.5: 2},
        {(1, 2): 3},
        torch.eye(2).to_sparse(),
        torch.empty(2, device="meta"),
        torch.float32,
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_what_cannot_be_stored_is_named_by_its_place(tmp_path: Path, thing) -> None:
    path = tmp_path / "s"
    save_state(path, 1, kind="test", version=1)
    state = {"optimizer": {"state": {0: torch.ones(1), 3: {"exp_avg": thing}}}}
    with pytest.raises(TypeError, match=r"^optimizer\.state\[3\]\.exp_avg: .* cannot be stored; make it"):
        save_state(path, state, kind="test", version=1)
    with pytest.raises(TypeError, match=r"^\['a\.b'\]\[1\]\['3'\]:"):
        pack({"a.b": (0, {"3": thing})})
    assert load_state(path, kind="test", version=1) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "er" / "s"
    save_state(path, "old", kind="test", version=1)

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_state(path, "new", kind="test", version=1)
    assert load_state(path, kind="test", version=1) == "old"
    assert list(path.parent.iterdir()) == [path]


def test_too_much_outside_tensors_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tts_brain.statefile._MAX_HEADER", 1000)
    with pytest.raises(ValueError, match="as tensors or numpy arrays"):
        save_state(tmp_path / "s", string.printable * 20, kind="test", version=1)
    assert not (tmp_path / "s").exists()
