//! NBD for blkrepl.
