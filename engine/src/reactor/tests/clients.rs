//! Client connections, through whole volumes and (where buffers are counted) by hand.

use std::net::{TcpListener, TcpStream};

use super::*;
use crate::reactor::client::End;
use crate::reactor::clients::{Clients, Next};
use crate::reactor::fair::REQUESTS_MAX;
use crate::reactor::ring::{Completion, Hold, Io, Token};
use crate::replica::ConnId;

const MIB: u32 = 1 << 20;

#[test]
fn reads_and_writes_of_any_alignment_round_trip() {
    let rig = Rig::new(64 << 20);
    let mut client = rig.client();
    let mut model = vec![0_u8; 40 << 20];
    for (at, len) in [(0, 4096), (4096, 65536), (5, 1), (4095, 2), (100_000, 300_000), (1 << 20, 33 << 20)] {
        let len = len.min(32 << 20);
        let bytes = pattern(len, at as u8);
        client.write(at as u64, &bytes);
        model[at..at + len].copy_from_slice(&bytes);
    }
    for (at, len) in [(0, 40_000), (3, 1), (4095, 2), (99_999, 300_002), (1 << 20, 32 << 20)] {
        let read = client.read(at as u64, u32::try_from(len).unwrap());
        assert!(read == model[at..at + len], "{len} bytes at {at}");
    }
    rig.stop();
    let data = std::fs::read(paths(&rig.dir).data).unwrap();
    assert!(data[..model.len()] == model, "the data file holds the content");
}

#[test]
fn many_requests_in_flight_over_tcp_are_all_answered() {
    let rig = Rig::new(16 << 20);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (there, _) = listener.accept().unwrap();
    rig.volume.client_connected(new_client(OwnedFd::from(there), 0, Box::new(|_| ())));
    let mut sender = Client(stream.try_clone().unwrap());
    let writer = std::thread::spawn(move || {
        for n in 0..2000_u64 {
            sender.send(WRITE, n, n * 4096, 4096, &pattern(4096, n as u8));
        }
    });
    let mut receiver = Client(stream);
    let mut seen: Vec<u64> =
        (0..2000).map(|_| receiver.reply()).inspect(|r| assert_eq!(r.1, 0)).map(|r| r.0).collect();
    seen.sort_unstable();
    assert!(seen.into_iter().eq(0..2000));
    writer.join().unwrap();
    assert_eq!(receiver.read(1999 * 4096, 4096), pattern(4096, 1999_u64 as u8));
    rig.stop();
}

#[test]
fn requests_outside_the_volume_or_too_long_are_refused_and_their_payload_drained() {
    let rig = Rig::new(64 << 20);
    let mut client = rig.client();
    let long = 32 * MIB + 1;
    client.send(WRITE, 1, 0, long, &vec![0xAA; long as usize]);
    assert_eq!(client.reply(), (1, 1));
    client.send(READ, 2, 0, long, &[]);
    assert_eq!(client.reply(), (2, 1));
    client.send(WRITE, 3, (64 << 20) - 10, 20, &[0xAA; 20]);
    assert_eq!(client.reply(), (3, 1));
    client.send(READ, 4, u64::MAX - 3, 8, &[]);
    assert_eq!(client.reply(), (4, 1));
    client.send(TRIM, 5, 0, u32::MAX, &[]);
    assert_eq!(client.reply(), (5, 1));
    client.send(READ, 6, 1 << 40, 0, &[]);
    assert_eq!(client.reply(), (6, 0), "nothing to do");
    assert_eq!(client.read((64 << 20) - 4096, 4096), [0; 4096]);
    assert_eq!(rig.shared.count("request"), 1, "only the last one reached the core");
}

#[test]
fn a_long_trim_reaches_the_core_in_pieces_and_is_answered_once() {
    let rig = Rig::new(128 << 20);
    let mut client = rig.client();
    client.write(0, &pattern(8192, 1));
    client.write(100 << 20, &pattern(8192, 1));
    client.send(TRIM, 9, 100, 100 * MIB, &[]);
    assert_eq!(client.reply(), (9, 0));
    assert_eq!(rig.shared.count("request 1 Zero 33554432"), 3);
    assert_eq!(rig.shared.count("request 1 Zero"), 4);
    assert_eq!(client.read(50 << 20, 4096), [0; 4096]);
    client.send(FLUSH, 10, 0, 0, &[]);
    assert_eq!(client.reply(), (10, 0));
}

