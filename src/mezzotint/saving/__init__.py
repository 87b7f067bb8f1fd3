"""Writing so that a failure leaves what was there before, or nothing, and never half of anything."""

from mezzotint.saving.files import remove_leftovers, sync, whole_file
from mezzotint.saving.output import Output, write_output
from mezzotint.saving.places import check_place, other_files, refuse_to_replace, true_place
from mezzotint.saving.publishing import recover
from mezzotint.saving.shards import Block, Entry, FileRange, Group, Shard, ShardRecord, into_shards, weight_index
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
    "into_shards",
    "other_files",
    "recover",
    "refuse_to_replace",
    "remove_leftovers",
    "sync",
    "true_place",
    "weight_index",
    "whole_file",
    "write_output",
]
