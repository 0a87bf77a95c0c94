//! The state of the model: Raft as far as it matters, nodes with the real lease and leader state of production,
//! renewals on their way, and what is true of the content.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use super::super::command::Leadership;
use super::super::failover::Failover;
use super::super::fixture::{Cluster, VOL, member};
use super::super::lease::{ExclusionId, Grant, LeaseTable, NodeLease};
use super::super::state::{ClusterState, VolumeRecord};
use crate::types::{LogIndex, Member, Nanos, NodeId};

/// Two data nodes, 0 and 1, and the witness, 2. Their ids are one more.
pub(super) const NODES: u8 = 3;
/// The data nodes.
pub(super) const DATA: u8 = 2;
/// It is always this late: instead of the clock moving on, everything gets older. Late enough that what is too
/// old to matter ends at 0 or before: a lease is 1.5 s long, the wait for members that restarted 2 s.
pub(super) const NOW: Nanos = Nanos(3_000_000_000);

pub(super) fn id(n: u8) -> NodeId {
    NodeId(u64::from(n) + 1)
}

/// A run of a data node.
pub(super) fn run(n: u8, run: u8) -> Member {
    member(u64::from(n) + 1, u64::from(run))
}

/// The node and run of a member.
pub(super) fn place(m: Member) -> (u8, u8) {
    let small = |x: u64| u8::try_from(x).expect("the model's numbers are small");
    (small(m.node.0 - 1), small(m.incarnation.boot))
}

/// A change that a log entry holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Op {
    /// The first entry of a leadership.
    Blank,
    Register {
        n: u8,
        run: u8,
    },
    Promote {
        to: Member,
        epoch: u64,
    },
    PromoteRestarted {
        to: Member,
        epoch: u64,
    },
    Remove {
        by: Member,
        who: Member,
        epoch: u64,
    },
    Join {
        by: Member,
        who: Member,
        epoch: u64,
    },
}

/// A log entry and the leadership that wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Entry {
    pub(super) by: Leadership,
    /// It was judged by that leadership's lease table, so it counts only under it.
    pub(super) judged: bool,
    pub(super) op: Op,
}

/// What a node says of its replica with a renewal (`replica/status.rs::report`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Said {
    pub(super) run: u8,
    pub(super) member: u8,
    pub(super) inconsistent: bool,
}

/// Where a renewal is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Stage {
    Sent,
    /// The leader has confirmed its leadership with a quorum.
    Confirmed {
        leadership: Leadership,
        read: LogIndex,
    },
    Granted(Grant),
}

/// A renewal, or its answer, on its way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Renewal {
    pub(super) n: u8,
    pub(super) nonce: u64,
    pub(super) said: Said,
    pub(super) stage: Stage,
    /// Ticks since it was sent.
    pub(super) age: u32,
}

/// What a node that leads, or thinks so, keeps (`control/node/leader.rs::Lead`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Lead {
    pub(super) table: LeaseTable,
    pub(super) failover: Failover,
    pub(super) said: [Option<Said>; DATA as usize],
    pub(super) under_way: Option<u64>,
    /// Exclusions and the index of the entry whose fate lifts each.
    pub(super) held: Vec<(ExclusionId, LogIndex)>,
}

/// One node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Node {
    pub(super) up: bool,
    pub(super) run: u8,
    /// Entries of the log that are applied here; stays over a restart.
    pub(super) applied: usize,
    pub(super) lease: NodeLease,
    pub(super) lead: Option<Lead>,
    /// The run that the superblock records as a member (`replica/config.rs::record_config`).
    pub(super) recorded: u8,
    pub(super) inconsistent: bool,
    /// The proposal of this node, as primary, whose fate it does not know.
    pub(super) pending: Option<Op>,
}

/// An invariant that a step broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Broken {
    /// 1: a member does not hold every acknowledged write.
    MemberLacks,
    /// 2: two nodes serve.
    TwoServe,
    /// 7: one from outside the set became primary.
    PromotedOutside,
    /// 8: the role was taken from a primary that serves.
    TakenFromServing,
}

/// The state of the cluster after each entry: follows from the log, so it is no part of what makes a state.
#[derive(Clone, Debug)]
pub(super) struct Applied(pub(super) Vec<Arc<ClusterState>>);

