"""Validate values of a file with a pydantic model, so that other code can rely on their types."""

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from mezzotint.errors import BrokenFile
from mezzotint.untrusted.escaping import cut
from mezzotint.untrusted.json import HINT


class Entries(BaseModel):
    """Base of models of file contents: types are not coerced, and unknown entries are ignored."""

    model_config = ConfigDict(strict=True, frozen=True)


Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], value: object, where: object, hint: str = HINT) -> Model:
    """Return the value as an instance of the model.

    where    the file of the value, for the message
    Raises   BrokenFile, which names the first entry of a wrong type and counts the others
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first, *others = error.errors(include_url=False, include_context=False, include_input=False)
        entry = cut(".".join(map(str, first["loc"]))) or "it"
        more = f", and {len(others)} more entries are wrong" if others else ""
        raise BrokenFile(f"{where}: {entry}: {first['msg']}{more}", hint) from error
