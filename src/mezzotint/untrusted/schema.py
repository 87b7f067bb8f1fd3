"""Values from a file, held against a pydantic model once; code behind it may trust every type."""

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from mezzotint.errors import BrokenFile
from mezzotint.untrusted.escaping import cut
from mezzotint.untrusted.json import HINT


class Entries(BaseModel):
    """Base of the models of what files hold: no type is made from another, unknown entries are left alone."""

    model_config = ConfigDict(strict=True, frozen=True)


Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], value: object, where: object, hint: str = HINT) -> Model:
    """Return the value as the model.

    where    the file that it is from, for the message
    Raises   BrokenFile that names the first entry of a wrong type, and says how many more there are
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first, *others = error.errors(include_url=False, include_context=False, include_input=False)
        entry = cut(".".join(map(str, first["loc"]))) or "it"
        more = f", and {len(others)} more entries are wrong" if others else ""
        raise BrokenFile(f"{where}: {entry}: {first['msg']}{more}", hint) from error
