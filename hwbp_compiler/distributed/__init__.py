"""Highway-BP on several devices: each rank holds one segment; a round takes one all-gather (docs/distributed.md)."""

from .errors import RankError as RankError
from .errors import StageError as StageError
from .report import StageReport as StageReport
from .report import explain as explain
from .schedule import ScheduleHighway as ScheduleHighway
from .time import recurrent as recurrent

__all__ = ["RankError", "ScheduleHighway", "StageError", "StageReport", "explain", "recurrent"]
