"""Prints which of the addresses HOST:PORT ... can be reached from where this runs."""

import socket
import sys

for address in sys.argv[1:]:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 3).close()
    except OSError:
        continue
    sys.stdout.write(address + "\n")
