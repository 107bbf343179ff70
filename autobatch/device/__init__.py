"""Where the memory is: one protocol, an implementation for each kind of place."""
