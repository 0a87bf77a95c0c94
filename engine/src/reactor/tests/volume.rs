//! The loop, its clock, its end, and what its handle tells.

use std::sync::mpsc;

use super::*;

/// [R27]: the time that the core is given is not older than what came with it.
#[test]
fn r27_now_is_read_after_the_completion_was_reaped() {
    let rig = Rig::new(1 << 20);
    let mut client = rig.client();
    client.write(0, &[1; 4096]);
    for n in 0..20 {
        // The volume waits in the kernel meanwhile; a time read before that wait would be too old.
        std::thread::sleep(Duration::from_millis(5));
        let sent = boottime_now();
        client.write(n * 4096, &[2; 4096]);
        let answered = boottime_now();
        for what in ["request", "disk"] {
            let now = *rig.shared.times(what).last().unwrap();
            assert!(sent <= now && now <= answered, "{what}: {sent:?} <= {now:?} <= {answered:?}");
        }
    }
    let times = rig.shared.times("");
    assert!(times.is_sorted(), "time never runs backwards");
}

/// [R27]: a lease that ended while a request was on the disk is seen as ended, because the time that comes
/// with the completion is later than the disk's.
#[test]
fn r27_each_completion_comes_with_a_time_of_its_own() {
    let rig = Rig::new(64 << 20);
    let mut client = rig.client();
    client.send(WRITE, 1, 0, 32 << 20, &pattern(32 << 20, 1));
    assert_eq!(client.reply(), (1, 0));
    let (request, disk) = (rig.shared.times("request")[0], rig.shared.times("disk")[0]);
    assert!(disk.since(request) > Duration::from_micros(500), "a write of 32 MiB takes time");
}

#[test]
fn the_tick_comes_when_it_is_due() {
    let rig = Rig::new(1 << 20);
    let due = boottime_now().after(Duration::from_millis(80));
    rig.volume.lease(Lease { until: due });
    eventually("tick", || rig.shared.count("tick") == 1);
    let late = rig.shared.times("tick")[0].since(due);
    assert!(rig.shared.times("tick")[0] >= due, "not early");
    assert!(late < Duration::from_secs(2), "{late:?}");
}

#[test]
fn a_stop_flushes_answers_and_unlocks() {
    let rig = Rig::new(1 << 20);
    let mut client = rig.client();
    client.write(0, &pattern(5000, 1));
    assert!(!rig.volume.is_stopped());
    assert!(!rig.volume.wait_stopped(Duration::from_millis(1)));
    rig.stop();
    assert!(client.is_closed());
    let expected = Expected {
        cluster: None,
        volume: VolumeId(2),
        node: NodeId(1),
        geometry: geometry(1 << 20),
        other_slots: vec![],
    };
    open(&paths(&rig.dir), &expected, Duration::from_secs(1)).expect("the locks are free");
    // Whatever comes after the end is refused or dropped, never left waiting.
    let (tx, rx) = mpsc::channel();
    rig.volume.begin_demote(move |result| tx.send(result).unwrap());
    assert!(rx.recv().unwrap().unwrap_err().contains("stopped"));
    assert!(rig.client().is_closed());
}

#[test]
fn operators_commands_are_answered() {
    let rig = Rig::new(1 << 20);
    let (tx, rx) = mpsc::channel();
    let other = tx.clone();
    rig.volume.begin_move(NodeId(3), move |result| tx.send(result).unwrap());
    assert_eq!(rx.recv().unwrap(), Err("node 3 is not in sync".into()));
    rig.volume.begin_demote(move |result| other.send(result).unwrap());
    assert_eq!(rx.recv().unwrap(), Ok(()));
    let (tx, rx) = mpsc::channel();
    let other = tx.clone();
    rig.volume.begin_force(true, move |result| tx.send(result).unwrap());
    assert_eq!(rx.recv().unwrap().unwrap().epoch, Epoch(1));
    rig.volume.begin_force(false, move |result| other.send(result).unwrap());
    assert_eq!(rx.recv().unwrap().unwrap_err(), "half done");
    rig.volume.end_force();
    eventually("the end of the force is told", || rig.shared.count("end of force") == 1);
}

#[test]
fn the_status_is_published_at_once_where_it_matters_and_seldom_where_not() {
    let rig = Rig::new(4 << 20);
    assert_eq!(rig.volume.status().writes_acked, 0);
    let mut client = rig.client();
    let start = Instant::now();
    for n in 0..500 {
        client.write(n * 4096, &[1; 4096]);
    }
    let took = start.elapsed();
    eventually("the last count is published", || rig.volume.status().writes_acked == 500);
    let published = rig.hooks.statuses.lock().unwrap().len();
    let most = took.as_millis() as usize / 50 + 4;
    assert!(published <= most, "{published} in {took:?}");
    assert!(!rig.volume.status().serving);
    rig.volume.lease(Lease { until: Nanos(2) });
    eventually("ticked", || rig.shared.count("tick") == 1);
    eventually("serving", || rig.volume.status().serving);
}

#[test]
fn a_broken_invariant_stops_this_volume_and_says_so() {
    use std::net::{TcpListener, TcpStream};
    let rig = Rig::new(1 << 20);
    let mut client = rig.client();
    client.write(0, &[1; 1]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let incarnation = Incarnation { boot: 1, nonce: 1 };
    rig.volume.peer_connected(NodeId(2), incarnation, listener.accept().unwrap().0);
    let mut bytes = Vec::new();
    crate::wire::encode(&PeerMsg::Failed { reign: Reign(1), reason: "panic".into() }, &mut bytes);
    peer.write_all(&bytes).unwrap();
    assert!(rig.volume.wait_stopped(Duration::from_secs(10)));
    assert!(client.is_closed(), "clients go elsewhere");
    let status = rig.volume.status();
    assert!(!status.serving);
    assert_eq!(status.state, ReplicaState::Failed);
    let Health::Unhealthy(reason) = &status.health else { panic!("unhealthy") };
    assert!(reason.contains("asked to"), "{reason}");
    assert_eq!(rig.hooks.statuses.lock().unwrap().last(), Some(&status));
}

#[test]
fn without_registered_buffers_everything_works_as_well() {
    let mut options = ReactorOptions::new("test");
    (options.registered_bytes, options.ring_entries) = (0, 4);
    let rig = Rig::with(4 << 20, options);
    let mut client = rig.client();
    let bytes = pattern(300_001, 4);
    client.write(1234, &bytes);
    assert_eq!(client.read(1234, 300_001), bytes);
    rig.stop();
}
