//! What clients asked and were told, and whether it fits together (design invariants 3 and 4).
//!
//! Every sector is a register. A write names itself in what it writes, so that for each value read it is
//! known which write it came from; only zeroes are anonymous. That makes linearizability exact and fast
//! (Gibbons and Korach): the operations of one value form a cluster, a cluster takes effect within a zone,
//! and a history is linearizable if and only if no two zones exclude each other.
//!
//! An operation's interval ends when the node let the answer go, which is at or before the time at which the
//! client has it. One that was not answered may take effect once, at any later time; one that its client did
//! again may do so only until that repetition is answered [R24].
//!
//! The promise ends at an *era*: a moment after which any value not older than the last flushed write may
//! be what is left (loss of power everywhere), or any value at all (a forced promotion).

use crate::clock::{NEVER, Time};
use crate::content::{ROT, at, named, tag};

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OpKind {
    Write,
    Zero,
    Read,
    Flush,
}

/// One operation.
#[derive(Clone, Debug)]
pub(crate) struct Op {
    pub(crate) kind: OpKind,
    pub(crate) client: u8,
    pub(crate) fua: bool,
    pub(crate) first: u64,
    pub(crate) count: u64,
    pub(crate) asked: Time,
    /// When the node let the answer go; `NEVER` if the client did not get it.
    pub(crate) answered: Time,
    /// The operation that does it again.
    replay: Option<usize>,
    /// What a read brought.
    values: Vec<u64>,
}

impl Op {
    fn writes(&self) -> bool {
        matches!(self.kind, OpKind::Write | OpKind::Zero)
    }
}

/// A moment at which the promise ended for what was not flushed.
#[derive(Debug)]
struct Era {
    at: Time,
    /// Per sector: nothing that was over by then may be all that is left.
    floor: Vec<Time>,
}

/// See the module's head.
#[derive(Debug)]
pub(crate) struct History {
    ops: Vec<Op>,
    eras: Vec<Era>,
    /// Per sector: when the newest write that was acknowledged (or read) was asked for. What ended before
    /// is overwritten.
    floor: Vec<Time>,
    /// The same of what was flushed.
    flushed: Vec<Time>,
    /// Zeroing operations by sector.
    zeroes: Vec<Vec<usize>>,
    /// What was acknowledged when a flush was asked for.
    flushing: Vec<(usize, Vec<Time>)>,
    pub(crate) excused_reads: u64,
}

impl History {
    pub(crate) fn new(sectors: u64) -> Self {
        Self {
            ops: Vec::new(),
            eras: Vec::new(),
            floor: vec![0; at(sectors)],
            flushed: vec![0; at(sectors)],
            zeroes: vec![Vec::new(); at(sectors)],
            flushing: Vec::new(),
            excused_reads: 0,
        }
    }

    pub(crate) fn op(&self, op: usize) -> &Op {
        &self.ops[op]
    }

    /// A client asks for something. `again`: the operation of unknown fate that this one repeats.
    pub(crate) fn ask(
        &mut self,
        client: u8,
        kind: OpKind,
        (first, count): (u64, u64),
        fua: bool,
        now: Time,
        again: Option<usize>,
    ) -> usize {
        let op = self.ops.len();
        let new = Op {
            kind,
            client,
            fua,
            first,
            count,
            asked: now,
            answered: NEVER,
            replay: None,
            values: Vec::new(),
        };
        self.ops.push(new);
        if let Some(first_try) = again {
            self.ops[first_try].replay = Some(op);
        }
        match kind {
            OpKind::Zero => (first..first + count).for_each(|s| self.zeroes[at(s)].push(op)),
            OpKind::Flush => self.flushing.push((op, self.floor.clone())),
            OpKind::Read | OpKind::Write => {}
        }
        op
    }

    /// The tags that a write writes.
    pub(crate) fn tags(&self, op: usize) -> impl Iterator<Item = u64> + use<> {
        let (first, count) = (self.ops[op].first, self.ops[op].count);
        (first..first + count).map(move |sector| tag(op, sector))
    }

