//! The client against the server, over real sockets, with volumes in memory behind it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod common;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use blkrepl_engine::reactor::ClientSession;
use blkrepl_nbd::proto::*;
use blkrepl_nbd::{
    Admitting, Attached, ClientOptions, ExportInfo, ExportRefusal, Exports, NbdClient, NbdError, NbdUri,
    Peer, Place, RefusalKind, Request, ServerOptions, admit_with, connect_session, keepalive, list_exports,
    places,
};
use common::{Manner, Memory, TestServer, Volume, pattern, quick};
use proptest::prelude::*;

const MIB: usize = 1 << 20;

fn raw(command: u16, flags: u16, offset: u64, len: u32, payload: &[u8]) -> Request<'_> {
    Request::Raw { command, flags, offset, len, payload, reply_len: 0 }
}

fn server_error(result: Result<Vec<u8>, NbdError>) -> NbdErrno {
    match result {
        Err(NbdError::Server(errno)) => errno,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_written_is_read_at_any_alignment_over_tcp_and_unix() {
    let volume = Volume::new(4 * MIB, Manner::InOrder);
    let server = TestServer::start(Memory::one(&volume));
    for uri in [server.unix("vol0"), server.tcp("vol0"), server.tcp("")] {
        let mut client = NbdClient::connect(&uri, quick()).unwrap();
        assert_eq!(client.size(), 4 * MIB as u64);
        assert_eq!(client.facts().block_sizes, Some([1, 4096, 32 << 20]));
        assert_ne!(client.facts().flags & NBD_FLAG_CAN_MULTI_CONN, 0);
        for (seed, (offset, len)) in
            [(0, 1), (4095, 2), (1, 4096), (8192, 65536), (4 * MIB - 3, 3)].into_iter().enumerate()
        {
            let data = pattern(seed as u64, len);
            client.write(offset as u64, &data).unwrap();
            let mut back = vec![0; len];
            client.read(offset as u64, &mut back).unwrap();
            assert_eq!(back, data);
            assert_eq!(volume.data.lock().unwrap()[offset..offset + len], data);
        }
        client.disconnect().unwrap();
    }
}

#[test]
fn the_largest_request_passes_whole() {
    let volume = Volume::new(40 * MIB, Manner::InOrder);
    let server = TestServer::start(Memory::one(&volume));
    let mut client = server.connect();
    let data = pattern(7, PAYLOAD_MAX_DEFAULT as usize);
    client.write(513, &data).unwrap();
    let mut back = vec![0; data.len()];
    client.read(513, &mut back).unwrap();
    assert!(back == data);
}

#[test]
fn flush_fua_trim_and_zeroes_arrive_as_such() {
    let volume = Volume::new(MIB, Manner::InOrder);
    let server = TestServer::start(Memory::one(&volume));
    let mut client = server.connect();
    client.write_fua(0, &pattern(1, MIB)).unwrap();
    assert_eq!(volume.fuas.load(Ordering::Relaxed), 1);
    client.flush().unwrap();
    assert_eq!(volume.flushes.load(Ordering::Relaxed), 1);
    client.trim(4096, 8192).unwrap();
    client.write_zeroes(100_000, 1).unwrap();
    client.call(Request::WriteZeroes { offset: 200_000, len: 3, fua: true, no_hole: true }).unwrap();
    assert_eq!(volume.fuas.load(Ordering::Relaxed), 2);
    let mut expected = pattern(1, MIB);
    expected[4096..12288].fill(0);
    expected[100_000] = 0;
    expected[200_000..200_003].fill(0);
    let mut back = vec![0; MIB];
    client.read(0, &mut back).unwrap();
    assert!(back == expected);
}

#[test]
fn refused_requests_get_their_error_and_the_connection_goes_on() {
    let volume = Volume::new(MIB, Manner::InOrder);
    let server = TestServer::start(Memory::one(&volume));
    let mut client = server.connect();
    let end = MIB as u64;
    let block = pattern(3, 4096);
    let huge = vec![1; PAYLOAD_MAX_DEFAULT as usize + 1];
    let huge_len = PAYLOAD_MAX_DEFAULT + 1;
    let cases = [
        (Request::Read { offset: end, len: 1 }, NbdErrno::Inval),
        (Request::Read { offset: u64::MAX, len: 4096 }, NbdErrno::Inval),
        (Request::Read { offset: 0, len: 0 }, NbdErrno::Inval),
        (Request::Write { offset: end - 4095, data: &block, fua: false }, NbdErrno::NoSpc),
        (Request::Write { offset: 0, data: &huge, fua: false }, NbdErrno::Inval),
        (Request::Trim { offset: end, len: 4096, fua: false }, NbdErrno::Inval),
        (Request::WriteZeroes { offset: end, len: 1, fua: false, no_hole: false }, NbdErrno::NoSpc),
        (raw(NBD_CMD_WRITE, 1 << 3, 0, 4096, &block), NbdErrno::Inval),
        (raw(8, 0, 0, 4096, &[]), NbdErrno::Inval),
        (raw(7, 0, 0, 4096, &[]), NbdErrno::Inval),
        (raw(999, 0xffff, 1, 1, &[]), NbdErrno::Inval),
        (raw(NBD_CMD_FLUSH, 0, 1, 0, &[]), NbdErrno::Inval),
        (raw(NBD_CMD_READ, 0, 0, huge_len, &[]), NbdErrno::Inval),
    ];
    for (request, expected) in cases {
        assert_eq!(server_error(client.call(request)), expected);
        // Nothing of a drained payload is taken for a request.
        client.write(0, &block).unwrap();
    }
    let mut expected = vec![0; MIB];
    expected[..4096].copy_from_slice(&block);
    assert!(*volume.data.lock().unwrap() == expected, "no refused request had an effect");
}

#[test]
fn replies_out_of_order_find_their_requests() {
    const DEPTH: usize = 32;
    let volume = Volume::new(MIB, Manner::Reversed(DEPTH));
    let server = TestServer::start(Memory::one(&volume));
    let mut client = server.connect();
    for round in 0..3u64 {
        let mut blocks = BTreeMap::new();
        for index in 0..DEPTH {
            let data = pattern(round * 1000 + index as u64, 4096);
            let offset = index as u64 * 4096;
            let handle = client.submit(Request::Write { offset, data: &data, fua: false }).unwrap();
            blocks.insert(handle, data);
        }
        let mut order = Vec::new();
        while order.len() < DEPTH {
            let completion = client.poll(Duration::from_secs(20)).unwrap().unwrap();
            completion.result.unwrap();
            order.push(completion.handle);
        }
        assert!(order.is_sorted_by(|a, b| a > b), "the server answers last one first");

        let mut reads = BTreeMap::new();
        for (index, data) in blocks.into_values().enumerate() {
            let request = Request::Read { offset: index as u64 * 4096, len: 4096 };
            reads.insert(client.submit(request).unwrap(), data);
        }
        while !reads.is_empty() {
            let completion = client.poll(Duration::from_secs(20)).unwrap().unwrap();
            assert!(completion.result.unwrap() == reads.remove(&completion.handle).unwrap());
        }
        assert_eq!(client.in_flight().len(), 0);
    }
    assert_eq!(client.poll(Duration::ZERO).unwrap(), None);
}

#[test]
fn full_sockets_in_both_directions_do_not_lock_up() {
    let volume = Volume::new(64 * MIB, Manner::InOrder);
    let server = TestServer::start(Memory::one(&volume));
    let mut client = server.connect();
    let data = pattern(5, MIB);
    let mut expected = 0;
    // More to send and more to receive than sockets and queue hold, all submitted before the first poll.
    for index in 0..96u64 {
        client.submit(Request::Write { offset: index % 64 * MIB as u64, data: &data, fua: false }).unwrap();
        client.submit(Request::Read { offset: index % 64 * MIB as u64, len: MIB as u32 }).unwrap();
        expected += 2;
    }
    while expected > 0 {
        let completion = client.poll(Duration::from_secs(20)).unwrap().unwrap();
        let read = completion.result.unwrap();
        assert!(read.is_empty() || read == data);
        expected -= 1;
    }
}

#[test]
fn many_clients_share_a_volume() {
    let volume = Volume::new(8 * MIB, Manner::InOrder);
    let server = TestServer::start(Memory::one(&volume));
    std::thread::scope(|scope| {
        for worker in 0..8u64 {
            let uri = if worker % 2 == 0 { server.unix("vol0") } else { server.tcp("vol0") };
            scope.spawn(move || {
                let mut client = NbdClient::connect(&uri, quick()).unwrap();
                for step in 0..50 {
                    let offset = worker * MIB as u64 + step * 4096;
                    client.write(offset, &pattern(offset, 4096)).unwrap();
                }
                client.flush().unwrap();
            });
        }
    });
    let mut client = server.connect();
    let mut back = vec![0; 4096];
    for offset in (0..8u64).flat_map(|worker| (0..50).map(move |step| worker * MIB as u64 + step * 4096)) {
        client.read(offset, &mut back).unwrap();
        assert!(back == pattern(offset, 4096));
    }
}

#[test]
fn refusals_come_with_their_kind_and_the_servers_words() {
    let volume = Volume::new(MIB, Manner::InOrder);
    let text = "volume away: n2 is primary, at nbd://10.0.0.2:10809/away";
    let refusals = [
        ("away".to_owned(), ExportRefusal::Policy(text.into())),
        ("late".to_owned(), ExportRefusal::Shutdown),
    ];
    let volumes = [("vol0".to_owned(), volume)].into();
    let server = TestServer::start(Arc::new(Memory { volumes, refusals: refusals.into() }));
    let cases = [
        ("away", RefusalKind::Policy, "10.0.0.2", true),
        ("late", RefusalKind::Shutdown, "stopping", true),
        ("none", RefusalKind::Unknown, "none", false),
        ("", RefusalKind::Unknown, "3 volumes", false),
    ];
    for (name, expected, words, transient) in cases {
        let error = NbdClient::connect(&server.unix(name), quick()).unwrap_err();
        assert_eq!(error.is_transient(), transient);
        match error {
            NbdError::Refused { kind, message } => {
                assert_eq!(kind, expected);
                assert!(message.contains(words), "{message}");
            }
            other => panic!("{other:?}"),
        }
    }
    let names = list_exports(&server.tcp("").target, quick()).unwrap();
    assert_eq!(names, ["vol0", "away", "late"]);
}

#[test]
fn a_server_that_goes_away_leaves_the_open_requests_to_the_caller() {
    let volume = Volume::new(MIB, Manner::CloseAfter(3));
    let server = TestServer::start(Memory::one(&volume));
    let mut client = server.connect();
    let block = pattern(1, 4096);
    let handles: Vec<_> = (0..8)
        .map(|index| client.submit(Request::Write { offset: index * 4096, data: &block, fua: false }))
        .map_while(Result::ok)
        .collect();
    let mut answered = Vec::new();
    let error = loop {
        match client.poll(Duration::from_secs(20)) {
            Ok(Some(completion)) => answered.push(completion.handle),
            Ok(None) => panic!("no answer and no end"),
            Err(e) => break e,
        }
    };
    assert!(matches!(error, NbdError::Disconnected(_)), "{error:?}");
    assert!(error.is_transient());
    assert_eq!(answered, handles[..3]);
    assert_eq!(client.in_flight().collect::<Vec<_>>(), handles[3..]);
    assert!(matches!(client.flush(), Err(NbdError::Disconnected(_))), "never reconnects by itself");
}

#[test]
fn a_read_cut_off_in_its_data_stays_open() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nbd.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        accept_go(&mut stream);
        let mut request = [0; REQUEST_LEN];
        stream.read_exact(&mut request).unwrap();
        let request = RequestHeader::decode(&request).unwrap();
        stream.write_all(&encode_simple_reply(None, request.handle)).unwrap();
        stream.write_all(&[7; 1000]).unwrap();
    });
    let mut client = NbdClient::connect(&NbdUri::unix(&path, "vol0"), quick()).unwrap();
    let handle = client.submit(Request::Read { offset: 0, len: 4096 }).unwrap();
    assert!(matches!(client.poll(Duration::from_secs(20)), Err(NbdError::Disconnected(_))));
    assert_eq!(client.in_flight().collect::<Vec<_>>(), [handle]);
    server.join().unwrap();
}

