"""RMS norm per head and rotary embedding of queries and keys, in one pass."""
