"""The names in a family's diffusers classes that the passes of `fast` need.

Everything here is a name, so that `families` does not import `fast`. tests/families/test_recipes.py
checks that each class, attribute, argument and method exists in the installed diffusers: an
upstream rename fails there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rewrite:
    """A diffusers module whose activation `fast` can fuse with the linear layers around it.

    class_name   class of the module
    kind         name of the rewrite, a key of `mezzotint.fast.passes.fused_activation.REWRITES`
    attributes   attributes of the module that the rewrite uses
    """

    class_name: str
    kind: str
    attributes: tuple[str, ...]


@dataclass(frozen=True)
class ResidualBlock:
    """A repeated block that ends with x + gate * branch.

    class_name     class of the block
    last_modules   modules whose outputs are the branches
    arguments      arguments of the block's forward that hold x, in diffusers' order
    unsupported    (attribute, value) of blocks that end in another way, or None
    needs_rewrite  True if the block must be rewritten by `Recipe.single_block` first
    """

    class_name: str
    last_modules: tuple[str, ...]
    arguments: tuple[str, ...] = ("hidden_states", "encoder_hidden_states")
    unsupported: tuple[str, bool] | None = None
    needs_rewrite: bool = False


@dataclass(frozen=True)
class TextRefiner:
    """The part of a transformer that processes text alone, before text and image are joined.

    text_argument   argument of the transformer's forward with the text, a list of [tokens, width]
    embedder        module that embeds the text
    blocks          module list that refines it
    image_blocks    module list that refines the image at the same time
    join            method of the transformer that joins text and image
    join_text       argument of `join` with the refined text
    join_lengths    argument of `join` with the number of text tokens
    """

    text_argument: str
    embedder: str
    blocks: str
    image_blocks: str
    join: str
    join_text: str
    join_lengths: str


@dataclass(frozen=True)
class Recipe:
    """How `fast` speeds up a family's transformer. An empty recipe leaves all of this to diffusers.

    attn_processors   {diffusers processor class: kind}, a key of
                      `mezzotint.fast.passes.attention_processors.PROCESSORS`
    feed_forward      the feed-forward module
    single_block      the module with attention and feed-forward in parallel
    residual_blocks   repeated blocks that can defer their last addition
    final_layer       name of the module, or of the module dict, that reads the last block's output
    text_refiner      text blocks whose output depends on the prompt only
    """

    attn_processors: Mapping[str, str] = field(default_factory=dict)
    feed_forward: Rewrite | None = None
    single_block: Rewrite | None = None
    residual_blocks: tuple[ResidualBlock, ...] = ()
    final_layer: str | None = None
    text_refiner: TextRefiner | None = None

    @property
    def rewrites(self) -> Mapping[str, Rewrite]:
        """Return {class name: rewrite} of all modules that are rewritten."""
        given = (self.feed_forward, self.single_block)
        return {rewrite.class_name: rewrite for rewrite in given if rewrite is not None}


GELU_FEED_FORWARD = Rewrite("FeedForward", "gelu", ("net",))
"""diffusers.models.attention.FeedForward, which several families share."""