#[test]
fn a_reply_to_no_request_and_a_reply_without_magic_end_the_connection() {
    for reply in [encode_simple_reply(None, 4711), [0xab; SIMPLE_REPLY_LEN]] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            accept_go(&mut stream);
            stream.write_all(&reply).unwrap();
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let mut client = NbdClient::connect(&NbdUri::unix(&path, "vol0"), quick()).unwrap();
        let error = client.flush().unwrap_err();
        assert!(matches!(error, NbdError::Protocol(_)), "{error:?}");
        drop(client);
        server.join().unwrap();
    }
}

/// The smallest possible server: greets, takes one `NBD_OPT_GO`, and says yes.
fn accept_go(stream: &mut UnixStream) {
    stream.write_all(b"NBDMAGICIHAVEOPT\x00\x03").unwrap();
    let mut head = [0; 4 + OPTION_HEADER_LEN];
    stream.read_exact(&mut head).unwrap();
    let len = u32::from_be_bytes(head[16..20].try_into().unwrap());
    std::io::copy(&mut (&*stream).take(u64::from(len)), &mut std::io::sink()).unwrap();
    let head = [&NBD_REP_MAGIC.to_be_bytes()[..], &NBD_OPT_GO.to_be_bytes()].concat();
    let info = [&NBD_REP_INFO.to_be_bytes()[..], &12u32.to_be_bytes(), &[0, 0], &(1u64 << 20).to_be_bytes()];
    stream.write_all(&[&head, &info.concat()[..], &1u16.to_be_bytes()].concat()).unwrap();
    stream.write_all(&[&head[..], &NBD_REP_ACK.to_be_bytes(), &0u32.to_be_bytes()].concat()).unwrap();
}