    /// The latest point at which an operation may take effect.
    fn end(&self, op: usize) -> Time {
        let mut op = &self.ops[op];
        loop {
            match (op.answered, op.replay) {
                (NEVER, Some(next)) => op = &self.ops[next],
                (end, _) => return end,
            }
        }
    }

    /// The latest point at which this value may have been written to the sector; `None` if it never was.
    fn end_of(&self, sector: u64, value: u64) -> Option<Time> {
        match named(value) {
            Some((op, s)) if s == sector && op < self.ops.len() => Some(self.end(op)),
            Some(_) => None,
            // Zeroes, also those from before the first write.
            None => Some(self.zeroes[at(sector)].iter().map(|op| self.end(*op)).max().unwrap_or(0)),
        }
    }

    /// Why `value` cannot be what a member holds in the sector now, if so.
    pub(crate) fn outdated(&self, sector: u64, value: u64) -> Option<String> {
        if value & ROT != 0 {
            return None;
        }
        match self.end_of(sector, value) {
            None => Some(format!("sector {sector} holds {}", self.describe(value))),
            Some(end) if end < self.floor[at(sector)] => Some(format!(
                "sector {sector} holds {}, which was overwritten by a write acknowledged since (asked at {})",
                self.describe(value),
                self.floor[at(sector)]
            )),
            Some(_) => None,
        }
    }

    /// Names a value for people.
    pub(crate) fn describe(&self, value: u64) -> String {
        if value & ROT != 0 {
            return format!("rot over {}", self.describe(value & !ROT));
        }
        match named(value) {
            None => "zeroes".into(),
            Some((op, sector)) => match self.ops.get(op) {
                Some(o) => format!(
                    "write {op} of client {} to sector {sector} (asked {}, {})",
                    o.client,
                    o.asked,
                    if o.answered == NEVER {
                        "unanswered".into()
                    } else {
                        format!("answered {}", o.answered)
                    }
                ),
                None => format!("garbage {value:#x}"),
            },
        }
    }

    fn raise(&mut self, sector: u64, to: Time) {
        let floor = &mut self.floor[at(sector)];
        *floor = (*floor).max(to);
    }

    /// The node lets the answer to a write, zeroing or flush go. What follows for the members of the set
    /// holds from here on, whether the client gets it or not.
    pub(crate) fn released(&mut self, op: usize, durable: bool) {
        let (asked, first, count) = (self.ops[op].asked, self.ops[op].first, self.ops[op].count);
        match self.ops[op].kind {
            OpKind::Write | OpKind::Zero => {
                for sector in first..first + count {
                    self.raise(sector, asked);
                    if durable || self.ops[op].fua {
                        let flushed = &mut self.flushed[at(sector)];
                        *flushed = (*flushed).max(asked);
                    }
                }
            }
            OpKind::Flush => {
                if let Some(n) = self.flushing.iter().position(|(f, _)| *f == op) {
                    let (_, then) = self.flushing.swap_remove(n);
                    for (flushed, then) in self.flushed.iter_mut().zip(then) {
                        *flushed = (*flushed).max(then);
                    }
                }
            }
            OpKind::Read => {}
        }
    }

    /// The client has the answer, which the node let go at `released`.
    pub(crate) fn answered(&mut self, op: usize, released: Time, values: Vec<u64>) {
        self.ops[op].answered = released;
        if self.ops[op].kind != OpKind::Read {
            return;
        }
        let first = self.ops[op].first;
        let era = self.eras.last().map_or(0, |e| e.at);
        for (sector, value) in (first..).zip(&values) {
            self.excused_reads += u64::from(value & ROT != 0);
            // What was read is not taken back, unless its promise ended since.
            if let Some((write, _)) = named(*value).filter(|_| released >= era)
                && let Some(asked) = self.ops.get(write).map(|w| w.asked)
            {
                self.raise(sector, asked);
            }
        }
        self.ops[op].values = values;
    }

