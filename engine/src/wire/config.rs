//! The committed config of a volume as bytes, little-endian. It lets a replica that meets a newer config
//! adopt it from the message instead of refusing [R12].
//!
//! A decoded config obeys the rules that every committed one obeys: lists sorted and without repeats,
//! slots distinct, members and primary among the replicas, a geometry that [`Geometry::new`] accepts.

use std::time::Duration;

use super::body::optional;
use super::cursor::{Cursor, put_incarnation, put_member};
use super::{FrameKind, WireError};
use crate::types::{
    ConfigView, Durability, Epoch, Geometry, Incarnation, LineageFork, LogIndex, Member, NodeId,
    REPLICAS_MAX, Reign, ReplicaSlot, ReplicaView, SlotSet, VolumeSettings,
};

const KIND: FrameKind = FrameKind::Config;
const FIXED_LEN: usize = 152;
const MEMBER_LEN: usize = 24;
const REPLICA_LEN: usize = 32;
const FORK_LEN: usize = 24;
/// Bytes of the shortest config: one replica, one member, no history.
pub(super) const CONFIG_LEN_MIN: u32 = 208;

const _: () = assert!(FIXED_LEN + MEMBER_LEN + REPLICA_LEN == CONFIG_LEN_MIN as usize);

/// Appends `view`.
///
/// A list longer than its count can say is encoded with the largest count, which no decoder accepts: the
/// frame encoder's own check reports it as the broken invariant that it is.
pub(super) fn encode_config(view: &ConfigView, out: &mut Vec<u8>) {
    let at = out.len();
    let small = |len: usize| u8::try_from(len).unwrap_or(u8::MAX);
    let nanos = |d: Duration| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX);
    out.extend_from_slice(&view.index.0.to_le_bytes());
    out.extend_from_slice(&view.cluster.0.to_le_bytes());
    out.extend_from_slice(&view.volume.0.to_le_bytes());
    out.extend_from_slice(&view.epoch.0.to_le_bytes());
    out.extend_from_slice(&view.reign.0.to_le_bytes());
    out.extend_from_slice(&view.lineage.0.to_le_bytes());
    out.extend_from_slice(&view.geometry.size().to_le_bytes());
    out.extend_from_slice(&view.geometry.block_size().to_le_bytes());
    out.extend_from_slice(&view.geometry.region_size().to_le_bytes());
    let durability = match view.settings.durability {
        Durability::Flush => 0,
        Durability::Always => 1,
    };
    out.extend_from_slice(&[
        durability,
        u8::from(view.primary.is_some()),
        small(view.in_sync.len()),
        small(view.replicas.len()),
    ]);
    out.extend_from_slice(&u32::try_from(view.history.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(&nanos(view.settings.peer_timeout).to_le_bytes());
    out.extend_from_slice(&nanos(view.settings.disk_timeout).to_le_bytes());
    out.extend_from_slice(&view.settings.intent_regions_max.to_le_bytes());
    out.extend_from_slice(&view.settings.resync_window_bytes.to_le_bytes());
    out.extend_from_slice(&nanos(view.settings.resync_latency_budget).to_le_bytes());
    put_member(out, view.primary.unwrap_or(NOBODY));
    debug_assert_eq!(out.len() - at, FIXED_LEN);
    for member in &view.in_sync {
        put_member(out, *member);
    }
    for replica in &view.replicas {
        out.extend_from_slice(&replica.node.0.to_le_bytes());
        out.extend_from_slice(&[replica.slot.0, u8::from(replica.last_member.is_some()), 0, 0, 0, 0, 0, 0]);
        put_incarnation(out, replica.last_member.unwrap_or_default());
    }
    for fork in &view.history {
        out.extend_from_slice(&fork.lineage.0.to_le_bytes());
        out.extend_from_slice(&fork.fork_epoch.0.to_le_bytes());
    }
}

/// What stands in the primary's place when there is none: zeroes.
const NOBODY: Member = Member { node: NodeId(0), incarnation: Incarnation { boot: 0, nonce: 0 } };

/// Reads a config; `body` must hold it and nothing else.
pub(super) fn decode_config(body: &[u8]) -> Result<ConfigView, WireError> {
    let mut cursor = Cursor::new(KIND.name(), body);
    let (mut view, counts) = decode_fixed(&mut cursor)?;
    // The counts must account for exactly the bytes that arrived before anything is allocated for them.
    let lists = counts.in_sync * MEMBER_LEN + counts.replicas * REPLICA_LEN;
    if cursor.remaining().checked_sub(lists) != counts.history.checked_mul(FORK_LEN) {
        return Err(cursor.length_error());
    }
    decode_lists(&mut cursor, counts, &mut view)?;
    cursor.end()?;
    check_config(&view)?;
    Ok(view)
}

#[derive(Clone, Copy)]
struct Counts {
    in_sync: usize,
    replicas: usize,
    history: usize,
}

/// The fixed part, and the lengths of the lists after it.
fn decode_fixed(c: &mut Cursor<'_>) -> Result<(ConfigView, Counts), WireError> {
    let index = LogIndex(c.u64()?);
    let cluster = c.cluster()?;
    let volume = c.volume()?;
    let epoch = Epoch(c.u64()?);
    let reign = Reign(c.u64()?);
    let lineage = c.lineage()?;
    let geometry = Geometry::new(c.u64()?, c.u32()?, c.u32()?)?;
    let [durability, has_primary, in_sync, replicas] = c.array::<4>()?;
    let history = c.u32()? as usize;
    let settings = VolumeSettings {
        durability: match durability {
            0 => Durability::Flush,
            1 => Durability::Always,
            _ => return Err(wrong("durability", u64::from(durability))),
        },
        peer_timeout: Duration::from_nanos(c.u64()?),
        disk_timeout: Duration::from_nanos(c.u64()?),
        intent_regions_max: c.u32()?,
        resync_window_bytes: c.u32()?,
        resync_latency_budget: Duration::from_nanos(c.u64()?),
    };
    let primary = optional(KIND, "primary", has_primary, c.member()?, NOBODY)?;
    if in_sync == 0 || in_sync > replicas {
        return Err(wrong("number of members", u64::from(in_sync)));
    }
    if usize::from(replicas) > REPLICAS_MAX {
        return Err(wrong("number of replicas", u64::from(replicas)));
    }
    let view = ConfigView {
        index,
        cluster,
        volume,
        epoch,
        reign,
        primary,
        in_sync: Vec::new(),
        replicas: Vec::new(),
        lineage,
        history: Vec::new(),
        geometry,
        settings,
    };
    Ok((view, Counts { in_sync: usize::from(in_sync), replicas: usize::from(replicas), history }))
}

/// The lists, whose lengths are already known to fit.
fn decode_lists(c: &mut Cursor<'_>, counts: Counts, view: &mut ConfigView) -> Result<(), WireError> {
    view.in_sync.reserve_exact(counts.in_sync);
    for _ in 0..counts.in_sync {
        view.in_sync.push(c.member()?);
    }
    view.replicas.reserve_exact(counts.replicas);
    for _ in 0..counts.replicas {
        let node = NodeId(c.u64()?);
        let [slot, has_last, padding @ ..] = c.array::<8>()?;
        if padding != [0; 6] {
            return Err(wrong("padding of a replica", node.0));
        }
        let last = c.incarnation()?;
        let last_member = optional(KIND, "last member of a replica", has_last, last, Incarnation::default())?;
        view.replicas.push(ReplicaView { node, slot: ReplicaSlot(slot), last_member });
    }
    view.history.reserve_exact(counts.history);
    for _ in 0..counts.history {
        view.history.push(LineageFork { lineage: c.lineage()?, fork_epoch: Epoch(c.u64()?) });
    }
    Ok(())
}

fn wrong(field: &'static str, value: u64) -> WireError {
    WireError::Field { kind: KIND, field, value }
}

/// The rules between the parts of a config.
fn check_config(view: &ConfigView) -> Result<(), WireError> {
    if view.reign.0 > view.epoch.0 {
        return Err(wrong("reign later than the epoch", view.reign.0));
    }
    if let Some(pair) = view.in_sync.windows(2).find(|pair| pair[0].node >= pair[1].node) {
        return Err(wrong("order of the members", pair[1].node.0));
    }
    if let Some(pair) = view.replicas.windows(2).find(|pair| pair[0].node >= pair[1].node) {
        return Err(wrong("order of the replicas", pair[1].node.0));
    }
    let mut slots = SlotSet::default();
    for replica in &view.replicas {
        if usize::from(replica.slot.0) >= REPLICAS_MAX || slots.contains(replica.slot) {
            return Err(wrong("slot of a replica", u64::from(replica.slot.0)));
        }
        slots.insert(replica.slot);
    }
    let stranger = view.in_sync.iter().chain(&view.primary).find(|m| view.replica(m.node).is_none());
    match stranger {
        Some(member) => Err(wrong("member that is no replica", member.node.0)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{ClusterId, LineageId, VolumeId};

    fn member(node: u64) -> Member {
        Member { node: NodeId(node), incarnation: Incarnation { boot: node + 10, nonce: node + 20 } }
    }

    fn view() -> ConfigView {
        let replica = |node, slot| ReplicaView {
            node: NodeId(node),
            slot: ReplicaSlot(slot),
            last_member: (node != 3).then_some(member(node).incarnation),
        };
        ConfigView {
            index: LogIndex(99),
            cluster: ClusterId(5),
            volume: VolumeId(6),
            epoch: Epoch(12),
            reign: Reign(11),
            primary: Some(member(2)),
            in_sync: vec![member(1), member(2)],
            replicas: vec![replica(1, 0), replica(2, 2), replica(3, 1)],
            lineage: LineageId(8),
            history: vec![LineageFork { lineage: LineageId(7), fork_epoch: Epoch(4) }],
            geometry: Geometry::new(1 << 30, 4096, 1 << 20).unwrap(),
            settings: VolumeSettings::default(),
        }
    }

    fn bytes(view: &ConfigView) -> Vec<u8> {
        let mut out = Vec::new();
        encode_config(view, &mut out);
        out
    }

    #[test]
    fn a_config_round_trips_and_has_no_slack() {
        let mut config = view();
        let good = bytes(&config);
        assert_eq!(decode_config(&good).unwrap(), config);
        for len in 0..good.len() {
            assert!(decode_config(&good[..len]).is_err(), "{len} bytes");
        }
        let mut longer = good;
        longer.push(0);
        assert!(decode_config(&longer).is_err());
        config.primary = None;
        config.history.clear();
        assert_eq!(decode_config(&bytes(&config)).unwrap(), config);
    }

    #[test]
    fn configs_that_break_a_rule_are_refused() {
        let broken: [fn(&mut ConfigView); 8] = [
            |v| v.in_sync.clear(),
            |v| v.in_sync.swap(0, 1),
            |v| v.replicas.swap(0, 1),
            |v| v.replicas[0].slot = ReplicaSlot(8),
            |v| v.replicas[0].slot = ReplicaSlot(1),
            |v| v.in_sync[1].node = NodeId(4),
            |v| v.primary = Some(member(4)),
            |v| v.reign = Reign(13),
        ];
        for (at, break_it) in broken.iter().enumerate() {
            let mut config = view();
            break_it(&mut config);
            assert!(decode_config(&bytes(&config)).is_err(), "case {at}");
        }
    }

    #[test]
    fn counts_and_sizes_that_the_bytes_do_not_bear_are_refused() {
        let good = bytes(&view());
        // Offsets: docs/protocol.md, config body. Size, block size, region size, durability, primary present,
        // members, replicas, history, history's high byte, padding of the first replica.
        for (at, value) in [
            (72, 1),
            (80, 1),
            (84, 1),
            (88, 2),
            (89, 2),
            (90, 3),
            (91, 9),
            (92, 2),
            (95, 0xff),
            (152 + 48 + 10, 1),
        ] {
            let mut bad = good.clone();
            bad[at] = value;
            assert!(decode_config(&bad).is_err(), "byte {at}");
        }
        let mut bad = good;
        bad[79] = 0xff;
        assert!(matches!(decode_config(&bad), Err(WireError::Geometry(_))));
    }
}
