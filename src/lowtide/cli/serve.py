"""`lowtide serve`: pictures and clips over HTTP, within a budget."""

from __future__ import annotations

import ipaddress
import signal
import socket
from pathlib import Path
from typing import Annotated, Any

import typer

from lowtide.cli.budget_options import Budget
from lowtide.cli.errors import InputError, in_one_line, tell
from lowtide.cli.request import SHIPPED_MODEL, DType, shipped_model

_EXTRA = "Serving needs packages that are not installed: pip install 'lowtide[serve]'"


def serve(
    models: Annotated[
        list[str] | None, typer.Argument(help="Folders or Hub ids of models, or NAME=MODEL. The shipped one otherwise.")
    ] = None,
    vram: Annotated[str | None, typer.Option(help="The most memory of the GPU, such as 6GB.")] = None,
    ram: Annotated[str | None, typer.Option(help="The most memory of both processes together, such as 4GB.")] = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file of keys, one a line; needed beyond this machine.")
    ] = None,
    data: Annotated[Path, typer.Option(help="The folder in which jobs and results are kept.")] = Path("lowtide-data"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, xpu or mps.")] = "auto",
    dtype: Annotated[DType, typer.Option(help="In which to compute; auto is as in lowtide generate.")] = DType.AUTO,
    at_once: Annotated[int, typer.Option(min=1, max=64, help="Jobs that may run together where they fit.")] = 1,
) -> None:
    """Make pictures and clips for whoever asks over HTTP, within a budget."""
    Budget(vram, ram)  # raises for text that means no size
    if api_key_file is None and not _is_loopback(host):
        raise InputError(
            f"--host {host}: whoever reaches this machine could use it. Give --api-key-file FILE, or 127.0.0.1."
        )
    with in_one_line("serve"):
        settings = {"models": _named(models or []), "vram": vram, "ram": ram, "device": device, "dtype": dtype.value}
        _serve(settings, host, port, api_key_file, data, at_once)


def _serve(settings: dict[str, Any], host: str, port: int, api_key_file: Path | None, data: Path, at_once: int) -> None:
    try:
        import uvicorn

        from lowtide.serve.application import make_app
    except ImportError as error:
        raise InputError(f"{_EXTRA} ({error})") from error
    from lowtide.hub import Source
    from lowtide.loading.model_index import MODEL_INDEX, read_model_index
    from lowtide.serve.dispatcher import Dispatcher
    from lowtide.serve.job_store import JobStore
    from lowtide.serve.keys import keys_in
    from lowtide.serve.lanes import Lanes
    from lowtide.serve.limits import Limits
    from lowtide.serve.worker_handle import own_bytes

    models: dict[str, str] = settings["models"]
    for model in models.values():  # one that is not there is refused at once, and not when torch is imported
        read_model_index(Source(model).fetch([MODEL_INDEX]))
    keys = () if api_key_file is None else keys_in(api_key_file)
    store = JobStore(data)
    settings |= {"beside": own_bytes(), "notes": str(store.notes)}
    dispatcher = Dispatcher(store, Lanes(settings, at_once), list(models), Limits())
    listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    tell(f"lowtide serve: http://{host}:{listening.getsockname()[1]} · {', '.join(models)} · jobs in {data.resolve()}")
    config = uvicorn.Config(make_app(dispatcher, keys), log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    dispatcher.on_refusal = lambda: setattr(server, "should_exit", True)
    for number in (signal.SIGTERM, signal.SIGINT):  # raised once more when all has ended
        signal.signal(number, lambda *_: None)
    server.run(sockets=[listening])
    if dispatcher.worker.refusal is not None:
        raise InputError(dispatcher.worker.refusal)


def _named(models: list[str]) -> dict[str, str]:
    """Each model by the name that requests use."""
    if not models:
        return {SHIPPED_MODEL: str(shipped_model())}
    named: dict[str, str] = {}
    for given in models:
        name, separator, model = given.partition("=")
        if not separator:
            name, model = Path(given).name, given
        if name in named:
            raise InputError(f"Two models are called {name}: name them, as in one={named[name]} two={model}.")
        named[name] = model
    return named


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
