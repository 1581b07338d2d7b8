"""Serves the page at / from the files in the package."""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter, Response

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Images and videos are fetched with the key and shown from memory, hence blob:.
_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)


def page_files() -> dict[str, tuple[bytes, str]]:
    """Return content and type of the page's files by their path on the server."""
    folder = resources.files("shardit.server") / "page"
    files: dict[str, tuple[bytes, str]] = {}
    if not folder.is_dir():
        return files
    for entry in folder.iterdir():
        suffix = "." + entry.name.rpartition(".")[2]
        if suffix in _TYPES:
            path = "/" if entry.name == "index.html" else f"/{entry.name}"
            files[path] = entry.read_bytes(), _TYPES[suffix]
    return files


def page_routes(files: dict[str, tuple[bytes, str]]) -> APIRouter:
    """Return one route for each file."""
    router = APIRouter()
    for path, (content, kind) in files.items():
        router.add_api_route(path, _serving(content, kind), methods=["GET"], include_in_schema=False)
    return router


def _serving(content: bytes, kind: str):  # the type of the route function is FastAPI's business
    async def file() -> Response:
        headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
        return Response(content, media_type=kind, headers=headers)

    return file
