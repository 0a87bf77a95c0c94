//! # blkrepl-fuzz
//!
//! Everything of blkrepl that reads bytes which somebody else wrote, each as a function from bytes to a
//! [`Verdict`]. A target panics if the code under test does, or if a property that must hold for whatever
//! was accepted does not: what is decoded encodes back, what is read can be written again, damage never
//! shrinks a set. The same functions run under libFuzzer (`fuzz_targets`) and in plain tests
//! (`tests/replay.rs`). They do no I/O and remember nothing between two inputs.
//!
//! Nearly all formats carry checksums, which no mutation hits by chance. So targets try their input as it
//! is and also with its checksums made good; a leading control byte chooses among such ways.

#![forbid(unsafe_code)]

mod control;
mod input;
mod meta;
pub mod mutate;
mod nbd;
mod node_config;
pub mod seeds;
mod wire;

pub use control::control_codec;
pub use meta::{metadata_pages, superblock_pair};
pub use nbd::{nbd_negotiation, nbd_requests};
pub use node_config::config;
pub use wire::{hello, peer_frame};

/// What the code under test made of an input. Fuzzers may ignore it; the tests of the seeds do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Something in it was valid and was used.
    Accepted,
    /// Nothing was.
    Refused,
}

impl Verdict {
    fn of(accepted: bool) -> Self {
        if accepted { Self::Accepted } else { Self::Refused }
    }
}

/// A target.
pub type Target = fn(&[u8]) -> Verdict;

/// Every target with its name, which is that of its program and of its corpus directory.
pub const TARGETS: [(&str, Target); 8] = [
    ("nbd_negotiation", nbd_negotiation),
    ("nbd_requests", nbd_requests),
    ("peer_frame", peer_frame),
    ("hello", hello),
    ("superblock_pair", superblock_pair),
    ("metadata_pages", metadata_pages),
    ("control_codec", control_codec),
    ("config", config),
];
