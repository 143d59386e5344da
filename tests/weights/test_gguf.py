"""Headers of GGUF files: where tensors lie, and what is refused."""

import struct

import numpy as np
import pytest
import torch

from lowtide.weights.gguf import KINDS, read_gguf_index
from lowtide.weights.index import CheckpointError

gguf = pytest.importorskip("gguf")


def text(content):
    return struct.pack("<Q", len(content)) + content.encode()


def header(tensors, settings=b"", count=0, version=3):
    body = b"".join(text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
        for name, dims, kind, offset in tensors)  # fmt: skip
    return b"GGUF" + struct.pack("<IQQ", version, len(tensors), count) + settings + body


@pytest.fixture
def written(tmp_path):
    file = tmp_path / "w.gguf"
    numbers = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(file, "flux")
    writer.add_array("tokens", ["a", "b"])
    writer.add_array("counts", [1, 2, 3])
    writer.add_float32("half", 0.5)
    writer.add_tensor("plain", numbers)
    writer.add_tensor("halves", numbers.astype(np.float16))
    kind = gguf.GGMLQuantizationType.Q4_0
    writer.add_tensor("packed", gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, numbers


def test_tensors_are_found_where_they_are(written):
    file, numbers = written
    index, content = read_gguf_index(file), file.read_bytes()
    found = {name: content[entry.offset : entry.offset + entry.nbytes] for name, entry in index.items()}
    assert found["plain"] == numbers.tobytes()
    assert found["halves"] == numbers.astype(np.float16).tobytes()
    assert found["packed"] == gguf.quants.quantize(numbers, gguf.GGMLQuantizationType.Q4_0).tobytes()
    assert (index["plain"].dtype, index["plain"].shape) == (torch.float32, (6, 64))
    assert (index["packed"].dtype, index["packed"].shape) == (torch.uint8, (6, 36))
    assert index.kinds == {"packed": int(gguf.GGMLQuantizationType.Q4_0)}


def test_kinds_are_those_that_diffusers_computes_with():
    utils = pytest.importorskip("diffusers.quantizers.gguf.utils")
    known = {int(kind) for kind in utils.SUPPORTED_GGUF_QUANT_TYPES}
    assert set(KINDS) == known | {0, 1}
    for number, kind in KINDS.items():
        assert (kind.numbers, kind.nbytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file ends"),
        (b"GGML" + bytes(60), "does not begin"),
        (header([], version=1), "version 1"),
        (header([])[:-1], "the file ends"),
        (b"GGUF" + struct.pack("<IQQ", 3, 10**6, 0), "1000000 tensors"),
        (header([("a", (32,), 8, 0)]), "reaches behind the end"),
        (header([("a", (33,), 8, 0)]), "cannot be packed as Q8_0"),
        (header([("a", (32,), 99, 0)]), "kind 99"),
        (header([("a", (), 0, 0)]), "cannot be packed"),
        (header([("a", (1,), 0, 0), ("a", (1,), 0, 0)]) + bytes(200), "occurs twice"),
        (header([("a", (2**40, 2**40), 0, 0)]), "reaches behind the end"),
        (header([("a", (1,) * 65, 0, 0)]), "65 dimensions"),
        (header([], text("x") + struct.pack("<IQ", 8, 2**62), 1), "longer than"),
        (header([], text("x") + struct.pack("<IIQ", 9, 0, 2**62), 1), "longer than"),
        (header([], text("x") + struct.pack("<IIQ", 9, 9, 2**62) + bytes(500), 1), "the file ends|cannot be read"),
        (header([], text("x") + struct.pack("<I", 77), 1), "type 77"),
        (header([], text("general.alignment") + struct.pack("<II", 4, 0), 1), "alignment"),
        (header([], text("general.alignment") + struct.pack("<I", 8) + text("wide"), 1), "alignment"),
    ],
)
def test_malformed_headers_are_refused(tmp_path, content, said):
    (tmp_path / "w.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        read_gguf_index(tmp_path / "w.gguf")
