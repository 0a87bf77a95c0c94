//! What a replica refuses: requests beyond the volume's end, messages that the wire cannot judge as it does not
//! know the volume, and configs of which it is no part. Nothing that is refused touches a disk or keeps a buffer.

use crate::types::{
    BlockIndex, BlockRange, LineageId, LogIndex, Nanos, ReplicaSlot, ReplicaState, SlotSet, VolumeId,
};
use crate::wire::{BlockHash, BufId, PAYLOAD_BYTES_MAX, Payload, PeerMsg, Run, RunsKind, WriteSeq};

use super::super::io::{
    ClientError, ClientInput, ClientOp, ClientRequest, ConnId, Cookie, DiskDone, DiskErrorKind, DiskOp,
    DiskRequest, Event, Output, PeerInput, ReplyData,
};
use super::world::{BLOCK, Link, OnWire};
use super::{Options, World, node};

/// A buffer that the world does not know.
const STRAY: BufId = BufId(9999);

fn world(replicas: u64, blocks: u64) -> World {
    let mut world = World::new(&Options { replicas, blocks, ..Options::default() });
    world.run(20);
    assert!(world.all_in_sync(), "{:#?}", world.summary());
    world
}

/// What a replica says; the world does not carry it out.
fn outputs(world: &mut World, id: u64) -> Vec<Output> {
    std::iter::from_fn(|| world.replica(node(id)).poll_output()).collect()
}

/// What node 2 says to a message of node 1.
fn answers(world: &mut World, msg: PeerMsg) -> Vec<Output> {
    let session = world.session(node(2), node(1));
    let now = Nanos(world.now);
    world.replica(node(2)).handle_peer(now, PeerInput::Msg(session, msg));
    outputs(world, 2)
}

fn request(op: ClientOp, offset: u64, len: u64) -> ClientRequest {
    ClientRequest { conn: ConnId(7), cookie: Cookie(7), op, offset, len, fua: false }
}

fn stray(blocks: u64) -> Payload {
    Payload { buf: STRAY, len: u32::try_from(blocks * BLOCK).unwrap(), crc: 0 }
}

fn blocks(start: u64, count: u64) -> BlockRange {
    BlockRange { start: BlockIndex(start), count }
}

#[test]
fn a_request_beyond_the_volume_s_end_is_refused_at_once() {
    let mut world = world(2, 64);
    let end = 64 * BLOCK;
    for (offset, len) in [(end - BLOCK, 2 * BLOCK), (end, 1), (u64::MAX, 2), (0, end + 1), (1, u64::MAX)] {
        for op in [ClientOp::Read, ClientOp::Zero, ClientOp::Write(stray(2))] {
            let now = Nanos(world.now);
            world.replica(node(1)).handle_client(now, ClientInput::Request(request(op, offset, len)));
            let refused =
                Output::Reply { conn: ConnId(7), cookie: Cookie(7), result: Err(ClientError::Invalid) };
            let expected = match op {
                ClientOp::Write(_) => vec![Output::Release(STRAY), refused],
                _ => vec![refused],
            };
            assert_eq!(outputs(&mut world, 1), expected, "{op:?} of {len} bytes at {offset}");
        }
    }
    world.converge();
}

