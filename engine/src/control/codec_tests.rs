//! Every value that the control plane puts on disk or on the wire comes back as it was; no bit of it changes
//! unnoticed; and the envelope is the documented one, byte for byte.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::io;
use std::time::Duration;

use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, VoteRequest, VoteResponse};
use openraft::{CommittedLeaderId, EntryPayload, Membership};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use tokio::io::AsyncWriteExt;

use super::super::command::{Applied, ClusterOp, Command, Leadership, Prepared, RequestId};
use super::super::lease::Grant;
use super::super::raft::{Entry, LogId, RaftNode, Response, SnapshotMeta, StoredMembership, Vote};
use super::super::rpc::{Renewal, Reply, ReplyBody, Request, RequestBody, Sender, read_frame, write_frame};
use super::super::state::{Attachment, NodeAddrs, NodeKind, NodeRecord, StoreId};
use super::*;
use crate::types::{
    ClusterId, Durability, Epoch, Geometry, Health, Incarnation, LineageId, LogIndex, Member, NodeId,
    Proposal, ProposalId, ProposalKind, Reign, ReplicaReport, SuperblockTrust, VolumeId, VolumeSettings,
};

fn run() -> impl Strategy<Value = Incarnation> {
    any::<(u64, u64)>().prop_map(|(boot, nonce)| Incarnation { boot, nonce })
}

fn member() -> impl Strategy<Value = Member> {
    (any::<u64>(), run()).prop_map(|(node, incarnation)| Member { node: NodeId(node), incarnation })
}

fn time() -> impl Strategy<Value = Duration> {
    (any::<u64>(), 0u32..1_000_000_000).prop_map(|(s, n)| Duration::new(s, n))
}

fn volume() -> impl Strategy<Value = VolumeId> {
    any::<u128>().prop_map(VolumeId)
}

fn volume_and_epoch() -> impl Strategy<Value = (VolumeId, Epoch)> {
    (volume(), any::<u64>().prop_map(Epoch))
}

fn settings() -> impl Strategy<Value = VolumeSettings> {
    (any::<(bool, u32, u32)>(), time(), time(), time()).prop_map(
        |((always, intent_regions_max, resync_window_bytes), peer_timeout, disk_timeout, budget)| {
            VolumeSettings {
                durability: if always { Durability::Always } else { Durability::Flush },
                peer_timeout,
                disk_timeout,
                intent_regions_max,
                resync_window_bytes,
                resync_latency_budget: budget,
            }
        },
    )
}

fn addrs() -> impl Strategy<Value = NodeAddrs> {
    (".{0,9}", ".{0,9}", ".{0,9}").prop_map(|(control, peer, nbd)| NodeAddrs { control, peer, nbd })
}

fn record() -> impl Strategy<Value = NodeRecord> {
    (any::<(u64, bool, u128, u128)>(), ".{0,9}", addrs(), option::of(run())).prop_map(
        |((id, data, store, os_boot), name, addrs, incarnation)| NodeRecord {
            id: NodeId(id),
            name,
            kind: if data { NodeKind::Data } else { NodeKind::Witness },
            addrs,
            store: StoreId(store),
            incarnation,
            os_boot,
        },
    )
}

fn proposal() -> impl Strategy<Value = Proposal> {
    let kind = (0u8..6, member()).prop_map(|(kind, m)| match kind {
        0 => ProposalKind::Remove(m),
        1 => ProposalKind::Join(m),
        2 => ProposalKind::Move(m),
        3 => ProposalKind::Demote,
        4 => ProposalKind::HandOver(m),
        _ => ProposalKind::Bump,
    });
    (any::<u64>(), volume_and_epoch(), member(), kind).prop_map(|(id, (volume, expected_epoch), by, kind)| {
        Proposal { id: ProposalId(id), volume, expected_epoch, by, kind }
    })
}

