//! What the decoders accept, against the rules as they are written down in docs/protocol.md: for any input, a
//! few lines that know the rule alone say whether it is accepted, and as what.

use std::collections::BTreeSet;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::body::{
    cut, decode_bits, decode_hashes, decode_runs, encode_bits, encode_runs, runs_kind_of, selector_of,
};
use super::config::{decode_config, encode_config};
use super::*;
use crate::types::{
    ClusterId, ConfigView, Epoch, Geometry, Incarnation, LineageFork, LineageId, LogIndex, Member, NodeId,
    Reign, ReplicaSlot, ReplicaView, VolumeId, VolumeSettings,
};

const BUF: BufId = BufId(1);

/// Runs near zero and near the bound, mostly ascending.
fn any_runs(bound: u64) -> impl Strategy<Value = Vec<Run>> {
    let start = prop_oneof![8 => 0u64..40, 1 => bound - 4..bound + 4, 1 => any::<u64>()];
    let count = prop_oneof![1 => Just(0u64), 8 => 1u64..6, 1 => any::<u64>()];
    let run = (start, count).prop_map(|(start, count)| Run { start, count });
    (vec(run, 0..5), prop::bool::weighted(0.7)).prop_map(|(mut runs, sorted)| {
        if sorted {
            runs.sort_by_key(|run| run.start);
        }
        runs
    })
}

/// A config in which nothing need be right but what its types enforce.
fn any_config() -> impl Strategy<Value = ConfigView> {
    let run = || (0u64..3).prop_map(|boot| Incarnation { boot, nonce: boot });
    let member =
        move || (1u64..5, run()).prop_map(|(node, incarnation)| Member { node: NodeId(node), incarnation });
    let slot = prop_oneof![12 => 0u8..8, 1 => 8u8..10];
    let replica = (1u64..5, slot, option::of(run())).prop_map(|(node, slot, last_member)| ReplicaView {
        node: NodeId(node),
        slot: ReplicaSlot(slot),
        last_member,
    });
    let lists = (vec(replica, 0..5), vec(member(), 0..4), prop::bool::weighted(0.9));
    let history = vec((0u128..5, 0u64..5), 0..3);
    (lists, option::of(member()), history, 0u64..4, 0u64..6).prop_map(
        |((mut replicas, mut in_sync, tidy), primary, history, reign, epoch)| {
            if tidy {
                replicas.sort_by_key(|r| r.node);
                replicas.dedup_by_key(|r| r.node);
                in_sync.sort();
                in_sync.dedup_by_key(|m| m.node);
            }
            ConfigView {
                index: LogIndex(9),
                cluster: ClusterId(1),
                volume: VolumeId(2),
                epoch: Epoch(epoch),
                reign: Reign(reign),
                primary,
                in_sync,
                replicas,
                lineage: LineageId(3),
                history: history
                    .into_iter()
                    .map(|(lineage, fork)| LineageFork {
                        lineage: LineageId(lineage),
                        fork_epoch: Epoch(fork),
                    })
                    .collect(),
                geometry: Geometry::new(1 << 20, 4096, 65_536).unwrap(),
                settings: VolumeSettings::default(),
            }
        },
    )
}

/// The rules of a config, one after the other.
fn obeys_the_rules(view: &ConfigView) -> bool {
    let nodes: BTreeSet<NodeId> = view.replicas.iter().map(|r| r.node).collect();
    let slots: BTreeSet<ReplicaSlot> = view.replicas.iter().map(|r| r.slot).collect();
    let members: BTreeSet<NodeId> = view.in_sync.iter().map(|m| m.node).collect();
    let listed = |nodes: &BTreeSet<NodeId>, list: Vec<NodeId>| nodes.iter().copied().eq(list);
    listed(&nodes, view.replicas.iter().map(|r| r.node).collect())
        && listed(&members, view.in_sync.iter().map(|m| m.node).collect())
        && slots.len() == view.replicas.len()
        && slots.iter().all(|slot| slot.0 < 8)
        && !members.is_empty()
        && members.is_subset(&nodes)
        && view.primary.is_none_or(|p| nodes.contains(&p.node))
        && view.reign.0 <= view.epoch.0
}

