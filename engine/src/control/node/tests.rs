//! Whole nodes over loopback TCP: founding, failover, restart, refusal of lost and foreign stores.

use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::time::sleep;

use crate::types::{
    Epoch, Geometry, Health, LineageId, Member, ProposalId, ProposalKind, SuperblockTrust, VolumeSettings,
};

use super::super::command::ClusterOp;
use super::super::recover::{RECOVERED_EPOCH_STEP, recover_force};
use super::super::state::{NodeRecord, VolumeRecord};
use super::*;

const VOL: VolumeId = VolumeId(77);

/// Three nodes: 1 and 2 data, 3 witness. Node 4 (data) may be added.
struct Group {
    dirs: Vec<TempDir>,
    addrs: Vec<SocketAddr>,
    nodes: Vec<Option<Control>>,
    /// Node 1 has stopped serving by itself, as a primary does before it proposes a move [R18].
    stopped: AtomicBool,
}

/// Addresses that nobody listens on, none given out twice. The ports lie below those that the kernel gives to
/// outgoing connections: such a connection would keep a node from listening when it is started again.
fn free_addrs(n: usize) -> Vec<SocketAddr> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Other test processes begin elsewhere.
    let start = (std::process::id() % 8000) as u16;
    let candidates =
        (0..8000_u16).map(|_| 12_000 + start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % 8000);
    let addrs = candidates.map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    let free: Vec<_> = addrs.filter(|addr| StdListener::bind(addr).is_ok()).take(n).collect();
    assert_eq!(free.len(), n, "no free ports on loopback");
    free
}

fn kind(id: u64) -> NodeKind {
    if id == 3 { NodeKind::Witness } else { NodeKind::Data }
}

impl Group {
    fn founder(&self, id: u64) -> Founder {
        let control = self.addrs[id as usize - 1].to_string();
        let addrs = NodeAddrs { control, ..NodeAddrs::default() };
        Founder { id: NodeId(id), name: format!("n{id}"), kind: kind(id), addrs }
    }

    fn options(&self, id: u64) -> ControlOptions {
        let dir = self.dirs[id as usize - 1].path();
        let mut options = ControlOptions::new(dir, NodeId(id), self.addrs[id as usize - 1]);
        options.founders = (1..=3).map(|id| self.founder(id)).collect();
        if id > 3 {
            options.founders.push(self.founder(id));
        }
        options
    }

    async fn start(&mut self, id: u64) {
        let options = self.options(id);
        self.nodes[id as usize - 1] = Some(start(options, boot_time).await.unwrap());
    }

    /// Kills a node: from one moment to the next it does nothing any more.
    async fn kill(&mut self, id: u64) {
        let node = self.nodes[id as usize - 1].take().unwrap();
        node.shutdown().await;
    }

    fn node(&self, id: u64) -> &Control {
        self.nodes[id as usize - 1].as_ref().unwrap()
    }

    async fn new() -> Self {
        let dirs: Vec<_> = (0..4).map(|_| tempfile::tempdir().unwrap()).collect();
        let mut group = Self {
            dirs,
            addrs: free_addrs(4),
            nodes: vec![None, None, None, None],
            stopped: AtomicBool::new(false),
        };
        for id in 1..=3 {
            init(group.dirs[id as usize - 1].path(), NodeId(id)).unwrap();
            group.start(id).await;
        }
        for id in 1..=3 {
            group
                .wait(id, "registered nodes", |s| {
                    s.nodes.values().filter(|n| n.incarnation.is_some()).count() == 3
                })
                .await;
        }
        group
    }