#[test]
fn zeroes_that_take_their_space_are_written_in_pieces_and_answered_once() {
    let rig = Rig::new(64 << 20);
    let mut client = rig.client();
    client.write(0, &pattern(12288, 1));
    assert_eq!(client.status(0, 64 * MIB), [(12288, false), ((64 << 20) - 12288, true)]);
    client.send(FILL, 9, 100, 3 * MIB, &[]);
    assert_eq!(client.reply(), (9, 0));
    assert_eq!(rig.shared.count("request 1 Write"), 5, "the client's own and four pieces");
    let end = u64::from(3 * MIB) + 4096;
    assert_eq!(client.status(0, 64 * MIB), [(end, false), ((64 << 20) - end, true)]);
    assert_eq!(client.read(0, 100), pattern(12288, 1)[..100]);
    assert_eq!(client.read(100, 3 * MIB), vec![0; 3 << 20]);
    client.send(FILL, 10, 50, 10, &[]);
    assert_eq!(client.reply(), (10, 0));
    let mut expected = pattern(12288, 1)[..100].to_vec();
    expected[50..60].fill(0);
    assert_eq!(client.read(0, 100), expected);
    client.send(FILL, 11, 64 << 20, 1, &[]);
    assert_eq!(client.reply(), (11, 1), "past the end");
}

#[test]
fn a_goodbye_is_followed_by_what_is_in_flight_and_then_the_end() {
    let rig = Rig::new(1 << 20);
    rig.hold();
    let mut client = rig.client();
    client.send(WRITE, 1, 0, 4096, &[1; 4096]);
    client.send(GOODBYE, 0, 0, 0, &[]);
    eventually("the write arrived", || rig.shared.count("request") == 1);
    rig.let_go();
    assert_eq!(client.reply(), (1, 0));
    assert!(client.is_closed());
    eventually("the core knows", || rig.shared.count("closed 1") == 1);
}

#[test]
fn bytes_that_are_not_the_protocol_close_the_connection_alone() {
    let rig = Rig::new(1 << 20);
    let (mut good, mut bad) = (rig.client(), rig.client());
    bad.0.write_all(&[0xFF; TOY_HEADER * 3]).unwrap();
    assert!(bad.is_closed());
    good.write(0, &[1; 10]);
    assert_eq!(rig.shared.log().iter().filter(|l| l.starts_with("closed")).count(), 1);
}

/// [R24]: a client that shut down while its connection is not read is gone at once, and what it had
/// sent and nobody had read never starts.
#[test]
fn r24_a_shut_down_is_seen_while_the_connection_is_not_read() {
    let rig = Rig::new(4 << 20);
    rig.hold();
    let mut client = rig.client();
    for n in 0..u64::from(REQUESTS_MAX) + 8 {
        client.send(WRITE, n, n * 4096, 4096, &[1; 4096]);
    }
    eventually("reading stopped", || rig.shared.count("request") == REQUESTS_MAX as usize);
    client.0.shutdown(std::net::Shutdown::Write).unwrap();
    eventually("the core knows", || rig.shared.count("closed 1") == 1);
    rig.let_go();
    let mut next = rig.client();
    assert_eq!(next.read(0, 4096), [0; 4096], "nothing of the old connection was started");
    assert_eq!(rig.shared.count("request 1"), REQUESTS_MAX as usize);
}

/// [R24]: before a new connection is read, those whose client has shut down are closed, so that a replay
/// is never overtaken by the original.
#[test]
fn r24_a_new_connection_is_served_only_after_shut_down_ones_are_closed() {
    for _ in 0..50 {
        let rig = Rig::new(1 << 20);
        let mut old = rig.client();
        old.write(0, &[1; 4096]);
        rig.hold();
        old.send(WRITE, 5, 0, 4096, &[2; 4096]);
        old.0.shutdown(std::net::Shutdown::Write).unwrap();
        let mut new = rig.client();
        new.send(READ, 6, 0, 4096, &[]);
        eventually("the new request arrived", || rig.shared.count("request 2") == 1);
        let log = rig.shared.log();
        let closed = log.iter().position(|l| l == "closed 1").expect("closed before the new one is read");
        let first = log.iter().position(|l| l.starts_with("request 2")).unwrap();
        assert!(closed < first, "{log:?}");
        assert!(!log[closed..].iter().any(|l| l.starts_with("request 1")), "{log:?}");
    }
}

