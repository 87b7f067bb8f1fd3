"""Tools for untrusted input: bounded JSON, typed entries, limits, escaping, library errors."""
