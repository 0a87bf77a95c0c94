//! Whether all operations on a shared unit fit one order (linearizability of a register with unique
//! written values), in O(n log n) per unit.
//!
//! Each write with the reads that returned it is a cluster. Its zone runs from the first end of any of
//! its operations to the last start. If that is forward in time the value was certainly present
//! throughout; else there is a moment at which all of the cluster may have happened. An order exists
//! exactly if no two forward zones overlap and no backward zone lies inside a forward one (Gibbons and
//! Korach). Times are ticks of one counter, so no two are equal.

use std::collections::BTreeMap;
use std::fmt;

use super::pattern::Value;

/// What an operation did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Wrote the value.
    Write(Value),
    /// Read the value.
    Read(Value),
}

impl Access {
    /// The value written or read.
    #[must_use]
    pub fn value(self) -> Value {
        match self {
            Self::Write(value) | Self::Read(value) => value,
        }
    }
}

/// One operation on one unit.
#[derive(Clone, Copy, Debug)]
pub struct HistoryOp {
    /// The unit.
    pub unit: u64,
    /// Who did it; `u64::MAX` is the final read.
    pub worker: u64,
    /// What it did.
    pub access: Access,
    /// Tick before it was sent.
    pub start: u64,
    /// Tick after its answer, or after which it can no longer take effect; none if it may at any time.
    pub end: Option<u64>,
    /// It was answered: it did take effect between `start` and `end`. Otherwise it may have.
    pub acked: bool,
}

/// Why no order exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// A read returned what nobody wrote to the unit.
    FromNowhere {
        /// The unit.
        unit: u64,
        /// What was read.
        value: Value,
        /// When, in ticks.
        at: u64,
    },
    /// A read ended before the write that it returned was sent.
    FromTheFuture {
        /// The unit.
        unit: u64,
        /// What was read.
        value: Value,
    },
    /// Two values exclude each other: one was overwritten and came back, or an acknowledged one is lost.
    WentBack {
        /// The unit.
        unit: u64,
        /// The value that was certainly there ...
        held: Value,
        /// ... from and until (ticks), ...
        zone: (u64, u64),
        /// and the one that must lie within.
        lost: Value,
        /// Its own zone.
        within: (u64, u64),
    },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FromNowhere { unit, value, at } => {
                write!(
                    f,
                    "shared unit {unit}: a read at tick {at} returned {value}, which was never written there"
                )
            }
            Self::FromTheFuture { unit, value } => {
                write!(f, "shared unit {unit}: {value} was read before it was sent")
            }
            Self::WentBack { unit, held, zone, lost, within } => write!(
                f,
                "shared unit {unit}: {held} was there from tick {} to {}, yet {lost} took effect between {} and {}: \
                 an acknowledged write is lost or a read went back",
                zone.0, zone.1, within.0, within.1
            ),
        }
    }
}

struct Cluster {
    value: Value,
    sent: u64,
    acked: bool,
    read: bool,
    first_end: u64,
    last_start: u64,
}

impl Cluster {
    fn forward(&self) -> bool {
        self.first_end < self.last_start
    }

    fn zone(&self) -> (u64, u64) {
        (self.first_end.min(self.last_start), self.first_end.max(self.last_start))
    }
}

/// Checks all units. `base[unit]` is what each held before; operations may come in any order.
///
/// # Errors
/// The first finding, by unit.
pub fn check(base: &[Value], ops: &[HistoryOp]) -> Result<(), Finding> {
    let mut units: BTreeMap<u64, Vec<&HistoryOp>> = BTreeMap::new();
    for op in ops {
        units.entry(op.unit).or_default().push(op);
    }
    for (unit, ops) in units {
        let before = usize::try_from(unit).ok().and_then(|u| base.get(u)).copied().unwrap_or(Value::Zero);
        check_unit(unit, before, &ops)?;
    }
    Ok(())
}

