//! Clients that misbehave, against the server over real sockets: each is refused or closed, is counted, gives its
//! place back, and leaves others alone.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use blkrepl_nbd::proto::*;
use blkrepl_nbd::{ConnectionLimits, NbdClient, NbdErrno, NbdError, RefusalKind, Request, ServerOptions};
use common::{Manner, Memory, TestServer, Volume, quick};

const MIB: usize = 1 << 20;

fn volume() -> Arc<Volume> {
    Volume::new(MIB, Manner::InOrder)
}

fn limited(all: usize, per_client: usize) -> TestServer {
    let options =
        ServerOptions { connections: ConnectionLimits { all, per_client }, ..ServerOptions::default() };
    TestServer::with(Memory::one(&volume()), options)
}

/// The text of the refusal that a client beyond a limit gets.
fn refusal(server: &TestServer) -> String {
    match NbdClient::connect(&server.unix("vol0"), quick()) {
        Err(NbdError::Refused { kind: RefusalKind::Policy, message }) => message,
        other => panic!("{other:?}"),
    }
}

#[test]
fn connections_beyond_a_limit_are_told_so_and_a_place_is_given_back_with_its_connection() {
    for (all, per_client, key, counter) in [
        (2, 10, "nbd.connections_max", "refused_connections_max"),
        (10, 2, "nbd.connections_per_client_max", "refused_connections_per_client_max"),
    ] {
        let server = limited(all, per_client);
        let held = [server.connect(), NbdClient::connect(&server.tcp("vol0"), quick()).unwrap()];
        let said = refusal(&server);
        assert!(said.contains(key) && said.contains(" 2 "), "{said}");
        assert_eq!((server.count("open"), server.count("accepted"), server.count(counter)), (2, 2, 1));
        let [mut first, second] = held;
        first.flush().unwrap();
        drop(second);
        server.await_count("open", 1);
        server.connect().flush().unwrap();
    }
}

#[test]
fn a_storm_of_connections_beyond_the_limit_costs_bounded_places_and_hurts_nobody() {
    let server = limited(1, 1);
    let mut client = server.connect();
    let storm: Vec<_> = (0..300).map(|_| UnixStream::connect(server.socket()).unwrap()).collect();
    server.await_count("refused_connections_max", 300);
    client.flush().unwrap();
    // Those that are not told the reason are closed at once: few are left, and they only for a second.
    let closed = storm.iter().filter(|stream| {
        stream.set_nonblocking(true).unwrap();
        matches!((&**stream).read(&mut [0; 1]), Ok(0))
    });
    assert!(closed.count() >= 300 - 16);
    drop(client);
    server.await_count("open", 0);
    server.connect().flush().unwrap();
}

#[test]
fn a_client_that_stays_silent_in_its_handshake_is_counted_and_gives_its_place_back() {
    let options =
        ServerOptions { negotiation_timeout: Duration::from_millis(50), ..ServerOptions::default() };
    let server = TestServer::with(Memory::one(&volume()), options);
    let mut silent = UnixStream::connect(server.socket()).unwrap();
    silent.read_exact(&mut [0; GREETING_LEN]).unwrap();
    // Half of its flags.
    silent.write_all(&[0, 0]).unwrap();
    assert_eq!(silent.read(&mut [0; 1]).unwrap(), 0);
    server.await_count("handshake_timeouts", 1);
    server.await_count("open", 0);
}

#[test]
fn garbage_is_counted_in_the_handshake_and_behind_it() {
    let server = TestServer::start(Memory::one(&volume()));
    let mut bad = UnixStream::connect(server.socket()).unwrap();
    bad.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    // It may be closed with bytes of ours unread, which is an error here.
    let _ended = bad.read_to_end(&mut Vec::new());
    server.await_count("handshake_violations", 1);
    let mut bad = UnixStream::connect(server.socket()).unwrap();
    bad.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
    bad.write_all(&[0x5a; REQUEST_LEN]).unwrap();
    let _ended = bad.read_to_end(&mut Vec::new());
    server.await_count("violations", 1);
    server.await_count("open", 0);
    server.connect().flush().unwrap();
}

#[test]
fn refused_requests_are_counted_by_their_error_and_a_handle_may_be_used_again() {
    let server = TestServer::start(Memory::one(&volume()));
    let mut client = server.connect();
    let cases = [
        (Request::Read { offset: MIB as u64, len: 1 }, NbdErrno::Inval),
        (Request::Read { offset: u64::MAX, len: u32::MAX }, NbdErrno::Inval),
        (Request::Write { offset: u64::MAX - 1, data: &[1; 8], fua: false }, NbdErrno::NoSpc),
    ];
    for (request, expected) in cases {
        assert!(matches!(client.call(request), Err(NbdError::Server(found)) if found == expected));
    }
    assert_eq!((server.count("requests_einval"), server.count("requests_enospc")), (2, 1));
    client.flush().unwrap();
}

#[test]
fn requests_with_one_handle_are_all_answered() {
    let server = TestServer::start(Memory::one(&volume()));
    let mut stream = UnixStream::connect(server.socket()).unwrap();
    stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x04vol0").unwrap();
    stream.read_exact(&mut [0; GREETING_LEN + 10]).unwrap();
    let flush = RequestHeader { flags: 0, command: NBD_CMD_FLUSH, handle: 7, offset: 0, len: 0 };
    stream.write_all(&flush.encode().repeat(100)).unwrap();
    for _ in 0..100 {
        let mut reply = [0; SIMPLE_REPLY_LEN];
        stream.read_exact(&mut reply).unwrap();
        assert_eq!(decode_simple_reply(&reply), Ok((None, 7)));
    }
    assert_eq!(server.count("violations"), 0);
}
