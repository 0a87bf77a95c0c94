//! What happened on this node: a bounded ring of events for `blkrepl events` and the demo.
//!
//! Holds the last [`EVENTS_MAX`] events of this run in memory; never writes to disk, never blocks the
//! thread that records one for longer than a short lock. Sequence numbers start at 1 with each run of
//! the process, grow by one, and are never reused within a run. A follower that falls behind the ring
//! sees a gap in the sequence numbers, nothing else.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use blkrepl_engine::replica::Event;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::sync::watch;

/// Events kept; the oldest is dropped for a new one.
pub const EVENTS_MAX: usize = 10_000;
/// Events handed out at once.
pub const EVENTS_BATCH_MAX: usize = 1000;

/// One event, as `events --json` prints it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EventRecord {
    /// Counts from 1 within one run of the node.
    pub seq: u64,
    /// Wall clock, milliseconds since 1970 (UTC).
    pub time_ms: u64,
    /// Name of the node that saw it.
    pub node: String,
    /// The volume, if it concerns one.
    pub volume: Option<String>,
    /// What kind, a fixed word in snake case.
    pub kind: String,
    /// For people.
    pub text: String,
    /// Numbers that belong to it; keys depend on the kind.
    pub data: Map<String, Value>,
}

/// An event before it has a place in the ring.
#[derive(Clone, Debug, PartialEq)]
pub struct Happening {
    /// What kind.
    pub kind: &'static str,
    /// For people.
    pub text: String,
    /// Numbers.
    pub data: Map<String, Value>,
}

impl Happening {
    /// One without numbers.
    pub fn new(kind: &'static str, text: impl Into<String>) -> Self {
        Self { kind, text: text.into(), data: Map::new() }
    }

    fn with(kind: &'static str, text: String, data: Value) -> Self {
        let data = match data {
            Value::Object(map) => map,
            _ => Map::new(),
        };
        Self { kind, text, data }
    }
}

/// The ring. Shared by every part of the process.
pub struct EventLog {
    node: String,
    ring: Mutex<VecDeque<EventRecord>>,
    last: watch::Sender<u64>,
}

impl EventLog {
    /// An empty ring for the node of this name.
    pub fn new(node: &str) -> Self {
        Self {
            node: node.to_string(),
            ring: Mutex::new(VecDeque::with_capacity(64)),
            last: watch::Sender::new(0),
        }
    }

    /// Records an event and logs it.
    pub fn record(&self, volume: Option<&str>, happening: Happening) {
        let Happening { kind, text, data } = happening;
        match kind {
            "failed" | "metadata_damaged" | "volume_failed" => {
                tracing::error!(volume = volume.unwrap_or("-"), kind, "{text}");
            }
            "refused" | "removing" | "discarding" => {
                tracing::warn!(volume = volume.unwrap_or("-"), kind, "{text}");
            }
            _ => tracing::info!(volume = volume.unwrap_or("-"), kind, "{text}"),
        }
        let seq = {
            let mut ring = self.ring.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let seq = *self.last.borrow() + 1;
            if ring.len() == EVENTS_MAX {
                ring.pop_front();
            }
            ring.push_back(EventRecord {
                seq,
                time_ms: wall_ms(),
                node: self.node.clone(),
                volume: volume.map(str::to_string),
                kind: kind.to_string(),
                text,
                data,
            });
            // Inside the lock, so that sequence numbers are handed out in ring order.
            self.last.send_replace(seq);
            seq
        };
        debug_assert!(seq > 0, "sequence numbers start at 1");
    }

    /// Up to [`EVENTS_BATCH_MAX`] events with a sequence number above `after`, oldest first.
    pub fn after(&self, after: u64) -> Vec<EventRecord> {
        let ring = self.ring.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        ring.iter().filter(|e| e.seq > after).take(EVENTS_BATCH_MAX).cloned().collect()
    }

