"""What the sandbox provider answers: text and token counts that follow from the request alone.

The rules, for both wires:

- A token is four characters, rounded up, of the prompt (system text, then every message, then
  tool definitions, joined by newlines) and of the answer; an image adds 1,000 tokens, a file 2,000.
- An answer is whole sentences of 40 to 120 tokens, chosen by the SHA-256 of the prompt. A request
  for a JSON schema gets JSON that fits it; a forced tool gets a call with fitting arguments.
- Lines of the system text or the last user message (a tool's result is one) steer it; the last
  such line wins:
  `ECHO: xyz` answers exactly xyz; `TOKENS: n` makes the output n tokens; `REASONING: n` puts n
  reasoning tokens into the output; `CACHED: n`, `CACHE_WRITE: n`, `CACHE_WRITE_1H: n` (Anthropic
  only) declare prompt tokens as such; `INPUT: n` replaces the count of prompt tokens;
  `TOOL: name` calls a tool of the request, `TOOL: one, another` several at once where the request
  allows it.
- Above the request's token limit the answer is cut, reasoning counting first.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal

import orjson

from sluicegate.workers.local.sandbox_prices import Usage, WireName

CHARS_PER_TOKEN = 4
TOKENS_PER_IMAGE = 1_000
TOKENS_PER_FILE = 2_000
#: The most that `TOKENS:` and its like can ask for.
MAX_DIRECTIVE_TOKENS = 2_000_000
MAX_ANSWER_TOKENS = 200_000
#: How many values an answer to a JSON schema holds at most; a reference to itself ends in null.
MAX_SCHEMA_VALUES = 200

Stop = Literal["end", "length", "tool", "filter", "refusal", "sequence"]

_DIRECTIVE = re.compile(
    r"(?m)^(ECHO|TOKENS|REASONING|CACHED|CACHE_WRITE_1H|CACHE_WRITE|INPUT|TOOL): ?(.*?)\r?$",
    re.MULTILINE,
)

_WHO = (
    "The account team", "Their operations lead", "The buyer", "Our champion there",
    "Finance", "The support desk", "The new director", "The regional manager",
)  # fmt: skip
_DID = (
    "confirmed", "asked us to revisit", "wants to move ahead with", "raised a concern about",
    "agreed on", "is still waiting for", "postponed", "signed off on",
)  # fmt: skip
_WHAT = (
    "the renewal terms", "the onboarding plan", "the revised quote", "the security review",
    "the seat count", "the pilot results", "the service credits", "the data migration",
)  # fmt: skip
_WHEN = (
    "before the quarter ends", "on the last call", "by Tuesday", "after the demo",
    "once legal has replied", "for the spring rollout", "in a short email", "for both sites",
)  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Ask:
    """One request, read from either wire."""

    wire: WireName
    model: str
    stream: bool
    include_usage: bool
    max_tokens: int | None
    stop: tuple[str, ...]
    system: str
    last_user: str
    prompt: str
    images: int
    files: int
    tools: dict[str, Any] = field(default_factory=dict)
    forced_tool: str | None = None
    #: `tool_choice` forbids calls.
    no_tools: bool = False
    parallel: bool = True
    json_schema: dict[str, Any] | None = None

    def digest(self) -> bytes:
        """Return the SHA-256 of the prompt's text."""
        return sha256(self.prompt.encode("utf-8", "surrogatepass")).digest()


@dataclass(slots=True, kw_only=True)
class Answer:
    """The whole answer: text, or the arguments of a tool call as JSON text."""

    text: str
    stop: Stop
    usage: Usage
    tool: str | None = None
    #: Further calls besides that one: each tool and its arguments as JSON text.
    more_tools: tuple[tuple[str, str], ...] = ()
    stop_sequence: str | None = None

    def pieces(self) -> list[str]:
        """Return the text in pieces of one token."""
        text = self.text
        return [text[i : i + CHARS_PER_TOKEN] for i in range(0, len(text), CHARS_PER_TOKEN)]


def json_string(text: str) -> bytes:
    """Return text as a JSON string; NUL and lone surrogates come out as escapes."""
    try:
        return orjson.dumps(text)
    except orjson.JSONEncodeError:  # a lone surrogate, which UTF-8 cannot carry
        return json.dumps(text).encode()


