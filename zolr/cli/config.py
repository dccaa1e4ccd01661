"""One frozen dataclass per verb is its flags, its config keys and its defaults at once.

A field made by `flag` becomes a command-line option, a key of `--config run.toml`, and an attribute of the resolved settings:

    @dataclass(frozen=True)
    class Pretrain(Settings):
        steps: Annotated[int, Ge(1)] = flag(1000, "Optimizer steps.", "Training")

    def run(settings: Pretrain) -> None: ...

    def register(app): add(app, "pretrain", Pretrain, run)

`rank` is `--rank` and `rank = 8`; `batch_size` is `--batch-size` (or `--batch_size`) and `batch-size = 8` (or `batch_size`).
Defaults < config file < flags. Importing this module imports neither torch nor pydantic: `--help` has to be instant.
"""

import dataclasses
import inspect
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
import typer.core

from zolr.errors import UsageError

_FLAG = "flag"
VERB, RECORDED = "verb", "recorded"  # keys of a recipe that are no settings: what runs it, and what it gave
_SWITCHED = {"on": True, "true": True, "off": False, "false": False}  # both spellings of a switch
_ACTIONS = "Run"  # panel of what a verb can do instead of running


@dataclass(frozen=True)
class _Flag:
    help: str
    panel: str
    shown: str | None  # the default as `--help` prints it, where None stands for a rule
    aliases: tuple[str, ...]
    argument: bool
    saved: bool
    path: bool
    bare: bool


def flag(
    default: Any,
    help: str,
    panel: str,
    *,
    shown: str | None = None,
    aliases: tuple[str, ...] = (),
    argument: bool = False,
    saved: bool = True,
    path: bool = False,
    bare: bool = False,
) -> Any:
    """A field of a `Settings` class.

    Args:
        default: its value where neither the config file nor a flag gives one; None where a rule decides.
        help: one line for `--help`.
        panel: the group it is listed under.
        shown: what `--help` prints as the default, for the defaults that are rules.
        aliases: other spellings of the flag, accepted and not listed.
        argument: a positional argument, not an option.
        saved: whether it belongs into the config file of a run (where to write to, for example, does not).
        path: whether it may name a file; relative paths are made absolute in the config file of a run.
        bare: whether it may go without a value; `--x` is `--x on` then, and `--no-x` is `--x off`.
    """
    info = _Flag(help, panel, shown, aliases, argument, saved, path, bare)
    return dataclasses.field(default=default, metadata={_FLAG: info})


@dataclass(frozen=True)
class Settings:
    """What one verb was asked to do, after defaults, config file and flags."""

    @classmethod
    def gather(cls, given: dict[str, Any], config: Path | None) -> typing.Self:
        """The settings of a command line; a verb with further sources (a run folder to go on with) adds them here."""
        return resolve(cls, given, config)

    @property
    def chosen_later(self) -> list[str]:
        """What `--print-config` says of settings that hang on more than the command line, a line each."""
        return []


S = TypeVar("S", bound=Settings)


def nearest(name: str, names: Sequence[str] | Mapping[str, object]) -> str:
    """The end of an error message: the nearest of `names`, else all of them."""
    close = get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"choose one of {', '.join(names)}"


def spelled(key: str) -> str:
    """A key as it is spelled in flags and config files."""
    return key.replace("_", "-")


def resolve(kind: type[S], given: Mapping[str, Any], config: Path | None = None) -> S:
    """Settings from defaults, then the file `config`, then `given`.

    Raises:
        UsageError: an unknown key, a wrong type or a value out of range.
    """
    values = dict(_read(kind, config)) if config else {}
    values.update(given)
    return _checked(kind, values, {key: "" if key in given else f" in {config}" for key in values})


def toml(settings: Settings) -> str:
    """The settings as a config file that gives them back."""
    lines = []
    for field in dataclasses.fields(settings):
        value, info = getattr(settings, field.name), _info(field)
        if info.saved and value is not None and value != ():
            lines.append(f"{spelled(field.name)} = {_literal(_absolute(value) if info.path else value)}")
    return "\n".join(lines) + "\n"


