"""`lowtide serve`: pictures and clips over HTTP, within a budget."""

from __future__ import annotations

import ipaddress
import signal
import socket
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowtide.cli.budget_options import Budget
from lowtide.cli.errors import InputError, in_one_line, reported, tell
from lowtide.cli.file_options import NOTHING, configurations
from lowtide.cli.request import SHIPPED_MODEL, DType, shipped_model
from lowtide.sizes import parse_bytes

if TYPE_CHECKING:
    from lowtide.serve.retention import Retention

_EXTRA = "Serving needs packages that are not installed: pip install 'lowtide[serve]'"


class LogForm(StrEnum):
    """Forms of lines in the log."""

    TEXT = "text"
    JSON = "json"


class LogLevel(StrEnum):
    """The least that is said in the log."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class _Operation:
    """How the server is run, apart from what it computes."""

    host: str
    port: int
    api_key_file: Path | None
    data: Path
    log: LogForm
    log_level: LogLevel
    retention: Retention
    drain_seconds: float
    at_once: int
    batch: int


def serve(
    models: Annotated[
        list[str] | None, typer.Argument(help="Folders or Hub ids of models, or NAME=MODEL. The shipped one otherwise.")
    ] = None,
    models_dir: Annotated[
        Path | None, typer.Option(help="A folder of models, each of its folders a model by its name.")
    ] = None,
    vram: Annotated[str | None, typer.Option(help="The most memory of the GPU, such as 6GB.")] = None,
    ram: Annotated[str | None, typer.Option(help="The most memory of both processes together, such as 4GB.")] = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file of keys, one a line; needed beyond this machine.")
    ] = None,
    data: Annotated[Path, typer.Option(help="The folder in which jobs and results are kept.")] = Path("lowtide-data"),
    keep_days: Annotated[
        float | None, typer.Option(min=0, help="Days that ended jobs are kept. No limit otherwise.")
    ] = None,
    keep_bytes: Annotated[
        str | None, typer.Option(help="The most that results of ended jobs take, such as 20GB; the oldest go first.")
    ] = None,
    drain_seconds: Annotated[float, typer.Option(min=0, help="What running jobs have to end after SIGTERM.")] = 60.0,
    log: Annotated[LogForm, typer.Option(help="The form of the log's lines.")] = LogForm.TEXT,
    log_level: Annotated[LogLevel, typer.Option(help="The least that is said in the log.")] = LogLevel.INFO,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, xpu or mps.")] = "auto",
    dtype: Annotated[DType, typer.Option(help="In which to compute; auto is as in lowtide generate.")] = DType.AUTO,
    at_once: Annotated[int, typer.Option(min=1, max=64, help="Jobs that may run together where they fit.")] = 1,
    batch: Annotated[
        int,
        typer.Option(min=1, max=64, help="Pictures that one call makes where planned faster, up to rounding."),
    ] = 1,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="LOWTIDE_DEBUG", help="Show tracebacks.", show_envvar=False)
    ] = False,
) -> None:
    """Make pictures and clips for whoever asks over HTTP, within a budget."""
    with reported(debug=debug), in_one_line("serve"):
        Budget(vram, ram)  # raises for text that means no size
        if api_key_file is None and not _is_loopback(host):
            raise InputError(
                f"--host {host}: whoever reaches this machine could use it. Give --api-key-file FILE, or 127.0.0.1."
            )
        retention = _retention(keep_days, keep_bytes)
        operation = _Operation(host, port, api_key_file, data, log, log_level, retention, drain_seconds, at_once, batch)
        named = _named(models or [], models_dir)
        _serve({"models": named, "vram": vram, "ram": ram, "device": device, "dtype": dtype.value}, operation)


def _serve(settings: dict[str, Any], operation: _Operation) -> None:
    try:
        import uvicorn

        from lowtide.serve.application import make_app
    except ImportError as error:
        raise InputError(f"{_EXTRA} ({error})") from error
    from lowtide.loading.model_index import MODEL_INDEX, read_model_index
    from lowtide.serve.dispatcher import Dispatcher
    from lowtide.serve.draining import DrainingServer
    from lowtide.serve.job_store import JobStore
    from lowtide.serve.keys import keys_in
    from lowtide.serve.lanes import Lanes
    from lowtide.serve.limits import Limits
    from lowtide.serve.log_lines import LOG, configure
    from lowtide.serve.observer import Observer
    from lowtide.serve.spans import spans_from_environment
    from lowtide.serve.worker_handle import own_bytes

    models: dict[str, str] = settings["models"]
    for model in models.values():  # one that is not there is refused at once, and not when torch is imported
        read_model_index(configurations(model, NOTHING).fetch([MODEL_INDEX]))
    keys = () if operation.api_key_file is None else keys_in(operation.api_key_file)
    configure(as_json=operation.log is LogForm.JSON, level=operation.log_level.value)
    observer = Observer(spans_from_environment())
    store = JobStore(operation.data)
    settings |= {"beside": own_bytes(), "notes": str(store.notes)}
    dispatcher = Dispatcher(
        store, Lanes(settings, operation.at_once), list(models), Limits(together=operation.batch), observer
    )
    listening = _listening(operation.host, operation.port)
    where = f"http://{operation.host}:{listening.getsockname()[1]}"
    said = f"lowtide serve: {where} · {', '.join(models)} · jobs in {operation.data.resolve()}"
    if operation.log is LogForm.JSON:
        LOG.info(said)
    else:
        tell(said)
    app = make_app(dispatcher, keys, operation.retention)
    server = DrainingServer(uvicorn.Config(app, log_config=None, access_log=False), dispatcher, operation.drain_seconds)
    dispatcher.on_refusal = lambda: setattr(server, "should_exit", True)
    for number in (signal.SIGTERM, signal.SIGINT):  # raised once more when all has ended
        signal.signal(number, lambda *_: None)
    server.run(sockets=[listening])
    store.close()
    if dispatcher.worker.refusal is not None:
        raise InputError(dispatcher.worker.refusal)


def _listening(host: str, port: int) -> socket.socket:
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def _named(models: list[str], folder: Path | None) -> dict[str, str]:
    """Each model by the name that requests use."""
    if not models and folder is None:
        return {SHIPPED_MODEL: str(shipped_model())}
    named: dict[str, str] = {}
    for given in models:
        name, separator, model = given.partition("=")
        if not separator:
            name, model = Path(given).name, given
        _add(named, name, model)
    if folder is not None:
        from lowtide.serve.model_folders import models_in

        for name, model in models_in(folder).items():
            _add(named, name, model)
    return named


def _add(named: dict[str, str], name: str, model: str) -> None:
    if name in named:
        raise InputError(f"Two models are called {name}: name them, as in one={named[name]} two={model}.")
    named[name] = model


def _retention(days: float | None, size: str | None) -> Retention:
    try:
        from lowtide.serve.retention import DAY, Retention

        return Retention(None if days is None else days * DAY, None if size is None else parse_bytes(size))
    except ImportError as error:
        raise InputError(f"{_EXTRA} ({error})") from error
    except ValueError as error:
        raise InputError(f"--keep-bytes {size}: {error}") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
