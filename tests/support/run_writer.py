"""Writes ``.wandb`` files: W&B's own messages in framing of the tests' own, so that reading does not prove itself."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

from wandb.proto import wandb_internal_pb2 as pb

BLOCK = 32768
PREAMBLE = b":W&B" + struct.pack("<HB", 0xBEE1, 0)


def framed(records: list[bytes]) -> bytes:
    """Return the bytes of a whole file with these records."""
    out = bytearray(PREAMBLE)
    for record in records:
        rest, first = record, True
        while True:
            room = BLOCK - len(out) % BLOCK
            if room < 7:
                out += bytes(room)
                room = BLOCK
            piece, rest = rest[: room - 7], rest[room - 7 :]
            kind = bytes([{(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[first, not rest]])
            out += struct.pack("<IH", zlib.crc32(kind + piece), len(piece)) + kind + piece
            first = False
            if not rest:
                break
    return bytes(out)


def history(step: int, values: Mapping[str, object], at: float = 1000.0) -> bytes:
    """Return a row as W&B writes it."""
    record = pb.Record(num=step + 7)
    record.history.step.num = step
    for key, value in {"_step": step, "_timestamp": at + step, **values}.items():
        record.history.item.add(nested_key=key.split("."), value_json=json.dumps(value))
    return bytes(record.SerializeToString())


def summary(values: Mapping[str, object]) -> bytes:
    """Return an update of the run's summary."""
    record = pb.Record(num=3)
    for key, value in values.items():
        record.summary.update.add(key=key, value_json=json.dumps(value))
    return bytes(record.SerializeToString())


def run(run_id: str = "r1", *, starting_step: int = 0) -> bytes:
    """Return who the run is."""
    record = pb.Record(num=2)
    record.run.run_id, record.run.project, record.run.entity = run_id, "digits", "me"
    record.run.display_name, record.run.starting_step = "brave-net", starting_step
    return bytes(record.SerializeToString())


def step_metric(pattern: str, over: str) -> bytes:
    """Return a `define_metric`."""
    record = pb.Record()
    if pattern.endswith("*"):
        record.metric.glob_name = pattern
    else:
        record.metric.name = pattern
    record.metric.step_metric = over
    return bytes(record.SerializeToString())


def ended(code: int) -> bytes:
    """Return the end of a run."""
    record = pb.Record()
    record.exit.exit_code = code
    return bytes(record.SerializeToString())


def write_run(attempt: Path, records: list[bytes], *, run_id: str = "r1", started: str = "20260101_120000") -> Path:
    """Write an off-line run into an attempt's folder in the store, and return its file."""
    folder = attempt / "wandb" / "wandb" / f"offline-run-{started}-{run_id}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"run-{run_id}.wandb"
    path.write_bytes(framed(records))
    return path
