//! The small bodies that travel inside a frame: runs, hashes, compare results, reports, texts.
//!
//! Decoders get the bytes that really arrived, already checked against the frame's checksum, and size
//! what they allocate from those bytes alone. Layouts: docs/protocol.md.

use super::cursor::{Cursor, put_incarnation, put_member};
use super::kind::RUN_LEN;
use super::message::{BLOCK_HASH_LEN, BaseContent, BlockHash, InconsistentMark, PeerReport, Run, RunsKind};
use super::{FrameKind, REGIONS_MAX, VOLUME_BLOCKS_MAX, WireError};
use crate::types::{Epoch, Incarnation, Member, NodeId, REPLICAS_MAX, Reign, ReplicaSlot, SuperblockTrust};

/// Bytes of an encoded [`PeerReport`].
pub(super) const REPORT_LEN: u32 = 88;

const SELECT_INTENT: u8 = 0;
const SELECT_FOREIGN: u8 = 1;
/// Plus the slot.
const SELECT_DIRTY: u8 = 16;

/// The selector byte of a list of runs.
pub(super) fn selector_of(kind: RunsKind) -> u8 {
    match kind {
        RunsKind::Intent => SELECT_INTENT,
        RunsKind::Foreign => SELECT_FOREIGN,
        // A slot out of range becomes a selector that no decoder accepts.
        RunsKind::Dirty(slot) => SELECT_DIRTY.saturating_add(slot.0),
    }
}

/// What a selector byte means, if anything.
pub(super) fn runs_kind_of(selector: u8) -> Option<RunsKind> {
    match selector {
        SELECT_INTENT => Some(RunsKind::Intent),
        SELECT_FOREIGN => Some(RunsKind::Foreign),
        _ => {
            let slot = selector.checked_sub(SELECT_DIRTY)?;
            (usize::from(slot) < REPLICAS_MAX).then_some(RunsKind::Dirty(ReplicaSlot(slot)))
        }
    }
}

pub(super) fn encode_runs(runs: &[Run], out: &mut Vec<u8>) {
    out.reserve(runs.len() * RUN_LEN);
    for run in runs {
        out.extend_from_slice(&run.start.to_le_bytes());
        out.extend_from_slice(&run.count.to_le_bytes());
    }
}

/// Runs must be ascending, not overlap, not be empty, and lie inside the largest volume.
pub(super) fn decode_runs(kind: RunsKind, body: &[u8]) -> Result<Vec<Run>, WireError> {
    let bound = if kind == RunsKind::Intent { REGIONS_MAX } else { VOLUME_BLOCKS_MAX };
    let (items, []) = body.as_chunks::<RUN_LEN>() else {
        return Err(WireError::BodyLength { what: FrameKind::Runs.name(), len: body.len() });
    };
    let mut runs = Vec::with_capacity(items.len());
    let mut from = 0u64;
    for item in items {
        let mut cursor = Cursor::new(FrameKind::Runs.name(), item);
        let (start, count) = (cursor.u64()?, cursor.u64()?);
        let wrong = |field, value| WireError::Field { kind: FrameKind::Runs, field, value };
        if start < from {
            return Err(wrong("start of a run that is not after the one before it", start));
        }
        let end = start.checked_add(count).filter(|end| count > 0 && *end <= bound);
        from = end.ok_or_else(|| wrong("length of a run", count))?;
        runs.push(Run { start, count });
    }
    Ok(runs)
}

pub(super) fn encode_hashes(hashes: &[BlockHash], out: &mut Vec<u8>) {
    out.extend_from_slice(hashes.as_flattened());
}

pub(super) fn decode_hashes(body: &[u8]) -> Result<Vec<BlockHash>, WireError> {
    match body.as_chunks::<BLOCK_HASH_LEN>() {
        (hashes, []) => Ok(hashes.to_vec()),
        _ => Err(WireError::BodyLength { what: FrameKind::Compare.name(), len: body.len() }),
    }
}

/// Bit `i % 8` (from the least significant) of byte `i / 8` is flag `i`.
pub(super) fn encode_bits(flags: &[bool], out: &mut Vec<u8>) {
    out.extend(flags.chunks(8).map(|eight| {
        eight.iter().enumerate().fold(0u8, |byte, (bit, flag)| byte | (u8::from(*flag) << bit))
    }));
}

/// `items` flags; bits beyond them must be zero.
pub(super) fn decode_bits(items: u32, body: &[u8]) -> Result<Vec<bool>, WireError> {
    let count = items as usize;
    if body.len() != count.div_ceil(8) {
        return Err(WireError::BodyLength { what: FrameKind::CompareResult.name(), len: body.len() });
    }
    let mut flags = Vec::with_capacity(body.len() * 8);
    flags.extend(body.iter().flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1 == 1)));
    if flags.iter().skip(count).any(|flag| *flag) {
        let value = body.last().copied().map_or(0, u64::from);
        return Err(WireError::Field { kind: FrameKind::CompareResult, field: "padding", value });
    }
    flags.truncate(count);
    Ok(flags)
}

pub(super) fn encode_report(report: &PeerReport, out: &mut Vec<u8>) {
    let trust = match report.trust {
        SuperblockTrust::Sound => 0,
        SuperblockTrust::Doubtful => 1,
        SuperblockTrust::None => 2,
    };
    let base = match report.base {
        BaseContent::Zero => 0,
        BaseContent::Unknown => 1,
        BaseContent::Member => 2,
    };
    out.extend_from_slice(&[
        trust,
        base,
        u8::from(report.member.is_some()),
        u8::from(report.inconsistent.is_some()),
    ]);
    out.extend_from_slice(&report.damaged_pages.to_le_bytes());
    out.extend_from_slice(&report.epoch.0.to_le_bytes());
    out.extend_from_slice(&report.lineage.0.to_le_bytes());
    put_incarnation(out, report.member.unwrap_or_default());
    let mark = report.inconsistent.unwrap_or(NO_MARK);
    out.extend_from_slice(&mark.epoch.0.to_le_bytes());
    out.extend_from_slice(&mark.reign.0.to_le_bytes());
    put_member(out, mark.source);
}

