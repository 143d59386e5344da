"""Tables of published key names, and how they turn the names in a file into those of the class at hand.

T5 needs no renames: `shared.weight` and `encoder.embed_tokens.weight` are one tied parameter, which `fill` handles.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from lowtide.weights.index import CheckpointIndex, TensorEntry

SCALE_SUFFIX = "_scale"
"""The name of a weight's scale is the name of the weight with this at its end."""


@dataclass(frozen=True)
class Rename:
    """A key matching the regular expression `old` becomes `new` (which may refer to groups).

    With `conv_to_linear`, a 1×1 convolution's weight [O, I, 1, 1] is read as a linear layer's [O, I].
    """

    old: str
    new: str
    conv_to_linear: bool = False


@dataclass(frozen=True)
class NameTable:
    """Renames, and patterns (`fnmatch`) of keys to leave out where the class has no such key."""

    renames: tuple[Rename, ...] = ()
    stray: tuple[str, ...] = ()


VAE_NAMES = NameTable(
    renames=(
        Rename(r"\.query\.(weight|bias)$", r".to_q.\1", conv_to_linear=True),
        Rename(r"\.key\.(weight|bias)$", r".to_k.\1", conv_to_linear=True),
        Rename(r"\.value\.(weight|bias)$", r".to_v.\1", conv_to_linear=True),
        Rename(r"\.proj_attn\.(weight|bias)$", r".to_out.0.\1", conv_to_linear=True),
    )
)

# Up to transformers 4, `CLIPTextModel` wrapped everything in `text_model`; since 5 it does not. Both are published.
CLIP_TEXT_NAMES = NameTable(
    renames=(Rename(r"^text_model\.", ""), Rename(r"^", "text_model.")),
    stray=("*embeddings.position_ids",),
)

CLIP_VISION_NAMES = NameTable(
    renames=(Rename(r"^vision_model\.", ""), Rename(r"^", "vision_model.")),
    stray=("*embeddings.position_ids",),
)

# The file of a whole T5 can be loaded as a text encoder too.
T5_NAMES = NameTable(stray=("decoder.*", "lm_head.weight"))

# The vision tower inside the safety checker changed in the same way; it was wrapped twice.
SAFETY_CHECKER_NAMES = NameTable(
    renames=(
        Rename(r"^vision_model\.vision_model\.", "vision_model."),
        Rename(r"^vision_model\.", "vision_model.vision_model."),
    ),
    stray=("*embeddings.position_ids",),
)


def apply_names(index: CheckpointIndex, table: NameTable, expected: Collection[str]) -> CheckpointIndex:
    """Rename the keys of `index` by `table`, towards the `expected` names of a module (see `fill.state_names`).

    A key is renamed only if the module lacks it but has the new name, and the file has no other key for the new name.
    One table thus serves old and new files, and old and new classes. Other keys stay as they are, and `fill` reports
    them. The scale of an 8-bit weight is renamed as its weight is.
    """
    expected = {*expected, *(name + SCALE_SUFFIX for name in expected)}
    entries = {name: entry for name, entry in index.items() if name in expected}
    for name, entry in index.items():
        if name in entries:
            continue
        new_name, new_entry = _renamed(name, entry, table, expected)
        if new_name in entries:
            new_name, new_entry = name, entry
        if new_name in expected or not any(fnmatchcase(name, pattern) for pattern in table.stray):
            entries[new_name] = new_entry
    return CheckpointIndex(entries, index.files, index.metadata)


def _renamed(name: str, entry: TensorEntry, table: NameTable, expected: Collection[str]) -> tuple[str, TensorEntry]:
    for rename in table.renames:
        new_name, count = re.subn(rename.old, rename.new, name, count=1)
        if count and new_name in expected:
            return new_name, _linear(entry) if rename.conv_to_linear else entry
    return name, entry


def _linear(entry: TensorEntry) -> TensorEntry:
    is_conv = len(entry.shape) == 4 and entry.shape[2:] == (1, 1)
    return replace(entry, shape=entry.shape[:2]) if is_conv else entry
