//! Keeps a device on the primary of its volume.
//!
//! When the device's connection dies, or another node is primary, it finds the primary and gives the device a new
//! connection to it. It decides nothing about requests: what is unanswered the device sends again, and the primary
//! knows a replay from what it replaces (docs/map.md). It may be killed at any time; the device goes on with the
//! connection that it has, and the next keeper takes over.
//!
//! Never does: letting a device go on with content of another lineage, or with less of it than it had; ending a device.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::Context;
use blkrepl_nbd::{ExportFacts, Target};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::front_end::{FrontEnd, Progress};
use super::locator::{Found, Locator, Refusals, target_of};
use super::record::Recorder;
use crate::signals::Interrupt;

/// How often nodes are asked who is primary, and the device is looked at.
const WATCH: Duration = Duration::from_secs(1);
/// First and longest pause between two searches for the primary.
const SEARCH_PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(250));
/// How often it is told that the primary is not found.
pub(super) const TELL: Duration = Duration::from_secs(10);
/// How long the kernel may take to notice that a connection was shut down.
const SHUT_DOWN_LIMIT: Duration = Duration::from_millis(300);
/// Looks without progress after which a connection is taken for dead: at first, and at most.
const PATIENCE: (u32, u32) = (2, 60);

/// How keeping a device came to an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The device is gone: somebody unmapped it.
    Unmapped,
    /// The keeper was asked to end. The device stays.
    Stopped,
}

/// A keeper of one device.
pub struct Keeper<'a, F> {
    front: &'a mut F,
    locator: Locator,
    recorder: Recorder,
    /// What nodes call the primary that the device is connected to.
    called: Option<Target>,
    /// Our end of the device's connection: to end it if the primary is elsewhere.
    held: Option<OwnedFd>,
    /// Nodes in a row that said that another one is primary.
    contradicted: u32,
    /// What the device had done when it was looked at last, and for how many looks in a row nothing.
    seen: Option<Progress>,
    still: u32,
    /// Looks without progress after which the connection is taken for dead.
    patience: u32,
}

impl<'a, F: FrontEnd> Keeper<'a, F> {
    fn new(front: &'a mut F, locator: Locator, recorder: Recorder) -> Self {
        Self {
            front,
            locator,
            recorder,
            called: None,
            held: None,
            contradicted: 0,
            seen: None,
            still: 0,
            patience: PATIENCE.0,
        }
    }

    /// A keeper of a device that was just made on the connection that was found.
    pub fn of_new(front: &'a mut F, locator: Locator, recorder: Recorder, found: Found) -> Self {
        let mut keeper = Self::new(front, locator, recorder);
        keeper.recorder.connected(&found.target, found.called.as_ref());
        (keeper.called, keeper.held) = (found.called, Some(found.connection));
        keeper
    }

    /// A keeper of a device that an earlier one made.
    pub fn of_old(front: &'a mut F, locator: Locator, recorder: Recorder) -> Self {
        let mut keeper = Self::new(front, locator, recorder);
        keeper.called = keeper.recorder.last().called.as_deref().and_then(target_of);
        keeper.recorder.taken_over();
        keeper
    }

    /// Keeps the device until it is gone or the keeper is to end.
    ///
    /// # Errors
    /// The device cannot be watched any more.
    pub fn keep(mut self, interrupt: &Interrupt) -> anyhow::Result<Ending> {
        // A connection that an earlier keeper gave can neither be looked at nor ended: it may be dead, or its node may
        // hang. So the device gets another one.
        let mut lost = self.held.is_none();
        let mut dead = lost && self.recorder.last().primary.is_none();
        loop {
            if !self.front.is_there().context("look at the device")? {
                return Ok(Ending::Unmapped);
            }
            if interrupt.is_set() {
                return Ok(Ending::Stopped);
            }
            if lost {
                lost = !self.reconnect(dead, interrupt)?;
                continue;
            }
            let told = self.front.wait_dead(WATCH)?;
            dead = self.is_dead(told);
            if dead {
                tracing::info!("volume {} lost its connection", self.front.identity().volume);
            }
            lost = dead || self.is_elsewhere() || self.is_stuck();
        }
    }

