//! Schedules written out: a store that was rolled back, a recovery without a quorum. Tests only.

use std::time::Duration;

use blkrepl_engine::control::{ClusterState, NodeKind};
use blkrepl_engine::types::{Incarnation, NodeId};

use crate::clock::{Clock, S, Time};
use crate::rng::Rng;

use super::cluster::{Cluster, Setup, Stepped};
use super::host::Now;

fn founded() -> Cluster {
    let setup = Setup {
        founders: vec![(1, NodeKind::Data), (2, NodeKind::Data), (3, NodeKind::Witness)],
        lease: Duration::from_millis(1500),
        renew: Duration::from_millis(400),
        heartbeat: Duration::from_millis(100),
        election: (Duration::from_millis(400), Duration::from_millis(800)),
    };
    let mut cluster = Cluster::new(setup, Now::default(), Rng::new(5));
    for id in 1..=3 {
        cluster.add(id, Clock::new(0, S, 0));
        cluster.start(id);
    }
    assert!(run(&mut cluster, 3 * S).is_empty());
    cluster
}

/// Lets time go on; gives the nodes that ended.
fn run(cluster: &mut Cluster, time: Time) -> Vec<(u64, String)> {
    let end = cluster.now.get() + time;
    let mut ended = Vec::new();
    while cluster.now.get() < end {
        if let Stepped::Broken(why) = cluster.step(end) {
            panic!("{why}");
        }
        for (id, why) in cluster.look() {
            cluster.kill(id, false);
            ended.push((id, why));
        }
    }
    ended
}

fn state(cluster: &Cluster, id: u64) -> ClusterState {
    ClusterState::clone(&cluster.up(id).expect("it runs").state.borrow())
}

fn newest(cluster: &Cluster, id: u64) -> Incarnation {
    state(cluster, 1).newest(NodeId(id)).expect("it is registered")
}

#[test]
fn r13_a_store_that_was_rolled_back_is_not_believed_however_often_it_starts() {
    let mut cluster = founded();
    let image = cluster.machines[&3].disk.image();
    for _ in 0..3 {
        cluster.kill(3, true);
        cluster.start(3);
        assert!(run(&mut cluster, 2 * S).is_empty());
    }
    let known = newest(&cluster, 3);
    assert_eq!(known.boot, 4);
    cluster.kill(3, true);
    cluster.machines[&3].disk.restore(image);
    for _ in 0..8 {
        cluster.start(3);
        let ended = run(&mut cluster, 2 * S);
        assert!(matches!(&ended[..], [(3, why)] if why.contains("rolled back or copied")), "{ended:?}");
    }
    assert_eq!(newest(&cluster, 3), known);
}

#[test]
fn r13_an_empty_store_under_a_known_id_takes_part_in_nothing() {
    let mut cluster = founded();
    let known = newest(&cluster, 3);
    cluster.kill(3, true);
    cluster.replace_disk(3);
    cluster.start(3);
    assert!(run(&mut cluster, 5 * S).is_empty());
    assert_eq!(state(&cluster, 3).cluster, None);
    assert_eq!(newest(&cluster, 3), known);
}

#[test]
fn r19_after_a_recovery_the_old_voters_are_refused_and_the_new_cluster_works() {
    let mut cluster = founded();
    let old = state(&cluster, 1).cluster;
    (1..=3).for_each(|id| cluster.kill(id, true));
    cluster.recover(1).expect("it belonged to a cluster");
    cluster.start(1);
    cluster.start(2);
    assert!(run(&mut cluster, 10 * S).is_empty());
    let new = state(&cluster, 1);
    assert_ne!(new.cluster, old);
    assert_eq!(cluster.up(1).expect("it runs").control.leader(), Some(NodeId(1)));
    assert_eq!(new.newest(NodeId(1)), Some(cluster.up(1).expect("it runs").control.incarnation()));
    // The old voter hears nothing, and alone it has no quorum.
    assert_eq!(state(&cluster, 2).cluster, old);
    assert_eq!(cluster.up(2).expect("it runs").control.leader(), None);
}

#[test]
fn a_power_cut_at_any_sync_leaves_a_store_that_starts_again() {
    for sync in 0..24 {
        let mut cluster = founded();
        let faults = super::disk::Faults { cut_after: Some(sync), ..Default::default() };
        cluster.machines[&3].disk.set_faults(faults);
        let mut cut = false;
        for _ in 0..20 {
            cut |= !run(&mut cluster, S / 2).is_empty();
            if cut {
                break;
            }
            cluster.kill(2, false);
            cluster.start(2);
        }
        assert!(cut, "sync {sync} never came");
        cluster.kill(3, true);
        cluster.start(3);
        assert!(run(&mut cluster, 3 * S).is_empty(), "sync {sync}");
        assert_eq!(newest(&cluster, 3).boot, 2, "sync {sync}");
    }
}
