"""Detection of the byte layout where headers do not state it."""