    /// Gives the device a connection to the primary. `dead`: it is known to have none. False if the keeper was
    /// interrupted, or the device went.
    fn reconnect(&mut self, dead: bool, interrupt: &Interrupt) -> anyhow::Result<bool> {
        let since = Instant::now();
        let mut pause = SEARCH_PAUSE.0;
        let mut told: Option<Instant> = None;
        self.recorder.searching();
        while self.front.is_there().context("look at the device")? && !interrupt.is_set() {
            let reason = match self.locator.find() {
                Ok(found) => match self.take(found, dead) {
                    Ok(()) => {
                        self.recorder.reconnected(since.elapsed());
                        return Ok(true);
                    }
                    Err(reason) => reason,
                },
                Err(refusals) => explain(&refusals),
            };
            if told.is_none_or(|at| at.elapsed() >= TELL) {
                tracing::warn!("volume {} waits for its primary: {reason}", self.front.identity().volume);
                self.recorder.waiting(&reason);
                told = Some(Instant::now());
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(SEARCH_PAUSE.1);
        }
        Ok(false)
    }

    /// Gives the device a connection to a node that serves the volume.
    fn take(&mut self, found: Found, dead: bool) -> Result<(), String> {
        let Found { target, facts, connection, called } = found;
        let resize = self.check(&target, &facts)?;
        let fails = |error: std::io::Error| format!("the kernel: {error}");
        if !dead {
            self.end_connection().map_err(fails)?;
        }
        self.front.replace(resize, &connection).map_err(fails)?;
        tracing::info!("volume {} goes on at {target}", self.front.identity().volume);
        self.recorder.connected(&target, called.as_ref());
        (self.called, self.held) = (called, Some(connection));
        (self.contradicted, self.seen, self.still) = (0, None, 0);
        Ok(())
    }

    /// Whether the device can go on with what a node serves; the new size and block size, if they have changed.
    fn check(&self, target: &Target, facts: &ExportFacts) -> Result<Option<(u64, u32)>, String> {
        let identity = self.front.identity();
        if facts.lineage != Some(identity.lineage) {
            return Err(format!(
                "{target} serves content of another lineage (a forced promotion, or another volume of that name): what \
                 was acknowledged may be missing there. Unmount, `blkrepl unmap {} --force`, map again, and check \
                 the file system",
                identity.volume
            ));
        }
        let (bytes, block_size) = self.front.size().ok_or("the device is gone")?;
        let whole = facts.size - facts.size % u64::from(block_size.max(1));
        if whole < bytes {
            return Err(format!("{target} has {} bytes of it, and the device {bytes}", facts.size));
        }
        Ok((whole > bytes).then_some((whole, block_size)))
    }

    /// Nodes say, twice in a row, that another one is primary than the one that the device is connected to.
    fn is_elsewhere(&mut self) -> bool {
        let Some(called) = &self.called else { return false };
        match self.locator.primary() {
            Some(primary) if primary != *called => self.contradicted += 1,
            Some(_) => self.contradicted = 0,
            None => {}
        }
        self.contradicted >= 2
    }

    /// Whether the device has no connection any more. `told`: it says that one has died; which one it does not say, and
    /// it may say so late, after another one was to take its place.
    ///
    /// The connection itself tells. Who takes a live one for dead gives it up, which is told, and so on without end.
    fn is_dead(&mut self, told: bool) -> bool {
        let Some(held) = &self.held else { return told };
        // The device may not have taken it: the death of the one before had not reached it by then. Where it has, this
        // changes nothing.
        has_ended(held) || self.front.replace(None, held).is_err()
    }

    /// Ends the connection that the device may still have, and waits until the kernel has noticed. The primary ends it
    /// as well, if it is the same one.
    fn end_connection(&mut self) -> std::io::Result<()> {
        let end = Instant::now() + SHUT_DOWN_LIMIT;
        if let Some(connection) = self.held.take() {
            // It may be dead by now, which is what is wanted.
            let _dead = rustix::net::shutdown(&connection, rustix::net::Shutdown::Both);
        }
        while Instant::now() < end && !self.front.wait_dead(end - Instant::now())? {}
        Ok(())
    }

    /// Requests are in flight, and none was answered for some looks: a death may have gone unheard. Where none was, the
    /// primary is slow; the next time this waits longer.
    fn is_stuck(&mut self) -> bool {
        let now = self.front.progress();
        let before = std::mem::replace(&mut self.seen, now);
        let (Some(now), Some(before)) = (now, before) else { return false };
        if now.in_flight == 0 || now.done != before.done {
            self.still = 0;
            self.patience = PATIENCE.0;
            return false;
        }
        self.still += 1;
        let stuck = self.still >= self.patience;
        if stuck {
            self.patience = (self.patience * 2).min(PATIENCE.1);
        }
        stuck
    }
}

/// Whether a connection was shut down, by whichever end.
fn has_ended(connection: &OwnedFd) -> bool {
    let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    let mut asked = [PollFd::new(connection, PollFlags::RDHUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut asked, Some(&now)).is_ok() && asked[0].revents().intersects(gone)
}

/// What each node said.
pub(super) fn explain(refusals: &Refusals) -> String {
    let each: Vec<String> = refusals.iter().map(|(target, error)| format!("{target}: {error}")).collect();
    if each.is_empty() { "no node has answered yet".to_owned() } else { each.join("; ") }
}

#[cfg(test)]
#[path = "keeper_tests.rs"]
mod tests;
