//! What happened, as a hash always and as text if asked for. The text costs more than the run itself, so it
//! is made only when somebody will read it.

use std::fmt::{self, Write};

use crate::clock::Time;

/// See the module's head.
#[derive(Debug)]
pub(crate) struct Trace {
    hash: u64,
    text: Option<String>,
}

impl Trace {
    pub(crate) fn new(readable: bool) -> Self {
        Self { hash: 0xcbf2_9ce4_8422_2325, text: readable.then(String::new) }
    }

    /// Counts numbers into the hash.
    pub(crate) fn mix(&mut self, numbers: &[u64]) {
        for n in numbers {
            self.hash = (self.hash ^ n).wrapping_mul(0x100_0000_01b3);
            self.hash ^= self.hash >> 32;
        }
    }

    /// Writes a line, if anybody reads it.
    pub(crate) fn line(&mut self, now: Time, who: impl fmt::Display, what: fmt::Arguments<'_>) {
        if let Some(text) = &mut self.text {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{:>6}.{:06} {who:<8} {what}", now / 1_000_000, now % 1_000_000);
        }
    }

    pub(crate) fn is_readable(&self) -> bool {
        self.text.is_some()
    }

    pub(crate) fn finish(self) -> (u64, String) {
        (self.hash, self.text.unwrap_or_default())
    }
}
