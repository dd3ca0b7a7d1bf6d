"""How the server tells its log of a fault: kind and place, never the message, which may quote what people said.

Owns that one rule. Does not know what went wrong.
"""

from __future__ import annotations

from graftlm.run import say


def tell_fault(what: str, error: BaseException) -> None:
    """One log line: `what` failed, the error's type, and the line of code it came from."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})" if trace is not None else ""
    say(f"{what} failed: {type(error).__name__}{place}")