fn check_unit(unit: u64, base: Value, ops: &[&HistoryOp]) -> Result<(), Finding> {
    let mut clusters: BTreeMap<Value, Cluster> = BTreeMap::new();
    let initial = Cluster { value: base, sent: 0, acked: true, read: false, first_end: 0, last_start: 0 };
    clusters.insert(base, initial);
    for op in ops {
        if let Access::Write(value) = op.access {
            let end = op.end.unwrap_or(u64::MAX);
            let (sent, acked) = (op.start, op.acked);
            let cluster = Cluster { value, sent, acked, read: false, first_end: end, last_start: sent };
            let twice = clusters.insert(value, cluster);
            assert!(twice.is_none(), "{value} was written twice to unit {unit}: numbers must be unique");
        }
    }
    for op in ops {
        let Access::Read(value) = op.access else { continue };
        let Some(end) = op.end else { continue };
        let Some(cluster) = clusters.get_mut(&value) else {
            return Err(Finding::FromNowhere { unit, value, at: op.start });
        };
        if end < cluster.sent {
            return Err(Finding::FromTheFuture { unit, value });
        }
        cluster.read = true;
        cluster.first_end = cluster.first_end.min(end);
        cluster.last_start = cluster.last_start.max(op.start);
    }
    // A write that was neither answered nor seen may never have happened.
    let clusters: Vec<Cluster> = clusters.into_values().filter(|c| c.acked || c.read).collect();
    check_zones(unit, &clusters)
}

