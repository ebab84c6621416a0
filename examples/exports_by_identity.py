"""Files that only some clients may open, by the name in their TLS certificate.

    pynbdkit --tls=require --tls-verify-peer --tls-certificates=CERTIFICATES \
        examples/exports_by_identity.py dir=DISKS table=TABLE

Each line of the table is an export and who may open it, a shell pattern for the distinguished
name in the client's certificate, or "*" for everybody whom the server lets in:

    public   *
    payroll  CN=alice,O=Example
    payroll  CN=carol,*

Who may not open a file does not see it in the list of exports, and is told the same as for a name
that no file has.
"""

from fnmatch import fnmatchcase

from pynbdkit import ConfigError, parameters
from pynbdkit.plugins.file import FilePlugin


class ExportsByIdentity(FilePlugin):
    table = parameters.path("Who may open what", required=True, metavar="FILE")

    def config_complete(self):
        super().config_complete()
        if self.dir is None:
            raise ConfigError("the exports are the files of a directory: use dir=DIRECTORY")
        self.who = {}
        try:
            with open(self.table, encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    words = line.split(maxsplit=1)
                    if len(words) == 1:
                        raise ConfigError(f"{self.table}:{number}: who may open {words[0]}?")
                    if words:
                        self.who.setdefault(words[0], []).append(words[1].strip())
        except OSError as error:
            raise ConfigError(f"table={self.table}: {error.strerror}") from None

    def may_open(self, session):
        name = session.peer_tls_dn
        patterns = self.who.get(session.export_name, ())
        return any(p == "*" or (name and fnmatchcase(name, p)) for p in patterns)