/// [R24]: what stays unread for too long may be stale, and is dropped with its connection.
#[test]
fn r24_a_connection_that_stays_unread_is_closed() {
    let mut options = ReactorOptions::new("test");
    options.unread_max = Duration::from_millis(150);
    let rig = Rig::with(4 << 20, options);
    rig.hold();
    let mut quiet = rig.client();
    let mut client = rig.client();
    for n in 0..u64::from(REQUESTS_MAX) + 1 {
        client.send(FLUSH, n, 0, 0, &[]);
    }
    eventually("reading stopped", || rig.shared.count("request 2") == REQUESTS_MAX as usize);
    let start = Instant::now();
    assert!(client.is_closed());
    assert!(start.elapsed() >= Duration::from_millis(100), "{:?}", start.elapsed());
    rig.let_go();
    quiet.write(0, &[1; 1]);
}

/// [R24]: what a client has given up does not start once it has replayed it, however late the rest of it comes.
#[test]
fn r24_nothing_of_a_replaced_connection_starts() {
    let rig = Rig::new(1 << 20);
    let mut old = rig.client_of(1, 1);
    let mut beside = rig.client_of(1, 1);
    let mut stranger = rig.client_of(2, 1);
    old.write(8192, &[7; 4096]);
    // Half a write, whose other half is on its way.
    old.send(WRITE, 1, 0, 4096, &[1; 2048]);
    let mut new = rig.client_of(1, 2);
    new.write(0, &[1; 4096]);
    new.write(0, &[2; 4096]);
    // It may be closed by now.
    let _sent = old.0.write_all(&[1; 2048]);
    assert!(old.is_closed() && beside.is_closed());
    // One that was negotiated before and is handed over only now.
    let mut late = rig.client_of(1, 1);
    let _sent = late.0.write_all(&header(WRITE, 1, 0, 4096));
    assert!(late.is_closed());
    assert_eq!(new.read(0, 4096), [2; 4096]);
    assert_eq!(stranger.read(8192, 4096), [7; 4096], "another client's connections stay");
}

/// [R24]: the later pieces of a long trim do not follow either.
#[test]
fn r24_what_is_left_of_a_replaced_trim_does_not_follow() {
    let rig = Rig::new(96 << 20);
    rig.hold();
    let mut old = rig.client_of(1, 1);
    old.send(TRIM, 1, 0, 96 << 20, &[]);
    eventually("its first piece is there", || rig.shared.count("request 1") == 1);
    let mut new = rig.client_of(1, 2);
    assert!(old.is_closed());
    rig.let_go();
    new.write(90 << 20, &[5; 4096]);
    assert_eq!(rig.shared.count("request 1"), 1, "no further piece");
    assert_eq!(new.read(90 << 20, 4096), [5; 4096]);
}

/// [R23]: another reign: every connection is closed, nothing is answered, nothing of it starts later.
#[test]
fn r23_close_clients_closes_all_of_them_unanswered() {
    let rig = Rig::new(1 << 20);
    rig.hold();
    let mut clients = [rig.client(), rig.client()];
    for client in &mut clients {
        client.send(WRITE, 1, 0, 4096, &[1; 4096]);
    }
    eventually("both arrived", || rig.shared.count("request") == 2);
    rig.volume.lease(Lease { until: Nanos(0) });
    for client in &mut clients {
        assert!(client.is_closed(), "closed without an answer");
    }
    eventually("the core knows", || rig.shared.count("closed") == 2);
    rig.let_go();
    assert_eq!(rig.client().read(0, 4096), [0; 4096]);
}

