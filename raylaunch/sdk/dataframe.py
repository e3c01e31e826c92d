"""Metrics as a pandas DataFrame. The only module that knows pandas, which need not be installed."""

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

LONGEST = 64 * 1024
"""Characters of a line that are held back for its end."""


class LineReader:
    """Takes bytes as they come and gives whole lines, without their ends; what is not UTF-8 is replaced."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def feed(self, data: bytes) -> list[str]:
        """Return the lines that are whole now. Of a line without an end, no more than `LONGEST` is held."""
        *lines, self._held = (self._held + self._decoder.decode(data)).split("\n")
        if len(self._held) > LONGEST:
            lines.append(self._held)
            self._held = ""
        return [line.removesuffix("\r") for line in lines]

    def finish(self) -> list[str]:
        """Return what is left where nothing more comes."""
        left, self._held = self._held + self._decoder.decode(b"", final=True), ""
        self._decoder.reset()
        return [left] if left else []


_HINT = "pip install 'raylaunch[notebook]'; or read the points without it: job.metrics().series"


def frame_of_csv(csv: bytes) -> pd.DataFrame:
    """Return ``step,at,key,value`` lines as a table: a row a step, a column a metric, floats.

    Where a step was logged twice (an attempt was repeated), the later value counts.

    Raises:
        RaylaunchError: pandas is not installed.
    """
    types = {"step": float, "key": str, "value": float}
    missing = {"value": ["nan"]}  # and no others: a metric may be called NA
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
        import pandas as pd  # noqa: PLC0415 -- half a second, and not everybody has it
    except ImportError:
        msg = "a table of metrics needs pandas, which is not installed here"
        raise RaylaunchError(msg, hint=_HINT) from None
    module: ModuleType = pd
    return module