impl PartialEq for Applied {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Applied {}

impl Hash for Applied {
    fn hash<H: Hasher>(&self, _: &mut H) {}
}

/// The whole.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct State {
    pub(super) nodes: [Node; NODES as usize],
    /// Committed.
    pub(super) log: Vec<Entry>,
    pub(super) after: Applied,
    /// The newest leadership that won an election, and what it has in its log that is not committed.
    pub(super) elected: Option<Leadership>,
    pub(super) tail: Vec<Entry>,
    pub(super) renewals: Vec<Renewal>,
    /// The data nodes whose replica holds every acknowledged write, as a set.
    pub(super) complete: u8,
    pub(super) crashes_left: u8,
    pub(super) elections_left: u8,
    pub(super) removals_left: u8,
    /// Promotions that the controller may still propose. No fault: a lease runs out with time.
    pub(super) promotions_left: u8,
    /// This step used the last fault.
    pub(super) last_fault: bool,
    pub(super) broken: Option<Broken>,
}

impl State {
    /// Both data nodes are in sync, node 0 is primary; nobody leads or has a lease.
    pub(super) fn initial() -> Self {
        let node = |n: u8| Node {
            up: true,
            run: 1,
            applied: 0,
            lease: NodeLease::new(id(n), run(n, 1).incarnation),
            lead: None,
            recorded: 1,
            inconsistent: false,
            pending: None,
        };
        Self {
            nodes: [node(0), node(1), node(2)],
            log: Vec::new(),
            after: Applied(vec![Arc::new(Cluster::pair().state)]),
            elected: None,
            tail: Vec::new(),
            renewals: Vec::new(),
            complete: 3,
            crashes_left: 0,
            elections_left: 0,
            removals_left: 0,
            promotions_left: 0,
            last_fault: false,
            broken: None,
        }
    }

    pub(super) fn node(&self, n: u8) -> &Node {
        &self.nodes[usize::from(n)]
    }

    pub(super) fn node_mut(&mut self, n: u8) -> &mut Node {
        &mut self.nodes[usize::from(n)]
    }

    /// The cluster state that node `n` has applied.
    pub(super) fn seen_by(&self, n: u8) -> &Arc<ClusterState> {
        &self.after.0[self.node(n).applied]
    }

    pub(super) fn committed(&self) -> &Arc<ClusterState> {
        &self.after.0[self.log.len()]
    }

    /// The log index of the entry at `position`.
    pub(super) fn index(&self, position: usize) -> LogIndex {
        LogIndex(self.after.0[0].applied.0 + u64::try_from(position).expect("a short log") + 1)
    }

    /// The index of the last entry that the newest leader has.
    pub(super) fn last_index(&self) -> LogIndex {
        LogIndex(self.index(self.log.len() + self.tail.len()).0 - 1)
    }

    pub(super) fn me(&self, n: u8) -> Member {
        run(n, self.node(n).run)
    }

    /// A quorum of voters is up.
    pub(super) fn quorum(&self) -> bool {
        self.nodes.iter().filter(|n| n.up).count() >= 2
    }

    /// The newest leader, if it is up, knows it, and has a quorum.
    pub(super) fn leader(&self) -> Option<(u8, Leadership)> {
        let leadership = self.elected?;
        let n = u8::try_from(leadership.node.0 - 1).expect("a node of the model");
        let knows = self.node(n).lead.as_ref().is_some_and(|l| l.table.leadership() == self.elected);
        (self.node(n).up && knows && self.quorum()).then_some((n, leadership))
    }

    /// True if `n` may answer clients at this moment (`replica/client.rs`, `ctl/src/serve/node.rs::follow`).
    pub(super) fn serves(&self, n: u8) -> bool {
        let node = self.node(n);
        let until = node.lease.snapshot().until(VOL);
        node.up && volume(self.seen_by(n)).primary == Some(self.me(n)) && until.is_some_and(|u| NOW < u)
    }

    /// True if the named run is alive.
    pub(super) fn alive(&self, m: Member) -> bool {
        let (n, r) = place(m);
        self.node(n).up && self.node(n).run == r
    }
}

pub(super) fn volume(state: &ClusterState) -> &VolumeRecord {
    &state.volumes[&VOL]
}
