"""In which dtype a pipeline of ours computes where none is asked for: the fastest here that is right for its model."""

from __future__ import annotations

from lowtide.configs import read_json
from lowtide.hub import Source
from lowtide.loading.model_index import MODEL_INDEX, read_model_index
from lowtide.planning.computing_dtype import ON_CPU, Kind, ranked

ON_ACCELERATORS = "float16"
_CONVOLVED = "StableDiffusionPipeline"
_AUTOENCODER = "vae/config.json"


def own_kind(source: Source) -> Kind:
    """What a checkpoint of ours mostly computes."""
    return Kind.CONVOLUTIONS if _class_name(source) == _CONVOLVED else Kind.PRODUCTS


def own_dtypes(source: Source, device: str) -> tuple[str, ...]:
    """The dtypes that are right for a checkpoint of ours on a kind of device, the fastest first.

    On a CPU float32 and bfloat16, and float16 where the model is known not to overflow in it; on others float16. Where
    they are as fast, float32 is first. Weights rest as the files have them whichever it is.
    """
    if device != "cpu":
        return (ON_ACCELERATORS,)
    return ranked(own_kind(source), (*ON_CPU, *(() if _overflows(source) else ("float16",))))


def _class_name(source: Source) -> str:
    return read_model_index(source.fetch([MODEL_INDEX]))[0]


def _overflows(source: Source) -> bool:
    """Whether numbers may be too large for float16: T5's are, and those of autoencoders that do not deny it."""
    if _class_name(source) != _CONVOLVED:
        return True
    file = source.fetch([_AUTOENCODER]) / _AUTOENCODER
    return not file.is_file() or read_json(file).get("force_upcast", True) is not False
