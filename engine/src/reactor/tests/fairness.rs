//! A greedy, a stalled and a slow client beside a well-behaved one: that one is answered, and memory stays bounded.

use super::clients::Bench;
use super::*;
use crate::reactor::buffers::BUFFER_BYTES_MAX;
use crate::reactor::client::End;
use crate::reactor::clients::Next;
use crate::reactor::fair::{REQUESTS_MAX, REQUESTS_SHARED_MAX};
use crate::replica::ConnId;

const MIB: u32 = 1 << 20;
/// Round trips of the well-behaved client.
const ROUNDS: u64 = 200;

/// Headers of so many requests, for one send: a unix socket holds few sends, however short they are.
fn many(op: u8, count: u64, len: u32) -> Vec<u8> {
    (0..count).flat_map(|n| header(op, n, n % 1024 * u64::from(len), len)).collect()
}

/// Some reads and writes, one at a time.
fn go_on(client: &mut Client<UnixStream>) {
    for n in 0..ROUNDS {
        client.write(n * 4096, &pattern(4096, n as u8));
        assert_eq!(client.read(n * 4096, 4096), pattern(4096, n as u8));
    }
}

#[test]
fn a_client_that_queues_thousands_of_requests_does_not_starve_another() {
    let rig = Rig::new(16 << 20);
    let mut good = rig.client();
    let mut greedy = rig.client();
    let stream = greedy.0.try_clone().unwrap();
    let (stop, stopped) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let asked_to = Arc::clone(&stop);
    let sender = std::thread::spawn(move || {
        let many = many(READ, 4000, 4096);
        while !asked_to.load(Ordering::SeqCst) {
            if greedy.0.write_all(&many).is_err() {
                break;
            }
        }
    });
    let told = Arc::clone(&stopped);
    let reader = std::thread::spawn(move || {
        let mut answers = vec![0; 1 << 20];
        while matches!((&stream).read(&mut answers), Ok(1..)) {}
        told.store(true, Ordering::SeqCst);
    });
    eventually("the greedy one is at work", || rig.shared.count("request 2") > 1000);
    go_on(&mut good);
    assert!(!stopped.load(Ordering::SeqCst), "the greedy one was served as well, to the end");
    stop.store(true, Ordering::SeqCst);
    rig.stop();
    sender.join().unwrap();
    reader.join().unwrap();
}

#[test]
fn a_client_that_never_reads_its_answers_does_not_starve_another() {
    let rig = Rig::new(64 << 20);
    let mut silent = rig.client();
    silent.0.write_all(&many(READ, 2000, 4096)).unwrap();
    let mut large = rig.client();
    for n in 0..8 {
        large.send(READ, n, 0, 32 * MIB, &[]);
    }
    // With what the silent one holds, a fourth would be more than is left.
    eventually("they are at work", || {
        rig.shared.count("request 1") > 60 && rig.shared.count("request 2") == 3
    });
    go_on(&mut rig.client());
    assert!(rig.shared.count("request 1") <= REQUESTS_MAX as usize, "no more is read than fits its window");
    assert_eq!(rig.shared.count("request 2"), 3, "no more than its share of the memory");
}

#[test]
fn a_client_that_sends_a_byte_now_and_then_does_not_starve_another() {
    let rig = Rig::new(64 << 20);
    let slow: Vec<_> = [header(READ, 1, 0, 4096), header(WRITE, 2, 0, 32 * MIB)]
        .into_iter()
        .map(|mut bytes| {
            let mut client = rig.client();
            bytes.extend_from_slice(&[1; 30]);
            std::thread::spawn(move || {
                for byte in bytes {
                    client.0.write_all(&[byte]).unwrap();
                    std::thread::sleep(Duration::from_millis(2));
                }
                client
            })
        })
        .collect();
    let mut good = rig.client();
    go_on(&mut good);
    let _open: Vec<_> = slow.into_iter().map(|thread| thread.join().unwrap()).collect();
    go_on(&mut good);
    assert_eq!(rig.shared.count("closed"), 0);
}

/// More than the memory has room for: some of them wait, and would be before everybody who comes.
#[test]
fn a_client_that_asks_for_one_small_thing_at_a_time_does_not_wait_for_hoarders() {
    let rig = Rig::new(64 << 20);
    let mut hoarders: Vec<_> = (0..20).map(|_| rig.client()).collect();
    for hoarder in &mut hoarders {
        hoarder.0.write_all(&header(WRITE, 1, 0, 32 * MIB)).unwrap();
    }
    // Open until it is looked whether anybody was closed.
    let mut good = rig.client();
    go_on(&mut good);
    assert_eq!(rig.shared.count("closed"), 0, "nobody had to be closed for that");
}