    /// The fate of an operation will never be known, and it is not done again.
    pub(crate) fn given_up(&mut self, op: usize) {
        self.flushing.retain(|(f, _)| *f != op);
    }

    /// From here on any value may be left that is not older than what was flushed; after a forced
    /// promotion any at all.
    pub(crate) fn promise_ends(&mut self, now: Time, forced: bool) {
        if forced {
            self.flushed.fill(0);
        }
        self.floor.clone_from(&self.flushed);
        for (_, then) in &mut self.flushing {
            then.clone_from(&self.flushed);
        }
        self.eras.push(Era { at: now, floor: self.flushed.clone() });
    }

    /// Checks everything that clients saw.
    ///
    /// # Errors
    /// What does not fit, and the operations that show it.
    pub(crate) fn check(&self) -> Result<(), String> {
        let mut by_sector: Vec<Vec<(usize, u64)>> = vec![Vec::new(); self.floor.len()];
        for (index, op) in self.ops.iter().enumerate() {
            for sector in op.first..op.first + op.count {
                match op.kind {
                    OpKind::Write => by_sector[at(sector)].push((index, tag(index, sector))),
                    OpKind::Read if op.answered != NEVER => {
                        by_sector[at(sector)].push((index, op.values[at(sector - op.first)]));
                    }
                    _ => {}
                }
            }
        }
        for (sector, seen) in by_sector.iter().enumerate() {
            self.check_sector(sector as u64, seen)?;
        }
        Ok(())
    }

    fn era_of(&self, t: Time) -> usize {
        self.eras.iter().take_while(|e| e.at <= t).count()
    }

    fn check_sector(&self, sector: u64, seen: &[(usize, u64)]) -> Result<(), String> {
        for era in 0..=self.eras.len() {
            let begin = if era == 0 { 0 } else { self.eras[era - 1].at };
            let floor = if era == 0 { 0 } else { self.eras[era - 1].floor[at(sector)] };
            let reads: Vec<(&Op, u64)> = seen
                .iter()
                .map(|(op, value)| (&self.ops[*op], *value))
                .filter(|(op, value)| {
                    op.kind == OpKind::Read && value & ROT == 0 && self.era_of(op.answered) == era
                })
                .collect();
            let zones = self.zones(sector, (era, begin, floor), seen, &reads)?;
            self.check_zones(sector, &zones)?;
            self.check_zeroes(sector, (era, begin, floor), &zones, &reads)?;
        }
        Ok(())
    }

    /// The zone of each value that took effect for certain within an era.
    fn zones(
        &self,
        sector: u64,
        (era, begin, floor): (usize, Time, Time),
        seen: &[(usize, u64)],
        reads: &[(&Op, u64)],
    ) -> Result<Vec<Zone>, String> {
        let mut zones: Vec<Zone> = Vec::new();
        // In the order of operations, so values stay sorted by their write.
        for (index, value) in seen {
            let op = &self.ops[*index];
            if op.kind == OpKind::Write && op.answered != NEVER && self.era_of(op.answered) == era {
                zones.push(Zone { value: *value, first_end: op.answered, last_begin: op.asked.max(begin) });
            }
        }
        zones.sort_by_key(|z| z.value);
        for (op, value) in reads.iter().filter(|(_, value)| *value != 0) {
            let read_begin = op.asked.max(begin);
            let write = named(*value).filter(|(w, s)| *s == sector && *w < self.ops.len());
            let Some((write, _)) = write.filter(|(w, _)| self.ops[*w].writes()) else {
                return Err(format!("a read (asked {}) brings {}", op.asked, self.describe(*value)));
            };
            let w = &self.ops[write];
            if op.answered < w.asked {
                return Err(format!("a read answered at {} brings {}", op.answered, self.describe(*value)));
            }
            let at = match zones.binary_search_by_key(value, |z| z.value) {
                Ok(at) => at,
                Err(at) => {
                    // Left over from before the era, or a write whose answer nobody got.
                    let before = w.asked < begin;
                    if before
                        && self.end(write).max(if self.era_of(w.asked) == era { NEVER } else { 0 }) < floor
                    {
                        return Err(format!(
                            "sector {sector}: a read asked at {} brings {}, lost its place to a flushed write",
                            op.asked,
                            self.describe(*value)
                        ));
                    }
                    let end = if before { begin } else { self.end(write) };
                    zones.insert(at, Zone { value: *value, first_end: end, last_begin: w.asked.max(begin) });
                    at
                }
            };
            zones[at].first_end = zones[at].first_end.min(op.answered);
            zones[at].last_begin = zones[at].last_begin.max(read_begin);
        }
        Ok(zones)
    }

