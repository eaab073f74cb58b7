"""GET /docs: the OpenAPI document as a page to read, whole in itself, so that it works without network.

No viewer from elsewhere: the usual ones are two to four megabytes of script, from another host or to be kept up to
date here (ARCHITECTURE.md, Decisions). This page is readable without any script, and what a viewer's "try it" is for,
the page at / and commands that run as they stand do better with images. Any viewer reads /openapi.json.
"""

import json
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from fastapi import APIRouter, Request, Response

from service.page import Page, static

Json = dict[str, Any]

router = APIRouter(include_in_schema=False)


@router.api_route("/docs", methods=["GET", "HEAD"])
async def docs(request: Request) -> Response:
    """The reference, made of the document that the app has, once."""
    state = request.app.state
    if not hasattr(state, "reference"):
        template = static("reference.html").replace("{{reference}}", reference(request.app.openapi()))
        state.reference = Page(template, static("page.css", "reference.css"), static("shared.js", "reference.js"))
    page: Page = state.reference
    return page.response()


def reference(document: Json) -> str:
    """The document as HTML; everything in it is escaped."""
    operations = [(p, method, what) for p, methods in document["paths"].items() for method, what in methods.items()]
    contents = [
        f'<li><a href="#{what["operationId"]}"><b>{method.upper()}</b> {path}</a> {escape(what["summary"])}</li>'
        for path, method, what in operations
    ]
    return "\n".join(
        (
            f'<section class="block"><h2>{escape(document["info"]["title"])}</h2>',
            _paragraphs(document["info"]["description"]),
            f'<nav aria-label="Operations"><ul class="contents">{"".join(contents)}</ul></nav></section>',
            *(_operation(*operation) for operation in operations),
            '<section class="block" id="schemas"><h2>Schemas</h2>',
            *(_schema(name, schema) for name, schema in document["components"]["schemas"].items()),
            "</section>",
        )
    )


def _operation(path: str, method: str, what: Json) -> str:
    name = what["operationId"]
    parts = [
        f'<section class="block" id="{name}" aria-labelledby="{name}-title">',
        f'<h2 id="{name}-title"><span class="method">{method.upper()}</span> {escape(path)}</h2>',
        _paragraphs(what["description"]),
    ]
    if samples := what.get("x-codeSamples"):
        parts.append("<h3>As commands</h3>")
        parts += [
            f'<h4>{escape(sample["label"])}</h4><div class="command"><code>{escape(sample["source"])}</code></div>'
            for sample in samples
        ]
    if options := what.get("parameters"):
        rows = [
            [f"{_code(option['name'])} ({option['in']})", _type(option["schema"]), _inline(option["description"])]
            for option in options
        ]
        parts += ["<h3>Options</h3>", _table(["Option", "Type", "Meaning"], rows)]
    if "requestBody" in what:
        bodies = what["requestBody"]["content"]
        rows = [[_code(media_type), _type(body["schema"])] for media_type, body in bodies.items()]
        parts += ["<h3>Bodies</h3>", _table(["Content type", "Body"], rows), *_examples(bodies)]
    rows = [[f"<b>{status}</b>", _answer(response)] for status, response in what["responses"].items()]
    parts += ["<h3>Answers</h3>", _table(["Status", "When, and what comes with it"], rows)]
    for status, response in what["responses"].items():
        if int(status) < 400:  # the errors' are all alike: their codes are in the table
            parts += _examples(response["content"])
    return "".join((*parts, "</section>"))


def _answer(response: Json) -> str:
    """A response in a few words: when, as what types, with which error codes and headers."""
    contents = response["content"]
    types = ", ".join(f"{_code(media_type)} {_type(content['schema'])}" for media_type, content in contents.items())
    examples = [item for content in contents.values() for item in content.get("examples", {}).items()]
    codes = [_code(name) for name, example in examples if [*example["value"]] == ["error"]]
    headers = [_code(name) for name in response.get("headers", {})]
    lines = [_inline(response["description"]), types]
    lines += [f"Codes: {', '.join(codes)}"] if codes else []
    lines += [f"Headers: {', '.join(headers)}"] if headers else []
    return "<br>".join((lines[0], *(f'<span class="muted">{line}</span>' for line in lines[1:])))


def _examples(contents: Json) -> list[str]:
    """Each example that is there in full, folded."""
    found = []
    for media_type, content in contents.items():
        for name, example in content.get("examples", {}).items():
            if "value" in example:
                value = example["value"]
                text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
                summary = f"{_code(media_type)} {escape(name)}"
                found.append(f'<details><summary>{summary}</summary><pre tabindex="0">{escape(text)}</pre></details>')
    return found


def _schema(name: str, schema: Json) -> str:
    required = schema.get("required", [])
    rows = [
        [_code(field) + ("" if field in required else " (optional)"), _type(what), _inline(what.get("description", ""))]
        for field, what in schema.get("properties", {}).items()
    ]
    heading = f'<h3 id="schema-{escape(name)}">{escape(name)}</h3>'
    return heading + _paragraphs(schema.get("description", "")) + _table(["Field", "Type", "Meaning"], rows)


def _type(schema: Json) -> str:
    """A schema in a few words, with links to the named ones."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[1])
        return f'<a href="#schema-{name}">{name}</a>'
    for several in ("oneOf", "anyOf"):
        if several in schema:
            return ", or ".join(_type(each) for each in schema[several])
    if "enum" in schema:
        return ", ".join(_code(json.dumps(value)) for value in schema["enum"])
    if "const" in schema:
        return _code(json.dumps(schema["const"]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if schema.get("type") == "object" and "properties" in schema:
        fields = schema["properties"].items()
        return "; ".join(
            f"{_code(field)}: {_inline(what.get('description', '')) or _type(what)}" for field, what in fields
        )
    words = ["bytes of an image" if schema.get("format") == "binary" else schema.get("type", "anything")]
    bounds = {"minimum": "at least", "maximum": "at most", "default": "default"}
    words += [f"{word} {schema[key]}" for key, word in bounds.items() if key in schema]
    return escape(", ".join(words))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{_inline(paragraph)}</p>" for paragraph in text.split("\n\n") if paragraph)


def _inline(text: str) -> str:
    """Escaped, with `code` as such."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"
