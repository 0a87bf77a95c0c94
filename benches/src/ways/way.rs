//! The ways, and the messages that each is measured with.

use anyhow::Result;

use super::link::Sample;
use super::{WaysOptions, receive, send, wait, write};

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
    /// The same on a ring without the reactor's flags.
    AsleepPlainRing,
    /// Asked for again and again; never asleep.
    Spinning,
    /// A thread of the kernel submits; completions are waited for asleep.
    KernelSubmits,
    /// The same, and completions are looked for again and again.
    KernelSubmitsSpinning,
}

/// What of a write is registered with the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Write {
    /// As the reactor does: the buffer.
    RegisteredBuffer,
    /// Nothing.
    OwnBuffer,
    /// The file as well.
    RegisteredFile,
    /// The buffer, and the ring has none of the reactor's flags (SINGLE_ISSUER, DEFER_TASKRUN).
    PlainRing,
}

/// Where a file lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Medium {
    Disk,
    Memory,
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
    /// Blocks of 4 KiB to a file, 32 in flight.
    Write(Write, Medium),
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
        let waits = [
            Wait::Asleep,
            Wait::AsleepPlainRing,
            Wait::Spinning,
            Wait::KernelSubmits,
            Wait::KernelSubmitsSpinning,
        ];
        let writes = [Medium::Disk, Medium::Memory].into_iter().flat_map(|medium| {
            [Write::RegisteredBuffer, Write::OwnBuffer, Write::RegisteredFile, Write::PlainRing]
                .map(|how| Self::Write(how, medium))
        });
        receives.chain(sends).chain(waits.map(Self::Wait)).chain(writes)
    }

    /// What ways are compared within.
    pub(super) fn group(self) -> String {
        match self {
            Self::Receive(_, len, batch) => format!("receive {} KiB, {batch} at once", len >> 10),
            Self::Send(_, len) => format!("send {} KiB", len >> 10),
            Self::Wait(_) => "wait for 4 KiB".to_owned(),
            Self::Write(_, Medium::Disk) => "write 4 KiB to a disk".to_owned(),
            Self::Write(_, Medium::Memory) => "write 4 KiB to memory".to_owned(),
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
            Self::Wait(Wait::AsleepPlainRing) => "asleep, plain ring",
            Self::Wait(Wait::Spinning) => "spinning",
            Self::Wait(Wait::KernelSubmits) => "SQPOLL",
            Self::Wait(Wait::KernelSubmitsSpinning) => "SQPOLL, spinning",
            Self::Write(Write::RegisteredBuffer, _) => "registered buffer",
            Self::Write(Write::OwnBuffer, _) => "nothing registered",
            Self::Write(Write::RegisteredFile, _) => "registered buffer and file",
            Self::Write(Write::PlainRing, _) => "registered buffer, plain ring",
        };
        format!("{}: {how}", self.group())
    }

    /// Measures it for about that time.
    pub(super) fn run(self, options: &WaysOptions) -> Result<Sample> {
        let time = options.time;
        match self {
            Self::Receive(how, len, batch) => receive::run(how, len, batch, time),
            Self::Send(how, len) => send::run(how, len, time),
            Self::Wait(how) => wait::run(how, time),
            Self::Write(how, Medium::Disk) => write::run(how, Medium::Disk, &options.disk_dir, time),
            Self::Write(how, Medium::Memory) => write::run(how, Medium::Memory, &options.tmpfs_dir, time),
        }
    }
}
