"""Highway-BP over several devices: segments on ranks, one all-gather a round (docs/distributed.md)."""

from .schedule import ScheduleHighway as ScheduleHighway

__all__ = ["ScheduleHighway"]
