"""Damaged and hostile checkpoints: each is refused with a clear error, quickly, and nothing outside is opened."""

import json
import os
import random
import signal
import struct
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from lowtide.weights.fill import load_tensors
from lowtide.weights.index import CheckpointError, find_weights, read_index

SECONDS = 5
DATA = bytes(range(48))
GOOD = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "I64", "shape": [2], "data_offsets": [32, 48]},
}


def build(header, data=DATA, length=None):
    """A file from a header (an object, text or bytes) and data; `length` is what it claims for the header."""
    if not isinstance(header, bytes):
        header = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def changed(tensor=None, **entry):
    """GOOD with the entry of one tensor changed; a value of `...` removes the key."""
    header = json.loads(json.dumps(GOOD))
    header[tensor].update(entry)
    header[tensor] = {key: value for key, value in header[tensor].items() if value is not ...}
    return header


def structural():
    """(name, file content) of corruptions which must all be refused."""
    good = build(GOOD)
    length = len(good) - 8 - len(DATA)
    for size in [*range(8), *range(8, len(good), 3), len(good) - 1]:
        yield f"truncated to {size} bytes", good[:size]
    for extra in (1, 8, 4096):
        yield f"{extra} bytes after the data", good + bytes(extra)
    for claim in (0, 1, 2, length - 1, length + 1, length + 48, length + 49, 10**8 + 1, 2**31, 2**32, 2**63, 2**64 - 1):
        yield f"header length {claim}", build(GOOD, length=claim)
    yield from headers()
    for tensor in "abc":
        for dtype in ("", "f32", "F4", "F6_E2M3", "F6_E3M2", "F128", "I128", "float32", "F32 ", "\x00", "É" * 99):
            yield f"{tensor} dtype {dtype!r}", build(changed(tensor, dtype=dtype))
        for dtype in (None, 1, True, ["F32"], {"a": 1}, 1.5):
            yield f"{tensor} dtype {dtype!r}", build(changed(tensor, dtype=dtype))
        for shape in bad_shapes():
            yield f"{tensor} shape {str(shape)[:40]}", build(changed(tensor, shape=shape))
        for offsets in bad_offsets(GOOD[tensor]["data_offsets"]):
            yield f"{tensor} data_offsets {str(offsets)[:60]}", build(changed(tensor, data_offsets=offsets))
        for key in ("dtype", "shape", "data_offsets"):
            yield f"{tensor} without {key}", build(changed(tensor, **{key: ...}))
        for entry in (None, 1, "x", [], [1, 2], True, {}):
            yield f"{tensor} is {entry!r}", build({**GOOD, tensor: entry})
        yield f"{tensor} left out", build({key: value for key, value in GOOD.items() if key != tensor})
    yield from layouts()


def headers():
    for text in (
        "",
        " ",
        "[]",
        "null",
        "1",
        '"x"',
        "{",
        "}",
        "{}{}",
        "{} x",
        "[{}]",
        "{'a': 1}",
        '{"a": NaN}',
        '{"a":}',
    ):
        yield f"header {text!r}", build(text)
    text = json.dumps(GOOD)
    yield "leading space", build(" " + text)
    yield "byte order mark", build(b"\xef\xbb\xbf" + text.encode())
    yield "UTF-16", build(text.encode("utf-16-le"))
    yield "latin-1", build(text.replace('"a"', '"\xe9"').encode("latin-1"))
    yield "overlong UTF-8", build(text.encode().replace(b'"a"', b'"\xc0\xaf"'))
    yield "bare surrogate", build(text.replace('"a"', '"\ud800"'))
    yield "control character", build(text.replace('"a"', '"\n"'))
    yield "trailing comma", build(text[:-1] + ",}")
    yield "comment", build(text[:-1] + "/* */}")
    yield "duplicate tensor", build(text[:-1] + ', "a": ' + json.dumps(GOOD["a"]) + "}")
    yield "duplicate tensor by escape", build(text[:-1] + ', "\\u0061": ' + json.dumps(GOOD["a"]) + "}")
    yield "duplicate field", build(text.replace('"dtype": "F32"', '"dtype": "F32", "dtype": "F32"'))
    yield "duplicate metadata", build(text[:-1] + ', "__metadata__": {}}')
    for depth in (500, 990, 5000, 100_000):
        for opened, closed in ("[]", ('{"a":', "}")):
            nested = opened * depth + ("1" if opened != "[" else "") + closed * depth
            yield f"nested {depth} deep in {opened}", build('{"a": ' + nested + "}")
            yield f"nested {depth} deep dtype in {opened}", build(text.replace('"F32"', nested))
            yield f"nested {depth} deep metadata in {opened}", build(text.replace('{"format": "pt"}', nested))
    for metadata in (
        None,
        1,
        "x",
        [],
        ["x"],
        True,
        {"a": 1},
        {"a": None},
        {"a": ["x"]},
        {"a": {"b": "c"}},
        {"a": True},
    ):
        yield f"metadata {metadata!r}", build({**GOOD, "__metadata__": metadata})


