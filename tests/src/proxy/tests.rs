//! The proxy's own tests: each fault does what it says, and nothing else, to a pair of sockets.

use std::io::{ErrorKind, Read, Write};
use std::time::Instant;

use super::*;

/// A dialer and the server's end, through a proxy.
struct Pair {
    proxy: Proxy,
    server: TcpListener,
    near: TcpStream,
    far: TcpStream,
}

const SHORT: Duration = Duration::from_millis(150);
const LONG: Duration = Duration::from_secs(5);

fn pair(traffic: Traffic) -> Pair {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = server.local_addr().unwrap();
    let proxy = Proxy::start("test", traffic, "127.0.0.1:0".parse().unwrap(), to, 1).unwrap();
    let near = TcpStream::connect(proxy.at()).unwrap();
    let far = server.accept().unwrap().0;
    near.set_read_timeout(Some(LONG)).unwrap();
    far.set_read_timeout(Some(LONG)).unwrap();
    Pair { proxy, server, near, far }
}

fn expect(stream: &mut TcpStream, bytes: &[u8]) {
    let mut got = vec![0; bytes.len()];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(got, bytes);
}

fn expect_silence(stream: &mut TcpStream) {
    stream.set_read_timeout(Some(SHORT)).unwrap();
    let error = stream.read(&mut [0; 1]).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
    stream.set_read_timeout(Some(LONG)).unwrap();
}

fn expect_reset(stream: &mut TcpStream) {
    let error = stream.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
}

#[test]
fn a_healthy_link_carries_both_ways_and_passes_on_the_end() {
    let Pair { proxy, mut near, mut far, .. } = pair(Traffic::Peer);
    near.write_all(b"there").unwrap();
    expect(&mut far, b"there");
    far.write_all(b"and back").unwrap();
    expect(&mut near, b"and back");
    near.shutdown(Shutdown::Write).unwrap();
    assert_eq!(far.read(&mut [0; 1]).unwrap(), 0);
    drop(far);
    assert_eq!(near.read(&mut [0; 1]).unwrap(), 0);
    crate::wait::wait_until("its end", LONG, || proxy.connections() == 0).unwrap();
}

#[test]
fn silence_in_one_direction_holds_back_and_delivers_late() {
    let Pair { proxy, mut near, mut far, .. } = pair(Traffic::Peer);
    proxy.set(Condition { silent_forward: true, ..Default::default() });
    near.write_all(b"late").unwrap();
    far.write_all(b"now").unwrap();
    expect(&mut near, b"now");
    expect_silence(&mut far);
    proxy.heal(false);
    expect(&mut far, b"late");
}

#[test]
fn a_healed_link_can_break_what_it_held() {
    let Pair { proxy, mut near, mut far, .. } = pair(Traffic::Peer);
    proxy.set(Condition::black_hole());
    near.write_all(b"never").unwrap();
    expect_silence(&mut far);
    proxy.heal(true);
    expect_reset(&mut far);
    expect_reset(&mut near);
}

#[test]
fn a_half_open_connection_stays_open_at_one_end_until_healed() {
    let Pair { proxy, mut near, mut far, .. } = pair(Traffic::Peer);
    near.write_all(b"x").unwrap();
    expect(&mut far, b"x");
    proxy.strike(Blow::ResetListener);
    expect_reset(&mut far);
    expect_silence(&mut near);
    proxy.heal(false);
    expect_reset(&mut near);
}

#[test]
fn one_flipped_bit_and_a_message_cut_off() {
    let Pair { proxy, server, mut near, mut far } = pair(Traffic::Control);
    proxy.strike(Blow::Corrupt(Direction::Forward));
    near.write_all(&[0; 100]).unwrap();
    let mut got = [0; 100];
    far.read_exact(&mut got).unwrap();
    assert_eq!(got.iter().map(|byte| byte.count_ones()).sum::<u32>(), 1);
    near.write_all(b"whole").unwrap();
    expect(&mut far, b"whole");
    proxy.strike(Blow::Truncate(Direction::Back));
    far.write_all(&[7; 100]).unwrap();
    let mut rest = Vec::new();
    near.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, [7; 50]);
    let again = TcpStream::connect(proxy.at()).unwrap();
    server.accept().unwrap();
    drop(again);
}

#[test]
fn resets_refusals_delay_and_rate() {
    let Pair { proxy, server, mut near, mut far } = pair(Traffic::Nbd);
    proxy.set(Condition { delay: SHORT, rate: 100_000, ..Default::default() });
    let begun = Instant::now();
    near.write_all(&[3; 20_000]).unwrap();
    far.read_exact(&mut [0; 20_000]).unwrap();
    assert!(begun.elapsed() >= SHORT + Duration::from_millis(200), "{:?}", begun.elapsed());
    proxy.heal(false);
    proxy.strike(Blow::Reset);
    expect_reset(&mut near);
    expect_reset(&mut far);
    proxy.set(Condition { refused: true, ..Default::default() });
    let mut refused = TcpStream::connect(proxy.at()).unwrap();
    expect_reset(&mut refused);
    proxy.heal(false);
    let _again = TcpStream::connect(proxy.at()).unwrap();
    server.accept().unwrap();
}

/// What a client leaves behind on a silent link dies with it, and the server hears of its end: R24 of the
/// design can be kept by no server if not.
#[test]
fn a_clients_end_reaches_its_server_through_silence() {
    let Pair { proxy, near, mut far, .. } = pair(Traffic::Nbd);
    proxy.set(Condition::black_hole());
    (&near).write_all(b"left behind").unwrap();
    expect_silence(&mut far);
    drop(near);
    expect_reset(&mut far);
}
