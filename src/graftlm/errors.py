"""The only exceptions users are meant to see.

Owns the shape of an error message (what was found and expected, then the next thing to do) and the exit
codes of the command line. Knows nothing else; every other module may import it.
"""


class UserError(Exception):
    """A mistake the user can mend: `problem` says what was found and expected, `fix` what to do next."""

    exit_code = 2

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(f"{problem}\n{fix}")
        self.problem = problem
        self.fix = fix


class NumericalStop(UserError):
    """Training stopped because its numbers went bad and could not be mended."""

    exit_code = 3


class DiskError(UserError):
    """The disk is full, read-only or broke while writing."""

    exit_code = 4


class RankLost(UserError):
    """A process that trained with others was killed, hangs or cannot be reached: the run ends, and can go on."""

    exit_code = 130


class Interrupted(Exception):
    """The person or the system asked the run to stop; what was being done is finished and saved."""
