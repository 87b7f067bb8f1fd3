"""Write outputs atomically: a failure leaves the previous output or none, never a partial one."""

from mezzotint.saving.files import atomic_write, fsync, remove_leftovers
from mezzotint.saving.output import Output, write_output
from mezzotint.saving.places import check_place, other_files, refuse_to_replace, resolve_parent
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
from mezzotint.saving.sources import WatchedFiles

__all__ = [
    "Block",
    "Entry",
    "FileRange",
    "Group",
    "WatchedFiles",
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
    "resolve_parent",
    "weight_index",
    "atomic_write",
    "write_output",
]