    /// Changes whenever an event was recorded.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.last.subscribe()
    }
}

/// Wall clock in milliseconds since 1970. For people only; nothing is decided by it.
pub fn wall_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Wall time as `YYYY-MM-DD HH:MM:SS.mmm` (UTC).
pub fn format_wall(ms: u64) -> String {
    let (days, rest) = (ms / 86_400_000, ms % 86_400_000);
    // Civil date from days since 1970 (proleptic Gregorian, era of 400 years starting in March).
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + u64::from(month <= 2);
    let (h, m, s, milli) = (rest / 3_600_000, rest / 60_000 % 60, rest / 1000 % 60, rest % 1000);
    format!("{year:04}-{month:02}-{day:02} {h:02}:{m:02}:{s:02}.{milli:03}")
}

/// The event of the replication core in words. `name` gives the name of a node.
pub fn describe(event: &Event, name: impl Fn(blkrepl_engine::types::NodeId) -> String) -> Happening {
    match event {
        Event::ConfigFollowed { epoch, reign } => Happening::with(
            "config_followed",
            format!("follows epoch {epoch}, reign {reign}"),
            json!({"epoch": epoch.0, "reign": reign.0}),
        ),
        Event::TookOver { reign, regions } => Happening::with(
            "took_over",
            format!("takes over in reign {reign}; {regions} intent regions to compare"),
            json!({"reign": reign.0, "regions": regions}),
        ),
        Event::Serving { reign } => {
            Happening::with("serving", format!("serves clients in reign {reign}"), json!({"reign": reign.0}))
        }
        Event::StoppedServing(reason) => {
            Happening::new("stopped_serving", format!("serves clients no longer: {reason}"))
        }
        Event::Session { node, up } => Happening::with(
            "session",
            format!("session to {} is {}", name(*node), if *up { "up" } else { "down" }),
            json!({"peer": name(*node), "up": up}),
        ),
        Event::Removing { node, reason } => Happening::with(
            "removing",
            format!("proposes to take {} out of the in-sync set: {reason}", name(*node)),
            json!({"peer": name(*node)}),
        ),
        Event::ResyncStarted { node, bytes, reason } => Happening::with(
            "resync_started",
            format!("resync of {} begins: {bytes} bytes in the set ({reason})", name(*node)),
            json!({"peer": name(*node), "bytes": bytes, "reason": reason}),
        ),
        Event::Discarding { node, bytes } => Happening::with(
            "discarding",
            format!("{} holds writes of another lineage: up to {bytes} bytes are thrown away", name(*node)),
            json!({"peer": name(*node), "bytes": bytes}),
        ),
        Event::ResyncFinished { node, progress } => Happening::with(
            "resync_finished",
            format!(
                "resync of {} is done: {} of {} bytes compared or copied, {} bytes moved",
                name(*node),
                progress.done_bytes,
                progress.total_bytes,
                progress.moved_bytes
            ),
            json!({
                "peer": name(*node),
                "done_bytes": progress.done_bytes,
                "total_bytes": progress.total_bytes,
                "moved_bytes": progress.moved_bytes,
            }),
        ),
        Event::Refused { node, reason } => Happening::with(
            "refused",
            format!("refuses {}: {reason}", name(*node)),
            json!({"peer": name(*node)}),
        ),
        Event::Repaired { blocks } => Happening::with(
            "repaired",
            format!(
                "{} blocks from block {} could not be read; rewritten from a peer",
                blocks.count, blocks.start.0
            ),
            json!({"start": blocks.start.0, "count": blocks.count}),
        ),
        Event::Failed(reason) => Happening::new("failed", format!("this replica failed: {reason}")),
        Event::MetadataDamaged(what) => {
            Happening::new("metadata_damaged", format!("damaged metadata, the resync will be longer: {what}"))
        }
        other => Happening::new("other", format!("{other:?}")),
    }
}

