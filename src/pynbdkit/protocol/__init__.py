"""The NBD protocol as pure functions and state machines: bytes in, meaning out, no I/O.

Server and client stand on the same modules, and nothing here imports the rest of the package.
Everything on the wire is big-endian ("network byte order").
"""
