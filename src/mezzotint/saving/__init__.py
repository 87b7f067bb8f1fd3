"""Writing so that a failure leaves what was there before, or nothing, and never half of anything."""

from mezzotint.saving.files import sync, whole_file
from mezzotint.saving.output import Output, write_output
from mezzotint.saving.shards import Block, Entry, FileRange, Group, Shard, ShardRecord, into_shards, weight_index

__all__ = [
    "Block",
    "Entry",
    "FileRange",
    "Group",
    "Output",
    "Shard",
    "ShardRecord",
    "into_shards",
    "sync",
    "weight_index",
    "whole_file",
    "write_output",
]
