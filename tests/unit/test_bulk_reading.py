"""Files of bulk: what is read from them, what is refused, and what a row asks for."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sluicegate.producers import bulk_reading
from sluicegate.producers.bulk import Form, Row, Template
from sluicegate.producers.bulk_formats import FileFormat, format_of
from sluicegate.producers.bulk_reading import MAX_ROW_BYTES, CsvFile, Lines, read_jsonl
from sluicegate.producers.bulk_rows import batch_rows
from sluicegate.producers.submission import Request
from sluicegate.shared.errors import InvalidJob
from sluicegate.shared.jobs import Lane


def lines(content: bytes | str) -> Lines:
    return Lines(io.BytesIO(content.encode() if isinstance(content, str) else content))


def jsonl(content: bytes | str) -> list[Row]:
    return list(read_jsonl(lines(content)))


def table(content: bytes | str) -> list[Row]:
    return list(CsvFile(lines(content)))


def asked(form: Form, values: object) -> tuple[object, Mapping[str, Any]]:
    """Return the prompt and all options of a row, apart from the lane."""
    request: Request = form.request(values)
    assert request.terms.lane is Lane.BULK
    terms = request.terms.model_dump(exclude_unset=True, exclude={"lane"})
    return request.prompt, {**request.fields, **terms}


SUMMARY = Form(use_case="summary", common={})


# Templates

names = st.text(st.characters(exclude_characters="{}", exclude_categories=["Cs"]), min_size=1)
texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(st.tuples(texts, names)), texts, st.data())
def test_a_template_puts_in_what_fields_hold_as_it_is(
    places: list[tuple[str, str]], end: str, data: st.DataObject
) -> None:
    assume(places)
    values = {name: data.draw(texts) for _, name in places}
    assume(any(value.strip() for value in values.values()))

    def escaped(text: str) -> str:
        return text.replace("{", "{{").replace("}", "}}")

    written = "".join(f"{escaped(text)}{{{name}}}" for text, name in places) + escaped(end)
    expected = "".join(text + values[name] for text, name in places) + end
    template = Template(written)
    assert template.fill(values) == expected
    assert set(template.fields) == set(values)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Summarise.", "names no field"),
        ("{{note}}", "names no field"),
        ("a {note", "single '{' at character 3"),
        ("a } {note}", "single '}' at character 3"),
        ("{} {note}", "single '{' at character 1"),
    ],
)
def test_a_template_that_cannot_be_read_says_where(text: str, problem: str) -> None:
    with pytest.raises(InvalidJob, match=problem) as refused:
        Template(text)
    assert refused.value.field == "template"


@pytest.mark.parametrize("text", ["{note.text}", "{note!r}", "{note:>9}", "{note[0]}"])
def test_a_place_is_a_name_and_nothing_else(text: str) -> None:
    with pytest.raises(InvalidJob, match="is missing"):
        Template(text).fill({"note": "x"})
    assert Template(text).fill({text[1:-1]: "x"}) == "x"


def test_fields_that_are_no_text_are_put_in_as_json() -> None:
    template = Template("{a} {b}")
    assert template.fill({"a": 7, "b": {"x": [True, None]}}) == '7 {"x":[true,null]}'


@pytest.mark.parametrize("values", [{}, {"note": None}])
def test_a_field_that_is_missing_is_named(values: Mapping[str, object]) -> None:
    with pytest.raises(InvalidJob, match="note: is missing"):
        Template("Summarise: {note}").fill(values)


def test_a_row_in_which_all_places_stay_empty_asks_nothing() -> None:
    template = Template("{greeting}, summarise: {note}")
    with pytest.raises(InvalidJob, match="nothing to ask"):
        template.fill({"greeting": " ", "note": "\n"})
    assert template.fill({"greeting": "", "note": "x"}) == ", summarise: x"


# What rows ask for


def test_a_row_of_json_is_spelled_out_as_submit_takes_it() -> None:
    form = Form(use_case="summary", common={"system": "Be brief.", "account": "acme"})
    prompt, options = asked(form, {"prompt": "Hello", "account": "other", "max_tokens": 5})
    assert prompt == "Hello"
    assert options == {"system": "Be brief.", "account": "other", "max_tokens": 5}
    messages = [{"role": "user", "content": "Hello"}]
    assert asked(form, {"messages": messages})[0] == messages
    assert asked(SUMMARY, "Hello") == ("Hello", {})


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"prompt": "x", "max_token": 5}, "max_token"),
        ({"prompt": "x", "lane": "interactive"}, "lane"),
        ({"prompt": "x", "messages": []}, "messages"),
        ({"prompt": "x", "max_attempts": 0}, "max_attempts"),
        ({"prompt": "x", "use_case": "draft"}, "use_case"),
    ],
)
def test_a_row_that_submit_would_refuse_is_refused(values: object, field: str) -> None:
    with pytest.raises(InvalidJob) as refused:
        SUMMARY.request(values)
    assert refused.value.field == field


def test_with_a_template_the_other_fields_become_metadata() -> None:
    form = Form(
        use_case="summary",
        common={"metadata": {"source": "crm"}},
        template=Template("Summarise: {note}"),
    )
    row = {"note": "n", "id": 7, "tags": ["a"], "none": None, "idempotency_key": "k"}
    prompt, options = asked(form, row)
    assert prompt == "Summarise: n"
    assert options == {
        "metadata": {"source": "crm", "id": "7", "tags": '["a"]'},
        "idempotency_key": "k",
    }


def test_columns_to_keep_may_be_named_those_of_the_prompt_too() -> None:
    form = Form(use_case="summary", common={}, tabular=True, keep=("id", "prompt"))
    row = {"prompt": "n", "id": "7", "other": "x", "idempotency_key": ""}
    assert asked(form, row) == ("n", {"metadata": {"id": "7", "prompt": "n"}})


def test_rows_for_a_template_must_have_fields() -> None:
    form = Form(use_case="summary", common={}, template=Template("{note}"))
    with pytest.raises(InvalidJob, match="must be a mapping"):
        form.request("a note")


@pytest.mark.parametrize(
    ("changes", "columns", "problem"),
    [
        ({"template": Template("{note}")}, ["id", "text"], "no column 'note', only id, text"),
        ({}, ["id", "text"], "no column 'prompt', only id, text; give a --template"),
        ({"keep": ("ID",)}, ["prompt", "id"], "no column 'ID'"),
        ({}, ["prompt", *map(str, range(33))], "more than 32 columns"),
    ],
)
def test_a_table_without_the_columns_is_refused_whole(
    changes: dict[str, Any], columns: list[str], problem: str
) -> None:
    form = Form(use_case="summary", common={}, tabular=True, **changes)
    with pytest.raises(InvalidJob, match=problem):
        form.check_columns(columns)


def test_a_table_with_the_columns_is_taken() -> None:
    form = Form(use_case="summary", common={}, tabular=True)
    form.check_columns(["prompt", "", "idempotency_key", *map(str, range(32))])


def test_rows_of_a_program_are_numbered_and_must_be_a_list() -> None:
    assert [(row.line, row.values) for row in batch_rows(["a", "b"])] == [(1, "a"), (2, "b")]
    for wrong in ("text", {"prompt": "x"}):
        with pytest.raises(InvalidJob, match="must be a list"):
            next(batch_rows(wrong))


# JSON Lines

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(texts, values, max_size=4)), st.booleans(), st.booleans())
def test_json_lines_come_back_as_they_were(
    rows: list[dict[str, Any]], ascii_only: bool, ends: bool
) -> None:
    content = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    read = jsonl("\ufeff" + content + ("\n" if ends else ""))
    assert [(row.line, row.values) for row in read] == list(enumerate(rows, 1))


def test_bad_lines_of_json_stand_for_themselves() -> None:
    read = jsonl(b'{"prompt": "a"}\n\n[1]\n{"prompt": \r\n"x"\n\xff{}\n{"prompt": "b"}')
    assert [(row.line, row.problem.partition(",")[0]) for row in read] == [
        (1, ""),
        (3, "is not a JSON object"),
        (4, "is not JSON: it ends too early"),
        (5, "is not a JSON object"),
        (6, "is not UTF-8 text"),
        (7, ""),
    ]
    assert [row.raw for row in read[1:5]] == ["[1]", '{"prompt": ', '"x"', "\\xff{}"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{not json", "it goes wrong at column 2"),
        ('{"prompt": "Grüße", x}', "it goes wrong at column 21"),
        ('{"prompt": "x"', "it ends too early"),
        ('{"prompt": "x"} {', "it goes wrong at column 17"),
    ],
)
def test_a_line_that_is_not_json_says_where(line: str, problem: str) -> None:
    (row,) = jsonl(line + "\n")
    assert row.problem == f"is not JSON: {problem}"


@given(st.binary())
def test_no_bytes_break_the_reading_of_json_lines(content: bytes) -> None:
    assume(not content.startswith((b"\xff\xfe", b"\xfe\xff")))
    for row in jsonl(content):
        assert row.problem or isinstance(row.values, dict)


def test_a_line_of_any_length_is_passed_over_in_constant_memory() -> None:
    class Endless(io.RawIOBase):
        """One line that is ten times as long as a row may be, then a good one."""

        largest = 0
        left = 10 * MAX_ROW_BYTES

        def readline(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            self.largest = max(self.largest, size)
            if self.left > 0:
                self.left -= size
                return b"x" * size
            if self.left > -MAX_ROW_BYTES * 2:
                self.left = -MAX_ROW_BYTES * 2
                return b'"end of it"\n'
            if self.left == -MAX_ROW_BYTES * 2:
                self.left -= 1
                return b'{"prompt": "b"}\n'
            return b""

    stream = Endless()
    read = list(read_jsonl(Lines(stream)))  # type: ignore[arg-type]  # readline is all it takes
    assert [(row.line, row.problem) for row in read] == [
        (1, f"is longer than {MAX_ROW_BYTES:,} bytes"),
        (2, ""),
    ]
    assert len(read[0].raw) == 1000
    assert stream.largest == MAX_ROW_BYTES + 1


# CSV

cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\x00"))
headers = st.lists(
    st.text(st.characters(categories=["L", "N"]), min_size=1), min_size=2, max_size=5, unique=True
)


@given(headers, st.data(), st.sampled_from([",", ";", "\t"]), st.sampled_from(["\n", "\r\n"]))
def test_csv_comes_back_as_it_was(
    header: list[str], data: st.DataObject, delimiter: str, end: str
) -> None:
    rows = data.draw(st.lists(st.lists(cells, min_size=len(header), max_size=len(header))))
    file = io.StringIO(newline="")
    writer = csv.writer(
        file, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL if rows else 0
    )
    writer.writerows([header, *rows])
    read = table("\ufeff" + file.getvalue())
    assert [row.values for row in read] == [dict(zip(header, row, strict=True)) for row in rows]
    assert not any(row.problem for row in read)


@given(st.binary())
def test_no_bytes_break_the_reading_of_csv(content: bytes) -> None:
    for row in table(b"a,b\n" + content):
        assert row.problem or (isinstance(row.values, dict) and set(row.values) == {"a", "b"})


def test_rows_are_named_by_the_line_on_which_they_begin() -> None:
    read = table('id,note\n1,"two\nlines"\n\n2,one\n')
    assert [(row.line, row.values) for row in read] == [
        (2, {"id": "1", "note": "two\nlines"}),
        (5, {"id": "2", "note": "one"}),
    ]
    assert read[0].raw == '1,"two\nlines"'


def test_a_quote_that_is_never_closed_costs_one_line() -> None:
    rows = "".join(f"{n},note {n}\n" for n in range(2, 5000))
    read = table(f'id,note\n1,"never closed\n{rows}')
    assert (read[0].line, read[0].raw) == (2, '1,"never closed')
    assert "CSV" in read[0].problem
    assert [row.values for row in read[1:]] == [
        {"id": str(n), "note": f"note {n}"} for n in range(2, 5000)
    ]


def test_a_quote_that_is_never_closed_is_given_up_at_the_longest_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bulk_reading, "MAX_ROW_BYTES", 100)
    read = table('id,note\n1,"never closed\n' + "2,two\n" * 50 + f"3,{'x' * 200}\n4,four\n")
    assert [row.line for row in read if row.problem] == [2, 53]
    assert "a quote may be missing" in read[0].problem
    assert "is longer than" in read[51].problem
    assert [row.values for row in read if not row.problem] == [{"id": "2", "note": "two"}] * 50 + [
        {"id": "4", "note": "four"}
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("1", "has 1 fields, and the header row has 2"),
        ("1,2,3", "has 3 fields"),
        ('1,"a"b', "is not CSV"),
        (b"1,\xff", "is not UTF-8 text"),
    ],
)
def test_bad_rows_of_csv_stand_for_themselves(line: str | bytes, problem: str) -> None:
    raw = line if isinstance(line, bytes) else line.encode()
    bad, good = table(b"id,note\n" + raw + b"\n2,two\n")
    assert problem in bad.problem
    assert good.values == {"id": "2", "note": "two"}


def test_a_long_field_is_read_whole() -> None:
    (row,) = table(f"id,note\n1,{'x' * 900_000}\n")
    assert isinstance(row.values, dict)
    assert len(row.values["note"]) == 900_000


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("id,id\n1,2\n", "two columns 'id'"),
        ('"id\n1,2\n', "no readable header row"),
        ("id,note\n".encode("utf-16"), "UTF-16"),
        (b"\xe9,note\n", "no readable header row: is not UTF-8"),
    ],
)
def test_a_header_that_cannot_be_one_is_said(content: str | bytes, problem: str) -> None:
    with pytest.raises(InvalidJob, match=problem):
        table(content)


def test_columns_without_a_name_are_left_out() -> None:
    assert table(" id ; note ;;\n1;n;;\n")[0].values == {"id": "1", "note": "n"}


def test_bytes_are_counted_and_hashed_as_they_are_read() -> None:
    content = lines('{"a": 1}\n{"a": 2}\n')
    list(read_jsonl(content))
    assert content.read_bytes == 18
    assert content.digest() != lines("").digest()


def test_a_name_tells_the_format() -> None:
    assert format_of("notes.JSONL") == format_of("x.ndjson") == FileFormat.JSONL
    assert format_of("notes.csv") == format_of("x.tsv") == FileFormat.CSV
    with pytest.raises(InvalidJob, match="--format"):
        format_of("notes.txt")
