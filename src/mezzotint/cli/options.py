"""Commands whose options are the fields of a dataclass.

Typer reads a command's options from the parameters of a function. A command of Mezzotint takes one
object instead, whose class declares the options:

    @dataclass(frozen=True, kw_only=True)
    class DemoOptions(DeviceOptions):
        output: Annotated[Path, typer.Option("--output", "-o")] = Path("demo.png")

    def demo(options: DemoOptions) -> None: ...

    app.command("demo")(with_flat_signature(demo))

Options that several commands share are base classes (`shared_options`), so that each option is
written once. `checked` adds a check of the value, which runs before the command.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, Field, fields
from functools import wraps
from typing import Any, TypeVar, get_type_hints

Options = TypeVar("Options")
Value = TypeVar("Value")


def with_flat_signature(command: Callable[[Options], None]) -> Callable[..., None]:
    """Return the command as a function with one parameter per option, as Typer expects it."""
    options_class = get_type_hints(command)["options"]

    @wraps(command)
    def flat(**values: Any) -> None:
        command(options_class(**values))

    # `inspect.signature` and `get_type_hints`, which Typer calls, read these two attributes.
    parameters = list(_parameters(options_class))
    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat


def _parameters(options_class: type[Any]) -> Iterator[inspect.Parameter]:
    """Yield the parameters in the order of --help: those of the class, then those of its bases."""
    hints = get_type_hints(options_class, include_extras=True)
    by_name = {field.name: field for field in fields(options_class)}
    order = (name for base in options_class.__mro__ for name in inspect.get_annotations(base))
    for name in dict.fromkeys(order):
        yield inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_default(by_name[name]),
            annotation=hints[name],
        )


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is MISSING else field.default


def checked(check: Callable[[Value], object]) -> Callable[[Any], Any]:
    """Return an option's callback that calls `check`, which raises an error for a wrong value.

    An option that is absent is not checked.
    """

    def callback(value: Any) -> Any:
        if value is not None:
            check(value)
        return value

    return callback


def checked_each(check: Callable[[Value], object]) -> Callable[[Any], Any]:
    """Return a callback like `checked` for an option or argument with several values."""

    def check_all(values: Iterable[Value]) -> None:
        for value in values:
            check(value)

    return checked(check_all)
