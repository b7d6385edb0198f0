"""Tables: words stay whole, and what finds no room goes beneath the first cell."""

from __future__ import annotations

from sluicegate.shared.terminal import fit

ID = "0192f0c1-7a2b-7cc3-9d4e-5f6071829304"
HEAD = ("job", "state", "queue", "error")
ROWS = [
    (ID, "failed", "draft.anthropic", "the model would not say, and all 5 attempts are used"),
    (ID, "succeeded", "draft.anthropic", ""),
]


def test_what_has_room_stays() -> None:
    # Of the error only its least width is asked for: it is broken between words.
    assert fit(HEAD, ROWS, 93) == (list(HEAD), [list(row) for row in ROWS])


def test_what_has_no_room_goes_beneath_by_its_name() -> None:
    head, (failed, succeeded) = fit(HEAD, ROWS, 92)
    assert head == ["job", "state", "queue"]
    assert failed == [f"{ID}\nerror {ROWS[0][3]}", "failed", "draft.anthropic"]
    assert succeeded == [ID, "succeeded", "draft.anthropic"]


def test_the_first_column_stays_however_little_room_there_is() -> None:
    head, (_, succeeded) = fit(HEAD, ROWS, 1)
    assert head == ["job"]
    assert succeeded == [f"{ID}\nstate succeeded, queue draft.anthropic"]


def test_empty_columns_are_left_out() -> None:
    assert fit(HEAD, ROWS[1:], 200)[0] == ["job", "state", "queue"]
    assert fit(HEAD, [], 200)[0] == list(HEAD)
