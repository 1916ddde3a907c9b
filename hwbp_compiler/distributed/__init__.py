"""Highway-BP over several devices: segments on ranks, one all-gather a round (docs/distributed.md)."""

from .schedule import ScheduleHighway as ScheduleHighway
from .time import recurrent as recurrent

__all__ = ["ScheduleHighway", "recurrent"]
