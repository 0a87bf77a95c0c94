//! Sessions to peers over loopback TCP; the test is the peer.

use std::net::{TcpListener, TcpStream};

use super::*;
use crate::wire::{self, Payload, WriteSeq};

const NODE: NodeId = NodeId(2);

struct Peer {
    stream: TcpStream,
    received: Vec<u8>,
}

fn incarnation(boot: u64) -> Incarnation {
    Incarnation { boot, nonce: 9 }
}

impl Peer {
    fn connect(rig: &Rig, boot: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let (there, _) = listener.accept().unwrap();
        there.set_nonblocking(true).unwrap();
        rig.volume.peer_connected(NODE, incarnation(boot), there);
        Self { stream, received: Vec::new() }
    }

    fn frame(message: &PeerMsg, content: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        if wire::encode(message, &mut bytes).is_some() {
            bytes.extend_from_slice(content);
        }
        bytes
    }

    fn send(&mut self, message: &PeerMsg, content: &[u8]) {
        self.stream.write_all(&Self::frame(message, content)).unwrap();
    }

    /// The next message and the bytes of its frame.
    fn next(&mut self) -> (PeerMsg, Vec<u8>) {
        loop {
            if let Some((message, len)) = wire::decode_slice(&self.received, BufId(0)).unwrap() {
                return (message, self.received.drain(..len).collect());
            }
            let mut bytes = vec![0; 1 << 20];
            let count = self.stream.read(&mut bytes).unwrap();
            assert!(count > 0, "closed");
            self.received.extend_from_slice(&bytes[..count]);
        }
    }

    fn is_closed(&mut self) -> bool {
        !matches!(self.stream.read(&mut [0; 1]), Ok(1))
    }
}

fn write_of(start: u64, content: &[u8], seq: u64) -> PeerMsg {
    let len = u32::try_from(content.len()).unwrap();
    PeerMsg::Write {
        reign: Reign(1),
        seq: WriteSeq(seq),
        blocks: BlockRange::between(start, start + u64::from(len) / 4096),
        durable: seq.is_multiple_of(2),
        missing: SlotSet(0),
        config: LogIndex(1),
        payload: Payload { buf: BufId(0), len, crc: crc32fast::hash(content) },
    }
}

#[test]
fn messages_with_and_without_content_go_both_ways() {
    let rig = Rig::new(64 << 20);
    let mut peer = Peer::connect(&rig, 1);
    peer.send(&PeerMsg::Ping, &[]);
    assert_eq!(peer.next().0, PeerMsg::Pong);
    let mut start = 0;
    for (seq, len) in [4096, 65536, 20_480, 32 << 20, 4096, 1 << 20].into_iter().enumerate() {
        let (content, seq) = (pattern(len, seq as u8), seq as u64 + 1);
        let blocks = BlockRange::between(start, start + len as u64 / 4096);
        peer.send(&write_of(start, &content, seq), &content);
        assert_eq!(peer.next().0, PeerMsg::WriteAck { reign: Reign(1), seq: WriteSeq(seq) });
        peer.send(&PeerMsg::ReadRequest { reign: Reign(1), id: seq, blocks }, &[]);
        let (message, frame) = peer.next();
        let PeerMsg::ReadReply { payload: Some(payload), .. } = message else { panic!("{message:?}") };
        assert_eq!(payload.len as usize, len);
        assert!(frame[wire::FRAME_HEADER_LEN..] == content, "{len} bytes");
        start = blocks.end();
    }
    // Many in one go, a long inline body among them.
    let mut bytes = Vec::new();
    for seq in 100..400 {
        let content = pattern(4096, seq as u8);
        bytes.extend(Peer::frame(&write_of(seq, &content, seq), &content));
    }
    let runs = (0..50_000).map(|n| wire::Run { start: 3 * n, count: 1 }).collect();
    let kind = wire::RunsKind::Intent;
    bytes.extend(Peer::frame(&PeerMsg::Runs { reign: Reign(1), kind, runs, last: true }, &[]));
    bytes.extend(Peer::frame(&PeerMsg::Ping, &[]));
    let mut stream = peer.stream.try_clone().unwrap();
    let sender = std::thread::spawn(move || stream.write_all(&bytes).unwrap());
    let mut acks = 0;
    let mut ponged = false;
    while acks < 300 || !ponged {
        match peer.next().0 {
            PeerMsg::WriteAck { .. } => acks += 1,
            PeerMsg::Pong => ponged = true,
            other => panic!("{other:?}"),
        }
    }
    sender.join().unwrap();
    assert_eq!(rig.shared.count("message 1 Runs"), 1);
    rig.stop();
}

