"""What was looked up lately: one look for all who ask at once, for a while, and not too many."""

from __future__ import annotations

import asyncio

import pytest

from sluicegate.producers.http.recent import Recent


class Book:
    """What is looked things up in; it counts."""

    def __init__(self) -> None:
        self.looks: list[str] = []
        self.now_s = 0.0
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self.error: Exception | None = None
        self.gone: set[str] = set()

    async def look(self, key: str) -> str | None:
        self.looks.append(key)
        await self.goes_on.wait()
        if self.error is not None:
            raise self.error
        return None if key == "nothing" or key in self.gone else key.upper()

    def recent(self, **options: float) -> Recent[str, str]:
        return Recent(self.look, ttl_s=2.0, clock=lambda: self.now_s, **options)  # type: ignore[arg-type]


async def test_all_who_ask_at_once_share_a_look() -> None:
    book = Book()
    recent = book.recent()
    assert await asyncio.gather(*(recent.get("a") for _ in range(50))) == ["A"] * 50
    assert book.looks == ["a"]
    book.now_s = 1.9
    assert await recent.get("a") == "A"
    assert book.looks == ["a"]
    book.now_s = 2.0
    assert await recent.get("a") == "A"
    assert book.looks == ["a", "a"]


async def test_it_is_as_old_as_the_question() -> None:
    book = Book()
    recent = book.recent()
    book.goes_on.clear()
    first = asyncio.create_task(recent.get("a"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    book.now_s = 1.5
    book.goes_on.set()
    await first
    book.now_s = 2.0
    await recent.get("a")
    assert book.looks == ["a", "a"]


async def test_what_is_not_there_and_what_went_wrong_is_not_kept() -> None:
    book = Book()
    recent = book.recent()
    assert [await recent.get("nothing") for _ in range(2)] == [None, None]
    assert len(book.looks) == 2
    book.error = LookupError("no")
    with pytest.raises(LookupError):
        await recent.get("a")
    book.error = None
    assert await recent.get("a") == "A"


async def test_who_goes_away_takes_nothing_from_the_others() -> None:
    book = Book()
    recent = book.recent()
    book.goes_on.clear()
    asked = [asyncio.create_task(recent.get("a")) for _ in range(3)]
    await asyncio.sleep(0)
    asked[0].cancel()
    await asyncio.sleep(0)
    book.goes_on.set()
    assert await asyncio.gather(*asked[1:]) == ["A", "A"]
    assert book.looks == ["a"]


async def test_those_not_asked_for_longest_go() -> None:
    book = Book()
    recent = book.recent(most=2)
    for key in ("a", "b", "a", "c"):
        await recent.get(key)
    book.looks.clear()
    for key in ("a", "c", "b"):
        await recent.get(key)
    assert book.looks == ["b"]


async def test_that_nothing_was_there_is_kept_for_a_moment_if_asked_for() -> None:
    book = Book()
    recent = book.recent(miss_ttl_s=1.0)
    assert [await recent.get("nothing") for _ in range(3)] == [None] * 3
    assert book.looks == ["nothing"]
    book.now_s = 1.0
    assert await recent.get("nothing") is None
    assert len(book.looks) == 2


async def test_misses_are_few_and_push_out_nothing_that_was_found() -> None:
    book = Book()
    book.gone = {"1", "2", "3"}
    recent = book.recent(miss_ttl_s=1.0, most=1, most_misses=2)
    assert await recent.get("a") == "A"
    for key in ("1", "2", "3"):
        assert await recent.get(key) is None
    book.looks.clear()
    for key in ("a", "2", "3", "1"):
        await recent.get(key)
    assert book.looks == ["1"]


async def test_what_was_there_is_known_until_it_is_gone() -> None:
    book = Book()
    recent = book.recent()
    assert "a" not in recent
    await recent.get("a")
    book.now_s = 100.0
    assert "a" in recent
    book.error = LookupError("no")
    with pytest.raises(LookupError):
        await recent.get("a")
    assert "a" in recent
    book.error, book.gone = None, {"a"}
    assert await recent.get("a") is None
    assert "a" not in recent
