"""The server: sockets, connections, threads. It knows the device layer; no layer knows it."""