#[test]
fn a_message_that_does_not_fit_the_volume_ends_the_session_and_touches_nothing() {
    // Larger than what one message may hold.
    let most = u64::from(PAYLOAD_BYTES_MAX) / BLOCK;
    let mut world = world(2, most + 64);
    let (reign, end) = (world.config.reign, most + 64);
    let (missing, config, seq) = (SlotSet::default(), LogIndex(0), WriteSeq(u64::MAX));
    let write =
        |blocks, payload| PeerMsg::Write { reign, seq, blocks, durable: false, missing, config, payload };
    let zero = |blocks| PeerMsg::Zero { reign, seq, blocks, durable: false, missing, config };
    let hashes = |count| vec![BlockHash::default(); count];
    let bad = [
        write(blocks(end - 1, 2), stray(2)),
        write(blocks(0, 2), stray(1)),
        write(blocks(0, 1), stray(2)),
        zero(blocks(end, 1)),
        zero(blocks(1, u64::MAX)),
        PeerMsg::Copy { reign, id: 1, blocks: blocks(end - 1, 2), payload: stray(2) },
        PeerMsg::Copy { reign, id: 1, blocks: blocks(0, 1), payload: stray(2) },
        PeerMsg::CopyZero { reign, id: 1, blocks: blocks(end - 1, 2) },
        PeerMsg::ReadRequest { reign, id: 1, blocks: blocks(end, 1) },
        PeerMsg::ReadRequest { reign, id: 1, blocks: blocks(0, most + 1) },
        PeerMsg::Compare { reign, id: 1, blocks: blocks(end, 1), hashes: hashes(1) },
        PeerMsg::Compare { reign, id: 1, blocks: blocks(0, 2), hashes: hashes(1) },
    ];
    let session = world.session(node(2), node(1));
    for msg in bad {
        let carries = matches!(msg, PeerMsg::Write { .. } | PeerMsg::Copy { .. });
        let mut said = answers(&mut world, msg.clone());
        assert_eq!(
            said.iter().filter(|o| **o == Output::Release(STRAY)).count(),
            usize::from(carries),
            "{msg:?}"
        );
        said.retain(|o| *o != Output::Release(STRAY));
        let [Output::CloseSession(closed, reason)] = &said[..] else { panic!("{said:?} to {msg:?}") };
        assert_eq!(*closed, session);
        assert!(reason.contains("outside the volume"), "{reason}");
    }
    world.converge();
}

#[test]
fn r12_a_bitmap_that_does_not_fit_the_volume_ends_the_session() {
    let mut world = world(3, 64);
    let (reign, kind) = (world.config.reign, RunsKind::Dirty(ReplicaSlot(2)));
    let session = world.session(node(2), node(1));
    for run in [Run { start: 63, count: 2 }, Run { start: 64, count: 1 }, Run { start: 1, count: u64::MAX }] {
        let runs = vec![Run { start: 5, count: 1 }, run];
        let said = answers(&mut world, PeerMsg::Runs { reign, kind, runs, last: true });
        let [Output::CloseSession(closed, reason)] = &said[..] else { panic!("{said:?} to {run:?}") };
        assert_eq!((*closed, &**reason), (session, "a bitmap names blocks outside the volume"));
    }
    // What came before it says only that more may differ.
    assert!(world.replica(node(2)).store.dirty(ReplicaSlot(2)).unwrap().get(5));
}

#[test]
fn a_config_of_another_volume_changes_nothing() {
    let mut world = world(2, 64);
    world.write(node(1), 5, false);
    let mut other = world.config.clone();
    other.volume = VolumeId(other.volume.0 + 1);
    other.index = LogIndex(other.index.0 + 10);
    other.primary = None;
    let now = Nanos(world.now);
    world.replica(node(1)).handle_config(now, other);
    world.collect(node(1));
    let refused = |e: &Event| matches!(e, Event::Refused { node: n, .. } if *n == node(1));
    assert!(world.nodes[&node(1)].events.iter().any(refused));
    assert_eq!(world.serving(), Some(node(1)));
    world.settle();
    assert_eq!((world.acked_writes, world.waiting(node(1))), (1, 0));
    world.converge();
}