    fn check_zones(&self, sector: u64, zones: &[Zone]) -> Result<(), String> {
        let mut forward: Vec<&Zone> = zones.iter().filter(|z| z.first_end < z.last_begin).collect();
        forward.sort_by_key(|z| z.first_end);
        for pair in forward.windows(2) {
            if pair[1].first_end < pair[0].last_begin {
                return Err(self.conflict(sector, pair[0], pair[1]));
            }
        }
        // Forward zones do not overlap from here on: the last that begins before is the only one that can
        // hold a backward zone.
        for zone in zones.iter().filter(|z| z.first_end >= z.last_begin) {
            let n = forward.partition_point(|f| f.first_end < zone.last_begin);
            if let Some(outer) =
                n.checked_sub(1).map(|n| forward[n]).filter(|f| zone.first_end < f.last_begin)
            {
                return Err(self.conflict(sector, outer, zone));
            }
        }
        Ok(())
    }

    fn conflict(&self, sector: u64, a: &Zone, b: &Zone) -> String {
        format!(
            "sector {sector} held {} up to {} and from {} on, and in between {} ({} to {})",
            self.describe(a.value),
            a.first_end,
            a.last_begin,
            self.describe(b.value),
            b.first_end,
            b.last_begin
        )
    }

    /// Zeroes are anonymous: each read of them needs one zeroing (or the beginning) that no other value lies
    /// between.
    fn check_zeroes(
        &self,
        sector: u64,
        (era, begin, floor): (usize, Time, Time),
        zones: &[Zone],
        reads: &[(&Op, u64)],
    ) -> Result<(), String> {
        for (read, _) in reads.iter().filter(|(_, value)| *value == 0) {
            // What is over before the read begins has been, what begins after another's end comes after it.
            let fits = |zero_end: Time, zero_begin: Time| {
                zero_begin <= read.answered
                    && !zones.iter().any(|z| z.last_begin > zero_end && z.first_end < read.asked.max(begin))
            };
            let of_era = |op: &usize| self.ops[*op].asked >= begin;
            let list = &self.zeroes[at(sector)];
            let within =
                list.iter().filter(|op| of_era(op)).any(|op| fits(self.end(*op), self.ops[*op].asked));
            let older = list.iter().filter(|op| !of_era(op)).map(|op| self.end(*op)).max().unwrap_or(0);
            let left = (era == 0 || older >= floor) && fits(begin, begin);
            if !within && !left {
                return Err(format!(
                    "sector {sector}: a read of client {} asked at {} (answered {}) brings zeroes, and something \
                     else was written since the last zeroing",
                    read.client, read.asked, read.answered
                ));
            }
        }
        Ok(())
    }
}

/// Within which time a value's operations have to take effect: from the first end to the last begin if that
/// is later (then all of that time), else at some point in between.
#[derive(Clone, Copy, Debug)]
struct Zone {
    value: u64,
    first_end: Time,
    last_begin: Time,
}

#[cfg(test)]
#[path = "history_tests.rs"]
mod tests;
