"""The page for people: files of the package, which ask for nothing from elsewhere."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

from lowtide.serve.problems import ProblemError

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:; "
    "media-src blob:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
TYPES = {".css": "text/css", ".js": "text/javascript"}


def router() -> APIRouter:
    """The routes of the page; no key is asked for."""
    routes = APIRouter(include_in_schema=False)
    folder = Path(str(resources.files("lowtide"))) / "serve" / "page"
    parts = {file.name: TYPES[file.suffix] for file in folder.iterdir() if file.suffix in TYPES}

    @routes.get("/")
    async def page() -> FileResponse:
        """The page."""
        return FileResponse(folder / "index.html", media_type="text/html", headers={"Content-Security-Policy": POLICY})

    @routes.get("/page/{name}")
    async def part(name: str) -> FileResponse:
        """Its style and its scripts."""
        if name not in parts:
            raise ProblemError(404, f"The page has no {name!r}.")
        return FileResponse(folder / name, media_type=parts[name])

    return routes