def bad_shapes():
    huge = 10**4000
    return (
        None, 6, "6", {}, True, [-1], [2, -3], [-2, -3], [2.0, 3], ["2", 3], [None], [[2, 3]], [True, True], [False],
        [2**31], [2**62, 2**62], [2**63], [2**64], [2**32, 2**32], [2**62, 4, 0], [2**64, 0], [0, 2**63], [huge, huge],
        [huge, 0], [1e400], [], [5], [7, 3], [1] * 65 + [6], [0], [6, 0], [0] * 200_000, [10**18] * 50_000,
    )  # fmt: skip


def bad_offsets(good):
    begin, end = good
    yield from (
        None, 0, "0", {}, True, [], [begin], [begin, end, end], [end, begin], [-1, end], [begin, -1], [str(begin), end],
        [-end, -begin - 1], [begin, None], [float(begin), end], [begin, end + 0.5], [[begin], end], [False, True],
        [begin, 2**63], [2**63, 2**63 + end - begin], [2**64, 2**64 + end - begin], [10**4000, 10**4000 + end - begin],
    )  # fmt: skip
    for shift in (-8, -4, -1, 1, 4, 8, 48, 1000):  # right size, wrong place
        yield [begin + shift, end + shift]
    for growth in (-8, -1, 1, 8):  # wrong size
        yield [begin, end + growth]


def layouts():
    a, b, c = (json.loads(json.dumps(GOOD[name])) for name in "abc")
    yield "two on one range", build({"a": a, "d": a, "b": b, "c": c})
    yield "all on one range", build({name: {"dtype": "U8", "shape": [48], "data_offsets": [0, 48]} for name in "abc"})
    yield "partial overlap", build({"a": {"dtype": "U8", "shape": [30], "data_offsets": [0, 30]}, "b": b, "c": c})
    yield "nested range", build({"a": {"dtype": "U8", "shape": [48], "data_offsets": [0, 48]}, "b": b})
    yield "hole at the start", build({"b": b, "c": c})
    yield "hole in the middle", build({"a": a, "c": c})
    yield "data but no tensors", build({})
    yield "tensors but no data", build(GOOD, data=b"")
    yield "empty tensor inside another", build({**GOOD, "e": {"dtype": "F32", "shape": [0], "data_offsets": [8, 8]}})
    yield "empty tensor after the end", build({**GOOD, "e": {"dtype": "F32", "shape": [0], "data_offsets": [49, 49]}})
    yield "data one byte short", build(GOOD, data=DATA[:-1])
    yield "data one byte long", build(GOOD, data=DATA + b"\0")


STRUCTURAL = [(name, content) for content, name in {content: name for name, content in structural()}.items()]
opened: list[str] | None = None


def _record(event, arguments):
    if opened is not None and event in ("open", "os.listdir", "os.scandir"):
        opened.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else "?")


@pytest.fixture(scope="module", autouse=True)
def _auditing():
    sys.addaudithook(_record)  # there is no removing one, so it looks at a switch


