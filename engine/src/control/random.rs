//! Random numbers for ids and nonces, from the kernel. Nothing that decides draws from here.

use std::fs::File;
use std::io::{self, Read};

/// 128 random bits.
///
/// # Errors
/// The kernel's generator cannot be read.
pub(super) fn random_u128() -> io::Result<u128> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u128::from_le_bytes(bytes))
}
