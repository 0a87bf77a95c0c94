//! Planned changes: a move or a demote by the operator, and the clean stop of the process.
//!
//! The primary stops serving, drains, flushes, and only then proposes; it serves again only after the
//! proposal is known to have failed, or after an epoch bump of its own has voided it [R18]. Requests that
//! arrive meanwhile are held; the change of reign drops them and closes their connections [R23].

use std::time::Duration;

use crate::meta::CleanMark;
use crate::types::{Member, Nanos, NodeId, ProposalKind};

use super::Replica;
use super::flusher::FlushTicket;
use super::io::{Event, Output};
use super::meta_store::Ticket;

/// How long the own intent regions are waited for before a move: empty ones make the take-over quick.
const CLEAR_WAIT: Duration = Duration::from_millis(150);
/// A move that cannot drain within this time is given up.
const DRAIN_MAX: Duration = Duration::from_secs(10);
/// A stop flushes the ack set for at most this long before it settles for the own disk.
const STOP_FLUSH_MAX: Duration = Duration::from_secs(1);

/// What keeps the primary from serving on purpose.
#[derive(Debug)]
pub(super) enum Hold {
    None,
    Draining {
        to: Option<Member>,
        since: Nanos,
    },
    Flushing {
        to: Option<Member>,
        since: Nanos,
    },
    Clearing {
        to: Option<Member>,
        until: Nanos,
    },
    /// Proposed, or being voided.
    Proposed,
}

impl Hold {
    pub(super) fn is_none(&self) -> bool {
        matches!(self, Self::None)
    }
}

/// The clean stop.
#[derive(Debug)]
pub(super) enum Stop {
    No,
    Draining {
        until: Nanos,
    },
    /// `clean`: nothing is left to be written.
    Flushing {
        flush: FlushTicket,
        clean: bool,
    },
    Saving {
        tickets: Vec<Ticket>,
        clean: bool,
    },
    Marking {
        version: u64,
    },
    Done,
}

impl Stop {
    pub(super) fn is_no(&self) -> bool {
        matches!(self, Self::No)
    }

    /// True from the last flush on: nothing more is written.
    pub(super) fn is_closing(&self) -> bool {
        !matches!(self, Self::No | Self::Draining { .. })
    }
}

impl Replica {
    /// Begins to hand the primary role to the member on `to`. The change itself shows as a config.
    ///
    /// # Errors
    /// A sentence that says why this can't be done now.
    pub fn begin_move(&mut self, now: Nanos, to: NodeId) -> Result<(), String> {
        self.advance(now, true);
        let member = self
            .config
            .as_ref()
            .and_then(|c| c.member(to))
            .ok_or_else(|| format!("{to} is not in sync; wait until its resync has ended"))?;
        if member == self.me {
            return Err(format!("{to} is already primary"));
        }
        if self.session_member(to) != Some(member) {
            return Err(format!("{to} is not connected"));
        }
        self.begin_hold(Some(member))
    }

    /// Begins to give the primary role up without a successor.
    ///
    /// # Errors
    /// A sentence that says why this can't be done now.
    pub fn begin_demote(&mut self, now: Nanos) -> Result<(), String> {
        self.advance(now, true);
        self.begin_hold(None)
    }

    fn begin_hold(&mut self, to: Option<Member>) -> Result<(), String> {
        let now = self.now;
        let Some(primary) = &mut self.primary else {
            return Err("this node is not primary".into());
        };
        if !primary.serving() {
            return Err("this node has only just become primary and does not serve yet; try again".into());
        }
        if !primary.hold.is_none() || primary.pending.is_some() || primary.removal.is_some() {
            return Err("another change of this volume is under way; try again".into());
        }
        primary.hold = Hold::Draining { to, since: now };
        self.maintain();
        Ok(())
    }