/// The commands about nodes and the cluster.
fn node_op() -> BoxedStrategy<ClusterOp> {
    prop_oneof![
        (any::<u128>(), time(), vec(record(), 0..4)).prop_map(|(cluster, lease, nodes)| {
            ClusterOp::InitCluster { cluster: ClusterId(cluster), lease, nodes }
        }),
        (member(), any::<u128>(), addrs()).prop_map(|(m, os_boot, addrs)| ClusterOp::Register {
            node: m.node,
            incarnation: m.incarnation,
            os_boot,
            addrs
        }),
        record().prop_map(ClusterOp::AddNode),
        any::<u64>().prop_map(|node| ClusterOp::RemoveNode { node: NodeId(node) }),
        time().prop_map(|lease| ClusterOp::SetLease { lease }),
    ]
    .boxed()
}

/// The commands about volumes.
fn volume_op() -> BoxedStrategy<ClusterOp> {
    let geometry = (1u64..1 << 20, 16u32..=26)
        .prop_map(|(blocks, region)| Geometry::new(blocks * 4096, 4096, 1 << region).unwrap());
    let node = || any::<u64>().prop_map(NodeId);
    let prepared = (member(), any::<u64>()).prop_map(|(member, size)| Prepared { member, size });
    let role = (volume_and_epoch(), member(), any::<bool>());
    prop_oneof![
        (volume(), ".{0,9}", geometry, settings(), vec(node(), 0..4), member(), any::<u128>()).prop_map(
            |(id, name, geometry, settings, replicas, first, lineage)| ClusterOp::CreateVolume {
                id,
                name,
                geometry,
                settings,
                replicas,
                first,
                lineage: LineageId(lineage)
            }
        ),
        volume_and_epoch()
            .prop_map(|(volume, expected_epoch)| ClusterOp::DeleteVolume { volume, expected_epoch }),
        (volume_and_epoch(), node(), any::<bool>()).prop_map(|((volume, expected_epoch), node, add)| {
            if add {
                ClusterOp::AddReplica { volume, expected_epoch, node }
            } else {
                ClusterOp::RemoveReplica { volume, expected_epoch, node }
            }
        }),
        proposal().prop_map(ClusterOp::Propose),
        (role, any::<bool>()).prop_map(|(((volume, expected_epoch), to, operator), restarted)| {
            if restarted {
                ClusterOp::PromoteRestarted { volume, expected_epoch, to, operator }
            } else {
                ClusterOp::Promote { volume, expected_epoch, to, operator }
            }
        }),
        (volume_and_epoch(), member(), any::<(u128, u64)>()).prop_map(
            |((volume, expected_epoch), to, (lineage, fork))| ClusterOp::ForcePromote {
                volume,
                expected_epoch,
                to,
                lineage: LineageId(lineage),
                fork_epoch: Epoch(fork)
            }
        ),
        (volume_and_epoch(), any::<u64>(), vec(prepared, 0..3)).prop_map(
            |((volume, expected_epoch), size, prepared)| ClusterOp::Resize {
                volume,
                expected_epoch,
                size,
                prepared
            }
        ),
        (volume_and_epoch(), settings()).prop_map(|((volume, expected_epoch), settings)| {
            ClusterOp::ChangeSettings { volume, expected_epoch, settings }
        }),
        client_op(),
    ]
    .boxed()
}

/// The commands about clients.
fn client_op() -> impl Strategy<Value = ClusterOp> {
    let fields = (volume(), ".{0,9}", member(), any::<u64>(), 0..4);
    fields.prop_map(|(volume, client, by, index, which)| match which {
        0 => ClusterOp::Attach { volume, client, by },
        1 => ClusterOp::Evict { volume, client },
        2 => ClusterOp::Share { volume, shared: index % 2 == 0 },
        _ => {
            let attachment = Attachment { client, index: LogIndex(index) };
            ClusterOp::Detach { volume, attachment, by }
        }
    })
}

fn command() -> impl Strategy<Value = Command> {
    let request = (member(), option::of(volume()), any::<u64>()).prop_map(|(m, volume, number)| RequestId {
        node: m.node,
        incarnation: m.incarnation,
        volume,
        number,
    });
    let under = any::<(u64, u64)>().prop_map(|(term, node)| Leadership { term, node: NodeId(node) });
    (request, option::of(under), prop_oneof![node_op(), volume_op()])
        .prop_map(|(request, only_under, op)| Command { request, only_under, op })
}

fn applied() -> impl Strategy<Value = Applied> {
    prop_oneof![
        any::<(u64, Option<u64>)>()
            .prop_map(|(index, epoch)| Applied::Done { index: LogIndex(index), epoch: epoch.map(Epoch) }),
        ".{0,30}".prop_map(Applied::Refused),
    ]
}