#[test]
fn a_damaged_frame_ends_the_session_and_reaches_no_disk() {
    let content = pattern(8192, 3);
    let whole = Peer::frame(&write_of(1, &content, 1), &content);
    // In the header, at the start and at the end of the content.
    for at in [0, 9, wire::FRAME_HEADER_LEN, whole.len() - 1] {
        let rig = Rig::new(1 << 20);
        let mut peer = Peer::connect(&rig, 1);
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        bytes.extend(Peer::frame(&PeerMsg::Ping, &[]));
        peer.stream.write_all(&bytes).unwrap();
        assert!(peer.is_closed(), "byte {at}");
        eventually("the core knows", || rig.shared.count("down 1") == 1);
        assert_eq!(rig.shared.count("message"), 0);
        eventually("told to connect again", || *rig.hooks.lost.lock().unwrap() == [NODE]);
        rig.stop();
        assert!(std::fs::read(paths(&rig.dir).data).unwrap().iter().all(|b| *b == 0));
    }
}

#[test]
fn blocks_outside_the_volume_end_the_session() {
    let rig = Rig::new(1 << 20);
    let mut peer = Peer::connect(&rig, 1);
    peer.send(&write_of(255, &[1; 8192], 1), &[1; 8192]);
    assert!(peer.is_closed());
    assert_eq!(rig.shared.count("message"), 0);
    let mut again = Peer::connect(&rig, 1);
    again.send(&write_of(255, &[1; 4096], 1), &[1; 4096]);
    assert_eq!(again.next().0, PeerMsg::WriteAck { reign: Reign(1), seq: WriteSeq(1) });
}

#[test]
fn a_new_session_replaces_the_old_one_which_delivers_no_more() {
    let rig = Rig::new(1 << 20);
    let mut old = Peer::connect(&rig, 1);
    // Half a frame, which must never be completed by bytes of the next session.
    let content = pattern(4096, 3);
    let frame = Peer::frame(&write_of(1, &content, 1), &content);
    old.stream.write_all(&frame[..2000]).unwrap();
    eventually("up", || rig.shared.count("up 1") == 1);
    let mut new = Peer::connect(&rig, 2);
    assert!(old.is_closed());
    new.send(&PeerMsg::Ping, &[]);
    assert_eq!(new.next().0, PeerMsg::Pong);
    assert_eq!(rig.shared.log(), ["up 1 of node 2", "down 1", "up 2 of node 2", "message 2 Ping"]);
    assert!(rig.hooks.lost.lock().unwrap().is_empty(), "a replaced session is not lost");
    // An older incarnation does not come back.
    let mut stale = Peer::connect(&rig, 1);
    assert!(stale.is_closed());
    new.send(&PeerMsg::Ping, &[]);
    assert_eq!(new.next().0, PeerMsg::Pong);
}

#[test]
fn a_session_that_the_core_or_the_peer_closes_is_lost_once() {
    let rig = Rig::new(1 << 20);
    let mut peer = Peer::connect(&rig, 1);
    peer.send(&PeerMsg::Failed { reign: Reign(1), reason: "go away".into() }, &[]);
    assert!(peer.is_closed());
    eventually("lost", || rig.hooks.lost.lock().unwrap().len() == 1);
    drop(Peer::connect(&rig, 1));
    eventually("lost again", || rig.hooks.lost.lock().unwrap().len() == 2);
    assert_eq!(rig.shared.count("down"), 2);
}
