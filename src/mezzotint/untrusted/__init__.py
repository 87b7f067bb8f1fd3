"""Reading what others wrote: bounded JSON, typed entries, limits of configurations, escaping, library errors."""
