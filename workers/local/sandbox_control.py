"""A client for the sandbox provider's control endpoints: standard library only, synchronous.

sandbox.add_fault("http_429", retry_after_s=2, times=1)     # once, then fine
sandbox.add_fault("cut_stream", fraction=0.67, every_nth=3)
sandbox.add_fault("missing_terminal", then="hold", usage=False)
rule = sandbox.down("gpt-6-luna")                           # and up again:
sandbox.remove_fault(rule)
sandbox.limit("gpt-6-luna", requests_per_minute=600, tokens_per_minute=100_000)
"""

from __future__ import annotations

import http.client
import json
import time
from typing import Any, cast
from urllib.parse import urlencode, urlsplit

PAGE_CALLS = 5_000
POLL_S = 0.02


class SandboxControlError(Exception):
    """The sandbox refused a control request, or could not be reached."""


class SandboxControl:
    """Reads the books of a sandbox and sets its pace, faults and limits.

    `url` is where the sandbox listens, such as `http://127.0.0.1:4100`. Every method makes one
    short connection, so an object may be shared by threads. Raises SandboxControlError.
    """

    def __init__(self, url: str, *, timeout_s: float = 10) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None or parts.port is None:
            raise ValueError(f"url: {url!r} must look like http://127.0.0.1:4100")
        self._host = parts.hostname
        self._port = parts.port
        self._timeout_s = timeout_s

    @property
    def openai_base_url(self) -> str:
        """What the OpenAI SDK takes as `base_url`."""
        return f"{self.anthropic_base_url}/v1"

    @property
    def anthropic_base_url(self) -> str:
        """What the Anthropic SDK takes as `base_url`."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}"

    def health(self) -> dict[str, Any]:
        """Return `ok`, `pid` and `up_s`."""
        return self._object("GET", "/sandbox/health")

    def calls(self, *, after: int = 0) -> list[dict[str, Any]]:
        """Return every call still kept with a `seq` above `after`, running ones too."""
        found: list[dict[str, Any]] = []
        while True:
            query = urlencode({"after": after, "limit": PAGE_CALLS})
            page = cast("list[dict[str, Any]]", self._send("GET", f"/sandbox/calls?{query}"))
            found += page
            if len(page) < PAGE_CALLS:
                return found
            after = page[-1]["seq"]

    def bill(self) -> dict[str, Any]:
        """Return the totals.

        `calls`, `in_flight`, `billed_calls`, `billed_nano_usd`, `limited_calls` (answered 429 by a
        limit), `by_model`, and `limits` as `limits()` has it.
        """
        return self._object("GET", "/sandbox/bill")

    def reset(self) -> None:
        """Forget all calls, counts and fault rules; settings and limits stay."""
        self.clear_faults()
        self._send("DELETE", "/sandbox/calls")

    def settings(self, **changes: object) -> dict[str, Any]:
        """Change the settings named, such as `latency_ms=0`, and return all of them."""
        if changes:
            return self._object("PUT", "/sandbox/settings", changes)
        return self._object("GET", "/sandbox/settings")

    def add_fault(
        self,
        fault: str,
        *,
        model: str | None = None,
        wire: str | None = None,
        prompt_contains: str | None = None,
        times: int | None = None,
        every_nth: int = 1,
        **args: object,
    ) -> int:
        """Arm a fault and return the rule's id; `args` are the fields of `FaultArgs`.

        `text=` is taken for `answer_text` and may hold NUL and lone surrogates.
        """
        if "text" in args:
            args["text_json"] = json.dumps(args.pop("text"))[1:-1]
        rule = {
            "fault": fault,
            "model": model,
            "wire": wire,
            "prompt_contains": prompt_contains,
            "times": times,
            "every_nth": every_nth,
            "args": args,
        }
        return int(self._object("POST", "/sandbox/faults", rule)["id"])

    def down(self, model: str | None = None, fault: str = "http_503") -> int:
        """Refuse every call for a model, or for all, until `remove_fault` of the rule's id.

        `fault` may also be `reset_before_headers`, or `hang`. Answers under way go on.
        """
        return self.add_fault(fault, model=model)

    def faults(self) -> list[dict[str, Any]]:
        """Return the rules, each with how many calls it `matched` and hit (`fired`)."""
        return list(self._object("GET", "/sandbox/faults")["faults"])

    def remove_fault(self, rule_id: int) -> None:
        """Disarm one rule."""
        self._send("DELETE", f"/sandbox/faults?id={rule_id}")

    def clear_faults(self) -> None:
        """Disarm every rule."""
        self._send("DELETE", "/sandbox/faults")

    def limit(self, model: str | None = None, **limits: float | None) -> dict[str, Any]:
        """Set all limits of a model, or of every model without its own, and return its counts.

        `limits` are the fields of `Limits`, such as `requests_per_minute=600`; one that is not
        named is lifted, and its use still counted.
        """
        shown = self._object("PUT", "/sandbox/limits", {"model": model} | limits)["limits"]
        return next(one for one in shown if one["limits"]["model"] == model)

    def limits(self) -> list[dict[str, Any]]:
        """Return limits and counts of each model with limits, and of all others (`model` null).

        Each has `limits`; `total` and `peak`, what was let in and the most of it within any
        minute, by `requests`, `tokens`, `input_tokens`, `output_tokens` (and `concurrent` in
        `peak`); `concurrent` now; and `refused`, how many calls were answered 429, by what was
        short.
        """
        return list(self._object("GET", "/sandbox/limits")["limits"])

    def clear_limits(self) -> None:
        """Lift every limit, and forget the counts."""
        self._send("DELETE", "/sandbox/limits")

    def wait_for_calls(
        self, count: int, timeout_s: float, *, finished: bool = False
    ) -> dict[str, Any]:
        """Wait until `count` calls have arrived, or have `finished`; return the bill then.

        Raises TimeoutError.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            bill = self.bill()
            seen = bill["calls"] - (bill["in_flight"] if finished else 0)
            if seen >= count:
                return bill
            if time.monotonic() >= deadline:
                what = "finished" if finished else "arrived"
                raise TimeoutError(f"{seen} of {count} calls have {what} after {timeout_s} s")
            time.sleep(POLL_S)

    def _object(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        return cast("dict[str, Any]", self._send(method, path, body))

    def _send(self, method: str, path: str, body: object = None) -> object:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        try:
            connection.request(
                method,
                path,
                body=None if body is None else json.dumps(body).encode(),
                headers={"content-type": "application/json", "connection": "close"},
            )
            response = connection.getresponse()
            answered: object = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            where = f"{self._host}:{self._port}"
            raise SandboxControlError(f"the sandbox at {where} did not answer: {error}") from error
        finally:
            connection.close()
        if response.status != 200:
            raise SandboxControlError(
                f"{method} {path}: {cast('dict[str, Any]', answered)['error']}"
            )
        return answered
