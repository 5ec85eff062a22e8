"""Records: what was written is read, and any damage of a line is noticed. Kills are tested in tests/faults."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vae_ray.storage.records import append_records, read_records, replace_records

RECORDS = [{"epoch": 1, "val/nelbo": 0.1}, {"epoch": 2, "val/nelbo": 1e-05, "note": "ünlucky\n"}]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    append_records(tmp_path / "records.jsonl", RECORDS)
    return tmp_path / "records.jsonl"


def test_a_line_is_plain_json_with_its_checksum_as_the_last_key(file: Path) -> None:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [list(line)[-1] for line in lines] == ["crc", "crc"]
    assert [line | {"crc": None} for line in lines] == [record | {"crc": None} for record in RECORDS]
    # CRC-32 of {"epoch":1,"val/nelbo":0.1}
    assert lines[0]["crc"] == "00c1a479"


texts = st.fixed_dictionaries({"trial": st.text(), "reason": st.text(), "value": st.none() | st.integers()})


@settings(max_examples=40)  # each waits for the disk
@given(st.lists(texts, min_size=1, max_size=4), st.data())
def test_a_cut_at_any_byte_loses_only_the_lines_from_there(written: list[dict[str, Any]], data: st.DataObject) -> None:
    """Whatever the texts contain: line ends of all kinds, quotes, other scripts."""
    with tempfile.TemporaryDirectory() as path:
        file = Path(path, "records.jsonl")
        append_records(file, written[:1])
        append_records(file, written[1:])
        assert read_records(file) == written
        whole = file.read_bytes()
        cut = data.draw(st.integers(0, len(whole)))
        file.write_bytes(whole[:cut])
        left = written[: whole[:cut].count(b"\n")]
        assert read_records(file) == left
        append_records(file, RECORDS)
        assert read_records(file) == [*left, *RECORDS]


def test_any_flipped_bit_is_noticed_or_means_the_same(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = file.read_bytes()
    for position in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            file.write_bytes(flipped)
            caplog.clear()
            records = read_records(file)
            assert all(record in RECORDS for record in records), (position, bit)
            assert records == RECORDS or f"{file}: line " in caplog.text, (position, bit)


def test_a_damaged_line_is_left_out_and_named_also_after_an_append(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.write_bytes(file.read_bytes().replace(b"0.1,", b"0.2,"))
    append_records(file, [{"epoch": 3}])
    assert read_records(file) == [RECORDS[1], {"epoch": 3}]
    assert caplog.messages == [f"{file}: line 1 is damaged ('not what was written') and left out"]


def test_lines_of_0_1_0_are_taken_as_they_are_and_continued(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    append_records(file, [{"epoch": 3}])
    assert read_records(file) == [*RECORDS, {"epoch": 3}]
    replace_records(file, RECORDS)
    assert read_records(file) == RECORDS
    assert file.read_text().count('"crc"') == 2
    assert caplog.messages == []


def test_records_are_replaced_only_if_they_differ(file: Path) -> None:
    inode = file.stat().st_ino
    replace_records(file, RECORDS)
    assert file.stat().st_ino == inode
    replace_records(file, RECORDS[:1])
    assert read_records(file) == RECORDS[:1]