fn small_message() -> impl Strategy<Value = PeerMsg> {
    let reign = any::<u64>().prop_map(Reign);
    prop_oneof![
        Just(PeerMsg::Ping),
        reign.clone().prop_map(|reign| PeerMsg::Takeover { reign }),
        (reign.clone(), "[a-z]{0,30}").prop_map(|(reign, reason)| PeerMsg::Failed { reign, reason }),
        (reign.clone(), vec(any::<bool>(), 1..40)).prop_map(|(reign, differ)| PeerMsg::CompareResult {
            reign,
            id: 3,
            differ
        }),
        (reign, 0u64..9).prop_map(|(reign, n)| PeerMsg::Runs {
            reign,
            kind: RunsKind::Intent,
            runs: (0..n).map(|at| Run { start: 3 * at, count: 2 }).collect(),
            last: n % 2 == 0,
        }),
    ]
}

fn end(versions: (u16, u16), cluster: u128, volume: u128, node: u64) -> LocalEnd {
    LocalEnd {
        versions: VersionRange { min: versions.0, max: versions.0 + versions.1 },
        cluster: ClusterId(cluster),
        volume: VolumeId(volume),
        node: NodeId(node),
        incarnation: Incarnation { boot: node, nonce: 7 },
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn runs_are_accepted_if_they_ascend_and_lie_within_the_largest_volume(
        (intent, runs) in any::<bool>().prop_flat_map(|intent| {
            (Just(intent), any_runs(if intent { REGIONS_MAX } else { VOLUME_BLOCKS_MAX }))
        }),
        slack in prop_oneof![9 => Just(0usize), 1 => 1usize..16],
    ) {
        let (kind, bound) =
            if intent { (RunsKind::Intent, REGIONS_MAX) } else { (RunsKind::Foreign, VOLUME_BLOCKS_MAX) };
        let mut bytes = Vec::new();
        encode_runs(&runs, &mut bytes);
        bytes.resize(bytes.len() + slack, 0);
        let end = |run: &Run| u128::from(run.start) + u128::from(run.count);
        let good = slack == 0
            && runs.iter().all(|run| run.count > 0 && end(run) <= u128::from(bound))
            && runs.windows(2).all(|pair| end(&pair[0]) <= u128::from(pair[1].start));
        prop_assert_eq!(decode_runs(kind, &bytes).ok(), good.then_some(runs));
    }

    #[test]
    fn flags_are_bits_from_the_least_significant_on(
        flags in vec(any::<bool>(), 0..40), bytes in vec(any::<u8>(), 0..4)
    ) {
        let mut encoded = Vec::new();
        encode_bits(&flags, &mut encoded);
        prop_assert_eq!(encoded.len(), flags.len().div_ceil(8));
        let bit = |bytes: &[u8], at: usize| bytes[at / 8] / (1 << (at % 8)) % 2 == 1;
        for at in 0..encoded.len() * 8 {
            prop_assert_eq!(bit(&encoded, at), flags.get(at).copied().unwrap_or(false));
        }
        prop_assert_eq!(decode_bits(u32::try_from(flags.len()).unwrap(), &encoded), Ok(flags));
        for items in 0..34usize {
            let fits = bytes.len() == items.div_ceil(8) && (items..bytes.len() * 8).all(|at| !bit(&bytes, at));
            let read = decode_bits(u32::try_from(items).unwrap(), &bytes).ok();
            prop_assert_eq!(read, fits.then(|| (0..items).map(|at| bit(&bytes, at)).collect()));
        }
    }

    #[test]
    fn hashes_are_sixteen_bytes_each(bytes in vec(any::<u8>(), 0..70)) {
        let whole = bytes.len() % 16 == 0;
        prop_assert_eq!(decode_hashes(&bytes).ok().map(|hashes| hashes.concat()), whole.then_some(bytes));
    }

    #[test]
    fn a_config_is_accepted_if_it_obeys_the_rules(view in any_config()) {
        let mut bytes = Vec::new();
        encode_config(&view, &mut bytes);
        prop_assert_eq!(decode_config(&bytes).ok(), obeys_the_rules(&view).then_some(view));
    }

    /// A stream cut anywhere: the frames before the cut are read, in order, and of the rest more is waited for.
    #[test]
    fn a_stream_cut_anywhere_gives_the_frames_before_the_cut(
        messages in vec(small_message(), 0..6), cut in any::<prop::sample::Index>(),
    ) {
        let mut stream = Vec::new();
        let mut ends = Vec::new();
        for message in &messages {
            prop_assert_eq!(encode(message, &mut stream), None);
            ends.push(stream.len());
        }
        stream.truncate(cut.index(stream.len() + 1));
        let (mut at, mut read) = (0, Vec::new());
        while let Some((message, used)) = decode_slice(&stream[at..], BUF).unwrap() {
            at += used;
            read.push(message);
        }
        let whole = ends.iter().filter(|end| **end <= stream.len()).count();
        prop_assert_eq!(&read, &messages[..whole]);
    }

    /// A session comes about if the two agree on cluster and volume, each is who the other means, and there is a
    /// version that both speak; then both know of each other what is so. Else the caller is told the reason.
    #[test]
    fn a_hello_is_accepted_exactly_if_both_ends_agree(
        a in ((1u16..4, 0u16..3), 0u128..2, 0u128..2, 1u64..4), b in ((1u16..4, 0u16..3), 0u128..2, 0u128..2, 1u64..4),
        to in 1u64..4,
    ) {
        let (caller, called) = (end(a.0, a.1, a.2, a.3), end(b.0, b.1, b.2, b.3));
        let hello = Hello::new(&caller, NodeId(to));
        let seen = Hello::decode(&hello.encode()).unwrap();
        let reply = HelloReply::decode(&seen.answer(&called).encode()).unwrap();
        let speaks = |range: (u16, u16), version: u16| range.0 <= version && version <= range.0 + range.1;
        let version = (1..8).rev().find(|version| speaks(a.0, *version) && speaks(b.0, *version));
        let expected = if a.1 != b.1 {
            Err(Refusal::Cluster)
        } else if to != b.3 || a.3 == b.3 {
            Err(Refusal::Receiver)
        } else if a.2 != b.2 {
            Err(Refusal::Volume)
        } else {
            version.ok_or(Refusal::Version)
        };
        match (reply.check(&hello), expected) {
            (Ok(found), Ok(version)) => {
                let wanted = Established { version, node: called.node, incarnation: called.incarnation };
                prop_assert_eq!(found, wanted);
                prop_assert_eq!((seen.node, seen.incarnation), (caller.node, caller.incarnation));
            }
            (Err(WireError::Refused { peer, code, .. }), Err(refusal)) => {
                prop_assert_eq!((peer, code), (called.node, refusal));
            }
            (found, expected) => prop_assert!(false, "{found:?} instead of {expected:?}"),
        }
    }

    #[test]
    fn a_text_is_cut_after_the_last_character_that_fits(text in ".{0,40}", max in 0usize..60) {
        let mut whole = String::new();
        for character in text.chars() {
            if whole.len() + character.len_utf8() > max {
                break;
            }
            whole.push(character);
        }
        prop_assert_eq!(cut(&text, max), whole);
    }
}

#[test]
fn every_selector_means_one_kind_of_runs_or_none() {
    let kinds = [RunsKind::Intent, RunsKind::Foreign]
        .into_iter()
        .chain((0..8).map(|s| RunsKind::Dirty(ReplicaSlot(s))));
    let known: Vec<(u8, RunsKind)> = kinds.map(|kind| (selector_of(kind), kind)).collect();
    for selector in 0..=u8::MAX {
        let kind = known.iter().find(|(known, _)| *known == selector).map(|(_, kind)| *kind);
        assert_eq!(runs_kind_of(selector), kind, "{selector}");
    }
    assert_eq!(known.iter().map(|(selector, _)| selector).collect::<BTreeSet<_>>().len(), 10);
}