fn log_id() -> impl Strategy<Value = LogId> {
    any::<(u64, u64, u64)>()
        .prop_map(|(term, node, index)| LogId::new(CommittedLeaderId::new(term, node), index))
}

fn vote() -> impl Strategy<Value = Vote> {
    any::<(u64, u64, bool)>().prop_map(|(term, node, sure)| {
        if sure { Vote::new_committed(term, node) } else { Vote::new(term, node) }
    })
}

fn membership() -> impl Strategy<Value = Membership<u64, RaftNode>> {
    (vec((1u64..9, any::<u128>(), ".{0,9}"), 1..5), any::<bool>()).prop_map(|(nodes, joint)| {
        let nodes: std::collections::BTreeMap<u64, RaftNode> = nodes
            .into_iter()
            .map(|(id, store, addr)| (id, RaftNode { store: StoreId(store), addr }))
            .collect();
        let all: BTreeSet<u64> = nodes.keys().copied().collect();
        let first: BTreeSet<u64> = all.iter().copied().take(1).collect();
        Membership::new(if joint { vec![first, all] } else { vec![all] }, nodes)
    })
}

fn entry() -> impl Strategy<Value = Entry> {
    let payload = prop_oneof![
        1 => Just(EntryPayload::Blank),
        3 => command().prop_map(EntryPayload::Normal),
        1 => membership().prop_map(EntryPayload::Membership),
    ];
    (log_id(), payload).prop_map(|(log_id, payload)| Entry { log_id, payload })
}

fn snapshot_meta() -> impl Strategy<Value = SnapshotMeta> {
    (option::of(log_id()), option::of(log_id()), membership(), ".{0,9}").prop_map(
        |(last_log_id, at, membership, snapshot_id)| SnapshotMeta {
            last_log_id,
            last_membership: StoredMembership::new(at, membership),
            snapshot_id,
        },
    )
}

fn sender() -> impl Strategy<Value = Sender> {
    (any::<Option<u128>>(), member(), any::<u128>()).prop_map(|(cluster, m, store)| Sender {
        cluster: cluster.map(ClusterId),
        node: m.node,
        store: StoreId(store),
        incarnation: m.incarnation,
    })
}

fn replica_report() -> impl Strategy<Value = ReplicaReport> {
    let trust = [SuperblockTrust::Sound, SuperblockTrust::Doubtful, SuperblockTrust::None];
    let numbers = any::<(u64, u64, u128, bool, bool, bool)>();
    (prop::sample::select(trust.to_vec()), numbers, option::of(run())).prop_map(
        |(trust, (epoch, reign, lineage, inconsistent, clean, same_os_boot), member)| ReplicaReport {
            trust,
            epoch: Epoch(epoch),
            reign: Reign(reign),
            lineage: LineageId(lineage),
            member,
            inconsistent,
            clean,
            same_os_boot,
        },
    )
}

fn renewal() -> impl Strategy<Value = Renewal> {
    let health = prop_oneof![Just(Health::Healthy), ".{0,20}".prop_map(Health::Unhealthy)];
    (member(), any::<u64>(), vec((volume(), health, replica_report()), 0..4))
        .prop_map(|(member, nonce, volumes)| Renewal { member, nonce, volumes })
}

fn grant() -> impl Strategy<Value = Grant> {
    (member(), any::<(u64, u64)>(), time(), vec(volume(), 0..3)).prop_map(
        |(m, (nonce, applied), length, excluded)| Grant {
            node: m.node,
            incarnation: m.incarnation,
            nonce,
            length,
            excluded,
            applied: LogIndex(applied),
        },
    )
}

