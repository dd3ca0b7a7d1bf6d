"""The command line: which verb is which function, and how every ending becomes an exit code.

Owns the list of verbs and the exit codes. Does not do any work itself: each verb calls one function of a room. Heavy
libraries are imported inside the verbs, so that `--help` answers at once.
"""

from __future__ import annotations

import sys

import typer

from graftlm.cli import data, machine, road, talk, tokenizer
from graftlm.errors import Interrupted, UserError

app = typer.Typer(
    name="graftlm",
    help="Graft a language onto a Llama-family base model, and teach it to talk.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
tokenizer_app = typer.Typer(no_args_is_help=True, help="Graft, check and measure tokenizers.")
app.add_typer(tokenizer_app, name="tokenizer")

app.command("run")(road.run)
tokenizer_app.command("graft")(tokenizer.tokenizer_graft)
tokenizer_app.command("check")(tokenizer.tokenizer_check)
tokenizer_app.command("report")(tokenizer.tokenizer_report_verb)
app.command("expand")(road.expand)
app.command("data")(data.data)
app.command("export")(road.export)
app.command("chat")(talk.chat)
app.command("generate")(talk.generate)
app.command("eval")(talk.eval_verb)
app.command("doctor")(machine.doctor)


def main() -> None:
    """Run the command line; every mistake of the user ends in two lines and an exit code."""
    try:
        app(standalone_mode=False)
    except UserError as error:
        print(f"{error.problem}\n{error.fix}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Interrupted as error:
        print(f"{error}\nRun the same command again to continue.", file=sys.stderr)
        sys.exit(130)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:  # typer's own usage errors tell themselves; anything else is our fault
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            sys.exit(error.exit_code)
        raise
