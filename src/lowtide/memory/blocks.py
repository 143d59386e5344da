"""Which parts of a module are units: its innermost repeated blocks, or the modules that hold weights themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from lowtide.memory.rule import Level, Rule
from lowtide.memory.weight import Weight

ATOMIC = (
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.RNNBase,
    torch.jit.ScriptModule,
)
"""Modules whose code reads the weights of modules inside them: they cannot be split.

Nor can modules with an attribute `works_as_one`, which call those inside them many times over, nor what `torch.compile`
made of a block: its code has the calls inside it merged. One made of a network is split: it is compiled layer by layer.
"""


@dataclass(frozen=True, eq=False)
class Part:
    """Weights that come and go together, around the calls of `modules`.

    The part of several `modules` stays from the call of the first to the end of the last. An `aside` part works while
    other parts come and go, or belongs to several of them. A part that `recurs` is called from several others.
    """

    modules: tuple[nn.Module, ...]
    weights: tuple[Weight, ...]
    aside: bool = False
    recurs: bool = False


def split(root: nn.Module, weights: Iterable[Weight], rule: Rule) -> list[Part]:
    """The parts of `root`, in the order in which modules are registered; every weight is in one of them."""
    if rule.level is Level.WHOLE:
        return [Part((root,), tuple(weights))]
    homes, recurring = _homes(root, rule)
    groups: dict[tuple[int, ...], tuple[tuple[nn.Module, ...], list[Weight]]] = {}
    for weight in weights:
        owners = list(dict.fromkeys(view.slot.owner for view in weight.views))
        places = {tuple(id(m) for m in homes[id(owner)]): homes[id(owner)] for owner in owners}
        modules = next(iter(places.values())) if len(places) == 1 else _owners(root, owners)
        key = (len(places) > 1, *(id(m) for m in modules))
        groups.setdefault(key, (modules, []))[1].append(weight)
    position = {id(module): place for place, module in enumerate(root.modules())}
    ordered = sorted(groups.items(), key=lambda item: position[id(item[1][0][0])])
    triggers = {id(module) for modules, _ in groups.values() for module in modules} - recurring
    parts: list[Part] = []
    for key, (modules, group) in ordered:
        recurs = id(modules[0]) in recurring
        is_aside = _is_aside(root, modules, triggers, shared=bool(key[0]) or recurs)
        parts.append(Part(modules, tuple(group), is_aside, recurs))
    return parts


def blocks_of(root: nn.Module, names: Iterable[str] | None = None) -> list[list[nn.Module]]:
    """The lists of repeated blocks, innermost ones only; with `names`, the lists (or modules) called so.

    A list of blocks is a `ModuleList` or `Sequential` with two members or more of one class that have modules inside.
    Raises `ValueError` for a name that `root` has not.
    """
    if names is not None:
        return [_named(root, name) for name in names]
    lists: list[list[nn.Module]] = []
    _collect(root, lists, set())
    return lists


def _named(root: nn.Module, name: str) -> list[nn.Module]:
    modules = dict(root.named_modules())
    if name not in modules or not name:
        lists = [key for key, module in modules.items() if isinstance(module, (nn.ModuleList, nn.Sequential))]
        raise ValueError(
            f"{type(root).__name__} has no module {name!r} to split in blocks; its lists are {lists[:30]}."
        )
    module = modules[name]
    return _members(module) if isinstance(module, (nn.ModuleList, nn.Sequential)) else [module]


def _collect(module: nn.Module, lists: list[list[nn.Module]], seen: set[int]) -> bool:
    """Add the innermost lists inside `module`; whether there were any."""
    if _is_atomic(module) or id(module) in seen:
        return False
    seen.add(id(module))
    inside = [_collect(child, lists, seen) for child in module.children()]
    if any(inside):
        return True
    if isinstance(module, (nn.ModuleList, nn.Sequential)) and _is_repeated(_members(module)):
        lists.append(_members(module))
        return True
    return False


def _members(modules: nn.ModuleList | nn.Sequential) -> list[nn.Module]:
    """The modules in a list, some of whose places may be empty."""
    return [member for member in modules if member is not None]  # pyright: ignore[reportUnnecessaryComparison]


def _is_atomic(module: nn.Module) -> bool:
    if isinstance(module, ATOMIC) or getattr(module, "works_as_one", False) is True:
        return True
    return _is_compiled(module) and not any(_collect(child, [], set()) for child in module.children())


def _is_compiled(module: nn.Module) -> bool:
    """Whether it is what `torch.compile` made of a module. Its class is not imported for that: it takes a second."""
    return type(module).__name__ == "OptimizedModule"


def _is_repeated(members: list[nn.Module]) -> bool:
    composite = [type(member) for member in members if _can_be_called(member) and any(True for _ in member.children())]
    return any(composite.count(kind) > 1 for kind in composite)


def _can_be_called(module: nn.Module) -> bool:
    has_forward = type(module).forward is not nn.Module.forward or _is_compiled(module)
    return has_forward and not isinstance(module, nn.ModuleList)


def _homes(root: nn.Module, rule: Rule) -> tuple[dict[int, tuple[nn.Module, ...]], set[int]]:
    """For every module in `root`, the modules around whose calls its weights are needed; and which of these recur."""
    homes: dict[int, tuple[nn.Module, ...]] = {}
    for module, atomic in with_atomic(root, None):
        homes.setdefault(id(module), (atomic or module,))
    groups: dict[int, set[int]] = {}
    if rule.level is Level.BLOCK:
        for blocks in blocks_of(root, rule.block_modules):
            members = [block for block in blocks if _can_be_called(block)]
            for start in range(0, len(members), rule.blocks_per_group):
                group = tuple(members[start : start + rule.blocks_per_group])
                for module in (module for block in group for module in block.modules()):
                    homes[id(module)] = group
                    groups.setdefault(id(module), set()).add(id(group[0]))
    recurring = _recurring(root, {place for place, several in groups.items() if len(several) > 1})
    for module in recurring:
        homes.update({id(inner): (module,) for inner in module.modules()})
    return homes, {id(module) for module in recurring}


def _recurring(root: nn.Module, in_several: set[int]) -> list[nn.Module]:
    """The outermost modules that can be called of those in several groups of blocks, and in no block inside another."""
    parents = Counter(id(child) for module in root.modules() for child in module.children())
    shared = {place for place in in_several if parents[place] > 1}
    found: list[nn.Module] = []
    for module in root.modules():  # what is around others comes before them
        if id(module) in shared:
            if _can_be_called(module):
                found.append(module)
                shared -= {id(inner) for inner in module.modules()}
            else:
                shared |= {id(child) for child in module.children()}
    return found


def with_atomic(module: nn.Module, atomic: nn.Module | None) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """Every module inside `module`, and the one around it that cannot be split, if there is one."""
    atomic = atomic or (module if _is_atomic(module) else None)
    yield module, atomic
    for child in module.children():
        yield from with_atomic(child, atomic)


def _owners(root: nn.Module, owners: list[nn.Module]) -> tuple[nn.Module, ...]:
    homes = {id(module): atomic or module for module, atomic in with_atomic(root, None)}
    return tuple(dict.fromkeys(homes[id(owner)] for owner in owners))


def _is_aside(root: nn.Module, modules: tuple[nn.Module, ...], triggers: set[int], *, shared: bool) -> bool:
    own = {id(module) for module in modules}
    if any(id(inner) in triggers - own for module in modules for inner in module.modules()):
        return True
    if not shared:
        return False
    holders = (module for module in root.modules() if id(module) in triggers - own)
    return any(id(inner) in own for holder in holders for inner in holder.modules())
