//! The hot path allocates nothing: two replicas with the production core and reactor, connected over TCP, an NBD
//! client that knows no allocation itself, and an allocator that counts those of the whole process.
//!
//! A tick and a published status (every 50 ms) allocate, whatever the number of requests. So requests are made in
//! short windows, and there has to be a window without a single allocation: what a request costs, on the primary or
//! on the secondary, would show in each of them.

#![allow(clippy::unwrap_used, missing_docs)]

use std::alloc::System;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blkrepl_engine::meta::{DataIdentity, Superblock};
use blkrepl_engine::reactor::{
    self, ClientKey, NewClient, ReactorOptions, VolumeHandle, VolumeHooks, VolumePaths,
};
use blkrepl_engine::replica::{Boot, Event, Lease, Replica};
use blkrepl_engine::types::*;
use blkrepl_engine::wire::BaseContent;
use blkrepl_nbd::proto::{NBD_CMD_FLUSH, NBD_CMD_READ, NBD_CMD_WRITE, RequestHeader, SIMPLE_REPLY_LEN};
use blkrepl_nbd::{ExportInfo, Replies, Session};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const SIZE: u64 = 16 << 20;
const BLOCK: usize = 4096;
/// A request that takes a buffer of its own size.
const LARGE: usize = 64 << 10;
/// Windows that are tried before it counts as shown that each request allocates.
const WINDOWS: usize = 400;
/// Requests in a window.
const REQUESTS: usize = 64;

struct Quiet;

impl VolumeHooks for Quiet {
    fn propose(&mut self, _proposal: Proposal) {}
    fn event(&mut self, _event: Event) {}
    fn session_lost(&mut self, _node: NodeId) {}
    fn status_changed(&mut self, _status: Arc<ReplicaStatus>) {}
}

fn member(n: u64) -> Member {
    Member { node: NodeId(n), incarnation: Incarnation { boot: 1, nonce: n } }
}

fn geometry() -> Geometry {
    Geometry::new(SIZE, 4096, 1 << 20).unwrap()
}

fn config(replicas: u8) -> ConfigView {
    let replica = |n: u8| ReplicaView {
        node: NodeId(u64::from(n) + 1),
        slot: ReplicaSlot(n),
        last_member: Some(member(u64::from(n) + 1).incarnation),
    };
    ConfigView {
        index: LogIndex(1),
        cluster: ClusterId(1),
        volume: VolumeId(2),
        epoch: Epoch(2),
        reign: Reign(2),
        primary: Some(member(1)),
        in_sync: (1..=u64::from(replicas)).map(member).collect(),
        replicas: (0..replicas).map(replica).collect(),
        lineage: LineageId(3),
        history: Vec::new(),
        geometry: geometry(),
        settings: VolumeSettings::default(),
    }
}

/// A replica of a volume whose replicas were in sync when they stopped.
fn replica(dir: &tempfile::TempDir, n: u8, replicas: u8) -> VolumeHandle {
    let me = member(u64::from(n) + 1);
    let paths = VolumePaths {
        data: dir.path().join(format!("{n}.data")),
        meta: dir.path().join(format!("{n}.meta")),
    };
    let superblock = Superblock {
        cluster: ClusterId(1),
        volume: VolumeId(2),
        node: me.node,
        slot: ReplicaSlot(n),
        geometry: geometry(),
        seq: 0,
        epoch: Epoch(1),
        reign: Reign(1),
        lineage: LineageId(3),
        member: Some(me.incarnation),
        chain: Vec::new(),
        current: me.incarnation,
        os_boot: 0,
        inconsistent: None,
        base: BaseContent::Member,
        identity: DataIdentity::default(),
        clean: None,
    };
    let others: Vec<ReplicaSlot> = (0..replicas).filter(|other| *other != n).map(ReplicaSlot).collect();
    let open = reactor::create(&paths, superblock, &others, true, Duration::ZERO).unwrap();
    let image = open.image;
    let core =
        move |now| Replica::new(Boot { me, os_boot: 0, image, data_replaced: false, failed: None, now });
    let handle = reactor::spawn(core, open.files, Box::new(Quiet), ReactorOptions::new("test")).unwrap();
    handle.config(config(replicas));
    handle.lease(Lease { until: Nanos(u64::MAX / 2) });
    handle
}

/// A client that sends plain requests of whole blocks and allocates nothing while it does.
struct Client {
    socket: UnixStream,
    out: Vec<u8>,
    content: Vec<u8>,
    at: u64,
    /// Bytes of a read or write.
    len: usize,
}

