"""Is this machine, and the way this job was started, fit for training? One line per question, measured where it can be."""

from hpcasync.doctor.examine import examine
from hpcasync.doctor.line import Line, worst

__all__ = ["Line", "examine", "worst"]
