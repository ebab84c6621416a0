"""Plugins that are shared objects written for nbdkit, in C or what compiles to the same."""
