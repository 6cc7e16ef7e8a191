"""Every key of the run configuration as a command-line flag, made from the configuration itself.

Values are handed on as text and checked in one place, so that all errors, from the file and from the flags, come at
once.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from common.config import RunConfig, load_config, read_config_file

__all__ = ["takes_configuration"]


def takes_configuration(
    command: Callable[..., Any], *, without: Sequence[str] = (), **defaults: Any
) -> Callable[..., Any]:
    """Give `command(config: RunConfig, ...)` the argument CONFIG and one flag per key; flags win over the file.

    Args:
        command: What is called.
        without: Keys that get no flag, because the command has its own.
        defaults: Values of keys that neither the file nor a flag gives, where they are other than elsewhere.
    """
    names = [name for name in RunConfig.model_fields if name not in without]
    own = [
        parameter
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items()
        if name != "config"
    ]

    @functools.wraps(command)
    def with_flags(**values: Any) -> Any:
        flags = {name: values.pop(name) for name in names}
        source = values.pop("config_file")
        stored = read_config_file(Path(source)) if source is not None else {}
        return command(config=load_config(defaults, stored, flags), **values)

    flags = [_flag(name, defaults) for name in names]
    argument = inspect.Parameter(
        "config_file",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="a TOML file of the keys below")],
    )
    keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    parameters = [argument, *flags, *keyword_only]
    with_flags.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
    with_flags.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del with_flags.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
    return with_flags


def _flag(name: str, defaults: Mapping[str, Any]) -> inspect.Parameter:
    field = RunConfig.model_fields[name]
    flag = f"--{name.replace('_', '-')}"
    default = defaults.get(name, field.get_default())
    shown = ",".join(default) if isinstance(default, tuple) else default
    text = f"{field.description}"
    if shown not in (None, ""):
        text += f" [default: {'inf' if shown == math.inf else shown}]"
    if field.annotation is bool:
        option = typer.Option(f"{flag}/--no-{name.replace('_', '-')}", help=text, show_default=False)
        annotation: Any = Annotated[bool | None, option]
    else:
        option = typer.Option(flag, help=text, show_default=False, metavar=_metavar(field.annotation))
        annotation = Annotated[str | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _metavar(annotation: Any) -> str:
    choices = [part for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal]
    if choices:
        return "|".join(str(value) for value in get_args(choices[0]))
    text = str(annotation)
    for word, name in (("int", "N"), ("float", "NUMBER"), ("tuple", "A,B,...")):
        if word in text:
            return name
    return "TEXT"