#[test]
fn a_connection_that_is_ended_is_closed_unanswered_and_the_others_go_on() {
    let rig = Rig::new(1 << 20);
    let (tell, told) = std::sync::mpsc::channel();
    let mut clients = [1, 2, 3].map(|key| {
        let tell = tell.clone();
        rig.client_with(key, Box::new(move |end| tell.send((key, end)).unwrap()))
    });
    rig.hold();
    for client in &mut clients {
        client.send(WRITE, 1, 0, 4096, &[1; 4096]);
    }
    eventually("all arrived", || rig.shared.count("request") == 3);
    rig.volume.end_clients(vec![ClientKey(1), ClientKey(3), ClientKey(9)]);
    let [mut first, mut second, mut third] = clients;
    assert!(first.is_closed() && third.is_closed(), "closed without an answer");
    let mut ended = [told.recv().unwrap(), told.recv().unwrap()];
    ended.sort_unstable_by_key(|(key, _)| *key);
    assert_eq!(ended, [(1, End::Server), (3, End::Server)]);
    rig.let_go();
    assert_eq!(second.reply(), (1, 0));
    second.write(4096, &[2; 4096]);
    drop(second);
    assert_eq!(told.recv(), Ok((2, End::Client)));
}

/// Clients that take no answers, or announce a payload and do not send it: each holds client bytes only until
/// somebody else has waited for them for a while.
#[test]
fn stalled_clients_do_not_starve_the_others() {
    for by_reads in [true, false] {
        let options =
            ReactorOptions { unread_max: Duration::from_millis(800), ..ReactorOptions::new("test") };
        let rig = Rig::with(64 << 20, options);
        let mut stalled: Vec<_> = (0..8).map(|_| rig.client()).collect();
        for n in 0..8_u64 {
            let at = usize::try_from(n).unwrap() % stalled.len();
            let op = if by_reads { READ } else { WRITE };
            stalled[at].send(op, n, 0, 32 * MIB, if by_reads { &[] } else { &[1; 1000] });
        }
        // Nobody waits: they may take their time.
        std::thread::sleep(Duration::from_millis(400));
        let closed = |rig: &Rig| rig.shared.count("closed");
        assert_eq!(closed(&rig), 0);
        let mut other = rig.client();
        assert_eq!(other.read(0, 4096), [0; 4096]);
        other.write(0, &[3; 10]);
        eventually("the stalled ones are closed", || closed(&rig) == stalled.len());
    }
}

/// Clients driven by hand, to see every buffer.
pub(super) struct Bench {
    pub(super) io: Io,
    pub(super) clients: Clients,
}

impl Bench {
    pub(super) fn new() -> (Self, ConnId, Client<UnixStream>) {
        let mut io = Io::new(16, 0).unwrap();
        let mut clients = Clients::new(geometry(1 << 30), Duration::from_secs(20), None);
        let (conn, client) = Self::connect(&mut io, &mut clients);
        (Self { io, clients }, conn, client)
    }

    fn connect(io: &mut Io, clients: &mut Clients) -> (ConnId, Client<UnixStream>) {
        let (here, there) = UnixStream::pair().unwrap();
        let conn = clients.add(io, new_client(OwnedFd::from(there), 0, Box::new(|_| ()))).unwrap();
        clients.arm(io, conn, Nanos(0));
        (conn, Client(here))
    }

    /// One more client.
    pub(super) fn client(&mut self) -> (ConnId, Client<UnixStream>) {
        Self::connect(&mut self.io, &mut self.clients)
    }

    fn turn(&mut self) -> Vec<Completion> {
        let mut done = Vec::new();
        self.io.turn(Some(Duration::from_millis(50)), &mut done).unwrap();
        done
    }

    /// Takes one receive; what comes of it.
    pub(super) fn receive(&mut self, conn: ConnId) -> Option<Next> {
        let done = self.turn().into_iter().find(|c| c.token == Token::ClientReceive(conn))?;
        let Hold::Buffer(buf) = done.hold else { panic!("a receive holds a buffer") };
        self.clients.received(conn, buf, done.result, done.more).unwrap();
        self.io.buffers.release(buf);
        let next = self.clients.next(&mut self.io, conn);
        self.clients.arm(&mut self.io, conn, Nanos(0));
        next
    }

