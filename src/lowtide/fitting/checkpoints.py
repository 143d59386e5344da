"""Plan for a checkpoint before a byte of its weights is read, and load it within the plan."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lowtide.casting.casting import NAMED_CASTINGS
from lowtide.fitting.applied_plan import put_under_plan
from lowtide.fitting.fit import check_not_cast
from lowtide.fitting.meta_subject import MetaSubject, Traces
from lowtide.fitting.prepare import prepare
from lowtide.hub import Source
from lowtide.loading.blueprint import components_on_meta
from lowtide.loading.components import LoadOptions, load_components
from lowtide.loading.elsewhere import ByComponent
from lowtide.loading.model_index import ComponentSpec, config_patterns
from lowtide.memory.presets import stream_for
from lowtide.models.put_weights import Offload
from lowtide.planning.plan import Budgets, Plan
from lowtide.prediction.meta_copy import weights_in_files
from lowtide.quiet import quiet


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is not loaded yet: where it is, the class of its pipeline, and how it is to be loaded.

    `specs` are the components to load, `given` those that are used as they are in place of its own, `dtypes` those of
    some components, by name, in place of the options', and `elsewhere` networks whose files are not its own.
    """

    pipeline_class: type[Any]
    source: Source
    specs: Mapping[str, ComponentSpec | None]
    options: LoadOptions
    given: Mapping[str, Any] = field(default_factory=dict)
    dtypes: Mapping[str, torch.dtype | None] = field(default_factory=dict)
    elsewhere: ByComponent = field(default_factory=dict)

    @property
    def given_networks(self) -> dict[str, nn.Module]:
        """The networks among what is given."""
        return {name: part for name, part in self.given.items() if isinstance(part, nn.Module)}

    def load(self, own_options: Mapping[str, LoadOptions] | None = None) -> Any:
        """The pipeline; `own_options` are those of some components, by name. Raises as `load_components` does."""
        own = own_options or {name: replace(self.options, dtype=dtype) for name, dtype in self.dtypes.items()}
        parts = load_components(self.source, self.specs, self.options, own, self.elsewhere)
        return self.pipeline_class(**self.given, **parts)

    def on_meta(self, device: torch.device) -> MetaSubject:
        """The pipeline on meta, from configurations alone; raises as loading does for those."""
        folder = self.source.fetch(config_patterns(self.specs))
        parts, in_files = components_on_meta(folder, self.specs, self.options, self.elsewhere)
        with quiet():
            pipe = self.pipeline_class(**{**self.given, **parts})
            given = {name: weights_in_files(network) for name, network in self.given_networks.items()}
            meta = MetaSubject(pipe.with_networks_on_meta(but=parts), {**given, **in_files}, device)
        if not self.given_networks:
            meta.traced = _traced_before(self._hash(meta))
        return meta

    def _hash(self, meta: MetaSubject) -> str:
        """What tracing depends on besides the size of a run: the configurations, and dtypes in the files."""
        folder = self.source.fetch(config_patterns(self.specs))
        about = (self.pipeline_class, self.specs, meta.device.type, meta.subject.dtype, meta.in_files)
        digest = hashlib.sha256(repr(about).encode())
        files = {path for pattern in config_patterns(self.specs) for path in folder.glob(pattern)}
        files |= {path for place in self.elsewhere.values() for path in place.folder.glob("*.json")}
        for file in sorted(files):
            digest.update(file.read_bytes())
        return digest.hexdigest()


@functools.lru_cache(maxsize=4)
def _traced_before(config_hash: str) -> Traces:
    """What was traced so far of checkpoints with the same configurations, of those that were planned for last."""
    return {}


def load_within(
    checkpoint: Checkpoint, budgets: Budgets, allow: tuple[str, ...], device: torch.device, size: Mapping[str, Any]
) -> Any:
    """Load a pipeline under the plan for a size, its usual one but for what is asked, so that loading fits in too.

    Raises `BudgetError` before any weight is read where no plan fits.
    """
    check_not_cast(checkpoint.given_networks)
    meta = checkpoint.on_meta(device)
    fit = prepare(meta, budgets, meta.subject.usual_size(**size), allow=allow, loaded=checkpoint.given_networks)
    plan = fit.choose()
    own = {name: _options_under(plan, name, checkpoint.options, device) for name in meta.in_files}
    own = {name: options for name, options in own.items() if name not in checkpoint.given}
    pipe = checkpoint.load(own)
    meta.adopt(pipe)
    put_under_plan(pipe, fit, plan, as_planned=set(own))
    return pipe


def _options_under(plan: Plan, name: str, options: LoadOptions, device: torch.device) -> LoadOptions:
    chosen = plan.components.get(name)
    if chosen is None:
        return options
    offload = None if chosen.rule is None else Offload(chosen.rule, stream_for(device, chosen.rule))
    casting = None if chosen.casting is None else NAMED_CASTINGS[chosen.casting]
    return replace(options, offload=offload, casting=casting)


def check_only_budget(offload: str | None, casting: object, dtypes: Mapping[str, object]) -> None:
    """Raise `ValueError` where a budget is given and its parts are chosen by hand too."""
    if dtypes:
        raise ValueError("A dtype for each component and a budget are not possible together: a plan has one dtype.")
    if offload is not None or casting is not None:
        name = "offload" if offload is not None else "casting"
        raise ValueError(
            f"{name} and a budget are not possible together: a budget chooses both. Leave {name} out, and let weights "
            "rest in 8 bits with allow=('fp8',) or ('int8',); or leave out the budget."
        )
