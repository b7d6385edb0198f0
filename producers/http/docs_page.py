"""The OpenAPI document as a page: no script, and nothing from anywhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, Final

import orjson

from sluicegate.producers.http.routes import SSE

_STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #8886 }
details { border: 1px solid #8886; border-radius: 6px; margin: .5rem 0; padding: .4rem .8rem }
summary { cursor: pointer } summary code { font-weight: 600 }
pre { overflow: auto; background: #8881; padding: .6rem; border-radius: 6px; font-size: 13px }
table { border-collapse: collapse } td { padding: .15rem .8rem .15rem 0; vertical-align: top }
@media (prefers-color-scheme: dark) { body { background: #111; color: #ddd } a { color: #8af } }
"""


def page(document: Mapping[str, Any]) -> str:
    """Return the page."""
    return "".join(_page(document))


def _page(document: Mapping[str, Any]) -> Iterator[str]:
    info = document["info"]
    title = f"{info['title']} {info['version']}"
    yield "<!doctype html><html lang=en><meta charset=utf-8>"
    yield "<meta name=viewport content='width=device-width'>"
    yield f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    yield f"<h1>{escape(title)}</h1><p>{escape(info['description'])}</p>"
    yield "<p>For programs: <a href='/openapi.json'>/openapi.json</a></p>"
    by_tag: dict[str, list[tuple[str, str, Mapping[str, Any]]]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            by_tag.setdefault(operation["tags"][0], []).append((method.upper(), path, operation))
    for tag, operations in by_tag.items():
        yield f"<h2>{escape(tag)}</h2>"
        for method, path, operation in operations:
            yield from _operation(method, path, operation)
    yield "<h2>Shapes</h2>"
    for name, schema in document["components"]["schemas"].items():
        yield f"<details id='{escape(name)}'><summary><code>{escape(name)}</code>"
        yield f" {escape(schema.get('description', ''))}</summary>{_json(schema)}</details>"


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"<details><summary><code>{method} {escape(path)}</code>"
    yield f" {escape(operation['summary'])}</summary>"
    if description := operation.get("description"):
        yield f"<p>{escape(description)}</p>"
    yield f"<p>Role: {escape(operation.get('x-role', 'anyone'))}</p><table>"
    for one in operation.get("parameters", ()):
        described = one.get("description") or one["schema"].get("description", "")
        yield f"<tr><td><code>{escape(one['name'])}</code><td>{one['in']}<td>{escape(described)}"
    yield "</table>"
    body = operation.get("requestBody")
    if body is not None:
        for media, content in body["content"].items():
            yield f"<p>Body, {escape(media)}: {_shape(content['schema'])}</p>"
    yield "<table>"
    for status, answer in operation["responses"].items():
        yield f"<tr><td><code>{status}</code><td>{escape(answer['description'])}"
        yield f"<td>{escape(', '.join(answer.get('content', {})))}<td>"
        for media, content in answer.get("content", {}).items():
            schema = content["schema"]
            if media == SSE:
                data = schema["properties"]["data"]
                schema = data.get("contentSchema", data)
            yield _shape(schema)
    yield "</table></details>"


def _shape(schema: Mapping[str, Any]) -> str:
    name = str(schema.get("$ref", "")).rpartition("/")[2]
    if name:
        return f"<a href='#{escape(name)}'>{escape(name)}</a> "
    return "" if schema == {"type": "string"} else _json(schema)


def _json(value: object) -> str:
    return f"<pre>{escape(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())}</pre>"