def count_tokens(text: str) -> int:
    """Count the tokens of a text: four characters each, rounded up."""
    return -(-len(text) // CHARS_PER_TOKEN)


def answer(ask: Ask, digest: bytes, *, text: str | None = None) -> Answer:
    """Answer a request; `text` replaces the answer's text, all else follows from the request."""
    lines = dict(_DIRECTIVE.findall(f"{ask.system}\n{ask.last_user}"))
    reasoning = _number(lines, "REASONING") or 0
    tool: str | None = None
    more: tuple[tuple[str, str], ...] = ()
    stop: Stop = "end"
    stop_sequence: str | None = None

    if text is None:
        named = _named_tools(ask, lines)
        tool = ask.forced_tool or next(iter(named), None)
        if tool is not None:
            text, stop = _json(_fit(ask.tools[tool])), "tool"
            more = tuple((name, _json(_fit(ask.tools[name]))) for name in named[1:])
        elif "ECHO" in lines:
            text = lines["ECHO"]
        elif ask.json_schema is not None:
            text = _json(_fit(ask.json_schema))
        else:
            wanted = _number(lines, "TOKENS")
            text = prose(digest, tokens=None if wanted is None else max(0, wanted - reasoning))
    for sequence in ask.stop:
        if sequence and tool is None and sequence in text:
            text, stop, stop_sequence = text[: text.index(sequence)], "sequence", sequence

    if ask.max_tokens is not None and reasoning + count_tokens(text) > ask.max_tokens:
        reasoning = min(reasoning, ask.max_tokens)
        text = text[: (ask.max_tokens - reasoning) * CHARS_PER_TOKEN]
        stop, stop_sequence, more = "length", None, ()
    written = text + "".join(arguments for _, arguments in more)
    usage = _usage(ask, lines, output=reasoning + count_tokens(written), reasoning=reasoning)
    return Answer(
        text=text,
        stop=stop,
        usage=usage,
        tool=tool,
        more_tools=more,
        stop_sequence=stop_sequence,
    )


def prose(digest: bytes, *, tokens: int | None = None) -> str:
    """Write sentences chosen by the digest: 40 to 120 tokens of them, or exactly `tokens`."""
    state = int.from_bytes(digest[:8], "big")
    wanted = 63 + state % 58 if tokens is None else min(tokens, MAX_ANSWER_TOKENS)
    limit = wanted * CHARS_PER_TOKEN
    sentences: list[str] = []
    length = -1
    while True:
        # Knuth's 64-bit linear congruential generator; its high bits are the good ones.
        state = (state * 6364136223846793005 + 1442695040888963407) & 0xFFFFFFFFFFFFFFFF
        sentence = _SENTENCES[state >> 52]
        if tokens is None and length + 1 + len(sentence) > limit:
            return " ".join(sentences)
        sentences.append(sentence)
        length += 1 + len(sentence)
        if tokens is not None and length >= limit:
            text = " ".join(sentences)[:limit]
            return f"{text[:-1]}." if text else ""


def _sentences() -> tuple[str, ...]:
    return tuple(
        f"{who} {did} {what} {when}."
        for who in _WHO
        for did in _DID
        for what in _WHAT
        for when in _WHEN
    )


#: 4,096 sentences of at most 91 characters (23 tokens), so that 12 bits choose one.
_SENTENCES = _sentences()


def _usage(ask: Ask, lines: dict[str, str], *, output: int, reasoning: int) -> Usage:
    total = _number(lines, "INPUT")
    if total is None:
        total = count_tokens(ask.prompt)
        total += ask.images * TOKENS_PER_IMAGE + ask.files * TOKENS_PER_FILE
    left = total = max(1, total)
    read = min(_number(lines, "CACHED") or 0, left)
    left -= read
    write_5m = min(_number(lines, "CACHE_WRITE") or 0, left)
    left -= write_5m
    write_1h = min(_number(lines, "CACHE_WRITE_1H") or 0, left) if ask.wire == "anthropic" else 0
    return Usage(
        input=left - write_1h,
        cache_read=read,
        cache_write_5m=write_5m,
        cache_write_1h=write_1h,
        output=output,
        reasoning=reasoning,
    )


def _number(lines: dict[str, str], name: str) -> int | None:
    value = lines.get(name, "").strip()
    # A line that only looks like a directive is prose, and prose is no error.
    if not (value.isascii() and value.isdigit() and len(value) <= 9):
        return None
    return min(int(value), MAX_DIRECTIVE_TOKENS)


def _named_tools(ask: Ask, lines: dict[str, str]) -> list[str]:
    if ask.no_tools:
        return []
    named = [name.strip() for name in lines.get("TOOL", "").split(",")]
    known = [name for name in named if name in ask.tools]
    return known if ask.parallel and ask.forced_tool is None else known[:1]


def _json(value: object) -> str:
    return orjson.dumps(value).decode()


def _fit(schema: dict[str, Any]) -> object:
    return _Fitting(root=schema).value(schema)


@dataclass(slots=True, kw_only=True)
class _Fitting:
    """Builds the simplest value that fits a JSON schema, as far as the common keywords go."""

    root: dict[str, Any]
    #: What is left of the values it may make: a schema can refer to itself.
    left: int = MAX_SCHEMA_VALUES

    def value(self, schema: object) -> object:
        """Return a value that fits this part of the schema; null where it cannot tell."""
        self.left -= 1
        if isinstance(schema, dict) and isinstance(schema.get("$ref"), str):
            schema = self._resolve(schema["$ref"])
        if not isinstance(schema, dict) or self.left < 0:
            return None
        if "const" in schema:
            return schema["const"]
        for choice in ("enum", "anyOf", "oneOf", "allOf"):
            if isinstance(schema.get(choice), list) and schema[choice]:
                first = schema[choice][0]
                return first if choice == "enum" else self.value(first)
        return self._of_type(schema)

    def _of_type(self, schema: dict[str, Any]) -> object:
        kind = schema.get("type")
        kind = kind[0] if isinstance(kind, list) and kind else kind
        properties = schema.get("properties")
        if kind == "object" or isinstance(properties, dict):
            parts = properties if isinstance(properties, dict) else {}
            return {str(name): self.value(part) for name, part in parts.items()}
        if kind == "array":
            count = schema.get("minItems", 1)
            count = min(count, 100) if isinstance(count, int) else 1
            return [self.value(schema.get("items")) for _ in range(count) if self.left > 0]
        number = schema.get("minimum", 1)
        plain = {"string": "confirmed", "boolean": True, "integer": number, "number": number}
        return plain.get(kind) if isinstance(kind, str) else None

    def _resolve(self, reference: str) -> object:
        """Follow a reference inside the schema itself, such as `#/$defs/Note`."""
        found: object = self.root
        for name in reference.removeprefix("#/").split("/"):
            found = found.get(name) if isinstance(found, dict) else None
        return found
