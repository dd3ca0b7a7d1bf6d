"""Errors users see: two lines, and an exit code that tells a script what kind it was."""

from graftlm.errors import DiskError, Interrupted, NumericalStop, UserError


def test_each_has_two_lines_and_its_exit_code() -> None:
    for kind, code in ((UserError, 2), (NumericalStop, 3), (DiskError, 4)):
        error = kind("This was found.", "Do that.")
        assert str(error) == "This was found.\nDo that."
        assert (error.problem, error.fix, error.exit_code) == ("This was found.", "Do that.", code)
        assert isinstance(error, UserError)
    assert not issubclass(Interrupted, UserError)
