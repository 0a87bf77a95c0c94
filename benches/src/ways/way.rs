//! The ways, and the messages that each is measured with.

use std::time::Duration;

use anyhow::Result;

use super::link::Sample;
use super::{receive, send, wait};

/// How messages are received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Receive {
    /// As the reactor does: one receive after the other into a buffer of its own, bodies of 64 KiB and more where they
    /// belong.
    Single,
    /// A receive that stays, into provided buffers; bodies are copied from there.
    Multishot,
    /// The same, and one completion may tell of several buffers.
    Bundles,
}

/// How messages are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Send {
    /// As the reactor does: the kernel copies.
    Copy,
    /// The kernel sends from the buffer and says when it is done with it.
    ZeroCopy,
}

/// How completions are waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// As the reactor does: submitted and waited for in one call.
    Asleep,
    /// Asked for again and again; never asleep.
    Spinning,
    /// A thread of the kernel submits; completions are waited for asleep.
    KernelSubmits,
    /// The same, and completions are looked for again and again.
    KernelSubmitsSpinning,
}

/// A way, and the messages it is measured with.
#[derive(Clone, Copy, Debug)]
pub(super) enum Way {
    /// Messages of a header and a body of so many bytes, of which so many come together.
    Receive(Receive, usize, usize),
    /// Messages of so many bytes.
    Send(Send, usize),
    /// One message of 4 KiB after the other, each answered.
    Wait(Wait),
}

impl Way {
    /// All of them; the first of each group is the reactor's.
    pub(super) fn all() -> impl Iterator<Item = Self> {
        let receives =
            [(4096, 1), (4096, 32), (65536, 8), (1 << 20, 2)].into_iter().flat_map(|(len, batch)| {
                [Receive::Single, Receive::Multishot, Receive::Bundles]
                    .map(|how| Self::Receive(how, len, batch))
            });
        let sends = [4096, 65536, 1 << 20].into_iter();
        let sends = sends.flat_map(|len| [Send::Copy, Send::ZeroCopy].map(|how| Self::Send(how, len)));
        let waits = [Wait::Asleep, Wait::Spinning, Wait::KernelSubmits, Wait::KernelSubmitsSpinning];
        receives.chain(sends).chain(waits.map(Self::Wait))
    }

    /// What ways are compared within.
    pub(super) fn group(self) -> String {
        match self {
            Self::Receive(_, len, batch) => format!("receive {} KiB, {batch} at once", len >> 10),
            Self::Send(_, len) => format!("send {} KiB", len >> 10),
            Self::Wait(_) => "wait for 4 KiB".to_owned(),
        }
    }

    pub(super) fn name(self) -> String {
        let how = match self {
            Self::Receive(Receive::Single, ..) => "single",
            Self::Receive(Receive::Multishot, ..) => "multishot",
            Self::Receive(Receive::Bundles, ..) => "bundles",
            Self::Send(Send::Copy, _) => "copy",
            Self::Send(Send::ZeroCopy, _) => "zero-copy",
            Self::Wait(Wait::Asleep) => "asleep",
            Self::Wait(Wait::Spinning) => "spinning",
            Self::Wait(Wait::KernelSubmits) => "SQPOLL",
            Self::Wait(Wait::KernelSubmitsSpinning) => "SQPOLL, spinning",
        };
        format!("{}: {how}", self.group())
    }

    /// Measures it for about that time.
    pub(super) fn run(self, time: Duration) -> Result<Sample> {
        match self {
            Self::Receive(how, len, batch) => receive::run(how, len, batch, time),
            Self::Send(how, len) => send::run(how, len, time),
            Self::Wait(how) => wait::run(how, time),
        }
    }
}
