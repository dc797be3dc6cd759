"""Records of measurements: frozen dataclasses of plain values, saved as JSON lines.

Every record names the measured model (`ModelRecord`); a record of a comparison also names its arm (`ArmRecord`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection, Iterable
    from contextlib import AbstractContextManager

    Arm = Callable[[Any], AbstractContextManager[Any]]

RecordT = TypeVar("RecordT")


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """The model of a measurement: the name or folder it was loaded from, its dtype, the type of its device."""

    model: str
    dtype: str
    device: str


@dataclass(frozen=True, kw_only=True)
class ArmRecord(ModelRecord):
    """The arm of a comparison: its name there, and its settings as `arm_settings` writes them."""

    arm: str
    settings: str


def append_records(path: str | os.PathLike[str], records: Iterable[Any]) -> None:
    """Append each record, an instance of a dataclass of plain values, as one JSON line; create missing folders.

    All lines are written at once, so a killed process leaves all of them or none.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "records.jsonl")
        >>> append_records(path, [ModelRecord(model="tiny", dtype="float32", device="cpu")])
        >>> read_records(path, ModelRecord)
        [ModelRecord(model='tiny', dtype='float32', device='cpu')]
    """
    lines = "".join(json.dumps(asdict(record)) + "\n" for record in records)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        file.write(lines.encode())


def read_records(path: str | os.PathLike[str], record_type: type[RecordT]) -> list[RecordT]:
    """Read the records that `append_records` wrote; a file that does not exist holds none.

    If the fields of a record type have changed, its class method `upgraded(values)` returns today's fields for those
    of an earlier line.

    Raises:
        ValueError: a line is no JSON object with exactly the fields of `record_type`; the message names the line.

    Examples:
        >>> read_records("no-such-file.jsonl", ModelRecord)
        []
    """
    if not Path(path).exists():
        return []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}; write to another file") from error
    return [_parsed(line, record_type, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _parsed(line: str, record_type: type[RecordT], where: str) -> RecordT:
    expected = [field.name for field in fields(record_type)]  # type: ignore[arg-type]
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    if isinstance(values, dict):
        values = getattr(record_type, "upgraded", dict)(values)
    if not isinstance(values, dict) or sorted(values) != sorted(expected):
        raise ValueError(
            f"{where}: expected a JSON object with the fields {', '.join(expected)}, got {line[:80]!r}; delete that "
            "line, or write to another file"
        )
    return record_type(**values)


class Journal(Generic[RecordT]):
    """Finished cells of a run, in a JSON-lines file `path` (None keeps nothing): a second run skips them.

    Two records of `record_type` are of one cell if they agree in all fields but `results` and the device.

    Examples:
        >>> journal = Journal(None, ModelRecord, ["dtype"])
        >>> journal.once({"model": "tiny", "device": "cpu"}, lambda: {"dtype": "float32"}).dtype
        'float32'
    """

    def __init__(self, path: str | os.PathLike[str] | None, record_type: type[RecordT], results: Collection[str]):
        self.path = path
        self._record_type = record_type
        self._results = {*results, "device"}
        self._known = {self._cell(asdict(r)): r for r in (read_records(path, record_type) if path else [])}  # type: ignore[call-overload]

    def once(self, planned: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> RecordT:
        """Return the record of a cell: the known one, or a new one with what `measure()` returns as its results."""
        record = self.get(**planned)
        if record is None:
            record = self._record_type(**planned, **measure())
            self.add(record)
        return record

    def get(self, **planned: Any) -> RecordT | None:
        """Return the record of the cell that these fields name, None if it is not done yet."""
        return self._known.get(self._cell(planned))

    def add(self, record: RecordT) -> None:
        """Append a cell's record to the file, at once."""
        if self.path:
            append_records(self.path, [record])

    def _cell(self, values: dict[str, Any]) -> frozenset[tuple[str, Any]]:
        planned = {name: value for name, value in values.items() if name not in self._results}
        return frozenset((name, tuple(value) if isinstance(value, list) else value) for name, value in planned.items())


def arm_settings(arm: Arm) -> str:
    """Return the settings of an arm as text: its repr, or the name of a function or class. Equal in every process."""
    return getattr(arm, "__qualname__", None) or repr(arm)


def arm_fields(name: str, arm: Arm, model: Any) -> dict[str, Any]:
    """Return the fields of an `ArmRecord`."""
    return {"arm": name, "settings": arm_settings(arm), **model_settings(model)}


def model_settings(model: Any) -> dict[str, Any]:
    """Return the fields of a `ModelRecord`."""
    name = model.config.name_or_path or type(model).__name__
    return {"model": name, "dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type}