#[test]
fn r23_a_primary_that_is_no_replica_any_more_answers_nothing_and_closes_the_connections() {
    let mut world = world(2, 64);
    world.clogged.insert(node(2)); // the write stays open
    world.write(node(1), 5, false);
    world.settle();
    let mut without = world.config.clone();
    without.index = LogIndex(without.index.0 + 1);
    without.epoch = without.epoch.next();
    without.replicas.retain(|r| r.node != node(1));
    without.in_sync.retain(|m| m.node != node(1));
    without.primary = without.in_sync.first().copied();
    let now = Nanos(world.now);
    world.replica(node(1)).handle_config(now, without);
    let said = outputs(&mut world, 1);
    assert!(said.iter().any(|o| matches!(o, Output::CloseClients(_))), "{said:?}");
    assert!(said.iter().any(|o| matches!(o, Output::Event(Event::StoppedServing(_)))), "{said:?}");
    assert!(said.iter().any(|o| matches!(o, Output::Event(Event::Refused { .. }))), "{said:?}");
    assert!(said.iter().any(|o| matches!(o, Output::Release(_))), "the buffer of the write: {said:?}");
    assert!(!said.iter().any(|o| matches!(o, Output::Reply { .. })), "{said:?}");
    assert!(!world.replica(node(1)).serving());
    // Nor does a late acknowledgement bring an answer, or a new request one.
    let (session, reign) = (world.session(node(1), node(2)), world.config.reign);
    let late = (1..20).map(|seq| PeerMsg::WriteAck { reign, seq: WriteSeq(seq) });
    for msg in late {
        world.replica(node(1)).handle_peer(now, PeerInput::Msg(session, msg));
    }
    let again = request(ClientOp::Write(stray(1)), 0, BLOCK);
    world.replica(node(1)).handle_client(now, ClientInput::Request(again));
    let said = outputs(&mut world, 1);
    assert!(said.contains(&Output::Release(STRAY)), "{said:?}");
    assert!(!said.iter().any(|o| matches!(o, Output::Reply { .. })), "{said:?}");
}

#[test]
fn a_replica_that_the_volume_gave_up_is_waited_for_no_more() {
    let mut world = world(3, 64);
    world.nodes.get_mut(&node(3)).unwrap().disk_paused = true;
    world.write(node(1), 5, false);
    world.settle();
    assert_eq!(world.waiting(node(1)), 1, "every member has to have it");
    let mut without = world.config.clone();
    without.replicas.retain(|r| r.node != node(3));
    without.in_sync.retain(|m| m.node != node(3));
    world.commit(without);
    world.give_config(node(1));
    assert!(!world.sessions.contains_key(&Link(node(1), node(3))), "its session is closed");
    world.settle();
    assert_eq!((world.acked_writes, world.waiting(node(1))), (1, 0));
    // It calls again, and is sent away.
    world.run(5);
    let status = world.replica(node(1)).status();
    assert_eq!(status.peers.iter().map(|p| p.node).collect::<Vec<_>>(), [node(2)]);
    assert!(status.serving);
}

#[test]
fn a_request_of_no_bytes_is_answered_and_does_nothing() {
    let mut world = world(2, 64);
    for op in [ClientOp::Read, ClientOp::Zero, ClientOp::Write(stray(0))] {
        let now = Nanos(world.now);
        world.replica(node(1)).handle_client(now, ClientInput::Request(request(op, 5 * BLOCK, 0)));
        let mut said = outputs(&mut world, 1);
        let released = said.iter().filter(|o| **o == Output::Release(STRAY)).count();
        assert_eq!(released, usize::from(matches!(op, ClientOp::Write(_))), "{said:?}");
        said.retain(|o| *o != Output::Release(STRAY));
        let done = Output::Reply { conn: ConnId(7), cookie: Cookie(7), result: Ok(ReplyData::None) };
        assert_eq!(said, [done], "{op:?}");
    }
    world.converge();
}

