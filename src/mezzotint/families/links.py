"""Which layer's outputs another layer reads with little in between, by diffusers' names."""

from collections.abc import Iterator

LINKED = (
    ("to_v", "to_out.0"),
    ("add_v_proj", "to_add_out"),
    ("net.0.proj", "net.2"),
    ("feed_forward.w3", "feed_forward.w2"),
    ("linear_in", "linear_out"),
)
"""(end of the writer's name, end of the reader's): values and the attention's output, both ends of a feed-forward.

The first half of FLUX.2's gated linear_in, the gates, is as long as what linear_out reads, and takes part as it does in
the other families.
"""


def writers_of(reader: str) -> Iterator[str]:
    """Names that a layer which writes what `reader` reads would have."""
    for writer, end in LINKED:
        if reader.endswith("." + end):
            yield reader.removesuffix(end) + writer
