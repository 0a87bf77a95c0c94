//! The `blkrepl` binary.
fn main() {}