@contextmanager
def confined(folder):
    """Every file opened inside the block must lie in `folder`, and the block must end in time."""
    global opened  # noqa: PLW0603
    opened = []
    signal.signal(signal.SIGALRM, _late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        paths, opened = opened, None
    outside = [path for path in paths if not os.path.normpath(path).startswith(str(folder))]
    assert not [path for path in outside if not path.endswith((".py", ".pyc"))]


def _late(*_):
    raise TimeoutError("reading took too long")


def test_the_untouched_file_loads(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(build(GOOD))
    with confined(tmp_path):
        assert load_tensors(read_index(file))["c"].shape == (2,)


def test_the_corpus_is_large_and_distinct():
    assert len(STRUCTURAL) >= 400  # distinct by content
    assert len(INDEXES) == len({str(index) for index in INDEXES.values()}) >= 30


@pytest.mark.parametrize(("name", "content"), STRUCTURAL, ids=[name for name, _ in STRUCTURAL])
def test_corrupt_file_is_refused(tmp_path, name, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with confined(tmp_path), pytest.raises(CheckpointError) as caught:
        find_weights(tmp_path, "model")
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 2000
    str(caught.value).encode()


@pytest.mark.parametrize("seed", range(10))
def test_random_damage_is_refused_or_harmless(tmp_path, seed):
    """Flipped, inserted and removed bytes: a refusal, or a file whose tensors all lie within it."""
    dice = random.Random(seed)
    file = tmp_path / "model.safetensors"
    good, refused = build(GOOD), 0
    for _ in range(60):
        content = bytearray(good)
        for _ in range(dice.choice((1, 1, 2, 8))):
            _damage(dice, content, len(good) - len(DATA))
        file.write_bytes(content)
        with confined(tmp_path):
            try:
                tensors = load_tensors(read_index(file))
            except CheckpointError:
                refused += 1
            else:
                assert sum(tensor.nbytes for tensor in tensors.values()) == len(DATA)
                assert all(tensor.sum() is not None for tensor in tensors.values())  # every byte can be read
    assert refused > 30


def _damage(dice, content, header_end):
    place = dice.randrange(min(header_end, len(content)))
    kind = dice.choice(("bit", "byte", "insert", "remove"))
    if kind == "bit":
        content[place] ^= 1 << dice.randrange(8)
    elif kind == "byte":
        content[place] = dice.randrange(256)
    elif kind == "insert":
        content.insert(place, dice.randrange(256))
    else:
        del content[place]


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
MAP = {"a": SHARDS[0], "b": SHARDS[1]}


def tricks():
    """Shard names that lead elsewhere; the files they lead to exist and are sound."""
    up = ("../secret.safetensors", "./" + SHARDS[0], "sub/../" + SHARDS[0], "sub/inner.safetensors", "/", "..", ".", "")
    other = ("..\\secret.safetensors", "C:\\secret.safetensors", "file:///secret.safetensors", "~/secret.safetensors")
    odd = (SHARDS[0] + "\0", "\0", SHARDS[0] + "/", SHARDS[0].upper(), SHARDS[0] + " ", "%2e%2e/secret.safetensors")
    worse = ("\ud800.safetensors", "x" * 300 + ".safetensors", "x" * 10**6, "model.bin", "config.json", "*.safetensors")
    return (*up, *other, *odd, *worse, "missing.safetensors", "folder.safetensors", "fifo.safetensors", "ABSOLUTE")


INDEXES = {f"shard {trick[:40]!r}": {"weight_map": {**MAP, "b": trick}} for trick in tricks()}
INDEXES |= {f"weight_map {str(value)[:40]}": {"weight_map": value} for value in (None, 1, [], "x", [["a", SHARDS[0]]])}
INDEXES |= {f"shard of b is {value!r}": {"weight_map": {**MAP, "b": value}} for value in (None, 1, True, [], {}, 1.5)}
INDEXES |= {
    "no weight_map": {"metadata": {}},
    "swapped": {"weight_map": {"a": SHARDS[1], "b": SHARDS[0]}},
    "all in one": {"weight_map": {"a": SHARDS[0], "b": SHARDS[0]}},
    "tensor in no shard": {"weight_map": {**MAP, "c": SHARDS[0]}},
    "tensor not in the map": {"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "": SHARDS[1]}},
    "shard with an unnamed tensor": {"weight_map": {**MAP, "c": "extra.safetensors"}},
    "damaged shard": {"weight_map": {**MAP, "c": "damaged.safetensors"}},
    "a list": [MAP],
    "text": "{",
    "duplicate": '{"weight_map": {}, "weight_map": {}}',
    "deep": '{"weight_map": ' + "[" * 100_000,
    "empty file": "",
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    outer = tmp_path_factory.mktemp("sharded")
    folder = outer / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "fifo.safetensors")
    for name in ("a", "b"):
        save_file({name: torch.ones(3)}, folder / MAP[name])
    for secret in (outer / "secret.safetensors", folder / "sub" / "inner.safetensors"):
        save_file({"b": torch.ones(3)}, secret)
    save_file({"c": torch.ones(1), "d": torch.ones(1)}, folder / "extra.safetensors")
    (folder / "damaged.safetensors").write_bytes(build(GOOD)[:-1])
    (folder / "model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (folder / "config.json").write_text("{}")
    return folder


def write_index(folder, content):
    text = content if isinstance(content, str) else json.dumps(content)
    text = text.replace("ABSOLUTE", str(folder.parent / "secret.safetensors"))
    (folder / "model.safetensors.index.json").write_text(text)


def test_the_untouched_index_loads(sharded):
    write_index(sharded, {"weight_map": MAP})
    with confined(sharded):
        assert set(find_weights(sharded, "model")) == {"a", "b"}


@pytest.mark.parametrize("name", INDEXES)
def test_corrupt_index_is_refused(sharded, name):
    write_index(sharded, INDEXES[name])
    with confined(sharded), pytest.raises(CheckpointError) as caught:
        find_weights(sharded, "model")
    str(caught.value).encode()


def test_the_guard_sees_a_file_opened_outside(sharded):
    with pytest.raises(AssertionError), confined(sharded):
        read_index(sharded.parent / "secret.safetensors")


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_not_a_regular_file(tmp_path, kind):
    file = tmp_path / "model.safetensors"
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero")
    with confined(tmp_path), pytest.raises(CheckpointError, match="not a regular file"):
        find_weights(tmp_path, "model")
