"""What all schedulers share: their interface, their configuration, and reading and writing `scheduler_config.json`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor

from lowtide.config_checks import check_types
from lowtide.configs import Config, frozen, write_json
from lowtide.hub import Source
from lowtide.machine.accelerators import brought_to
from lowtide.peer_names import PeerNames, refuse_arguments
from lowtide.schedulers import noise_schedule
from lowtide.schedulers.scheduler_entries import (
    MOST_TIMESTEPS,
    RANGES,
    are_all,
    are_betas,
    check_number,
    unsupported,
)

CONFIG_NAME = "scheduler_config.json"
FORMAT_VERSION = "0.42.1"  # the diffusers release whose file format we write

Generators = torch.Generator | Sequence[torch.Generator] | None
Timestep = int | float | Tensor


class StepOutput(NamedTuple):
    """The sample at the next, lower noise level, and the solver's estimate of the clean sample, if it makes one.

    It has names and is a tuple, so it serves whatever `return_dict` asks for.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class Scheduler(Protocol):
    """What a pipeline needs of a scheduler.

    Call `set_timesteps`, multiply noise by `init_noise_sigma`, then for each of `timesteps` in order: give
    `scale_model_input(sample, t)` to the model and its output to `step`. The noise schedule stays on the CPU; only
    `timesteps` are moved to the device asked for. `eta` matters only to DDIM, `generator` only where noise is drawn
    (DDIM with eta > 0, Euler with churn, DPM-Solver as an SDE, and always CogVideoX's DPM-Solver++); the others accept
    and ignore them.
    """

    @property
    def config(self) -> SchedulerConfig:
        """The configuration, as `scheduler_config.json` holds it."""
        ...

    @property
    def timesteps(self) -> Tensor:
        """The timesteps of all model calls, in order; whole numbers, or for Euler possibly fractions."""
        ...

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the sample that the first step expects."""
        ...

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | Config, **entries: Any) -> Self:
        """Build from the entries of a file or from any scheduler's configuration, changed by other `entries`."""
        ...

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], subfolder: str | None = None) -> Self:
        """Read `scheduler_config.json` from a local folder or a Hub id."""
        ...

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `scheduler_config.json` in a local folder."""
        ...

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Lay out the timesteps of a run and forget the run before."""
        ...

    def scale_model_input(self, sample: Tensor, timestep: Timestep) -> Tensor:
        """The model's input at `timestep`."""
        ...

    def step(
        self,
        model_output: Tensor,
        timestep: Timestep,
        sample: Tensor,
        *,
        eta: float = 0.0,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> StepOutput:
        """From `sample` at `timestep` to what the next model call needs, in the same shape and dtype."""
        ...

    def add_noise(self, original: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`original` with the noise level of `timesteps`."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig(Config):
    """The entries that every published `scheduler_config.json` may have, with the published defaults.

    `given` names the entries that the source spelled out. The configuration of another class takes over the given
    entries and the entries that differ from this class's defaults; for all others it uses its own defaults.
    Every class applies CogVideoX's `snr_shift_scale`; without that entry nothing is shifted.
    Raises `ValueError` for a value that is not supported, naming the values that are.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    given: frozenset[str] = dataclasses.field(default=frozenset(), repr=False, compare=False)

    # Entry -> its possible values. Entries of features that we lack are not fields; their value must be "off".
    ALLOWED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "beta_schedule": noise_schedule.BETA_SCHEDULES,
        "prediction_type": ("epsilon", "v_prediction", "sample"),
        "timestep_spacing": noise_schedule.TIMESTEP_SPACINGS,
    }
    # Entry -> its usual value: entries that change nothing here, as they change nothing in the published class.
    IDLE: ClassVar[Mapping[str, Any]] = {}
    # Entry -> values that only another class understands: here the default applies, and the value is kept as unused.
    FOREIGN: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __post_init__(self) -> None:
        entries = self.to_dict()
        for key, allowed in self.ALLOWED.items():
            if key in entries and entries[key] not in allowed:
                raise unsupported(self, key, f"one of {', '.join(map(repr, allowed))}")
        if "snr_shift_scale" in entries:
            check_number(self, "snr_shift_scale", (int, float), 1e-6, 1e6)
        check_number(self, "num_train_timesteps", int, 1, MOST_TIMESTEPS)
        check_number(self, "steps_offset", int, 0, self.num_train_timesteps - 1)
        for key in ("beta_start", "beta_end"):
            check_number(self, key, (int, float), 1e-12, 1 - 1e-6)
        betas = self.trained_betas
        if betas is not None and not are_betas(betas, self.num_train_timesteps):
            raise unsupported(self, "trained_betas", f"null or {self.num_train_timesteps} numbers between 0 and 1")
        check_types(self, type(self).__name__.removesuffix("Config"), RANGES)

    @classmethod
    def from_dict(cls, source: Mapping[str, Any]) -> Self:
        """Read `source`; entries listed in its `_use_default_values`, which the peer writes, count as not given."""
        defaulted: Any = source.get("_use_default_values", ())
        if not are_all(defaulted, str):
            raise ValueError(f"_use_default_values={defaulted!r:.80} is not possible: it lists names of entries.")
        entries = {k: v for k, v in source.items() if k not in defaulted and k not in ("given", "unused")}
        foreign = {k: v for k, v in entries.items() if v in cls.FOREIGN.get(k, ())}
        config = super().from_dict({k: v for k, v in entries.items() if k not in foreign})
        fields = {field.name for field in dataclasses.fields(cls)}
        given = frozenset(fields & entries.keys() - foreign.keys())
        return dataclasses.replace(config, unused={**config.unused, **foreign}, given=given)

    @classmethod
    def usual(cls) -> dict[str, Any]:
        """The entries that need not be told, at their usual values."""
        return {**cls.IDLE, **{key: possible[0] for key, possible in cls.ALLOWED.items()}}

    @classmethod
    def from_scheduler(cls, other: SchedulerConfig) -> Self:
        """Take over the configuration of any scheduler; see the class."""
        return cls.from_dict(other.carried())

    @property
    def snr_shift(self) -> float:
        """The number that divides the signal-to-noise ratio of every training timestep; 1 without an entry."""
        return self.get("snr_shift_scale", 1.0)

    def changed(self, entries: Mapping[str, Any]) -> Self:
        """This configuration with other `entries`, which count as given."""
        fields = {field.name for field in dataclasses.fields(self)}
        own = {key: frozen(value) for key, value in entries.items() if key in fields}
        rest = {key: value for key, value in entries.items() if key not in fields}
        return dataclasses.replace(self, unused={**self.unused, **rest}, given=self.given | own.keys(), **own)

    def told(self, owner: str, entries: Mapping[str, Any]) -> Self:
        """This configuration with other `entries` by name, as `owner` takes them; raises `TypeError` for others."""
        known = self.keys()
        refuse_arguments(owner, {key: value for key, value in entries.items() if key not in known})
        own = {key: value for key, value in entries.items() if key in known}
        return self.changed(own) if own else self

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: every field, then the unknown entries of the source."""
        return {key: value for key, value in super().to_dict().items() if key != "given"}

    def carried(self) -> dict[str, Any]:
        """The entries that the configuration of another class takes over; see the class."""
        defaults = {f.name: f.default for f in dataclasses.fields(self) if f.name not in ("unused", "given")}
        changed = {key for key, default in defaults.items() if getattr(self, key) != default}
        own = {key: value for key, value in self.to_dict().items() if key in changed | self.given}
        return {**self.unused, **own}


ConfigT = TypeVar("ConfigT", bound=SchedulerConfig)


class SchedulerBase(PeerNames, Generic[ConfigT]):
    """Configuration, training schedule (on the CPU) and file format; the subclasses add the solver.

    The training schedule follows from the configuration, unless `alphas_cumprod` gives another.
    """

    config_class: type[ConfigT]
    order = 1
    """Model calls a timestep."""

    def __init__(self, config: ConfigT, *, zero_snr: bool = False, alphas_cumprod: Tensor | None = None) -> None:
        self.config = config
        self.alphas_cumprod = _training_alphas(config, zero_snr) if alphas_cumprod is None else alphas_cumprod
        self.timesteps = torch.arange(config.num_train_timesteps - 1, -1, -1)
        self.num_inference_steps: int | None = None
        self._on_host: tuple[Tensor, list[int | float]] | None = None

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the sample that the first step expects."""
        return 1.0

    def number_of(self, timestep: Timestep) -> int | float:
        """A timestep as a number. One of `timesteps` is known by its place: a device need not be waited for."""
        place = self._place_in_timesteps(timestep)
        if place is None:
            return timestep.item() if isinstance(timestep, Tensor) else timestep
        if self._on_host is None or self._on_host[0] is not self.timesteps:
            self._on_host = self.timesteps, self.timesteps.tolist()
        return self._on_host[1][place]

    def _place_in_timesteps(self, timestep: Timestep) -> int | None:
        """Where among `timesteps` the memory of `timestep` is; None where it is elsewhere, or is the host's."""
        own = self.timesteps
        if not isinstance(timestep, Tensor) or timestep.device.type == "cpu" or timestep.dtype != own.dtype:
            return None
        place = (timestep.data_ptr() - own.data_ptr()) // own.itemsize
        is_one = timestep.numel() == 1 and own.is_contiguous() and timestep.device == own.device
        return place if is_one and 0 <= place < own.numel() else None

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | Config, **entries: Any) -> Self:
        """Build from the entries of a file or from any scheduler's configuration; entries unknown here are kept.

        Other `entries` by name, as in `from_config(config, use_karras_sigmas=True)`, replace those of `config`; raises
        `TypeError` for names that this class does not have.
        """
        if isinstance(config, SchedulerConfig):
            return cls(cls.config_class.from_scheduler(config), **entries)
        return cls(cls.config_class.from_dict(config.to_dict() if isinstance(config, Config) else config), **entries)

    @classmethod
    def _configured(cls, config: ConfigT | None, entries: Mapping[str, Any]) -> ConfigT:
        """`config`, or the class's own, with other entries."""
        config = cls.config_class() if config is None else config
        if not isinstance(config, cls.config_class):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"{cls.__name__} takes its entries by name, as in num_train_timesteps=1000, not {config!r:.80}."
            )
        return config.told(cls.__name__, entries)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], subfolder: str | None = None) -> Self:
        """Read `scheduler_config.json` from a local `folder` or a Hub id, written by any scheduler class.

        Raises `FileNotFoundError` if it is missing and `ValueError` if it is not valid.
        """
        name = f"{subfolder}/{CONFIG_NAME}" if subfolder else CONFIG_NAME
        path = Source(os.fspath(folder)).fetch([name]) / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist. Name a folder that holds {CONFIG_NAME}, or its subfolder.")
        return cls(cls.config_class.from_file(path))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `scheduler_config.json` to `folder`, which is created if it is missing."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        header = {"_class_name": type(self).__name__, "_diffusers_version": FORMAT_VERSION}
        write_json(Path(folder, CONFIG_NAME), {**header, **self.config.to_dict()})

    def scale_model_input(self, sample: Tensor, timestep: Timestep) -> Tensor:
        """The model's input at `timestep`: here `sample` itself."""
        return sample

    def add_noise(self, original: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ_t `original` + √(1-ᾱ_t) `noise`; `timesteps` are training timesteps, one per sample or one for all."""
        alpha, sigma = self._levels_like(timesteps, original)
        return alpha * original + sigma * noise

    def _levels_like(self, timesteps: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        bar = self.alphas_cumprod.to(timesteps.device)[timesteps.long()]
        return spread(bar**0.5, sample), spread((1 - bar) ** 0.5, sample)

    def _spaced(self, num_steps: int | None, least: int = 1) -> noise_schedule.FloatArray:
        c = self.config
        num_steps = noise_schedule.check_num_steps(num_steps, c.num_train_timesteps, least)
        spaced = noise_schedule.spaced_timesteps(c.timestep_spacing, num_steps, c.num_train_timesteps, c.steps_offset)
        noise_schedule.check_timesteps(spaced.round(), c.num_train_timesteps, c.timestep_spacing)
        return spaced

    def _num_inference_steps(self) -> int:
        if self.num_inference_steps is None:
            raise ValueError(f"Call {type(self).__name__}.set_timesteps(num_inference_steps) before stepping.")
        return self.num_inference_steps


def spread(values: Tensor, sample: Tensor) -> Tensor:
    """`values`, B of them or a single one, with the device and dtype of `sample`, shaped to multiply its B items."""
    values = values.flatten().to(sample.device, sample.dtype)
    return values.reshape(-1, *[1] * (sample.dim() - 1))


def draw_noise(
    shape: Sequence[int], *, generator: Generators, device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """Standard normal noise of `shape`, drawn where the generator is: a CPU generator gives the same noise everywhere.

    Each generator of a list draws one item of the batch; raises `ValueError` if their number is not `shape[0]`.
    """
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(
                f"{len(generator)} generators were given for a batch of {shape[0]}: give one for each item."
            )
        items = [draw_noise((1, *shape[1:]), generator=g, device=device, dtype=dtype) for g in generator]
        return torch.cat(items)
    source = generator.device if generator is not None else device
    noise = torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype)
    return brought_to(torch.device(device), noise)


def betas_of(config: SchedulerConfig, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The betas that `config` describes, ascending in the timestep, in `dtype`."""
    if config.trained_betas is not None:
        return torch.tensor(config.trained_betas, dtype=dtype)
    count = config.num_train_timesteps
    return noise_schedule.training_betas(config.beta_schedule, config.beta_start, config.beta_end, count, dtype=dtype)


def shifted_alphas(config: SchedulerConfig, *, zero_snr: bool) -> Tensor:
    """The ᾱ of CogVideoX (arXiv 2408.06072): shifted by `snr_shift`, then with `zero_snr` stretched to end in noise.

    They have the precision of the published schedulers: float64 where the schedule is "scaled_linear", else float32.
    """
    precise = config.trained_betas is None and config.beta_schedule == "scaled_linear"
    betas = betas_of(config, dtype=torch.float64 if precise else torch.float32)
    bars = noise_schedule.shift_snr(noise_schedule.cumulative_alphas(betas), config.snr_shift)
    return noise_schedule.stretch_to_zero_snr(bars) if zero_snr else bars


def _training_alphas(config: SchedulerConfig, zero_snr: bool) -> Tensor:
    if config.snr_shift != 1:
        return shifted_alphas(config, zero_snr=zero_snr).float()
    betas = betas_of(config)
    return noise_schedule.cumulative_alphas(noise_schedule.rescale_to_zero_snr(betas) if zero_snr else betas)
