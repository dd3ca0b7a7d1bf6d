"""The command line: which verb is which function, and how every ending becomes an exit code.

Owns the list of verbs and the exit codes. Does not do any work itself: each verb calls one function of a room. Heavy
libraries are imported inside the verbs, so that `--help` answers at once.
"""

from __future__ import annotations

import difflib
import errno
import logging
import os
import sys
import traceback
import warnings
from typing import Annotated, Any

import typer

from graftlm import __version__
from graftlm.cli import data, evaluate, health, machine, plan, release, road, serve, talk, tokenizer
from graftlm.errors import Interrupted, UserError
from graftlm.malloc import keep_little

OUR_FAULT, USERS_FAULT, DISK, INTERRUPTED = 1, 2, 4, 130
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)

app = typer.Typer(
    name="graftlm",
    help="Graft a language onto a Llama-family base model, and teach it to talk.",
    epilog="Example: graftlm run recipes/demo.yaml --out runs/demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich and its markdown would take longer than all the rest
)
tokenizer_app = typer.Typer(
    no_args_is_help=True,
    help="Graft, check and measure tokenizers.",
    rich_markup_mode=None,
    epilog="Example: graftlm tokenizer check base/ grafted/ --text zh.jsonl",
)


def _tell_version(is_asked: bool) -> None:
    if is_asked:
        print(f"graftlm {__version__}")
        raise typer.Exit


VersionAsked = Annotated[
    bool, typer.Option("--version", help="Tell the version and leave.", is_eager=True, callback=_tell_version)
]


@app.callback()
def _before_the_verb(version: VersionAsked = False) -> None:
    """What can be asked without a verb; the flag's own callback answers."""


app.command("run")(road.run)
app.command("sweep")(road.sweep)
app.command("preflight")(health.preflight)
app.command("plan")(plan.plan)
app.add_typer(tokenizer_app, name="tokenizer")
tokenizer_app.command("graft")(tokenizer.tokenizer_graft)
tokenizer_app.command("check")(tokenizer.tokenizer_check)
tokenizer_app.command("report")(tokenizer.tokenizer_report_verb)
app.command("expand")(road.expand)
app.command("data")(data.data)
app.command("export")(release.export)
app.command("card")(release.card)
app.command("chat")(talk.chat)
app.command("generate")(talk.generate)
app.command("eval")(evaluate.eval_verb)
app.command("compare")(evaluate.compare)
app.command("serve")(serve.serve)
app.command("autopsy")(health.autopsy)
app.command("doctor")(machine.doctor)


def main() -> None:
    """Run the command line; every mistake of the user ends in two lines and an exit code."""
    # Read by GNU OpenMP when torch loads it: how long a thread spins before it sleeps. Its default makes training many
    # times slower as soon as anything else holds a core; this is as fast alone (docs/log.md, bench/waiting.py).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    keep_little()
    # Libraries warn their own developers of what they will rename; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    # Told by bitsandbytes wherever peft imports it: a product in 4 bits that nothing here computes with.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_not_of_a_missing_kernel)
    # And by torchao wherever transformers does: kernels of other devices, and what torch means to rename.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").addFilter(_is_not_of_an_old_name)
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        code = _tell(error.exit_code, error.problem, error.fix)
    except Interrupted as error:
        code = _tell(INTERRUPTED, str(error), "Run the same command again to continue.")
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        code = _stop_writing()
    except SystemExit as left:
        # Typer catches a broken pipe itself and leaves with 1, which here means a fault of ours.
        code = _stop_writing() if isinstance(left.__context__, BrokenPipeError) else left.code
    except Exception as error:
        code = _tell_other(error)
    sys.exit(code if isinstance(code, int) else 0)


def _is_not_of_a_missing_kernel(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in str(record.msg)


def _is_not_of_an_old_name(record: logging.LogRecord) -> bool:
    return "register_constant() on Enum" not in str(record.msg)


def _stop_writing() -> int:
    """Whoever read our output has seen enough (`graftlm ... | head`). Python would complain once more on leaving."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _tell(code: int, problem: str, fix: str) -> int:
    print(f"{problem}\n{fix}", file=sys.stderr)
    return code


def _tell_other(error: Exception) -> int:
    """What did not come as a UserError: a wrong flag, a full disk, too little memory, or a fault of ours."""
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        return _tell_usage(error)
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        first = "Choose a place that can be written" if error.errno == errno.EROFS else "Free space or choose another"
        return _tell(DISK, f"{error}.", f"{first}, then run the same command again.")
    if isinstance(error, PermissionError):
        return _tell(USERS_FAULT, f"{error}.", "Give a path you may read and write.")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate" in str(error):
        fix = "Choose a smaller model, or lower stages.NAME.micro_batch_tokens and set gradient_checkpointing."
        return _tell(USERS_FAULT, f"Not enough memory: {str(error).splitlines()[0] if str(error) else error!r}", fix)
    traceback.print_exception(error)
    return _tell(
        OUR_FAULT,
        f"This is a fault of graftlm, not yours: {type(error).__name__}.",
        "Please report it with the lines above and the output of: graftlm doctor",
    )


def _tell_usage(error: Any) -> int:
    """A wrong verb, flag or value in two lines; the nearest one known is offered."""
    message, context = error.format_message().strip().replace("Value error, ", ""), getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message, file=sys.stderr)
        return error.exit_code
    command: Any = context.command if context else None
    typed = getattr(error, "option_name", None)
    near = ""
    if typed and type(error).__name__ == "NoSuchOption":
        message = f"There is no flag {typed}."
        flags = [flag for parameter in command.params for flag in parameter.opts if flag.startswith("-")]
        found = difflib.get_close_matches(typed, [*flags, "--help"], n=1, cutoff=0.5)
        near = f"Did you mean {found[0]}? " if found else ""
    elif hasattr(command, "commands") and "Did you mean" not in message:
        near = f"Known: {', '.join(command.commands)}. "
    path = context.command_path if context else "graftlm"
    return _tell(USERS_FAULT, " ".join(message.split()), f"{near}All of it with examples: {path} --help")
