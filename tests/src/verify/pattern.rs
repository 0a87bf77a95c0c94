//! What a unit of the volume holds: records of 64 bytes that all say the same write, each with its own
//! place, so that a torn unit, a unit of another place, another run's unit and plain garbage are told
//! apart. All zeroes is the value [`Value::Zero`].

use std::fmt;

use crate::bits::mix;

/// Bytes of a record.
pub const RECORD_LEN: usize = 64;

const MAGIC: u64 = 0x7966_6972_6576_6b62;

/// Content of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Value {
    /// Zeroes: never written, trimmed or zeroed.
    Zero,
    /// Written by the write with that number; numbers are unique in a run.
    Tag(u64),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zero => f.write_str("zeroes"),
            Self::Tag(number) => write!(f, "write {number}"),
        }
    }
}

/// Why the content of a unit cannot come from any one write to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Damage {
    /// Its records come from different writes.
    Torn {
        /// The unit that was read.
        unit: u64,
        /// What its first record says.
        first: Value,
        /// Index of the first record that disagrees.
        record: usize,
        /// What that one says.
        other: Value,
    },
    /// It was written, but for another unit or in another run.
    Foreign {
        /// The unit that was read.
        unit: u64,
        /// What it says it is.
        says: String,
    },
    /// No write left this.
    Garbage {
        /// The unit that was read.
        unit: u64,
        /// The record in it.
        record: usize,
    },
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Torn { unit, first, record, other } => {
                write!(f, "torn: unit {unit} begins with {first}, its record {record} is {other}")
            }
            Self::Foreign { unit, says } => write!(f, "foreign: unit {unit} holds {says}"),
            Self::Garbage { unit, record } => write!(f, "garbage: unit {unit}, record {record} is no record"),
        }
    }
}

/// Makes and reads units.
#[derive(Clone, Debug)]
pub struct Pattern {
    run: u64,
    unit_len: usize,
}

impl Pattern {
    /// For one run, named by its seed.
    #[must_use]
    pub fn new(run: u64, unit_len: usize) -> Self {
        assert!(
            unit_len > 0 && unit_len.is_multiple_of(RECORD_LEN),
            "a unit of {unit_len} bytes holds no records"
        );
        Self { run, unit_len }
    }

    /// Appends the content of `unit` as `value` leaves it.
    pub fn fill(&self, unit: u64, value: Value, out: &mut Vec<u8>) {
        let Value::Tag(number) = value else {
            out.resize(out.len() + self.unit_len, 0);
            return;
        };
        for record in 0..self.unit_len / RECORD_LEN {
            for word in self.record(unit, number, record as u64) {
                out.extend_from_slice(&word.to_le_bytes());
            }
        }
    }

    /// What `bytes`, read from `unit`, hold.
    ///
    /// # Errors
    /// [`Damage`], if no single write to that unit left them.
    pub fn read(&self, unit: u64, bytes: &[u8]) -> Result<Value, Damage> {
        assert_eq!(bytes.len(), self.unit_len, "a unit has {} bytes", self.unit_len);
        let mut first = None;
        for (record, piece) in bytes.chunks_exact(RECORD_LEN).enumerate() {
            let value = self.read_record(unit, record, piece)?;
            let first = *first.get_or_insert(value);
            if value != first {
                return Err(Damage::Torn { unit, first, record, other: value });
            }
        }
        Ok(first.unwrap_or(Value::Zero))
    }

    fn read_record(&self, unit: u64, record: usize, piece: &[u8]) -> Result<Value, Damage> {
        if piece.iter().all(|byte| *byte == 0) {
            return Ok(Value::Zero);
        }
        let mut words = [0u64; RECORD_LEN / 8];
        for (word, bytes) in words.iter_mut().zip(piece.chunks_exact(8)) {
            let mut le = [0; 8];
            le.copy_from_slice(bytes);
            *word = u64::from_le_bytes(le);
        }
        let [magic, run, its_unit, number, its_record, ..] = words;
        if magic != MAGIC {
            return Err(Damage::Garbage { unit, record });
        }
        if (run, its_unit, its_record) != (self.run, unit, record as u64) {
            let says = format!("record {its_record} of unit {its_unit}, write {number}, run {run}");
            return Err(Damage::Foreign { unit, says });
        }
        if words != self.record(unit, number, record as u64) {
            return Err(Damage::Garbage { unit, record });
        }
        Ok(Value::Tag(number))
    }

    fn record(&self, unit: u64, number: u64, record: u64) -> [u64; RECORD_LEN / 8] {
        let base = mix(self.run ^ mix(unit ^ mix(number ^ mix(record))));
        [MAGIC, self.run, unit, number, record, base, mix(base + 1), mix(base + 2)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(pattern: &Pattern, unit: u64, value: Value) -> Vec<u8> {
        let mut out = Vec::new();
        pattern.fill(unit, value, &mut out);
        out
    }

    #[test]
    fn what_was_filled_is_read() {
        let pattern = Pattern::new(7, 4096);
        for value in [Value::Zero, Value::Tag(0), Value::Tag(99)] {
            assert_eq!(pattern.read(3, &unit(&pattern, 3, value)), Ok(value));
        }
    }

    #[test]
    fn a_torn_unit_is_found_at_any_place() {
        let pattern = Pattern::new(7, 4096);
        let (old, new) = (unit(&pattern, 3, Value::Tag(1)), unit(&pattern, 3, Value::Tag(2)));
        for cut in (RECORD_LEN..4096).step_by(RECORD_LEN) {
            let mut mixed = new[..cut].to_vec();
            mixed.extend_from_slice(&old[cut..]);
            assert!(matches!(pattern.read(3, &mixed), Err(Damage::Torn { .. })), "cut at {cut}");
        }
        let mut half_zero = new;
        half_zero[2048..].fill(0);
        assert!(matches!(pattern.read(3, &half_zero), Err(Damage::Torn { other: Value::Zero, .. })));
    }

    #[test]
    fn foreign_units_and_garbage_are_told_apart() {
        let pattern = Pattern::new(7, 512);
        let other = unit(&pattern, 4, Value::Tag(1));
        assert!(matches!(pattern.read(3, &other), Err(Damage::Foreign { .. })));
        let run = unit(&Pattern::new(8, 512), 3, Value::Tag(1));
        assert!(matches!(pattern.read(3, &run), Err(Damage::Foreign { .. })));
        let mut flipped = unit(&pattern, 3, Value::Tag(1));
        flipped[500] ^= 4;
        assert!(matches!(pattern.read(3, &flipped), Err(Damage::Garbage { record: 7, .. })));
        assert!(matches!(pattern.read(3, &[0x55; 512]), Err(Damage::Garbage { .. })));
    }
}