    pub(super) fn pump_hold(&mut self) {
        let Some(primary) = &mut self.primary else { return };
        match primary.hold {
            Hold::None | Hold::Proposed => {}
            Hold::Draining { to, since } | Hold::Flushing { to, since } => {
                if self.now.since(since) > DRAIN_MAX || self.failure.is_some() {
                    return self.resume("requests did not drain in time");
                }
                let drained = primary.started() == 0 && primary.held.is_empty() && primary.parts.is_empty();
                if drained && primary.stable == Some(primary.last_seq()) {
                    let until = self.now.after(CLEAR_WAIT);
                    primary.hold = Hold::Clearing { to, until };
                    self.tell_stable(true);
                } else if drained {
                    primary.hold = Hold::Flushing { to, since };
                    primary.flush_wanted = true;
                    self.pump_flush();
                }
            }
            Hold::Clearing { to, until } => {
                self.clear_intents(true);
                let busy = self.primary.as_ref().is_some_and(|p| p.pending.is_some());
                if (!self.store.intent().is_empty() && self.now < until) || busy {
                    return;
                }
                let Some(primary) = &mut self.primary else { return };
                primary.hold = Hold::Proposed;
                self.propose(to.map_or(ProposalKind::Demote, ProposalKind::Move));
            }
        }
    }

    /// Serves again.
    pub(super) fn resume(&mut self, reason: &str) {
        let Some(primary) = &mut self.primary else { return };
        if !primary.hold.is_none() {
            primary.hold = Hold::None;
            self.event(Event::StoppedServing(format!(
                "the planned change was given up ({reason}); serving again"
            )));
        }
    }

    /// Still primary in the same reign under a newer epoch: whatever was proposed never happens.
    pub(super) fn hold_after_config(&mut self) {
        let Some(primary) = &mut self.primary else { return };
        if matches!(primary.hold, Hold::Proposed) && primary.pending.is_none() {
            self.resume("another change came first");
        }
    }

    /// Begins a clean stop: requests drain, everything is flushed, the superblock is marked. Ends with
    /// [`Output::Stopped`].
    pub fn begin_stop(&mut self, now: Nanos) {
        self.advance(now, true);
        if self.stop.is_no() {
            self.stop = Stop::Draining { until: now.after(STOP_FLUSH_MAX) };
        }
        self.maintain();
    }

    pub(super) fn pump_stop(&mut self) {
        match &self.stop {
            Stop::No | Stop::Done => {}
            Stop::Draining { until } => {
                let drained = match &mut self.primary {
                    Some(primary) => {
                        let flushed = primary.stable == Some(primary.last_seq()) || !primary.serving();
                        primary.flush_wanted |= !flushed;
                        primary.started() == 0 && primary.parts.is_empty() && flushed
                    }
                    None => self.following.is_idle(),
                };
                if self.failure.is_some() {
                    self.stopped();
                } else if drained || self.now >= *until {
                    self.clear_intents(true);
                    let flush = self.flusher.request();
                    // Out of patience with the others, not with the own disk: what is still to be written
                    // here would come after the mark.
                    let idle = self.primary.as_ref().is_none_or(|p| p.started() == 0);
                    let clean = idle && self.disk.locks.is_empty();
                    self.stop = Stop::Flushing { flush, clean };
                }
            }
            Stop::Flushing { flush, clean } if self.failure.is_some() || self.flusher.redeemed(*flush) => {
                let clean = *clean;
                self.clear_intents(true);
                let tickets = self.store.save_all();
                self.stop = Stop::Saving { tickets, clean };
            }
            Stop::Saving { clean: false, .. } => self.stopped(),
            Stop::Saving { tickets, .. } if tickets.iter().all(|t| self.store.redeemed(*t)) => {
                let (incarnation, epoch) = (self.incarnation(), self.store.superblock().epoch);
                let version = self.store.change_superblock(|sb| {
                    sb.clean = Some(CleanMark { incarnation, epoch });
                });
                self.stop = Stop::Marking { version };
            }
            Stop::Marking { version } if self.store.superblock_durable(*version) => self.stopped(),
            Stop::Flushing { .. } | Stop::Saving { .. } | Stop::Marking { .. } => {}
        }
    }

    fn stopped(&mut self) {
        self.stop = Stop::Done;
        self.out.push_back(Output::Stopped);
    }
}
