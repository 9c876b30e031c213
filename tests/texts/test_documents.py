"""Text files, folders, tables and datasets, read as documents; and their specification on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import refused
from transplant_hf.errors import DataError, HubError
from transplant_hf.texts import TextSource, documents


def read(data: Path | str, **fields: object) -> list[str]:
    return list(documents(TextSource(str(data), **fields)))  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_a_text_file_is_one_document_with_its_line_breaks(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"poem{suffix}"
    path.write_bytes("Tiger,\r\n\ntiger …\n".encode())
    assert read(path) == ["Tiger,\r\n\ntiger …\n"]


def write_tables(folder: Path, rows: list[dict[str, object]]) -> dict[str, Path]:
    pandas = pytest.importorskip("pandas")
    files = {suffix: folder / f"rows.{suffix}" for suffix in ("jsonl", "json", "csv", "parquet")}
    files["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    files["json"].write_text(json.dumps(rows))
    pandas.DataFrame(rows).to_csv(files["csv"], index=False)
    pandas.DataFrame(rows).to_parquet(files["parquet"])
    return files


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_table_gives_its_text_column(tmp_path: Path, suffix: str) -> None:
    rows: list[dict[str, object]] = [
        {"title": "a", "text": "one\ntwo", "n": 1},
        {"title": "b", "text": "three", "n": 2},
    ]
    assert read(write_tables(tmp_path, rows)[suffix]) == ["one\ntwo", "three"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_the_only_column_of_strings_is_taken(tmp_path: Path, suffix: str) -> None:
    assert read(write_tables(tmp_path, [{"n": 1, "body": "x"}, {"n": 2, "body": "y"}])[suffix]) == ["x", "y"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_column_that_is_named_is_taken(tmp_path: Path, suffix: str) -> None:
    path = write_tables(tmp_path, [{"text": "no", "body": "yes"}])[suffix]
    assert read(path, column="body") == ["yes"]


@pytest.mark.parametrize(
    ("row", "fields", "facts"),
    [
        ({"a": "x", "b": "y", "n": 1}, {}, ("several columns of text", "a, b, n", "column=")),
        ({"a": "x", "b": None}, {}, ("several columns of text", "a, b")),
        ({"n": 1, "m": 2.5}, {}, ("no column of text", "n, m")),
        ({"text": "x"}, {"column": "body"}, ("no column 'body'", "text")),
        ({"text": 3}, {"column": "text"}, ("row 0", "'text'", "int")),
    ],
)
def test_a_table_without_a_clear_column_is_refused_with_its_columns(
    tmp_path: Path, row: dict[str, object], fields: dict[str, str], facts: tuple[str, ...]
) -> None:
    path = write_tables(tmp_path, [row])["jsonl"]
    with refused(DataError, str(path), *facts):
        read(path, **fields)


def test_rows_without_text_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": null}\n{"text": ""}\n{"text": "x"}\n')
    assert read(path) == ["x"]


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"no table")
    with refused(DataError, str(path)):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '\ufeff{"text": "one"}\n\n{"text": "two\\nlines"}', ["one", "two\nlines"]),
        ("a.json", '[{"text": "one"}, {"text": "two"}]', ["one", "two"]),
        ("a.jsonl", "", []),
        (
            "a.jsonl",
            '{"text": "2026-11-27", "n": null}\n{"text": "2026-11-28", "n": "x"}\n',
            ["2026-11-27", "2026-11-28"],
        ),
        ("a[1]*.jsonl", '{"text": "one"}\n', ["one"]),
        ("a::b.jsonl", '{"text": "one"}\n', ["one"]),
        ("a.json", '{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
        ("a.csv", '\ufeffid,body\n1,"one, ""quoted""\nline"\n2,two\n', ['one, "quoted"\nline', "two"]),
        ("a.csv", "text\n42\nx\n", ["42", "x"]),
    ],
)
def test_json_and_csv_as_people_write_them(tmp_path: Path, name: str, content: str, expected: list[str]) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8", newline="")
    assert read(path) == expected
    assert read(tmp_path) == expected


@pytest.mark.parametrize(
    ("name", "content", "facts"),
    [
        ("a.jsonl", '{"text": "one"}\n{"text": ', ("line 1 column",)),
        ("a.jsonl", '{"text": "one"}\n["two"]\n', ("line 2 of", "list")),
        ("a.json", "[1]", ("row 0 of", "int")),
        ("a.json", "[" * 100_000, ("recursion",)),
        ("a.json", "{", ("line 1",)),
        ("a.csv", 'text\n"one\n', ("unexpected end",)),
        ("a.csv", "a,b\n1,2,3\n", ("line 2 of", "more cells")),
    ],
)
def test_a_damaged_table_is_refused_by_name(tmp_path: Path, name: str, content: str, facts: tuple[str, ...]) -> None:
    path = tmp_path / name
    path.write_text(content)
    with refused(DataError, str(path), *facts):
        read(path)


@pytest.mark.parametrize(
    ("name", "fields", "told"),
    [
        ("a.txt", {"column": "body"}, "is not a table: leave out column"),
        ("a.jsonl", {"revision": "v1", "config": "all"}, "leave out config, revision"),
        ("", {"config": "all"}, "leave out config"),
    ],
)
def test_fields_that_say_nothing_about_a_file_are_refused(
    tmp_path: Path, name: str, fields: dict[str, str], told: str
) -> None:
    (tmp_path / (name or "a.txt")).write_text('{"body": "x"}')
    with refused(DataError, told):
        read(tmp_path / name, **fields)


def test_a_name_is_not_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "a[1].jsonl").write_text('{"text": "right"}')
    (tmp_path / "a1.jsonl").write_text('{"text": "wrong"}')
    assert read(tmp_path / "a[1].jsonl") == ["right"]


def test_all_tables_of_a_folder_have_the_same_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}')
    (tmp_path / "b.jsonl").write_text('{"body": "two"}')
    with refused(DataError, "b.jsonl has no column 'text'", "body"):
        read(tmp_path)


def test_a_folder_is_read_in_order_and_by_split(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "deep/c.txt", "law-test.txt", "valid/d.txt", "contest.txt", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "picture.png").write_bytes(b"")
    assert read(tmp_path) == ["a.md", "b.txt", "contest.txt", "deep/c.txt"]
    assert read(tmp_path, split="test") == ["law-test.txt"]
    assert read(tmp_path, split="validation") == ["valid/d.txt"]
    with refused(DataError, "no split 'other'", "test, train, validation"):
        read(tmp_path, split="other")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with refused(DataError, "no file or folder", str(tmp_path / "no.txt")):
        read(tmp_path / "no.txt")
    with refused(DataError, "contains no text", ".jsonl"):
        read(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"")
    with refused(DataError, "x.bin", ".txt"):
        read(tmp_path / "x.bin")
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    with refused(DataError, "x.txt", "UTF-8"):
        read(tmp_path / "x.txt")
    with refused(DataError, "x.txt", "no split 'test'"):
        read(tmp_path / "x.txt", split="test")


@pytest.mark.hub
def test_a_dataset_that_is_not_on_the_hub(hub: object) -> None:
    with refused(HubError, "alice/no-such-text"):
        read("alice/no-such-text")


class FakeRows(list):  # type: ignore[type-arg]
    features = None


def test_the_hub_is_asked_for_exactly_what_was_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(*args: object, **kwargs: object) -> FakeRows:
        asked.append((args, kwargs))
        return FakeRows([{"text": "x"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = TextSource("user/law", "test[:5]", config="en", revision="v1", streaming=True)
    assert list(documents(source, token="t")) == ["x"]
    known = {"split": "test[:5]", "revision": "v1", "streaming": True, "token": "t"}
    assert asked == [(("user/law", "en"), known)]


def test_an_unknown_split_of_a_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*args: object, **kwargs: object) -> Iterator[object]:
        raise ValueError("Unknown split \"x\". Should be one of ['train'].")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with refused(DataError, "split 'x' of user/law", "['train']"):
        read("user/law", split="x")


@pytest.mark.parametrize(
    ("text", "data", "split", "name"),
    [
        ("law.txt", "law.txt", "train", "law"),
        ("user/law", "user/law", "train", "law"),
        ("user/law:test", "user/law", "test", "law"),
        ("user/law-1.5", "user/law-1.5", "train", "law-1.5"),
        ("law=user/cases:test[:10%]", "user/cases", "test[:10%]", "law"),
        ("law=user/cases:train+test", "user/cases", "train+test", "law"),
        ("law=/a/b=c/d.jsonl", "/a/b=c/d.jsonl", "train", "law"),
        ("./a=b/d.jsonl", "./a=b/d.jsonl", "train", "d"),
        ("C:\\texts\\law.txt", "C:\\texts\\law.txt", "train", "C:\\texts\\law"),
        ("/a/b:c/law.txt", "/a/b:c/law.txt", "train", "law"),
        ("x=C:\\law.txt", "C:\\law.txt", "train", "x"),
    ],
)
def test_what_a_command_line_says(text: str, data: str, split: str, name: str) -> None:
    source = TextSource.parse(text)
    assert (source.data, source.split) == (data, split)
    if "\\" not in name:
        assert source.name == name


def test_a_path_that_exists_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a=b.txt", "b.txt:test"):
        (tmp_path / name).write_text("x")
        path = str(tmp_path / name)
        assert TextSource.parse(path).data == path
        assert TextSource.parse(f"law={path}") == TextSource(path, name="law")
    monkeypatch.chdir(tmp_path)
    assert TextSource.parse("a=b.txt").data == "a=b.txt"
    assert TextSource.parse("x.jsonl", column="body", streaming=True).column == "body"
    with refused(DataError, "is not a text"):
        TextSource.parse("")