fn request() -> impl Strategy<Value = Request> {
    let append = (vote(), option::of(log_id()), vec(entry(), 0..3), option::of(log_id())).prop_map(
        |(vote, prev_log_id, entries, leader_commit)| {
            RequestBody::Append(AppendEntriesRequest { vote, prev_log_id, entries, leader_commit })
        },
    );
    let body = prop_oneof![
        Just(()).prop_map(|()| RequestBody::Identify),
        append,
        (vote(), option::of(log_id()))
            .prop_map(|(vote, last)| RequestBody::Vote(VoteRequest::new(vote, last))),
        (vote(), snapshot_meta(), vec(any::<u8>(), 0..99))
            .prop_map(|(vote, meta, data)| RequestBody::Snapshot { vote, meta, data }),
        command().prop_map(RequestBody::Submit),
        renewal().prop_map(RequestBody::Renew),
        vec(any::<u8>(), 0..99).prop_map(RequestBody::Admin),
    ];
    let to = option::of(any::<(u64, u128)>().prop_map(|(node, store)| (NodeId(node), StoreId(store))));
    (sender(), to, body).prop_map(|(from, to, body)| Request { from, to, body })
}

fn reply() -> impl Strategy<Value = Reply> {
    let appended = (0u8..4, option::of(log_id()), vote()).prop_map(|(kind, matching, vote)| match kind {
        0 => AppendEntriesResponse::Success,
        1 => AppendEntriesResponse::PartialSuccess(matching),
        2 => AppendEntriesResponse::Conflict,
        _ => AppendEntriesResponse::HigherVote(vote),
    });
    let voted = (vote(), any::<bool>(), option::of(log_id()))
        .prop_map(|(vote, vote_granted, last_log_id)| VoteResponse { vote, vote_granted, last_log_id });
    let text = || ".{0,30}";
    let body = prop_oneof![
        Just(()).prop_map(|()| ReplyBody::Identity),
        appended.prop_map(ReplyBody::Append),
        voted.prop_map(ReplyBody::Vote),
        vote().prop_map(ReplyBody::Snapshot),
        applied().prop_map(ReplyBody::Applied),
        text().prop_map(ReplyBody::Declined),
        grant().prop_map(ReplyBody::Grant),
        vec(any::<u8>(), 0..99).prop_map(ReplyBody::Admin),
        any::<Option<u64>>().prop_map(|leader| ReplyBody::NotLeader(leader.map(NodeId))),
        text().prop_map(ReplyBody::Refused),
        text().prop_map(ReplyBody::Failed),
        run().prop_map(ReplyBody::Outdated),
    ];
    (sender(), body).prop_map(|(from, body)| Reply { from, body })
}

/// The value comes back, by what it shows of itself and by its bytes; no flipped bit and no cut passes.
fn survives<T: Serialize + DeserializeOwned + Debug>(value: &T, at: prop::sample::Index) {
    let bytes = encode(value).unwrap();
    let read: T = decode(&bytes).unwrap();
    assert_eq!(format!("{read:?}"), format!("{value:?}"));
    assert_eq!(encode(&read).unwrap(), bytes);
    let bit = at.index(bytes.len() * 8);
    let mut bad = bytes.clone();
    bad[bit / 8] ^= 1 << (bit % 8);
    assert!(decode::<T>(&bad).is_err(), "bit {bit}");
    assert!(decode::<T>(&bytes[..bit / 8]).is_err(), "cut at {}", bit / 8);
    bad.clone_from(&bytes);
    bad.push(0);
    assert!(decode::<T>(&bad).is_err(), "a byte more");
}

