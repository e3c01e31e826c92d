"""The part of Protocol Buffers' wire format that W&B's records need: fields of a message, and rows of numbers.

Measured: W&B's generated classes (`wandb.proto.wandb_internal_pb2`) take 0.4-0.7 s and 53 MB to import (9 → 62 MB;
FastAPI and uvicorn together: 37 MB), because they import the whole package. On a file of 100,000 rows of five metrics
(53 MB), protobuf's C parser over a schema of just these fields takes 1.3 s, and so do the loops below, which import
nothing and skip unknown fields, as the format intends (https://protobuf.dev/programming-guides/encoding/).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_CONTINUES = 0x80
"""The bit of a varint's byte that says that another byte follows."""

_KEY, _NESTED_KEY, _INTEGER, _NUMBER, _VALUE_JSON = 1, 2, 5, 6, 16
_ITEM = 1
_VALUE_TAG = b"\x82\x01"
"""The tag of a field 16 that holds bytes."""
_KEYS_REMEMBERED = 10_000
LONGEST_KEY = 500
"""Characters of a metric's name; a longer one is cut."""
_NOT_NUMBERS = frozenset(b'"{[tfn')
"""First bytes of JSON that is a string, an object, a list, true, false or null."""


class WireError(ValueError):
    """The bytes are not a message."""


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the number and the value of each field of a message: an int, or the bytes of all other types.

    Raises:
        WireError: `data` is not a message.
    """
    at, end = 0, len(data)
    try:
        while at < end:
            tag = data[at]
            at += 1
            if tag >= _CONTINUES:
                tag, at = _varint(data, at - 1)
            size = data[at]
            at += 1
            if size >= _CONTINUES and tag & 7 in {_BYTES, _VARINT}:
                size, at = _varint(data, at - 1)
            kind = tag & 7
            if kind == _BYTES:
                yield tag >> 3, data[at : at + size]
                at += size
            elif kind == _VARINT:
                yield tag >> 3, size
            elif kind in {_FIXED64, _FIXED32}:
                width = 8 if kind == _FIXED64 else 4
                yield tag >> 3, data[at - 1 : at - 1 + width]
                at += width - 1
            else:
                _refuse(at)
    except IndexError:
        _refuse(at)
    if at != end:
        _refuse(at)


def _refuse(at: int) -> None:
    msg = f"not a message: byte {at} belongs to no field"
    raise WireError(msg)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < _CONTINUES:
            return value, at
        shift += 7


class Rows:
    """Reads rows: the items of history and summary records.

    Rows repeat the same keys thousands of times, so the bytes before an item's value are looked up, not parsed again.
    """

    def __init__(self) -> None:
        self._keys: dict[bytes, str] = {}

    def numbers(self, data: bytes) -> dict[str, float]:
        """Return the items that are numbers, nested keys joined by ``.``.

        Facts about a media object (an image's width, a table's rows: all next to a ``_type``) are not metrics, and are
        omitted.

        Args:
            data: the bytes of a ``HistoryRecord`` or a ``SummaryRecord``; field 1 of both repeats the items.

        Raises:
            WireError: `data` is not such a record.
        """
        found: dict[str, float] = {}
        media: list[str] = []
        for number, item in fields(data):
            if number != _ITEM or not isinstance(item, bytes):
                continue
            key, value = self._item(item)
            if value is not None:
                found[key] = value
            elif key.endswith("._type"):
                media.append(key[: -len("_type")])
        if media:
            return {key: value for key, value in found.items() if not key.startswith(tuple(media))}
        return found

    def _item(self, data: bytes) -> tuple[str, float | None]:
        head, _, tail = data.rpartition(_VALUE_TAG)
        if not tail or tail[0] != len(tail) - 1:
            return _any_item(data)
        key = self._keys.get(head)
        if key is None:
            try:
                key, other = _any_item(head)
            except WireError:  # the tag's bytes were part of a string
                return _any_item(data)
            if other is not None or not key:
                return _any_item(data)
            if len(self._keys) >= _KEYS_REMEMBERED:
                self._keys.clear()
            self._keys[head] = key
        return key, _json_number(tail[1:])


def _any_item(data: bytes) -> tuple[str, float | None]:
    key = ""
    value: float | None = None
    for number, part in fields(data):
        if number == _VALUE_JSON and isinstance(part, bytes):
            value = _json_number(part)
        elif number in {_KEY, _NESTED_KEY} and isinstance(part, bytes):
            word = part.decode("utf-8", "replace")
            key = (f"{key}.{word}" if key else word)[:LONGEST_KEY]
        elif number == _NUMBER and isinstance(part, bytes):
            value = float(struct.unpack("<d", part)[0])
        elif number == _INTEGER and isinstance(part, int):
            value = float((part >> 1) ^ -(part & 1))
    return key, value


def _json_number(text: bytes) -> float | None:
    if not text or text[0] in _NOT_NUMBERS:
        return _json_word(text)
    try:
        return float(text)
    except ValueError:
        return None


def _json_word(text: bytes) -> float | None:
    """W&B 0.31 writes ``NaN`` and ``Infinity`` bare; quoted ones are the same numbers."""
    return float(text.strip(b'"')) if text in {b'"NaN"', b'"Infinity"', b'"-Infinity"'} else None