    /// Reaps everything after the end of all connections.
    pub(super) fn drain(&mut self) {
        while self.io.in_kernel() > 0 {
            for done in self.turn() {
                if let Hold::Buffer(buf) = done.hold {
                    self.io.buffers.release(buf);
                }
            }
        }
    }
}

#[test]
fn a_disconnect_in_the_middle_of_a_write_gives_every_buffer_back() {
    for sent in [100, 5000, 40_000, 1 << 20] {
        let (mut bench, conn, mut client) = Bench::new();
        client.send(WRITE, 1, 4096, 4 * MIB, &[]);
        let sender = std::thread::spawn(move || {
            // The other side may close before everything is out.
            let _closed = client.0.write_all(&vec![1; sent]);
            client
        });
        while !sender.is_finished() {
            assert!(bench.receive(conn).is_none());
        }
        let _client = sender.join().unwrap();
        assert!(bench.clients.close(&mut bench.io, conn, End::Client, "test"));
        bench.drain();
        assert_eq!((bench.io.buffers.in_use(), bench.io.buffers.client_bytes()), (0, 0));
    }
}

#[test]
fn requests_that_end_with_their_connection_give_their_client_bytes_back() {
    let (mut bench, conn, mut client) = Bench::new();
    client.send(READ, 1, 4096, 4 * MIB, &[]);
    client.send(WRITE, 2, 4096, 100, &[1; 100]);
    let Some(Next::Request(read)) = bench.receive(conn) else { panic!("a read") };
    assert_eq!(bench.io.buffers.client_bytes(), 4 << 20);
    let Some(Next::Request(write)) = bench.clients.next(&mut bench.io, conn) else { panic!("a write") };
    let ClientOp::Write(payload) = write.op else { panic!("a write") };
    assert_eq!(payload.len, 4096, "whole blocks");
    assert_eq!(bench.io.buffers.client_bytes(), (4 << 20) + 4096);
    bench.clients.close(&mut bench.io, conn, End::Client, "test");
    assert_eq!(bench.io.buffers.client_bytes(), 4096, "the write's buffer is the core's until it lets go");
    let late = bench.io.buffers.alloc(4 << 20);
    let data = ReplyData::Read { buf: late, skip: 0, len: 4 * MIB, zero: false };
    assert!(bench.clients.reply(&mut bench.io, conn, read.cookie, Ok(data)).is_none(), "dropped");
    bench.io.buffers.release(late);
    bench.io.buffers.release(payload.buf);
    bench.drain();
    assert_eq!((bench.io.buffers.in_use(), bench.io.buffers.client_bytes()), (0, 0));
}

/// [R24]: the sockets themselves are asked, not only what the ring has reported so far.
#[test]
fn r24_a_shut_down_client_is_found_before_the_ring_reports_it() {
    let (bench, conn, client) = Bench::new();
    assert!(bench.clients.gone().is_empty());
    drop(client);
    assert_eq!(bench.clients.gone(), [conn]);
}

#[test]
fn zeroes_under_way_count_until_the_core_gives_them_back_also_after_their_connection() {
    let (mut bench, conn, mut client) = Bench::new();
    client.send(FILL, 1, 100, 3 * MIB, &[]);
    let piece = |next: Option<Next>| match next {
        Some(Next::Request(ClientRequest { op: ClientOp::Write(payload), .. })) => payload,
        other => panic!("{other:?}"),
    };
    let first = piece(bench.receive(conn));
    let share = bench.io.buffers.client_bytes();
    assert!(share >= u64::from(first.len));
    bench.io.buffers.release(first.buf);
    let next = bench.clients.reply(&mut bench.io, conn, Cookie(1), Ok(ReplyData::None)).map(Next::Request);
    let second = piece(next);
    assert_eq!(bench.io.buffers.client_bytes(), share, "one share for all pieces");
    assert!(bench.clients.close(&mut bench.io, conn, End::Client, "test"));
    assert_eq!(bench.io.buffers.client_bytes(), share, "the core still has it");
    bench.io.buffers.release(second.buf);
    bench.drain();
    assert_eq!((bench.io.buffers.in_use(), bench.io.buffers.client_bytes()), (0, 0));
}
