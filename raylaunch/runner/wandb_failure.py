"""Did the training fail because ``wandb.init`` broke on-line, before it had measured anything?"""

from __future__ import annotations

import re
import struct
from pathlib import Path

from raylaunch.runner import contract

_BLOCK = 32 * 1024
_FILE_HEADER = 7
_RECORD_HEADER = 7
_FULL, _FIRST = 1, 2
_LENGTH_DELIMITED = 2
_HISTORY = 2
"""Number of the field `history` in wandb.proto's Record."""
_BROKEN_INIT = re.compile(
    rb"wandb\.errors\.\S*(?:CommError|UsageError|AuthenticationError|WandbInitError)"
    rb"|^(?:\w+\.)*(?:CommError|AuthenticationError|UsageError): ",
    re.MULTILINE,
)


def init_broke(folder: Path, log_tail: bytes) -> bool:
    """Return whether the log ends in W&B's own error, and no point of history has been written."""
    if not _BROKEN_INIT.search(log_tail):
        return False
    runs = (folder / contract.WANDB).glob("wandb/*run-*/run-*.wandb")
    return not any(has_history(path) for path in runs)


def has_history(path: Path) -> bool:
    """Return whether a .wandb file (LevelDB's log format around protobuf records) holds a history record."""
    data = path.read_bytes()[: 8 * 1024 * 1024]
    offset = _FILE_HEADER
    while offset + _RECORD_HEADER <= len(data):
        if _BLOCK - offset % _BLOCK < _RECORD_HEADER:
            offset += _BLOCK - offset % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, offset)
        payload = data[offset + _RECORD_HEADER : offset + _RECORD_HEADER + length]
        if kind in (_FULL, _FIRST) and _HISTORY in _first_fields(payload):
            return True
        offset += _RECORD_HEADER + length
    return False


def _first_fields(record: bytes) -> set[int]:
    """Return the numbers of the protobuf fields that a record begins with; what a fragment cuts off is left out."""
    found = set()
    offset = 0
    while offset < len(record):
        tag, offset = _varint(record, offset)
        found.add(tag >> 3)
        value, offset = _varint(record, offset)
        wire = tag & 7
        if wire == _LENGTH_DELIMITED:
            offset += value
        elif wire != 0:
            break
    return found


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    value = shift = 0
    while offset < len(data):
        byte = data[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            break
    return value, offset
