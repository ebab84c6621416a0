# A disk in memory, whose byte 8192 cannot be written: so there are errors to compare.
use strict; use POSIX ();
my $disk;
sub config { my ($key, $value) = @_; die "unknown parameter $key" if $key ne "size"; $disk = "\0" x $value; }
sub config_complete { die "size is missing" unless defined $disk; }
sub open { my $readonly = shift; return { readonly => $readonly }; }
sub close { }
sub get_size { return length ($disk); }
sub can_write { return 1; }
sub can_flush { return 1; }
sub can_trim { return 1; }
sub is_rotational { return 1; }
sub check { my ($count, $offset) = @_; if ($offset <= 8192 && 8192 < $offset + $count) { Nbdkit::set_error (POSIX::ENOSPC); die "full at 8192"; } }
sub pread { my ($h, $count, $offset) = @_; return substr ($disk, $offset, $count); }
sub pwrite { my ($h, $buf, $offset) = @_; check (length ($buf), $offset); substr ($disk, $offset, length ($buf)) = $buf; }
sub flush { }
sub trim { my ($h, $count, $offset) = @_; check ($count, $offset); substr ($disk, $offset, $count) = "\xaa" x $count; }
sub zero { my ($h, $count, $offset, $may_trim) = @_; check ($count, $offset); substr ($disk, $offset, $count) = "\0" x $count; }