/// What stands in the bytes of the inconsistent mark when there is none: zeroes.
const NO_MARK: InconsistentMark = InconsistentMark {
    epoch: Epoch(0),
    reign: Reign(0),
    source: Member { node: NodeId(0), incarnation: Incarnation { boot: 0, nonce: 0 } },
};

pub(super) fn decode_report(body: &[u8]) -> Result<PeerReport, WireError> {
    const KIND: FrameKind = FrameKind::Report;
    let wrong = |field, value: u8| WireError::Field { kind: KIND, field, value: u64::from(value) };
    let mut cursor = Cursor::new(KIND.name(), body);
    let [trust, base, has_member, has_mark] = cursor.array::<4>()?;
    let damaged_pages = cursor.u32()?;
    let epoch = Epoch(cursor.u64()?);
    let lineage = cursor.lineage()?;
    let member = cursor.incarnation()?;
    let mark = InconsistentMark {
        epoch: Epoch(cursor.u64()?),
        reign: Reign(cursor.u64()?),
        source: cursor.member()?,
    };
    cursor.end()?;
    Ok(PeerReport {
        trust: match trust {
            0 => SuperblockTrust::Sound,
            1 => SuperblockTrust::Doubtful,
            2 => SuperblockTrust::None,
            _ => return Err(wrong("trust", trust)),
        },
        epoch,
        lineage,
        member: optional(KIND, "member", has_member, member, Incarnation::default())?,
        base: match base {
            0 => BaseContent::Zero,
            1 => BaseContent::Unknown,
            2 => BaseContent::Member,
            _ => return Err(wrong("base content", base)),
        },
        inconsistent: optional(KIND, "inconsistent mark", has_mark, mark, NO_MARK)?,
        damaged_pages,
    })
}

/// A value whose presence is told by a byte of its own; absent, its place must hold zeroes.
pub(super) fn optional<T: PartialEq>(
    kind: FrameKind,
    field: &'static str,
    present: u8,
    value: T,
    zero: T,
) -> Result<Option<T>, WireError> {
    match present {
        1 => Ok(Some(value)),
        0 if value == zero => Ok(None),
        _ => Err(WireError::Field { kind, field, value: u64::from(present) }),
    }
}

/// As much of `text` as fits `max` bytes without cutting a character.
pub(super) fn cut(text: &str, max: usize) -> &str {
    &text[..text.floor_char_boundary(max)]
}

/// The text in `body`, which the caller has bounded.
pub(super) fn decode_text(what: &'static str, body: &[u8]) -> Result<String, WireError> {
    std::str::from_utf8(body).map(str::to_owned).map_err(|_| WireError::Text(what))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_out_of_order_empty_or_past_the_largest_volume_are_refused() {
        let refused = |kind, runs: &[Run]| {
            let mut bytes = Vec::new();
            encode_runs(runs, &mut bytes);
            decode_runs(kind, &bytes).is_err()
        };
        let run = |start, count| Run { start, count };
        assert!(!refused(RunsKind::Foreign, &[run(0, 1), run(1, 1), run(9, 3)]));
        assert!(!refused(RunsKind::Foreign, &[run(VOLUME_BLOCKS_MAX - 1, 1)]));
        assert!(refused(RunsKind::Foreign, &[run(VOLUME_BLOCKS_MAX, 1)]));
        assert!(refused(RunsKind::Intent, &[run(REGIONS_MAX, 1)]));
        assert!(refused(RunsKind::Foreign, &[run(4, 2), run(5, 1)]));
        assert!(refused(RunsKind::Foreign, &[run(4, 0)]));
        assert!(refused(RunsKind::Foreign, &[run(u64::MAX, 2)]));
        assert!(decode_runs(RunsKind::Intent, &[0; 17]).is_err());
    }

    #[test]
    fn bits_beyond_the_count_must_be_zero() {
        assert_eq!(decode_bits(3, &[0b101]).unwrap(), [true, false, true]);
        assert!(decode_bits(3, &[0b1101]).is_err());
        assert!(decode_bits(9, &[0]).is_err());
        assert!(decode_bits(8, &[0, 0]).is_err());
    }

    #[test]
    fn a_report_says_nothing_in_the_bytes_of_what_is_absent() {
        let report = PeerReport {
            trust: SuperblockTrust::Doubtful,
            epoch: Epoch(7),
            lineage: crate::types::LineageId(9),
            member: None,
            base: BaseContent::Member,
            inconsistent: None,
            damaged_pages: 3,
        };
        let mut bytes = Vec::new();
        encode_report(&report, &mut bytes);
        assert_eq!(bytes.len(), REPORT_LEN as usize);
        assert_eq!(decode_report(&bytes).unwrap(), report);
        for at in [0, 1, 2, 3, 40, 80] {
            let mut bad = bytes.clone();
            bad[at] = 7;
            assert!(decode_report(&bad).is_err(), "byte {at}");
        }
        assert!(decode_report(&bytes[1..]).is_err());
        bytes.push(0);
        assert!(decode_report(&bytes).is_err());
    }

    #[test]
    fn a_text_is_cut_between_characters() {
        assert_eq!(cut("a\u{e9}b", 2), "a");
        assert_eq!(cut("a\u{e9}b", 3), "a\u{e9}");
        assert_eq!(cut("ab", 9), "ab");
    }
}