#[test]
fn a_silent_server_is_a_time_out_that_ends_the_connection() {
    let volume = Volume::new(MIB, Manner::Silent);
    let server = TestServer::start(Memory::one(&volume));
    let options = ClientOptions { io_timeout: Duration::from_millis(100), ..quick() };
    let mut client = NbdClient::connect(&server.unix("vol0"), options).unwrap();
    assert_eq!(client.poll(Duration::from_millis(10)).unwrap(), None);
    assert_eq!(client.poll(Duration::ZERO).unwrap(), None);
    assert!(matches!(client.flush(), Err(NbdError::TimedOut(_))));
    assert_eq!(client.in_flight().len(), 1);
    assert!(matches!(client.flush(), Err(NbdError::Disconnected(_))));
}

#[test]
fn a_connection_that_nobody_takes_over_is_closed() {
    let server = TestServer::start(Memory::one(&Volume::new(MIB, Manner::Drop)));
    let mut client = server.connect();
    assert!(matches!(client.flush(), Err(NbdError::Disconnected(_))));
}

#[test]
fn nothing_that_follows_the_negotiation_is_swallowed() {
    let volume = Volume::new(MIB, Manner::InOrder);
    let server = TestServer::start(Memory::one(&volume));
    let mut stream = UnixStream::connect(server.socket()).unwrap();
    let mut all = 3u32.to_be_bytes().to_vec();
    all.extend_from_slice(&IHAVEOPT.to_be_bytes());
    all.extend_from_slice(&NBD_OPT_EXPORT_NAME.to_be_bytes());
    all.extend_from_slice(&4u32.to_be_bytes());
    all.extend_from_slice(b"vol0");
    let write = RequestHeader { flags: 0, command: NBD_CMD_WRITE, handle: 9, offset: 10, len: 3 };
    all.extend_from_slice(&write.encode());
    all.extend_from_slice(b"abc");
    // One send, long before the server has greeted.
    stream.write_all(&all).unwrap();
    let mut answer = [0; GREETING_LEN + 10 + SIMPLE_REPLY_LEN];
    stream.read_exact(&mut answer).unwrap();
    let reply = answer[GREETING_LEN + 10..].try_into().unwrap();
    assert_eq!(decode_simple_reply(reply), Ok((None, 9)));
    assert_eq!(volume.data.lock().unwrap()[9..14], *b"\0abc\0");
}

