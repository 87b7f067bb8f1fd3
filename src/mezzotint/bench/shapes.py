"""Published models by the shapes of their layers; each family declares its own."""

from mezzotint.errors import require_known
from mezzotint.families import families
from mezzotint.families.family import PublishedModel

PUBLISHED_MODELS = {
    name: model for family in families().values() for name, model in family.published.items()
}
"""{name: model}"""


def published_model(name: str) -> PublishedModel:
    """Return the published model of this name; BadRequest lists those that exist."""
    require_known("model", name, PUBLISHED_MODELS)
    return PUBLISHED_MODELS[name]
