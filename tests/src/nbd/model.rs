//! What an area of an export must hold, by all that one client has asked of it with many requests in flight.
//!
//! Requests in flight that overlap have no order. A byte that two of them write is unsettled until a write that
//! overlaps with none in flight; a read is checked but for what was unsettled, or written to while it was in
//! flight. Whoever uses this is the only one who writes to the area.

use std::ops::Range;

use anyhow::{Result, ensure};

/// The area.
pub(super) struct Model {
    content: Vec<u8>,
    /// What two writes in flight at once have left.
    unsettled: Vec<Range<usize>>,
    writes: Vec<(u64, Range<usize>)>,
    reads: Vec<Seen>,
}

/// What a read in flight must bring.
struct Seen {
    cookie: u64,
    range: Range<usize>,
    expected: Vec<u8>,
    /// What it may bring anything for.
    open: Vec<Range<usize>>,
}

impl Model {
    /// An area of zeroes.
    pub(super) fn new(len: usize) -> Self {
        Self { content: vec![0; len], unsettled: Vec::new(), writes: Vec::new(), reads: Vec::new() }
    }

    /// A write is sent; without data, of zeroes.
    pub(super) fn write(&mut self, cookie: u64, range: Range<usize>, data: Option<&[u8]>) {
        match data {
            Some(data) => self.content[range.clone()].copy_from_slice(data),
            None => self.content[range.clone()].fill(0),
        }
        let before = std::mem::take(&mut self.unsettled);
        self.unsettled = before.into_iter().flat_map(|old| without(&old, &range)).collect();
        self.unsettled.extend(self.writes.iter().filter_map(|(_, other)| common(other, &range)));
        for read in &mut self.reads {
            read.open.extend(common(&read.range, &range));
        }
        self.writes.push((cookie, range));
    }

    /// A write is answered.
    pub(super) fn written(&mut self, cookie: u64) {
        self.writes.retain(|(sent, _)| *sent != cookie);
    }

    /// A read is sent.
    pub(super) fn read(&mut self, cookie: u64, range: Range<usize>) {
        let writes = self.writes.iter().map(|(_, range)| range);
        let open = self.unsettled.iter().chain(writes).filter_map(|other| common(other, &range)).collect();
        let expected = self.content[range.clone()].to_vec();
        self.reads.push(Seen { cookie, range, expected, open });
    }

    /// A read is answered with `data`, of which the bytes at `part` of it are judged; how many were.
    pub(super) fn judge(&self, cookie: u64, part: Range<usize>, data: &[u8]) -> Result<usize> {
        let Some(read) = self.reads.iter().find(|read| read.cookie == cookie) else { return Ok(0) };
        let start = read.range.start;
        let whole = start + part.start..start + part.end;
        let mut parts = vec![whole];
        for open in &read.open {
            parts = parts.into_iter().flat_map(|part| without(&part, open)).collect();
        }
        let mut judged = 0;
        for part in parts {
            let (expected, found) = (part.start - start..part.end - start, part.start - start);
            let data = &data[found..found + part.len()];
            ensure!(read.expected[expected] == *data, "bytes {part:?} of the area are not what was written");
            judged += part.len();
        }
        Ok(judged)
    }

    /// A read is done with.
    pub(super) fn forget(&mut self, cookie: u64) {
        self.reads.retain(|read| read.cookie != cookie);
    }
}

/// What two ranges have in common.
fn common(one: &Range<usize>, other: &Range<usize>) -> Option<Range<usize>> {
    let both = one.start.max(other.start)..one.end.min(other.end);
    (both.start < both.end).then_some(both)
}

/// What is left of a range.
fn without(whole: &Range<usize>, part: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let before = whole.start..whole.end.min(part.start);
    let after = whole.start.max(part.end)..whole.end;
    [before, after].into_iter().filter(|rest| rest.start < rest.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_settled_is_judged_and_nothing_else() {
        let mut model = Model::new(100);
        model.write(1, 10..30, Some(&[1; 20]));
        model.write(2, 20..40, Some(&[2; 20]));
        model.written(1);
        model.written(2);
        model.read(3, 0..50);
        let mut data = [[0; 10], [1; 10], [9; 10], [2; 10], [0; 10]].concat();
        assert_eq!(model.judge(3, 0..50, &data).unwrap(), 40, "20 to 29 may be anything");
        data[35] = 0;
        assert!(model.judge(3, 0..50, &data).is_err());
        assert_eq!(model.judge(3, 0..30, &data).unwrap(), 20);
        model.forget(3);

        model.write(4, 15..25, None);
        model.written(4);
        model.read(5, 10..40);
        model.write(6, 30..32, Some(&[7; 2]));
        let data = [&[1; 5][..], &[0; 10], &[8; 5], &[4; 2], &[2; 8]].concat();
        assert_eq!(model.judge(5, 0..30, &data).unwrap(), 23, "25 to 29 unsettled, 30 and 31 under way");
    }
}