/// A connection over TCP as it is handed over, and its client.
fn attached_over_tcp() -> (Attached, NbdClient) {
    struct Keep(std::sync::mpsc::Sender<Attached>);
    impl Exports for Keep {
        fn list(&self) -> Vec<String> {
            vec!["vol0".into()]
        }
        fn open(&self, name: &str) -> Result<ExportInfo, ExportRefusal> {
            Ok(ExportInfo::new(name, MIB as u64))
        }
        fn admit(&self, _: &str, _: Peer) -> Admitting {
            let sender = self.0.clone();
            admit_with(move |client| sender.send(client).unwrap())
        }
    }
    let (sender, attached) = std::sync::mpsc::channel();
    let server = TestServer::start(Arc::new(Keep(sender)));
    let client = NbdClient::connect(&server.tcp("vol0"), quick()).unwrap();
    (attached.recv_timeout(Duration::from_secs(20)).unwrap(), client)
}

#[test]
fn an_attached_tcp_connection_has_no_delay() {
    let (attached, _client) = attached_over_tcp();
    assert!(rustix::net::sockopt::tcp_nodelay(&attached.fd).unwrap());
}

#[test]
fn an_attached_tcp_connection_notices_a_client_that_is_gone() {
    use rustix::net::sockopt;
    let (attached, _client) = attached_over_tcp();
    let socket = &attached.fd;
    assert!(sockopt::socket_keepalive(socket).unwrap());
    assert_eq!(sockopt::tcp_keepidle(socket).unwrap(), keepalive::PROBE_IDLE);
    assert_eq!(sockopt::tcp_keepintvl(socket).unwrap(), keepalive::PROBE_INTERVAL);
    assert_eq!(sockopt::tcp_keepcnt(socket).unwrap(), keepalive::PROBES);
    let limit = Duration::from_millis(sockopt::tcp_user_timeout(socket).unwrap().into());
    assert_eq!(limit, keepalive::GONE_AFTER);
}