    async fn wait(&self, id: u64, what: &str, until: impl Fn(&ClusterState) -> bool) -> Arc<ClusterState> {
        let mut state = self.node(id).cluster_state();
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            let now = Arc::clone(&state.borrow_and_update());
            if until(&now) {
                return now;
            }
            let _ = tokio::time::timeout(Duration::from_millis(50), state.changed()).await;
        }
        panic!("node {id} waits in vain for {what}: {:?}", state.borrow());
    }

    fn volume(&self, id: u64) -> VolumeRecord {
        self.node(id).cluster_state().borrow().volumes[&VOL].clone()
    }

    fn member(&self, id: u64) -> Member {
        Member { node: NodeId(id), incarnation: self.node(id).incarnation() }
    }

    /// Node `id` says that its replica is healthy and continues `run`.
    fn report(&self, id: u64, run: Option<Incarnation>) {
        let v = self.volume(id);
        let report = ReplicaReport {
            trust: SuperblockTrust::Sound,
            epoch: v.epoch,
            reign: v.reign,
            lineage: v.lineage,
            member: run,
            inconsistent: false,
            clean: false,
            same_os_boot: true,
        };
        self.node(id).set_volume_report(VOL, Health::Healthy, report);
    }

    async fn propose(&self, id: u64, number: u64, kind: ProposalKind) -> ProposalOutcome {
        let expected_epoch = self.volume(id).epoch;
        let by = self.member(id);
        let proposal = Proposal { id: ProposalId(number), volume: VOL, expected_epoch, by, kind };
        self.node(id).propose(proposal).await
    }

    /// A volume on nodes 1 and 2, both in sync and reporting, node `primary` primary.
    async fn create_volume(&self, primary: u64) {
        let other = 3 - primary;
        let op = ClusterOp::CreateVolume {
            id: VOL,
            name: "vol0".into(),
            geometry: Geometry::new(1 << 20, 4096, 65536).unwrap(),
            settings: VolumeSettings::default(),
            replicas: vec![NodeId(1), NodeId(2)],
            first: self.member(primary),
            lineage: LineageId(1),
        };
        self.node(3).submit(op).await.unwrap();
        self.wait(primary, "the volume", |s| s.volumes.contains_key(&VOL)).await;
        let join = ProposalKind::Join(self.member(other));
        assert_eq!(self.propose(primary, 1, join).await, ProposalOutcome::Applied);
        for id in [1, 2] {
            self.wait(id, "the join", |s| s.volumes.get(&VOL).is_some_and(|v| v.in_sync.len() == 2)).await;
            self.report(id, Some(self.node(id).incarnation()));
        }
        sleep(Duration::from_millis(600)).await;
    }

    fn leader(&self) -> u64 {
        (1..=3).find_map(|id| self.nodes[id - 1].as_ref()?.leader()).map_or(0, |n| n.0)
    }

    /// True if node `id` believes that it may serve the volume right now.
    fn serves(&self, id: u64) -> bool {
        let Some(node) = &self.nodes[id as usize - 1] else { return false };
        if id == 1 && self.stopped.load(Ordering::SeqCst) {
            return false;
        }
        let state = node.cluster_state();
        let primary = state.borrow().volumes.get(&VOL).and_then(|v| v.primary);
        let until = node.leases().borrow().until(VOL);
        primary == Some(self.member(id)) && until.is_some_and(|until| boot_time() < until)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r1_a_primary_that_also_leads_is_replaced_in_time_and_comes_back_as_a_secondary() {
    let mut g = Group::new().await;
    // Only a data node can be both; move on until one leads.
    let mut leader = g.leader();
    if leader == 3 {
        g.kill(3).await;
        g.wait(1, "another leader", |_| true).await;
        while g.leader() == 3 || g.leader() == 0 {
            sleep(Duration::from_millis(20)).await;
        }
        leader = g.leader();
        g.start(3).await;
        let run = g.node(3).incarnation();
        g.wait(1, "the witness", |s| s.newest(NodeId(3)) == Some(run)).await;
    }
    let other = 3 - leader;
    g.create_volume(leader).await;
    assert!(g.serves(leader) && !g.serves(other));
    let old = g.member(leader);
    let last_until = g.node(leader).leases().borrow().until(VOL).unwrap();

    let killed = Instant::now();
    g.kill(leader).await;
    let to = g.member(other);
    let state = g.wait(other, "the failover", |s| s.volumes[&VOL].primary == Some(to)).await;
    let took = killed.elapsed();
    assert!(boot_time() >= last_until, "[R1]: before the old lease was over");
    println!("replaced a primary that led after {took:?}");
    assert!(took < Duration::from_millis(2600), "took {took:?}");
    assert_eq!(state.volumes[&VOL].in_sync.len(), 2, "[R9]: a promotion changes only the primary");
    while !g.serves(other) {
        sleep(Duration::from_millis(5)).await;
    }

    // It comes back: a newer run, still a member by name of the old one, and no primary.
    g.start(leader).await;
    let run = g.node(leader).incarnation();
    assert!(run.boot > old.incarnation.boot);
    g.wait(other, "the new run", |s| s.newest(NodeId(leader)) == Some(run)).await;
    assert_eq!(g.propose(other, 1, ProposalKind::Remove(old)).await, ProposalOutcome::Applied);
    let join = ProposalKind::Join(g.member(leader));
    assert_eq!(g.propose(other, 2, join).await, ProposalOutcome::Applied);
    g.report(leader, Some(run));
    sleep(Duration::from_secs(2)).await;
    assert_eq!(g.volume(other).primary, Some(to), "no rule moves the primary back");
    assert!(g.serves(other) && !g.serves(leader));
    for id in 1..=3 {
        g.kill(id).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r6_after_all_nodes_restarted_an_eligible_member_takes_over() {
    let mut g = Group::new().await;
    g.create_volume(1).await;
    let named = [g.node(1).incarnation(), g.node(2).incarnation()];
    for id in 1..=3 {
        g.kill(id).await;
    }
    for id in 1..=3 {
        g.start(id).await;
    }
    // The state is there at once, before any leader is.
    assert_eq!(g.volume(1).in_sync.len(), 2);
    g.report(1, Some(named[0]));
    g.report(2, Some(named[1]));
    let state = g.wait(1, "a primary", |s| s.volumes[&VOL].in_sync.len() == 1).await;
    let v = &state.volumes[&VOL];
    assert_eq!(v.primary, Some(g.member(1)), "the last primary breaks the tie");
    assert_eq!(v.reign.0, v.epoch.0);
    for id in 1..=3 {
        g.kill(id).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r1_r18_moves_unhealthy_primaries_and_forces_never_make_two_primaries() {
    let g = Arc::new(Group::new().await);
    g.create_volume(1).await;
    // Watches all the while: never do both believe that they may serve.
    let watcher = tokio::spawn({
        let g = Arc::clone(&g);
        async move {
            loop {
                assert!(!(g.serves(1) && g.serves(2)), "two primaries");
                sleep(Duration::from_millis(1)).await;
            }
        }
    });
    // A move, and a stale one after it.
    let epoch = g.volume(1).epoch;
    g.stopped.store(true, Ordering::SeqCst);
    assert_eq!(g.propose(1, 5, ProposalKind::Move(g.member(2))).await, ProposalOutcome::Applied);
    assert_eq!(g.volume(1).primary, Some(g.member(2)), "the state arrives before the outcome");
    g.stopped.store(false, Ordering::SeqCst);
    let stale = Proposal {
        id: ProposalId(6),
        volume: VOL,
        expected_epoch: epoch,
        by: g.member(1),
        kind: ProposalKind::Bump,
    };
    assert!(matches!(g.node(1).propose(stale).await, ProposalOutcome::Refused(_)));
    // An operator's promotion while the primary lives is refused: it is a move.
    g.wait(3, "the move", |s| s.volumes[&VOL].epoch > epoch).await;
    let v = g.volume(3);
    let op = ClusterOp::Promote { volume: VOL, expected_epoch: v.epoch, to: g.member(1), operator: true };
    let refused = g.node(3).submit(op).await;
    assert!(matches!(&refused, Err(SubmitError::Refused(why)) if why.contains("alive")), "{refused:?}");
    // The primary's disk fails: after its lease, and not before, the other takes over.
    g.report(2, Some(g.node(2).incarnation()));
    let until = g.node(2).leases().borrow().until;
    let sick = g.node(2).leader_view().is_some();
    let v = g.volume(2);
    let report = ReplicaReport {
        trust: SuperblockTrust::Sound,
        epoch: v.epoch,
        reign: v.reign,
        lineage: v.lineage,
        member: Some(g.node(2).incarnation()),
        inconsistent: false,
        clean: false,
        same_os_boot: true,
    };
    g.node(2).set_volume_report(VOL, Health::Unhealthy("disk".into()), report);
    let to = g.member(1);
    g.wait(1, "the failover", |s| s.volumes[&VOL].primary == Some(to)).await;
    assert!(boot_time() >= until, "before the old lease was over (leader: {sick})");
    // A force while the primary lives waits out its lease, and forks the lineage [R17].
    while !g.serves(1) {
        sleep(Duration::from_millis(5)).await;
    }
    let until = g.node(1).leases().borrow().until;
    let v = g.volume(1);
    let op = ClusterOp::ForcePromote {
        volume: VOL,
        expected_epoch: v.epoch,
        to: g.member(2),
        lineage: LineageId(2),
        fork_epoch: v.epoch,
    };
    g.node(3).submit(op).await.unwrap();
    assert!(boot_time() >= until, "[R1]: before the old lease was over");
    assert_eq!(g.volume(3).history.len(), 1);
    watcher.abort();
    assert!(watcher.await.unwrap_err().is_cancelled());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r13_a_node_that_lost_its_disk_is_refused_and_added_under_a_new_id() {
    let mut g = Group::new().await;
    g.kill(3).await;
    // Its disk is replaced by an empty one.
    g.dirs[2] = tempfile::tempdir().unwrap();
    let refused = start(g.options(3), boot_time).await;
    assert!(matches!(refused, Err(ControlError::Missing(_))));
    init(g.dirs[2].path(), NodeId(3)).unwrap();
    g.start(3).await;
    sleep(Duration::from_secs(2)).await;
    assert_eq!(g.node(3).cluster_state().borrow().cluster, None, "it takes part in nothing");
    assert_eq!(g.node(3).leader(), None);
    g.kill(3).await;
    // The other two still make a quorum; they replace it by node 4.
    g.node(1).submit(ClusterOp::RemoveNode { node: NodeId(3) }).await.unwrap();
    let store = init(g.dirs[3].path(), NodeId(4)).unwrap();
    let Founder { id, name, kind, addrs } = g.founder(4);
    let record = NodeRecord { id, name, kind, addrs, store, incarnation: None, os_boot: 0 };
    g.node(2).submit(ClusterOp::AddNode(record)).await.unwrap();
    g.start(4).await;
    let run = g.node(4).incarnation();
    g.wait(1, "node 4", |s| s.newest(NodeId(4)) == Some(run)).await;
    // It votes: with it, the cluster survives the loss of another.
    sleep(Duration::from_secs(1)).await;
    g.kill(2).await;
    let lease = Duration::from_secs(2);
    g.node(4).submit(ClusterOp::SetLease { lease }).await.unwrap();
    assert_eq!(g.node(4).cluster_state().borrow().lease, lease);
    g.kill(1).await;
    g.kill(4).await;
}

/// Counting on from an old copy, the run would be newer than the last one that registered, some starts later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r13_a_directory_that_was_restored_whole_is_refused_for_good() {
    let mut g = Group::new().await;
    let dir = g.dirs[2].path().to_owned();
    g.kill(3).await;
    let copy = |name: &str| std::fs::read(dir.join(name)).unwrap();
    let old = ["control.redb", "boot"].map(|name| (name, copy(name)));
    for _ in 0..2 {
        g.start(3).await;
        let run = g.node(3).incarnation();
        g.wait(1, "the new run", |s| s.newest(NodeId(3)) == Some(run)).await;
        g.kill(3).await;
    }
    let newest = g.node(1).cluster_state().borrow().newest(NodeId(3)).unwrap();
    for (name, bytes) in &old {
        std::fs::write(dir.join(name), bytes).unwrap();
    }
    g.start(3).await;
    assert!(g.node(3).incarnation().boot < newest.boot);
    let mut failed = g.node(3).failed();
    let failed = tokio::time::timeout(Duration::from_secs(20), failed.wait_for(Option::is_some)).await;
    assert!(failed.unwrap().unwrap().as_deref().unwrap().contains("rolled back or copied"));
    g.kill(3).await;
    for _ in 0..3 {
        let refused = start(g.options(3), boot_time).await;
        assert!(matches!(refused, Err(ControlError::Outdated { newest: known, .. }) if known == newest));
    }
    assert_eq!(g.node(1).cluster_state().borrow().newest(NodeId(3)), Some(newest));
    g.kill(1).await;
    g.kill(2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_quorum_nothing_is_promoted_and_no_lease_is_renewed() {
    let mut g = Group::new().await;
    g.create_volume(1).await;
    g.kill(3).await;
    g.kill(2).await;
    sleep(Duration::from_millis(1800)).await;
    assert!(!g.serves(1), "its lease is over");
    let epoch = g.volume(1).epoch;
    let outcome = g.propose(1, 9, ProposalKind::Bump).await;
    assert_eq!(outcome, ProposalOutcome::Unknown);
    assert_eq!(g.volume(1).epoch, epoch);
    // The others come back: the cluster goes on, and the bump took effect once at most.
    g.start(2).await;
    g.start(3).await;
    let state = g.wait(1, "a quorum", |s| s.newest(NodeId(2)) == Some(g.node(2).incarnation())).await;
    assert!(state.volumes[&VOL].epoch <= Epoch(epoch.0 + 1));
    for id in 1..=3 {
        g.kill(id).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn admin_calls_reach_the_handler_of_another_node_and_of_this_one() {
    let g = Group::new().await;
    assert!(g.node(1).call(NodeId(2), b"x".to_vec()).await.is_err(), "nobody answers yet");
    let handler: AdminHandler = Arc::new(|mut bytes| {
        bytes.reverse();
        Box::pin(async move { bytes })
    });
    for id in 1..=2 {
        g.node(id).set_admin_handler(Arc::clone(&handler));
        assert_eq!(g.node(1).call(NodeId(id), b"abc".to_vec()).await.unwrap(), b"cba");
    }
    assert!(g.node(1).call(NodeId(2), vec![0; ADMIN_BYTES_MAX + 1]).await.is_err());
    assert!(g.node(1).call(NodeId(9), vec![]).await.is_err());
}

/// Else it would renew its lease for good while a part of it stands still.
#[tokio::test]
async fn a_node_whose_task_panics_says_that_it_failed() {
    fn broken() -> Nanos {
        panic!("no clock")
    }
    let dir = tempfile::tempdir().unwrap();
    init(dir.path(), NodeId(1)).unwrap();
    let addr = free_addrs(1)[0];
    let mut options = ControlOptions::new(dir.path(), NodeId(1), addr);
    let addrs = NodeAddrs { control: addr.to_string(), ..NodeAddrs::default() };
    options.founders = vec![Founder { id: NodeId(1), name: "n1".into(), kind: NodeKind::Data, addrs }];
    let taken = std::net::TcpListener::bind(addr).unwrap();
    let text = start(options.clone(), broken).await.err().unwrap().to_string();
    assert!(text.contains(&addr.to_string()) && text.contains("[listen] control"), "{text}");
    drop(taken);
    options.lease = Duration::from_millis(1);
    let text = start(options.clone(), broken).await.err().unwrap().to_string();
    assert!(text.contains("lease_ms"), "{text}");
    options.lease = Duration::from_millis(1500);
    let node = start(options, broken).await.unwrap();
    let mut failed = node.failed();
    let failed = tokio::time::timeout(Duration::from_secs(20), failed.wait_for(Option::is_some)).await;
    let text = failed.unwrap().unwrap().clone().unwrap();
    assert!(text.contains("panicked"), "{text}");
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn r17_r19_a_forced_recovery_makes_a_new_cluster_that_refuses_the_old_voters() {
    let mut g = Group::new().await;
    g.create_volume(2).await;
    let before = g.volume(1);
    let old_cluster = g.node(1).cluster_state().borrow().cluster;
    let named = g.node(1).incarnation();
    let in_use = recover_force(g.dirs[0].path(), NodeId(1));
    assert!(matches!(in_use, Err(ControlError::InUse(_))));
    for id in 1..=3 {
        g.kill(id).await;
    }
    let report = recover_force(g.dirs[0].path(), NodeId(1)).unwrap();
    assert_eq!((report.old_cluster, report.nodes_lost.len()), (old_cluster, 2));
    assert!(report.volumes[0].was_in_sync && report.dropped.is_empty());

    // Alone it serves again, without a force since it was in sync; the old voters do not get in.
    for id in 1..=3 {
        g.start(id).await;
    }
    g.report(1, Some(named));
    let run = g.node(1).incarnation();
    let state = g.wait(1, "a primary", |s| s.volumes[&VOL].primary.map(|m| m.incarnation) == Some(run)).await;
    let v = &state.volumes[&VOL];
    assert!(v.epoch.0 > before.epoch.0 + RECOVERED_EPOCH_STEP);
    assert_eq!(v.history.last().map(|f| (f.lineage, f.fork_epoch)), Some((before.lineage, before.epoch)));
    assert_ne!(v.lineage, before.lineage);
    assert_eq!(v.replicas.len(), 2, "the lost replica keeps its slot");
    assert_eq!(state.cluster, Some(report.cluster));
    while !g.serves(1) {
        sleep(Duration::from_millis(5)).await;
    }
    sleep(Duration::from_secs(1)).await;
    for id in 2..=3 {
        assert_eq!(
            g.node(id).cluster_state().borrow().cluster,
            old_cluster,
            "node {id} stays in the old one"
        );
    }
    assert_eq!(g.node(1).cluster_state().borrow().nodes.len(), 1);

    // Added again, with a new store, node 2 takes part.
    g.kill(2).await;
    g.dirs[1] = tempfile::tempdir().unwrap();
    let store = init(g.dirs[1].path(), NodeId(2)).unwrap();
    let Founder { id, name, kind, addrs } = g.founder(2);
    let record = NodeRecord { id, name, kind, addrs, store, incarnation: None, os_boot: 0 };
    g.node(1).submit(ClusterOp::AddNode(record)).await.unwrap();
    g.start(2).await;
    let run = g.node(2).incarnation();
    g.wait(2, "node 2", |s| s.newest(NodeId(2)) == Some(run)).await;
    for id in 1..=3 {
        g.kill(id).await;
    }
}

#[test]
fn a_node_that_never_belonged_to_a_cluster_is_not_recovered() {
    let dir = tempfile::tempdir().unwrap();
    init(dir.path(), NodeId(1)).unwrap();
    for _ in 0..2 {
        let error = recover_force(dir.path(), NodeId(1)).unwrap_err();
        assert!(error.to_string().contains("never belonged to a cluster"), "{error}");
    }
}

#[tokio::test]
async fn strangers_that_say_nothing_do_not_keep_the_nodes_apart() {
    let group = Group::new().await;
    group.create_volume(1).await;
    let mut silent = Vec::new();
    for addr in &group.addrs[..3] {
        for _ in 0..2 * server::CONNECTIONS_MAX {
            silent.push(tokio::net::TcpStream::connect(addr).await.unwrap());
        }
    }
    // Every connection between the nodes is made anew when one starts again.
    let mut group = group;
    let away = if group.leader() == 2 { 3 } else { 2 };
    let boot = group.node(away).incarnation().boot;
    group.kill(away).await;
    group.start(away).await;
    let known = |s: &ClusterState| s.newest(NodeId(away)).is_some_and(|i| i.boot > boot);
    group.wait(1, "the new run is registered", known).await;
}

#[tokio::test]
async fn strangers_that_say_something_else_are_hung_up_on_and_do_no_harm() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let group = Group::new().await;
    for addr in &group.addrs[..3] {
        for said in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 64], &[0; 64]] {
            let mut stream = tokio::net::TcpStream::connect(addr).await.unwrap();
            stream.write_all(said).await.unwrap();
            let mut answer = Vec::new();
            // It may end with a reset, as the rest of what was said is not read.
            let _ =
                tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut answer)).await.unwrap();
            assert!(answer.is_empty(), "{answer:?}");
        }
    }
    group.create_volume(1).await;
}

/// A node that finds another one than its config says, or one of another cluster, founds nothing with it.
#[tokio::test]
async fn r13_a_cluster_is_founded_by_the_nodes_of_the_config_only() {
    let group = Group::new().await;
    let dir = tempfile::tempdir().unwrap();
    init(dir.path(), NodeId(1)).unwrap();
    let mut options = group.options(1);
    (options.dir, options.listen) = (dir.path().to_path_buf(), group.addrs[3]);
    options.founders[0].addrs.control = group.addrs[3].to_string();
    for swapped in [false, true] {
        if swapped {
            let witness = options.founders[2].addrs.control.clone();
            options.founders[1].addrs.control = witness;
        }
        let stranger = start(options.clone(), boot_time).await.unwrap();
        sleep(Duration::from_millis(700)).await;
        assert_eq!(stranger.cluster_state().borrow().cluster, None);
        assert_eq!(stranger.leader(), None);
        stranger.shutdown().await;
    }
    assert_eq!(group.node(2).cluster_state().borrow().nodes.len(), 3);
    group.create_volume(1).await;
}
