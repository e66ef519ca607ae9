"""Errors that a user can cure, and how a program ends by one."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class GLMError(ValueError):
    """An error whose message names the flag or file, its value, the rule and the cure.

    Entry points print it as one line without a traceback; anything else is a fault of the program
    and keeps its traceback.
    """

    # Whether every rank of a run raises it alike, so that the first one may speak for all.
    is_everywhere: ClassVar[bool] = False


class FlagError(GLMError):
    """A flag, or a pair of flags, that GLM cannot honour."""

    is_everywhere = True


def flag_of(dest: str) -> str:
    """The flag of an attribute of the parsed arguments, as errors name it."""
    return f"--{dest.replace('_', '-')}"


@contextmanager
def exit_with_one_line(
    *more: type[Exception], rank: int = 0, local_rank: int = 0, after_interrupt: str = ""
) -> Iterator[None]:
    """Ends the program with one line on standard error and exit status 2 where the user can cure
    the error: a GLMError, or an OSError that names a file. Ctrl-C ends it with 130, and quietly
    with 141 where the reader of standard output has gone, as `head` does.

    more: exceptions beside these, by which a library refuses flags: alike on every rank. rank: of
    this process in a run. local_rank: of it on its machine, given where all of a machine's do the
    same with the same files: the first of them speaks. after_interrupt: what to do after Ctrl-C.
    """
    program = os.path.basename(sys.argv[0])
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        if rank == 0:
            hint = f"; {after_interrupt}" if after_interrupt else ""
            print(f"\n{program}: interrupted{hint}", file=sys.stderr, flush=True)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # Python tries once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except (GLMError, OSError, *more) as error:
        message = _in_one_line(error)
        if message is None:
            raise
        if rank == 0:
            print(f"{program}: error: {message}", file=sys.stderr, flush=True)
        elif local_rank == 0 and not getattr(error, "is_everywhere", isinstance(error, more)):
            print(f"rank {rank}: {program}: error: {message}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error


def _in_one_line(error: Exception) -> str | None:
    """What to say of an error; None where only a traceback can."""
    if isinstance(error, OSError):
        if error.filename:
            return f"{error.filename}: {error.strerror}"
        return str(error) if isinstance(error, FileNotFoundError) else None
    message = str(error).strip()
    if isinstance(error, GLMError) and "Original Traceback" in message:
        # From a worker of a data loader: the last line is the error, behind its class.
        return message.splitlines()[-1].partition(": ")[2]
    # Some of Megatron's assertions say nothing; then the asserted line has to speak.
    return message or traceback.extract_tb(error.__traceback__)[-1].line