#[test]
fn garbage_in_the_transmission_phase_closes() {
    let server = TestServer::start(Memory::one(&Volume::new(MIB, Manner::InOrder)));
    let mut stream = UnixStream::connect(server.socket()).unwrap();
    stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
    stream.write_all(&[0x5a; REQUEST_LEN]).unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert_eq!(answer.len(), GREETING_LEN + 10);
}

#[test]
fn a_client_that_says_nothing_is_closed_and_its_place_given_to_the_next() {
    let options = ServerOptions {
        negotiation_timeout: Duration::from_millis(300),
        negotiations_max: 1,
        ..ServerOptions::default()
    };
    let server = TestServer::with(Memory::one(&Volume::new(MIB, Manner::InOrder)), options);
    let started = Instant::now();
    let mut silent = UnixStream::connect(server.socket()).unwrap();
    let mut greeting = [0; GREETING_LEN];
    silent.read_exact(&mut greeting).unwrap();
    let mut client = server.connect();
    assert!(started.elapsed() >= options.negotiation_timeout, "there is room for one negotiation only");
    client.flush().unwrap();
    assert_eq!(silent.read(&mut greeting).unwrap(), 0);
}

#[test]
fn a_connection_beyond_the_descriptors_for_clients_is_closed_at_once() {
    let options = ServerOptions { descriptor_max: 2, ..ServerOptions::default() };
    let server = TestServer::with(Memory::one(&Volume::new(MIB, Manner::InOrder)), options);
    let mut stream = UnixStream::connect(server.socket()).unwrap();
    assert_eq!(stream.read(&mut [0; GREETING_LEN]).unwrap(), 0);
}