#[test]
fn a_window_is_smaller_while_another_has_requests_in_flight() {
    let rig = Rig::new(1 << 20);
    rig.hold();
    let mut good = rig.client();
    good.send(FLUSH, 1, 0, 0, &[]);
    eventually("the first arrived", || rig.shared.count("request 1") == 1);
    let mut greedy = rig.client();
    greedy.0.write_all(&many(FLUSH, 500, 0)).unwrap();
    let window = REQUESTS_SHARED_MAX as usize;
    eventually("its window is full", || rig.shared.count("request 2") == window);
    good.send(FLUSH, 2, 0, 0, &[]);
    eventually("the second arrived", || rig.shared.count("request 1") == 2);
    assert_eq!(rig.shared.count("request 2"), window);
    rig.let_go();
    for (client, count) in [(&mut good, 2), (&mut greedy, 500)] {
        let answered: std::collections::BTreeSet<_> = (0..count).map(|_| client.reply()).collect();
        assert_eq!((answered.len(), answered.iter().all(|reply| reply.1 == 0)), (count, true));
    }
}

#[test]
fn one_connection_leaves_as_many_client_bytes_as_it_holds() {
    let rig = Rig::new(64 << 20);
    rig.hold();
    let mut first = rig.client();
    for n in 0..9 {
        first.send(READ, n, 0, 32 * MIB, &[]);
    }
    eventually("its share is used up", || rig.shared.count("request 1") == 4);
    let mut second = rig.client();
    for n in 0..9 {
        second.send(READ, n, 0, 32 * MIB, &[]);
    }
    eventually("so is that of the second", || rig.shared.count("request 2") == 2);
    let mut third = rig.client();
    third.send(READ, 1, 0, 1, &[]);
    eventually("there is room for a third", || rig.shared.count("request 3") == 1);
    assert_eq!((rig.shared.count("request 1"), rig.shared.count("request 2")), (4, 2), "back-pressure");
    rig.let_go();
    for client in [&mut first, &mut second] {
        for _ in 0..9 {
            assert_eq!(client.reply().1, 0);
            client.0.read_exact(&mut vec![0; 32 << 20]).unwrap();
        }
    }
    assert_eq!(third.reply(), (1, 0));
}

#[test]
fn client_bytes_beyond_the_bound_wait_and_are_served_in_turn() {
    let (mut bench, first, mut client) = Bench::new();
    let mut all = vec![(first, client.0.try_clone().unwrap())];
    let mut reads = Vec::new();
    let mut read = |bench: &mut Bench, conn: ConnId, client: &mut Client<UnixStream>| {
        client.send(READ, 1, 0, 32 * MIB, &[]);
        match bench.receive(conn) {
            Some(Next::Request(request)) => {
                reads.push((conn, request.cookie));
                true
            }
            None => false,
            other => panic!("{other:?}"),
        }
    };
    assert!(read(&mut bench, first, &mut client));
    for n in 1..10 {
        let (conn, mut client) = bench.client();
        assert_eq!(read(&mut bench, conn, &mut client), n < 8, "eight fit");
        all.push((conn, client.0));
    }
    assert_eq!(bench.io.buffers.client_bytes(), BUFFER_BYTES_MAX);
    assert_eq!(bench.clients.first_waiting(&bench.io), None, "nothing is free");
    let (conn, cookie) = reads[3];
    assert!(bench.clients.reply(&mut bench.io, conn, cookie, Err(ClientError::Io)).is_none());
    assert_eq!(bench.clients.first_waiting(&bench.io), Some(all[8].0), "who began to wait first");
    for (conn, _) in &all {
        assert!(bench.clients.close(&mut bench.io, *conn, End::Client, "test"));
    }
    bench.drain();
    assert_eq!((bench.io.buffers.in_use(), bench.io.buffers.client_bytes()), (0, 0));
}

#[test]
fn a_client_that_owes_the_rest_of_a_request_or_takes_no_answers_is_given_up() {
    let options = ReactorOptions { unread_max: Duration::from_millis(50), ..ReactorOptions::new("test") };
    let rig = Rig::with(64 << 20, options);
    let mut half_a_header = rig.client();
    half_a_header.0.write_all(&header(READ, 1, 0, 4096)[..5]).unwrap();
    let mut half_a_write = rig.client();
    half_a_write.send(WRITE, 1, 0, 8192, &[1; 4096]);
    let mut half_a_refused_write = rig.client();
    half_a_refused_write.send(WRITE, 1, 1 << 40, 8192, &[1; 4096]);
    let mut deaf = rig.client();
    deaf.send(READ, 1, 0, 16 * MIB, &[]);
    for client in [&mut half_a_header, &mut half_a_write, &mut half_a_refused_write] {
        assert!(client.is_closed());
    }
    eventually("the deaf one is closed, too", || rig.shared.count("closed") == 4);
    let mut idle = rig.client();
    idle.write(0, &[1; 1]);
    std::thread::sleep(Duration::from_millis(300));
    idle.write(1, &[1; 1]);
}

#[test]
fn a_connection_that_asks_nothing_is_closed_if_that_was_asked_for() {
    let options = ReactorOptions { idle_max: Some(Duration::from_millis(50)), ..ReactorOptions::new("test") };
    let rig = Rig::with(1 << 20, options);
    rig.hold();
    let mut waiting = rig.client();
    waiting.send(FLUSH, 1, 0, 0, &[]);
    eventually("it arrived", || rig.shared.count("request 1") == 1);
    assert!(rig.client().is_closed(), "it never asked anything");
    rig.let_go();
    assert_eq!(waiting.reply(), (1, 0), "what is in flight is no idleness");
    assert!(waiting.is_closed());
}