/// Reads frames until the stream ends or one of them cannot be read.
async fn read_all(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> (Vec<Vec<u8>>, bool) {
    let mut frames = Vec::new();
    loop {
        match read_frame::<Vec<u8>>(stream).await {
            Ok(Some(Ok(frame))) => frames.push(frame),
            Ok(Some(Err(_))) => return (frames, false),
            Ok(None) => return (frames, true),
            Err(e) => panic!("{e}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn commands_and_their_results_come_back(
        command in command(), applied in applied(), at in any::<prop::sample::Index>(),
    ) {
        survives(&command, at);
        prop_assert_eq!(decode(&encode(&command).unwrap()), Ok(command));
        survives(&Response::Applied(applied.clone()), at);
        prop_assert_eq!(decode(&encode(&applied).unwrap()), Ok(applied));
    }

    #[test]
    fn what_raft_keeps_comes_back(
        entry in entry(), meta in snapshot_meta(), vote in vote(), at in any::<prop::sample::Index>(),
    ) {
        survives(&entry, at);
        survives(&(meta, vec![1u8, 2, 3]), at);
        survives(&vote, at);
    }

    #[test]
    fn messages_come_back(request in request(), reply in reply(), at in any::<prop::sample::Index>()) {
        survives(&request, at);
        survives(&reply, at);
    }

    /// Written down by hand: the envelope, and the body in little-endian integers of fixed width.
    #[test]
    fn the_bytes_are_the_documented_ones(
        number in any::<u64>(), flag in any::<bool>(), maybe in any::<Option<u32>>(), text in ".{0,20}",
        list in vec(any::<u16>(), 0..9),
    ) {
        let mut body = number.to_le_bytes().to_vec();
        body.push(u8::from(flag));
        body.push(u8::from(maybe.is_some()));
        body.extend(maybe.iter().flat_map(|value| value.to_le_bytes()));
        body.extend((text.len() as u64).to_le_bytes());
        body.extend(text.as_bytes());
        body.extend((list.len() as u64).to_le_bytes());
        body.extend(list.iter().flat_map(|value| value.to_le_bytes()));
        let mut expected = vec![2];
        expected.extend(u32::try_from(body.len()).unwrap().to_le_bytes());
        let crc = crc32fast::hash(&[&expected[..], &body].concat());
        expected.extend(crc.to_le_bytes());
        expected.extend(&body);
        prop_assert_eq!(encode(&(number, flag, maybe, text, list)).unwrap(), expected);
    }

    /// A body with a checksum that holds but of anybody's making: an error or a value, never a panic, and a
    /// value is one that can be written.
    #[test]
    fn forged_bodies_are_refused_or_can_be_written_again(
        command in command(), edits in vec((any::<prop::sample::Index>(), any::<u8>()), 0..5),
        len in option::of(0usize..300),
    ) {
        let mut bytes = encode(&command).unwrap();
        bytes.resize(len.map_or(bytes.len(), |len| HEADER_LEN + len), 0x5a);
        let body = bytes.len() - HEADER_LEN;
        for (at, value) in edits.into_iter().filter(|_| body > 0) {
            bytes[HEADER_LEN + at.index(body)] = value;
        }
        bytes[1..5].copy_from_slice(&u32::try_from(body).unwrap().to_le_bytes());
        let crc = checksum(&bytes[..5], &bytes[HEADER_LEN..]);
        bytes[5..9].copy_from_slice(&crc.to_le_bytes());
        if let Ok(read) = decode::<Command>(&bytes) {
            prop_assert_eq!(decode(&encode(&read).unwrap()), Ok(read));
        }
    }

    /// Frames in pieces of any size, over a connection that ends anywhere: all that arrived whole is read, in
    /// order. An end between two frames or within a header is an end; within a body it is an error.
    #[test]
    fn a_stream_that_ends_anywhere_gives_what_arrived_whole(
        frames in vec(vec(any::<u8>(), 0..60), 0..5), end in any::<prop::sample::Index>(), piece in 1usize..40,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut stream = Vec::new();
        let mut ends = vec![0];
        for frame in &frames {
            runtime.block_on(write_frame(&mut stream, frame)).unwrap();
            ends.push(stream.len());
        }
        stream.truncate(end.index(stream.len() + 1));
        let whole = ends.iter().filter(|end| **end <= stream.len()).count() - 1;
        let rest = stream.len() - ends[whole];
        let (read, ended_well) = runtime.block_on(async {
            let (mut sending, mut receiving) = tokio::io::duplex(piece);
            let send = async {
                for piece in stream.chunks(piece) {
                    sending.write_all(piece).await?;
                }
                drop(sending);
                Ok::<_, io::Error>(())
            };
            tokio::join!(read_all(&mut receiving), send).0
        });
        prop_assert_eq!(&read, &frames[..whole]);
        prop_assert_eq!(ended_well, rest < HEADER_LEN);
    }
}

#[test]
fn a_value_that_is_too_long_is_not_written() {
    let longest = vec![0u8; BODY_LEN_MAX - 8];
    assert_eq!(decode::<Vec<u8>>(&encode(&longest).unwrap()), Ok(longest));
    assert!(matches!(
        encode(&vec![0u8; BODY_LEN_MAX - 7]),
        Err(CodecError::Body(_) | CodecError::TooLong(_))
    ));
}
