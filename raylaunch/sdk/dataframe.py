"""Metrics as a pandas DataFrame, and bytes of a log as lines. Only this module imports pandas, which is optional."""

from __future__ import annotations

import codecs
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from raylaunch.errors import RaylaunchError
from raylaunch.models.job import MetricSeries

if TYPE_CHECKING:
    from types import ModuleType

    import pandas as pd

_HINT = "pip install 'raylaunch[notebook]'; or read the points without it: job.metrics().series"

LONGEST = 64 * 1024
"""Characters of a line that are buffered until its end arrives."""


class LineReader:
    """Splits bytes that arrive in pieces into whole lines, without their ends; invalid UTF-8 is replaced."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def feed(self, data: bytes) -> list[str]:
        """Return the lines that are complete now. At most `LONGEST` characters of an unfinished line are buffered."""
        *lines, self._held = (self._held + self._decoder.decode(data)).split("\n")
        if len(self._held) > LONGEST:
            lines.append(self._held)
            self._held = ""
        return [line.removesuffix("\r") for line in lines]

    def finish(self) -> list[str]:
        """Return what is left once there is no more input."""
        left, self._held = self._held + self._decoder.decode(b"", final=True), ""
        self._decoder.reset()
        return [left] if left else []


def frame_of_csv(csv: bytes) -> pd.DataFrame:
    """Return ``step,at,key,value`` lines as a table: one row per step, one column per metric, floats.

    Where a step was logged twice (an attempt was repeated), the later value counts.

    Raises:
        RaylaunchError: pandas is not installed.
    """
    types = {"step": float, "key": str, "value": float}
    missing = {"value": ["nan"]}  # and nothing else: a metric may be called NA
    pandas = _pandas()
    return _table(pandas.read_csv(io.BytesIO(csv), dtype=types, keep_default_na=False, na_values=missing))


def frame_of_series(series: Sequence[MetricSeries]) -> pd.DataFrame:
    """Return curves as a table, as `frame_of_csv` does.

    Raises:
        RaylaunchError: pandas is not installed.
    """
    rows = [(point.step, one.key, point.value) for one in series for point in one.points]
    return _table(_pandas().DataFrame(rows, columns=["step", "key", "value"]))


def _table(points: pd.DataFrame) -> pd.DataFrame:
    once = points.drop_duplicates(["step", "key"], keep="last")
    table = once.pivot(index="step", columns="key", values="value")  # noqa: PD010 -- pivot_table would drop what is NaN
    table.columns.name = None
    result: pd.DataFrame = table
    return result


def _pandas() -> ModuleType:
    try:
        import pandas as pd  # noqa: PLC0415 -- half a second, and optional
    except ImportError:
        msg = "a table of metrics needs pandas, which is not installed here"
        raise RaylaunchError(msg, hint=_HINT) from None
    module: ModuleType = pd
    return module