def differing(before: str, now: str) -> list[tuple[str, str, str]]:
    """What two of the texts of `toml` have otherwise: name, value before, value now.

    >>> differing("rank = 4\\nlr = 0.1\\n", "rank = 8\\nlr = 0.1\\nclip = 1.0\\n")
    [('clip', 'not given', '1.0'), ('rank', '4', '8')]
    """
    old, new = (dict(line.split(" = ", 1) for line in text.splitlines()) for text in (before, now))
    absent = "not given"
    return [
        (key, old.get(key, absent), new.get(key, absent))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def as_dict(settings: Settings) -> dict[str, Any]:
    """The saved settings by name, for result files."""
    return {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if _info(f).saved}


def add(
    app: typer.Typer,
    verb: str,
    kind: type[S],
    run: Callable[..., None],
    *,
    config: bool = True,
    dry_run: bool = False,
) -> None:
    """Add a verb to the command line.

    Args:
        app: the typer app.
        verb: its name.
        kind: its settings; every field is a flag.
        run: called with the settings, and with `dry_run=` where the verb has a dry run; its docstring is the help text.
        config: whether it takes `--config` and `--print-config`.
        dry_run: whether the verb has a dry run.
    """
    spelling = {
        "token_normalize_func": spelled,
        "help_option_names": ["--help", "-h"],
    }  # --batch_size is --batch-size
    hints = typing.get_type_hints(kind, include_extras=True)
    bare = {field.name for field in dataclasses.fields(kind) if _info(field).bare}
    switches = [f"--{spelled(name)}" for name, hint in hints.items() if _is_switch(hint) or name in bare]

    class Command(typer.core.TyperCommand):
        """One whose switches may go without a value: `--x` is `--x on`, `--no-x` is `--x off`."""

        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            return super().parse_args(ctx, _with_values(args, switches))

    app.command(verb, cls=Command, context_settings=spelling)(_function(kind, run, config, dry_run))


def _with_values(args: Sequence[str], switches: Sequence[str]) -> list[str]:
    """Arguments in which every switch has a value.

    >>> _with_values(["--x", "--no-y", "--x", "half"], ["--x", "--y"])
    ['--x=on', '--y=off', '--x', 'half']
    """
    found = []
    for here, after in zip(args, [*args[1:], "--"], strict=False):  # no arguments have no "--" either
        name = spelled(here)
        if name in switches and after.startswith("-"):
            here = f"{name}=on"
        elif name.replace("--no-", "--", 1) in switches and name not in switches:
            here = f"{name.replace('--no-', '--', 1)}=off"
        found.append(here)
    return found


def _function(kind: type[S], run: Callable[..., None], config: bool, dry_run: bool) -> Callable[..., None]:
    """A function with the signature that typer reads: one keyword per flag of `kind`."""
    parameters, aliases = [], {}
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        info, plain = _info(field), _plain(hints[field.name])
        if info.argument:
            metavar = spelled(field.name).upper()
            option = typer.Argument(None, help=info.help, metavar=metavar, show_default=info.shown or False)
        else:
            option = typer.Option(
                None,
                *_spellings(field.name, plain),
                help=info.help,
                rich_help_panel=info.panel,
                show_default=_shown(field),
            )
        parameters.append(_parameter(field.name, plain, option))
        for alias in info.aliases:
            aliases[alias] = field.name
            parameters.append(
                _parameter(alias, plain, typer.Option(None, f"--{spelled(alias)}", hidden=True))
            )

    actions: dict[str, tuple[type, str]] = {}
    if config:
        actions["config"] = (str, "TOML file with any of these settings; flags win over it.")
        actions["print_config"] = (bool, "Print the resolved settings as TOML and stop.")
    if dry_run:
        actions["dry_run"] = (bool, "Load everything, show two examples and the expected memory, and stop.")
    for name, (plain, help) in actions.items():
        option = typer.Option(
            None, f"--{spelled(name)}", help=help, rich_help_panel=_ACTIONS, show_default=False
        )
        parameters.append(_parameter(name, plain, option))

    def command(**values: Any) -> None:
        given = {key: _frozen(value) for key, value in values.items() if value is not None and value != []}
        file = Path(given.pop("config")) if "config" in given else None
        printing, rehearsing = given.pop("print_config", False), given.pop("dry_run", False)
        for alias, name in aliases.items():
            if alias in given and name in given:
                raise UsageError(
                    f"--{spelled(alias)} and --{spelled(name)} are the same setting; give one of them"
                )
            if alias in given:
                given[name] = given.pop(alias)
        settings = kind.gather(given, file)
        if printing:
            print(toml(settings), end="")
            for line in settings.chosen_later:
                print(f"# {line}")
            return
        run(settings, **({"dry_run": rehearsing} if dry_run else {}))

    command.__doc__ = run.__doc__
    setattr(command, "__signature__", inspect.Signature(parameters))  # noqa: B010
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _info(field: dataclasses.Field[Any]) -> _Flag:
    return field.metadata[_FLAG]


def _plain(hint: Any) -> Any:
    """The type that the command line parses: no bounds, no choices, no None."""
    if get_origin(hint) is Annotated:
        return _plain(get_args(hint)[0])
    if _is_switch(hint):
        return str
    if get_origin(hint) in (types.UnionType, typing.Union):
        (inner,) = [a for a in get_args(hint) if a is not type(None)]
        return _plain(inner)
    if get_origin(hint) is Literal:
        return type(get_args(hint)[0])
    return list[get_args(hint)[0]] if get_origin(hint) is tuple else hint


def _is_switch(hint: Any) -> bool:
    """Whether a field is on, off, or one of some words."""
    parts = get_args(hint) if get_origin(hint) in (types.UnionType, typing.Union) else ()
    return bool in parts and any(get_origin(part) is Literal for part in parts)


def _parameter(name: str, plain: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=plain | None)


def _spellings(name: str, plain: Any) -> list[str]:
    flag = f"--{spelled(name)}"
    return [f"{flag}/--no-{spelled(name)}"] if plain is bool else [flag]


def _shown(field: dataclasses.Field[Any]) -> str | bool:
    shown = _info(field).shown
    if shown is None and field.default not in (None, False, ()):
        shown = str(field.default)
    return shown or False


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _read(kind: type[Settings], config: Path) -> dict[str, Any]:
    """The settings in a TOML file, by field name."""
    try:
        table = tomllib.loads(config.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read config file {config}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"config file {config} is not valid TOML: {error}") from error
    values: dict[str, Any] = {}
    table.pop(RECORDED, None)
    verb = table.pop(VERB, kind.__name__.lower())
    if verb != kind.__name__.lower():
        raise UsageError(f"{config} is a recipe of `zolr {verb}`; use that, or `zolr reproduce {config}`")
    for key, value in table.items():
        name = key.replace("-", "_")
        if name in values:
            raise UsageError(f"config file {config} sets '{spelled(name)}' twice")
        values[name] = value
    return values


def _checked(kind: type[S], values: dict[str, Any], where: dict[str, str]) -> S:
    """Settings of the right types: no text where a number belongs, no NaN, no key that does not exist."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    hints = typing.get_type_hints(kind, include_extras=True)
    rules = ConfigDict(strict=True, allow_inf_nan=False)
    checked = {}
    for name, value in values.items():
        if name not in hints:
            known = list(map(spelled, hints))
            raise UsageError(
                f"unknown setting '{spelled(name)}'{where[name]}; {nearest(spelled(name), known)}"
            )
        if _is_switch(hints[name]):
            value = _SWITCHED.get(value, value) if isinstance(value, str) else value
        elif get_origin(_plain(hints[name])) is list:  # in files; one column may be written without brackets
            value = (value,) if isinstance(value, str) else _frozen(value)
        try:
            checked[name] = TypeAdapter(hints[name], config=rules).validate_python(value)
        except ValidationError as error:
            choices = _choices(hints[name])
            message = error.errors()[0]["msg"]
            reason = nearest(str(value), choices) if choices else message[0].lower() + message[1:]
            raise UsageError(f"--{spelled(name)} {value!r}{where[name]}: {reason}") from None
    return kind(**checked)


def _choices(hint: Any) -> tuple[str, ...]:
    if _is_switch(hint):
        return ("on", "off", *(word for part in get_args(hint) for word in get_args(part)))
    if get_origin(hint) is Literal:
        return get_args(hint)
    return next((found for a in get_args(hint) if (found := _choices(a))), ())


def _absolute(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_absolute, value))
    return str(Path(value).absolute()) if Path(value).exists() else value


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, str):
        import json

        return json.dumps(value, ensure_ascii=False).replace(
            "\x7f", "\\u007f"
        )  # a TOML basic string, but for DEL
    return repr(value)
