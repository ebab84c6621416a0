"""A disk in memory, in a dozen lines: `pynbdkit examples/ram.py size=1M`."""

from pynbdkit import Device, Plugin, parameters


class Ram(Plugin):
    size = parameters.size("Size of the disk", default=1 << 20)

    def get_ready(self):
        self.data = bytearray(self.size)

    def open(self, session):
        return RamDisk(self.data)


class RamDisk(Device):
    def __init__(self, data):
        self.data = memoryview(data)

    def get_size(self):
        return len(self.data)

    def pread(self, count, offset, flags):
        return self.data[offset : offset + count]

    def pwrite(self, buf, offset, flags):
        self.data[offset : offset + len(buf)] = buf

    def flush(self, flags):
        pass
