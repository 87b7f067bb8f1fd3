"""4-bit matrix times a few vectors, for layers that are bound by memory."""