impl Client {
    fn push(&mut self, command: u16, offset: u64, len: usize) {
        let len32 = u32::try_from(len).unwrap();
        let header = RequestHeader { flags: 0, command, handle: offset, offset, len: len32 };
        self.out.extend_from_slice(&header.encode());
        if command == NBD_CMD_WRITE {
            self.out.extend_from_slice(&self.content[..len]);
        }
    }

    /// `depth` requests at once, and their answers.
    fn round(&mut self, command: u16, depth: usize) {
        self.out.clear();
        let len = if command == NBD_CMD_FLUSH { 0 } else { self.len };
        for _ in 0..depth {
            self.at = (self.at + 37 * self.len as u64) % SIZE;
            self.push(command, if len == 0 { 0 } else { self.at }, len);
        }
        self.socket.write_all(&self.out).unwrap();
        let answer = SIMPLE_REPLY_LEN + if command == NBD_CMD_READ { len } else { 0 };
        self.out.resize(answer * depth, 0);
        self.socket.read_exact(&mut self.out).unwrap();
        assert!(self.out.chunks(answer).all(|a| a[4..8] == [0; 4]), "an answer with an error");
    }
}

/// The fewest allocations that one window of requests took.
fn fewest(client: &mut Client, commands: &[u16], depth: usize) -> usize {
    let mut fewest = usize::MAX;
    for _ in 0..WINDOWS {
        let region = Region::new(ALLOCATOR);
        for _ in 0..REQUESTS / depth / commands.len() {
            commands.iter().for_each(|command| client.round(*command, depth));
        }
        let change = region.change();
        fewest = fewest.min(change.allocations + change.reallocations);
        if fewest == 0 {
            break;
        }
    }
    fewest
}

fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < end, "never came true: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Connects a client to a volume, and uses every region and every pool until it has what it needs.
fn connect(volume: &VolumeHandle) -> Client {
    wait_until("the primary serves", || volume.status().serving);
    let (socket, there) = UnixStream::pair().unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let session = Box::new(Session::new(&ExportInfo::new("vol0", SIZE), Replies::Simple));
    let (theirs, guard) = (OwnedFd::from(there), Box::new(|_| ()));
    volume.client_connected(NewClient {
        key: ClientKey(1),
        socket: theirs,
        session: None,
        protocol: session,
        name: "test".into(),
        guard,
    });
    let (out, content) = (Vec::with_capacity(4 << 20), vec![7; LARGE]);
    Client { socket, out, content, at: 0, len: BLOCK }
}

/// Looks at requests of one length, at each depth; what of them allocates.
fn look(client: &mut Client, who: &str, len: usize, depths: &[usize]) -> Vec<String> {
    client.len = len;
    for _ in 0..200 {
        [NBD_CMD_WRITE, NBD_CMD_READ].iter().for_each(|command| client.round(*command, 32));
    }
    let jobs: [(&str, &[u16]); 3] = [
        ("write", &[NBD_CMD_WRITE]),
        ("read", &[NBD_CMD_READ]),
        ("write and flush", &[NBD_CMD_WRITE, NBD_CMD_FLUSH]),
    ];
    let mut wrong = Vec::new();
    for (name, commands) in jobs {
        for depth in depths {
            let allocations = fewest(client, commands, *depth);
            let what = format!("{who}: {name} of {} KiB, depth {depth}: {allocations}", len >> 10);
            println!("{what} allocations in {REQUESTS} requests");
            if allocations > 0 {
                wrong.push(what);
            }
        }
    }
    wrong
}

fn stop(volume: &VolumeHandle) {
    volume.stop();
    assert!(volume.wait_stopped(Duration::from_secs(20)));
}

// One test: the allocator counts for the whole process.
#[test]
fn a_request_allocates_nothing_in_steady_state() {
    let dir = tempfile::tempdir().unwrap();
    let (primary, secondary) = (replica(&dir, 0, 2), replica(&dir, 1, 2));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (there, _) = listener.accept().unwrap();
    primary.peer_connected(member(2).node, member(2).incarnation, here);
    secondary.peer_connected(member(1).node, member(1).incarnation, there);
    let mut client = connect(&primary);
    let mut wrong = look(&mut client, "replicated", BLOCK, &[1, 8, 32]);
    wrong.extend(look(&mut client, "replicated", LARGE, &[1, 8]));
    drop(client);
    stop(&primary);
    stop(&secondary);

    let dir = tempfile::tempdir().unwrap();
    let alone = replica(&dir, 0, 1);
    let mut client = connect(&alone);
    wrong.extend(look(&mut client, "alone", BLOCK, &[1, 8, 32]));
    drop(client);
    stop(&alone);
    assert!(wrong.is_empty(), "{wrong:?}");
}