#[test]
fn stopping_ends_negotiations_and_leaves_attached_clients() {
    let volume = Volume::new(MIB, Manner::InOrder);
    let mut server = TestServer::start(Memory::one(&volume));
    let mut client = server.connect();
    let mut negotiating = UnixStream::connect(server.socket()).unwrap();
    let mut greeting = [0; GREETING_LEN];
    negotiating.read_exact(&mut greeting).unwrap();
    server.stop();
    assert_eq!(negotiating.read(&mut greeting).unwrap(), 0);
    assert!(!server.socket().exists());
    client.write(0, b"still here").unwrap();
    let error = NbdClient::connect(&NbdUri::unix(server.socket(), "vol0"), quick()).unwrap_err();
    assert!(matches!(error, NbdError::Connect { .. }) && error.is_transient(), "{error:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_server_that_talks_nonsense_cannot_hurt_the_client(
        valid in 0usize..3, bytes in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            match valid {
                0 => {}
                1 => stream.write_all(b"NBDMAGICIHAVEOPT\x00\x03").unwrap(),
                _ => accept_go(&mut stream),
            }
            let _ = stream.write_all(&bytes);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        });
        if let Ok(mut client) = NbdClient::connect(&NbdUri::unix(&path, "vol0"), quick()) {
            prop_assert!(client.flush().is_err());
        }
        server.join().unwrap();
    }
}

#[test]
fn the_client_asks_where_a_volume_is_and_joins_a_session() {
    struct Told(std::sync::mpsc::Sender<Attached>);
    impl Exports for Told {
        fn list(&self) -> Vec<String> {
            vec!["vol0".into()]
        }
        fn open(&self, name: &str) -> Result<ExportInfo, ExportRefusal> {
            Ok(ExportInfo { lineage: Some(9), ..ExportInfo::new(name, MIB as u64) })
        }
        fn places(&self, name: &str) -> Result<Vec<Place>, ExportRefusal> {
            assert_eq!(name, "vol0");
            Ok(vec![
                Place { address: "n1:5".into(), primary: false },
                Place { address: "n2:5".into(), primary: true },
            ])
        }
        fn admit(&self, _: &str, _: Peer) -> Admitting {
            let sender = self.0.clone();
            admit_with(move |client| sender.send(client).unwrap())
        }
    }
    let (sender, attached) = std::sync::mpsc::channel();
    let server = TestServer::start(Arc::new(Told(sender)));
    let uri = server.tcp("vol0");
    let found = places(&uri.target, "vol0", quick()).unwrap();
    assert_eq!(
        found.iter().map(|p| (p.address.as_str(), p.primary)).collect::<Vec<_>>(),
        [("n1:5", false), ("n2:5", true)]
    );
    let session = ClientSession { id: 3, generation: 4 };
    let (_socket, facts) = connect_session(&uri, session, quick()).unwrap();
    assert_eq!((facts.size, facts.lineage), (MIB as u64, Some(9)));
    let attached = attached.recv_timeout(Duration::from_secs(20)).unwrap();
    assert_eq!(attached.session, Some(session));
    let (_plain, facts) = blkrepl_nbd::connect_raw(&uri, quick()).unwrap();
    assert_eq!(facts.lineage, None, "nobody asked");
}