fn check_zones(unit: u64, clusters: &[Cluster]) -> Result<(), Finding> {
    let mut forward: Vec<&Cluster> = clusters.iter().filter(|c| c.forward()).collect();
    forward.sort_by_key(|c| c.first_end);
    let clash = |held: &Cluster, lost: &Cluster| Finding::WentBack {
        unit,
        held: held.value,
        zone: held.zone(),
        lost: lost.value,
        within: lost.zone(),
    };
    for pair in forward.windows(2) {
        if pair[1].first_end < pair[0].last_start {
            return Err(clash(pair[0], pair[1]));
        }
    }
    for cluster in clusters.iter().filter(|c| !c.forward()) {
        let (from, to) = cluster.zone();
        // Forward zones do not overlap, so only the last one that begins before can hold this one.
        let index = forward.partition_point(|f| f.first_end < from);
        if let Some(holder) = index.checked_sub(1).map(|i| forward[i])
            && to < holder.last_start
        {
            return Err(clash(holder, cluster));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(number: u64, start: u64, end: Option<u64>) -> HistoryOp {
        HistoryOp {
            unit: 0,
            worker: 1,
            access: Access::Write(Value::Tag(number)),
            start,
            end,
            acked: end.is_some(),
        }
    }

    /// A write that was never answered and is over at `end`, because its replay was answered then.
    fn bounded(number: u64, start: u64, end: u64) -> HistoryOp {
        HistoryOp { acked: false, ..write(number, start, Some(end)) }
    }

    fn read(number: u64, start: u64, end: u64) -> HistoryOp {
        let value = if number == 0 { Value::Zero } else { Value::Tag(number) };
        HistoryOp { unit: 0, worker: 2, access: Access::Read(value), start, end: Some(end), acked: true }
    }

    fn checked(ops: &[HistoryOp]) -> Result<(), Finding> {
        check(&[Value::Zero], ops)
    }

    #[test]
    fn a_plain_history_is_good() {
        checked(&[read(0, 1, 2), write(1, 3, Some(4)), read(1, 5, 6), write(2, 7, Some(8)), read(2, 9, 10)])
            .unwrap();
    }

    #[test]
    fn a_lost_acknowledged_write_is_found() {
        let lost = [write(1, 1, Some(2)), write(2, 3, Some(4)), read(1, 5, 6)];
        assert!(matches!(checked(&lost), Err(Finding::WentBack { .. })));
        assert!(matches!(checked(&[write(1, 1, Some(2)), read(0, 3, 4)]), Err(Finding::WentBack { .. })));
    }

    #[test]
    fn a_stale_read_is_found() {
        // Both values were seen; the older one again after the newer.
        let stale =
            [write(1, 1, Some(2)), write(2, 3, Some(10)), read(2, 4, 5), read(1, 6, 7), read(2, 11, 12)];
        assert!(matches!(checked(&stale), Err(Finding::WentBack { .. })));
    }

    #[test]
    fn a_read_of_nothing_ever_written_is_found() {
        assert!(matches!(checked(&[read(9, 1, 2)]), Err(Finding::FromNowhere { .. })));
        assert!(matches!(
            checked(&[read(9, 1, 2), write(9, 3, Some(4))]),
            Err(Finding::FromTheFuture { .. })
        ));
    }

    #[test]
    fn concurrent_writes_may_take_effect_in_any_order() {
        for last in [1, 2] {
            checked(&[write(1, 1, Some(10)), write(2, 2, Some(9)), read(last, 11, 12)]).unwrap();
        }
        let both = [write(1, 1, Some(10)), write(2, 2, Some(9)), read(1, 11, 12), read(2, 13, 14)];
        assert!(checked(&both).is_err(), "one of them must be last");
    }

    #[test]
    fn an_unanswered_write_may_show_or_not_but_not_after_its_bound() {
        checked(&[write(1, 1, Some(2)), write(2, 3, None), read(1, 5, 6)]).unwrap();
        checked(&[write(1, 1, Some(2)), write(2, 3, None), read(1, 5, 6), read(2, 7, 8)]).unwrap();
        assert!(
            checked(&[write(1, 1, Some(2)), write(2, 3, None), read(2, 5, 6), read(1, 7, 8)]).is_err(),
            "seen, then gone"
        );
        // [R24]: its replay (write 3) was acknowledged at 8; it shows up afterwards.
        let revived = [bounded(2, 3, 8), write(3, 5, Some(8)), read(3, 9, 10), read(2, 11, 12)];
        assert!(checked(&revived).is_err());
        checked(&[bounded(2, 3, 8), write(3, 5, Some(8)), read(3, 9, 10)]).unwrap();
        checked(&[bounded(2, 3, 8), write(3, 5, Some(8)), read(2, 9, 10)]).unwrap();
    }

    #[test]
    fn a_write_that_was_seen_before_its_answer_is_good() {
        checked(&[write(1, 1, Some(20)), read(0, 2, 3), read(1, 4, 5), read(1, 6, 7)]).unwrap();
        assert!(checked(&[write(1, 1, Some(20)), read(1, 2, 3), read(0, 4, 5)]).is_err());
    }

    /// All orders of a small history, tried one by one: the slow truth to compare with.
    fn some_order_exists(ops: &[HistoryOp], value: Value, done: u32) -> bool {
        let open: Vec<usize> = (0..ops.len()).filter(|i| done & (1 << i) == 0).collect();
        if open.iter().all(|i| !ops[*i].acked) {
            return true;
        }
        open.iter().any(|&next| {
            // Nothing that must happen and is still open may have ended before this one began, and
            // nothing that is done may have begun after this one was over.
            let first =
                open.iter().all(|&o| !ops[o].acked || ops[o].end.is_none_or(|end| end >= ops[next].start));
            let done_before = |d: &usize| ops[next].end.is_none_or(|end| ops[*d].start <= end);
            first
                && (0..ops.len()).filter(|i| done & (1 << i) != 0).all(|d| done_before(&d))
                && match ops[next].access {
                    Access::Write(new) => some_order_exists(ops, new, done | 1 << next),
                    Access::Read(seen) => seen == value && some_order_exists(ops, value, done | 1 << next),
                }
        })
    }

    #[test]
    fn agrees_with_trying_all_orders_on_random_small_histories() {
        let mut random = crate::bits::Random::new(11);
        let (mut good, mut bad) = (0, 0);
        for _ in 0..20_000 {
            let writes = 1 + random.below(3);
            let total = writes + 1 + random.below(4);
            // Distinct ticks: a shuffled list of times, two per operation.
            let mut times: Vec<u64> = (1..=2 * total).collect();
            for i in (1..times.len()).rev() {
                times.swap(i, usize::try_from(random.below(i as u64 + 1)).unwrap());
            }
            let ops: Vec<HistoryOp> = (0..total)
                .zip(times.chunks_exact(2))
                .map(|(index, pair)| {
                    let (start, end) = (pair[0].min(pair[1]), pair[0].max(pair[1]));
                    if index < writes {
                        match random.below(6) {
                            0 => write(index + 1, start, None),
                            1 => bounded(index + 1, start, end),
                            _ => write(index + 1, start, Some(end)),
                        }
                    } else {
                        read(random.below(writes + 1), start, end)
                    }
                })
                .collect();
            let truth = some_order_exists(&ops, Value::Zero, 0);
            assert_eq!(checked(&ops).is_ok(), truth, "{ops:?}");
            if truth { good += 1 } else { bad += 1 }
        }
        assert!(good > 1000 && bad > 1000, "{good} good, {bad} bad: the mix is too one-sided");
    }
}
