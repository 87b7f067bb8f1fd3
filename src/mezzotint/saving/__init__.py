"""Writing so that a failure leaves what was there before, or nothing, and never half of anything."""

from mezzotint.saving.files import atomic_write, fsync, remove_leftovers
from mezzotint.saving.output import Output, write_output
from mezzotint.saving.places import check_place, other_files, refuse_to_replace, true_place
from mezzotint.saving.publishing import recover
from mezzotint.saving.shards import (
    Block,
    Entry,
    FileRange,
    Group,
    Shard,
    ShardRecord,
    split_into_shards,
    weight_index,
)
from mezzotint.saving.sources import HeldFiles

__all__ = [
    "Block",
    "Entry",
    "FileRange",
    "Group",
    "HeldFiles",
    "Output",
    "Shard",
    "ShardRecord",
    "check_place",
    "split_into_shards",
    "other_files",
    "recover",
    "refuse_to_replace",
    "remove_leftovers",
    "fsync",
    "true_place",
    "weight_index",
    "atomic_write",
    "write_output",
]
