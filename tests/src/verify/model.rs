//! What one unit may hold that a single worker writes, one operation at a time.
//!
//! Two sets are kept: what a read may return now, and what may be there after every node lost power
//! at once (anything since the last flush). An acknowledged operation leaves one value; one whose
//! answer never came leaves two, until its replay is acknowledged.

use super::pattern::Value;

/// One write since the last flush.
#[derive(Clone, Copy, Debug)]
struct Since {
    value: Value,
    /// When it was acknowledged, if it was.
    acked: Option<u64>,
    /// FUA: stable by itself once acknowledged.
    fua: bool,
}

/// The account of one unit.
#[derive(Clone, Debug)]
pub struct UnitModel {
    now: Vec<Value>,
    stable: Value,
    since: Vec<Since>,
}

impl Default for UnitModel {
    fn default() -> Self {
        Self { now: vec![Value::Zero], stable: Value::Zero, since: Vec::new() }
    }
}

impl UnitModel {
    /// A write was acknowledged at tick `at`; `flushed` is the tick before which everything
    /// acknowledged is known to be stable.
    pub fn acked(&mut self, value: Value, at: u64, fua: bool, flushed: u64) {
        self.now = vec![value];
        self.forget_flushed(flushed);
        self.since.push(Since { value, acked: Some(at), fua });
    }

    /// A write whose answer never came.
    pub fn unknown(&mut self, value: Value) {
        if !self.now.contains(&value) {
            self.now.push(value);
        }
        self.since.push(Since { value, acked: None, fua: false });
    }

    /// A read returned `value`.
    ///
    /// # Errors
    /// If nothing that was written and not overwritten since explains it.
    pub fn observe(&mut self, value: Value) -> Result<(), String> {
        if !self.now.contains(&value) {
            let legal: Vec<String> = self.now.iter().map(ToString::to_string).collect();
            let known = self.since.iter().any(|s| s.value == value) || self.stable == value;
            let kind = if known {
                "a lost acknowledged write (older content is back)"
            } else {
                "content never due here"
            };
            return Err(format!("{kind}: holds {value}, expected {}", legal.join(" or ")));
        }
        // What was seen once stays until it is overwritten.
        self.now = vec![value];
        Ok(())
    }

    /// Every node was ended at once: whatever came since the last flush may be there or not.
    pub fn lose_power(&mut self, flushed: u64) {
        self.forget_flushed(flushed);
        self.now = std::iter::once(self.stable).chain(self.since.iter().map(|s| s.value)).collect();
    }

    /// After a loss of every node at once, `value` was read at tick `at`: it is what a flush from then on makes
    /// stable. Until one does, a second loss may bring back anything that was not stable at the first: the
    /// replicas need not have lost the same.
    pub fn read_after_loss(&mut self, value: Value, at: u64) {
        self.since.push(Since { value, acked: Some(at), fua: false });
    }

    /// What was acknowledged before the tick `flushed` became stable.
    fn forget_flushed(&mut self, flushed: u64) {
        let stable = |s: &Since| s.acked.is_some_and(|at| s.fua || at < flushed);
        if let Some(last) = self.since.iter().rposition(stable) {
            self.stable = self.since[last].value;
            self.since.drain(..=last);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tag(number: u64) -> Value {
        Value::Tag(number)
    }

    #[test]
    fn a_lost_acknowledged_write_is_found() {
        let mut unit = UnitModel::default();
        unit.acked(tag(1), 10, false, 0);
        unit.acked(tag(2), 20, false, 0);
        let finding = unit.observe(tag(1)).unwrap_err();
        assert!(finding.contains("lost"), "{finding}");
        assert!(unit.observe(Value::Zero).is_err());
        unit.observe(tag(2)).unwrap();
    }

    #[test]
    fn an_unanswered_write_may_be_there_or_not_but_not_both_in_turn() {
        let mut unit = UnitModel::default();
        unit.acked(tag(1), 10, false, 0);
        unit.unknown(tag(2));
        unit.clone().observe(tag(2)).unwrap();
        unit.observe(tag(1)).unwrap();
        assert!(unit.observe(tag(2)).is_err(), "a read went forward to a write that it had shown absent");
    }

    #[test]
    fn an_unanswered_write_is_over_once_its_replay_is_acknowledged() {
        // [R24]: the stale request must not start after its replay.
        let mut unit = UnitModel::default();
        unit.unknown(tag(1));
        unit.acked(tag(2), 30, false, 0);
        assert!(unit.observe(tag(1)).is_err());
        unit.observe(tag(2)).unwrap();
    }

    #[test]
    fn after_power_loss_flushed_content_must_be_there_and_newer_may_be() {
        let mut unit = UnitModel::default();
        unit.acked(tag(1), 10, false, 0);
        unit.acked(tag(2), 20, false, 0);
        unit.acked(tag(3), 30, false, 0);
        unit.unknown(tag(4));
        unit.lose_power(25);
        for value in [2, 3, 4] {
            unit.clone().observe(tag(value)).unwrap();
        }
        assert!(unit.clone().observe(tag(1)).is_err(), "a flushed write was lost");
        assert!(unit.clone().observe(Value::Zero).is_err());
    }

    #[test]
    fn a_flush_after_a_loss_makes_stable_what_is_left_not_what_was_lost() {
        let mut unit = UnitModel::default();
        unit.acked(tag(1), 10, false, 0);
        unit.lose_power(0);
        unit.observe(Value::Zero).unwrap();
        unit.read_after_loss(Value::Zero, 20);
        let mut unflushed = unit.clone();
        unflushed.lose_power(15);
        unflushed.observe(tag(1)).unwrap();
        unit.lose_power(25);
        assert!(unit.clone().observe(tag(1)).is_err(), "a lost write came back over flushed content");
        unit.observe(Value::Zero).unwrap();
    }

    #[test]
    fn fua_is_stable_without_a_flush() {
        let mut unit = UnitModel::default();
        unit.acked(tag(1), 10, true, 0);
        unit.lose_power(0);
        assert!(unit.clone().observe(Value::Zero).is_err());
        unit.observe(tag(1)).unwrap();
    }
}