#[cfg(test)]
mod tests {
    use blkrepl_engine::types::{NodeId, ResyncProgress};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_ring_keeps_the_newest_and_never_reuses_a_number() {
        let log = EventLog::new("n1");
        for i in 0..EVENTS_MAX + 5 {
            log.record(Some("vol0"), Happening::new("session", format!("{i}")));
        }
        let first = log.after(0);
        assert_eq!(first.len(), EVENTS_BATCH_MAX);
        assert_eq!(first[0].seq, 6);
        let last = (EVENTS_MAX + 5) as u64;
        assert_eq!(log.after(last - 1).iter().map(|e| e.seq).collect::<Vec<_>>(), [last]);
        assert_eq!(*log.watch().borrow(), last);
    }

    #[test]
    fn dates() {
        assert_eq!(format_wall(0), "1970-01-01 00:00:00.000");
        assert_eq!(format_wall(951_782_400_000), "2000-02-29 00:00:00.000");
        assert_eq!(format_wall(1_767_225_599_999), "2025-12-31 23:59:59.999");
    }

    #[test]
    fn numbers_of_a_resync_are_in_the_data() {
        let progress = ResyncProgress { done_bytes: 8, total_bytes: 9, moved_bytes: 4, bytes_per_s: 1 };
        let h = describe(&Event::ResyncFinished { node: NodeId(2), progress }, |n| format!("n{}", n.0));
        assert_eq!(h.kind, "resync_finished");
        assert_eq!(h.data["moved_bytes"], 4);
        assert_eq!(h.data["peer"], "n2");
    }

    /// The milliseconds that `text` shows, counted day by day from 1970.
    fn read_wall(text: &str) -> u64 {
        let numbers: Vec<u64> = text.split(['-', ' ', ':', '.']).map(|n| n.parse().unwrap()).collect();
        let [year, month, day, h, m, s, milli] = numbers[..] else { panic!("{text}") };
        let leap =
            |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
        let months = |year| [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
        assert!((1..=12).contains(&month) && h < 24 && m < 60 && s < 60, "{text}");
        assert!((1..=months(year)[month as usize - 1]).contains(&day), "{text}");
        let years: u64 = (1970..year).map(|year| 365 + u64::from(leap(year))).sum();
        let days = years + months(year)[..month as usize - 1].iter().sum::<u64>() + day - 1;
        ((days * 24 + h) * 60 + m) * 60_000 + s * 1000 + milli
    }

    proptest! {
        #[test]
        fn any_time_is_shown_as_the_calendar_has_it(ms in 0..253_402_300_800_000u64) {
            let text = format_wall(ms);
            prop_assert_eq!(text.len(), "1970-01-01 00:00:00.000".len());
            prop_assert_eq!(read_wall(&text), ms);
        }

        #[test]
        fn no_clock_is_too_wrong_to_be_shown(ms in any::<u64>()) {
            prop_assert!(format_wall(ms).contains(' '));
        }

        #[test]
        fn batches_give_each_event_once_and_in_order(count in 0..2500u64, after in 0..3000u64) {
            let log = EventLog::new("n1");
            for n in 0..count {
                log.record(None, Happening::new("session", n.to_string()));
            }
            let (mut seen, mut from) = (Vec::new(), after);
            loop {
                let batch = log.after(from);
                prop_assert!(batch.len() <= EVENTS_BATCH_MAX);
                let Some(last) = batch.last() else { break };
                from = last.seq;
                seen.extend(batch);
            }
            let (numbers, texts): (Vec<_>, Vec<_>) = seen.into_iter().map(|e| (e.seq, e.text)).unzip();
            let expected: Vec<_> = (after + 1..=count).collect();
            let expected_texts: Vec<_> = expected.iter().map(|seq| (seq - 1).to_string()).collect();
            prop_assert_eq!(numbers, expected);
            prop_assert_eq!(texts, expected_texts);
        }
    }
}