#[test]
fn a_zero_request_for_whose_edges_there_is_no_buffer_is_answered_with_an_error_and_changes_nothing() {
    let mut world = world(2, 64);
    for block in 10..14 {
        world.write(node(1), block, false);
    }
    world.run(2);
    let before = world.nodes[&node(1)].disk.data.clone();
    world.errors_allowed = true;
    for other_edge_fails in [false, true] {
        world.nodes.get_mut(&node(1)).unwrap().disk_paused = true;
        world.zero_bytes(node(1), 10 * BLOCK + 100, 3 * BLOCK);
        let edge = |r: &DiskRequest| matches!(r.op, DiskOp::ZeroBuffer { .. });
        for fails in [true, other_edge_fails] {
            let at = world.nodes[&node(1)].pending.iter().position(edge).expect("an edge has no buffer yet");
            if fails {
                let id = world.nodes.get_mut(&node(1)).unwrap().pending.remove(at).unwrap().id;
                let now = Nanos(world.now);
                world.replica(node(1)).handle_disk(now, DiskDone { id, result: Err(DiskErrorKind::Io) });
                world.collect(node(1));
            } else {
                world.complete_disk(node(1), at);
            }
        }
        world.nodes.get_mut(&node(1)).unwrap().disk_paused = false;
        world.settle();
        assert_eq!((world.acked_writes, world.waiting(node(1))), (4, 0));
        assert_eq!(world.nodes[&node(1)].disk.data, before);
        assert!(world.nodes[&node(1)].bufs.is_empty(), "no buffer is left");
    }
    assert!(world.replica(node(1)).status().serving);
    world.errors_allowed = false;
    world.zero_bytes(node(1), 10 * BLOCK + 100, 3 * BLOCK);
    world.settle();
    assert_eq!(world.acked_writes, 5);
    world.converge();
}

#[test]
fn r20_a_mended_block_of_the_wrong_length_is_not_used_and_another_member_is_asked() {
    let mut world = world(3, 64);
    world.write(node(1), 5, false);
    world.run(2);
    world.nodes.get_mut(&node(1)).unwrap().disk.bad = vec![5];
    world.clogged.insert(node(1));
    world.read(node(1), 5);
    world.settle();
    // The first that was asked says too much, in place of what it would have said.
    let asked = |(msg, _): &OnWire| match msg {
        PeerMsg::ReadRequest { id, .. } => Some(*id),
        _ => None,
    };
    let found = |w: &World| {
        w.wires.iter().find_map(|(link, queue)| Some((*link, queue.iter().position(|m| asked(m).is_some())?)))
    };
    let (Link(_, first), at) = found(&world).expect("a member is asked");
    let request = world.wires.get_mut(&Link(node(1), first)).unwrap().remove(at).unwrap();
    let (reign, id) = (world.config.reign, asked(&request).unwrap());
    let answer = PeerMsg::ReadReply { reign, id, payload: Some(stray(2)) };
    world.wires.entry(Link(first, node(1))).or_default().push_front((answer, Some(vec![1, 1])));
    world.settle();
    let (Link(_, second), _) = found(&world).expect("another is asked");
    assert_ne!(first, second);
    world.clogged.clear();
    world.settle();
    assert_eq!(world.waiting(node(1)), 0, "{:#?}", world.summary());
    world.converge();
}

#[test]
fn r17_a_copy_of_a_lineage_that_the_volume_does_not_know_is_left_alone() {
    let mut world = world(2, 64);
    let tag = world.write(node(1), 5, false);
    world.run(2);
    world.crash(node(2));
    world.run(60);
    world.write(node(1), 5, false);
    world.run(2);
    let mut other = world.config.clone();
    other.lineage = LineageId(other.lineage.0 + 7);
    other.history.clear();
    world.commit(other);
    world.run(2);
    world.start(node(2));
    world.run(60);
    let refused = |e: &Event| match e {
        Event::Refused { node: n, reason } => *n == node(2) && reason.contains("does not know"),
        _ => false,
    };
    assert_eq!(world.nodes[&node(1)].events.iter().filter(|e| refused(e)).count(), 1, "said once");
    let status = world.replica(node(1)).status();
    assert_eq!((status.serving, status.peers[0].state), (true, ReplicaState::Failed));
    assert_eq!(world.nodes[&node(2)].disk.data[5], tag, "its content may be all that is left of something");
    assert_eq!(world.config.in_sync.len(), 1);
}
