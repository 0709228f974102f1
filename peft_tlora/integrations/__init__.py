"""One module a host library, each the sole contact with that host's private parts."""
