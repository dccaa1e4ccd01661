"""The command line: one file per verb, imported only when it is asked for.

A verb `name` is the file `name.py` with `register(app)`, which adds one command to a typer app.
"""

import errno
import gc
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

import typer

from zolr.errors import UsageError, ZolrError

VERBS = {
    "finetune": "Fine-tune a language model on a task or on your own file.",
    "pretrain": "Train a language model on plain text, from random weights or from a checkpoint.",
    "evaluate": "Measure a run or a model on a task or on your own file.",
    "predict": "Label lines of text with a finished run.",
    "compare": "The same task under several methods, in one table.",
    "plot": "Loss curves of runs against what they cost, or maps of their diagnoses.",
    "reproduce": "Run a recipe, and compare with its recorded result.",
    "estimate": "Peak memory of a step by method, predicted without weights and without a GPU.",
    "replay": "The weights of a run without backprop, made again from its base model and its journal.",
    "export": "A run's journal as a file to give away.",
    "methods": "The methods of the literature that zolr knows, and what each is made of.",
    "doctor": "What zolr finds on this machine.",
}

RANKED = ("finetune", "pretrain")  # verbs that several processes can share

# warnings of what a library will do otherwise one day, which who runs a program cannot change
FOR_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)

INTERRUPTED = 128  # exit codes above this one: ended by a signal, with everything saved

# library chatter would bury the one line that matters; a variable that is set already stays
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# where they are installed, torchao (without CUDA) and bitsandbytes say at every start what they cannot load
_QUIET_LOGGERS = ("torchao", "torch.utils._pytree", "bitsandbytes")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 done, 2 usage, 3 data, 4 storage or checkpoint, 5 non-finite, 6 peer lost, 7 memory, 8 a result outside
    of its recorded spread, 130 and 143 interrupted (saved), 1 anything unexpected. An error is one line on stderr; `ZOLR_DEBUG=1` shows the traceback.

    Args:
        arguments: without the program's name; default `sys.argv[1:]`.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, _end)  # training has a handler of its own, which saves
    else:
        before = None
    try:
        with noting(_say):
            return _main(arguments)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _main(arguments: list[str]) -> int:
    if "--help" in arguments:
        gc.disable()  # help is gone before it could pay; it saves a sixth of the wait
    try:
        command = typer.main.get_command(_app(arguments))
        _check_ranks(arguments)
        code = command.main(args=arguments, prog_name="zolr", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED + signal.SIGINT:  # what typer makes of a KeyboardInterrupt
            _say("interrupted by SIGINT; nothing was begun that could be saved")
        return code if isinstance(code, int) else 0
    except (BrokenPipeError, SystemExit):  # the latter is what rich makes of it
        _say_no_more()  # the reader of our output has left (`zolr methods | head`): nothing is wrong
        return 0
    except _Ended as ended:
        _say("interrupted by SIGTERM; nothing was begun that could be saved")
        return ended.code
    except Exception as error:
        if os.environ.get("ZOLR_DEBUG", "0") not in ("", "0"):
            raise
        code, text = explained(error)
        _say(f"{_rank()}{' '.join(text.split())}")
        with suppress(OSError):  # what is left of our output may be what the disk did not take
            sys.stdout.flush()
            return code
        _say_no_more()
        return code


def _say(text: str) -> None:
    """A line on stderr, if somebody takes it."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _say_no_more() -> None:
    """Have nothing of our output left that Python would try to write once more at its end."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def noting(say: Callable[[str], None]) -> Iterator[None]:
    """Hand on the warnings of a block as they come, each text once and in one line.

    Args:
        say: takes a line for the screen.
    """
    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        line = note(message)
        if line not in said and not issubclass(category, FOR_DEVELOPERS):
            said.add(line)
            say(line)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def note(message: Warning | str) -> str:
    """A warning as a line for the screen."""
    return f"note: {' '.join(str(message).split())}"


class _Ended(BaseException):
    """SIGTERM outside of training: what was created is removed on the way out."""

    code = INTERRUPTED + signal.SIGTERM


def _end(number: int, frame: object) -> None:
    raise _Ended


def _rank() -> str:
    """Which of several processes speaks; nothing of one alone."""
    return f"rank {os.environ.get('RANK', 0)}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""


def _check_ranks(arguments: Sequence[str]) -> None:
    verb = next((a for a in arguments if a in VERBS), None)
    if _rank() and verb is not None and verb not in RANKED:
        raise UsageError(
            f"'{verb}' runs in one process; start it without torchrun, which is for {' and '.join(RANKED)}"
        )


def run() -> None:
    """The `zolr` program."""
    sys.exit(main())


def _app(arguments: list[str]) -> typer.Typer:
    """All verbs by name, and the code of the one that `arguments` ask for."""
    app = typer.Typer(
        help="Fine-tune and pretrain language models in random subspaces: by backprop, by forward passes only, or in between.",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )

    @app.callback(invoke_without_command=True)
    def program(version: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
        if version:
            from importlib.metadata import version as installed

            print(f"zolr {installed('zolr')}")
            raise typer.Exit()

    asked = next((a for a in arguments if not a.startswith("-")), None)
    for verb, summary in VERBS.items():
        if verb == asked:
            quieten()
            import_module(f"zolr.cli.{verb}").register(app)
        else:
            app.command(verb, help=summary)(lambda: None)
    return app


def quieten() -> None:
    """Have libraries say nothing at their start but errors; before they are imported."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def explained(error: Exception) -> tuple[int, str]:
    """Exit code and message of an error."""
    from zolr.cli.budget import is_out_of_memory

    usage = typer.BadParameter.__bases__[0]  # typer does not export the class of its own usage errors
    if isinstance(error, ZolrError):
        return error.exit_code, f"{'' if error.exit_code > INTERRUPTED else 'error: '}{error}"
    if isinstance(error, usage):
        return 2, f"error: {error.format_message()}"  # pyright: ignore[reportAttributeAccessIssue]
    if is_out_of_memory(error):
        advice = "try a smaller --batch-size or --max-length, --checkpointing, or --paradigm zo"
        return 7, f"error: out of memory; {advice} ({error})"
    if isinstance(error, OSError) and error.filename is not None:
        return 4, f"error: {error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # of a file that was open: our output
        return 4, f"error: the output of this program cannot be written: {error.strerror}; make room for it"
    return 1, f"error: unexpected {type(error).__name__}: {error} (set ZOLR_DEBUG=1 for the traceback)"
