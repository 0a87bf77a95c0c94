//! Messages between the control planes of two nodes, how they are framed, and who may send what.
//!
//! Every request and every reply carries the sender's identity. A node answers Raft traffic only if the
//! sender's cluster, store and run are those that membership knows, or newer runs of them [R13, R19]; a
//! caller believes a reply on the same terms. Nothing here does more than one frame's I/O.

use std::io;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, VoteRequest, VoteResponse};

use crate::mutation::{Mutation, mutated};
use crate::types::{ClusterId, Health, Incarnation, Member, NodeId, ReplicaReport, VolumeId};

use super::codec::{self, CodecError, HEADER_LEN};
use super::command::{Applied, Command};
use super::lease::Grant;
use super::raft::{SnapshotMeta, TypeConfig, Vote};
use super::state::{ClusterState, StoreId};

/// Longest payload of an admin call or its answer, in bytes.
pub const ADMIN_BYTES_MAX: usize = 1 << 20;
/// Longest command, in bytes, so that a full batch of them fits one frame.
pub(super) const COMMAND_BYTES_MAX: usize = 64 << 10;
/// Most log entries in one message.
pub(super) const ENTRIES_PER_MESSAGE_MAX: u64 = 32;
/// Longest text of why a replica is unhealthy, in bytes; more is cut off.
pub(super) const HEALTH_TEXT_MAX: usize = 256;

/// Memory that a frame may claim before its bytes are there.
const READ_AHEAD: usize = 64 << 10;

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sender {
    pub(super) cluster: Option<ClusterId>,
    pub(super) node: NodeId,
    pub(super) store: StoreId,
    pub(super) incarnation: Incarnation,
}

/// A request. `to` names who is meant; only `Identify` may leave it out.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Request {
    pub(super) from: Sender,
    pub(super) to: Option<(NodeId, StoreId)>,
    pub(super) body: RequestBody,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum RequestBody {
    /// Who are you?
    Identify,
    Append(AppendEntriesRequest<TypeConfig>),
    Vote(VoteRequest<u64>),
    Snapshot {
        vote: Vote,
        meta: SnapshotMeta,
        data: Vec<u8>,
    },
    Submit(Command),
    Renew(Renewal),
    Admin(Vec<u8>),
}

impl RequestBody {
    /// Raft's own messages: the only ones a node without a cluster accepts.
    pub(super) fn is_raft(&self) -> bool {
        matches!(self, Self::Append(_) | Self::Vote(_) | Self::Snapshot { .. })
    }
}

/// A request for a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Renewal {
    pub(super) member: Member,
    pub(super) nonce: u64,
    pub(super) volumes: Vec<(VolumeId, Health, ReplicaReport)>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Reply {
    pub(super) from: Sender,
    pub(super) body: ReplyBody,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum ReplyBody {
    Identity,
    Append(AppendEntriesResponse<u64>),
    Vote(VoteResponse<u64>),
    /// The receiver's vote after a snapshot.
    Snapshot(Vote),
    /// The command went through the log.
    Applied(Applied),
    /// Not proposed, and why; an earlier attempt under the same id may still be under way.
    Declined(String),
    Grant(Grant),
    Admin(Vec<u8>),
    /// Ask the leader, who may be the one named. The request had no effect.
    NotLeader(Option<NodeId>),
    /// The sender or the request is not acceptable.
    Refused(String),
    /// It was tried and went wrong; it may have taken effect.
    Failed(String),
    /// The sender is not the newest run of its node, this one is: its store was rolled back or copied [R13].
    Outdated(Incarnation),
}

/// Reads one frame. `None` if the stream ends before it.
pub(super) async fn read_frame<T: serde::de::DeserializeOwned>(
    stream: &mut (impl AsyncRead + Unpin),
) -> io::Result<Option<Result<T, CodecError>>> {
    let mut header = [0; HEADER_LEN];
    match stream.read_exact(&mut header).await {
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(e),
    }
    let header = match codec::decode_header(&header) {
        Ok(header) => header,
        Err(e) => return Ok(Some(Err(e))),
    };
    // Grows with what arrives, not with what is announced.
    let mut body = Vec::with_capacity(header.len.min(READ_AHEAD));
    stream.take(header.len as u64).read_to_end(&mut body).await?;
    Ok(Some(codec::decode_body(header, &body)))
}

/// Writes one frame.
pub(super) async fn write_frame<T: Serialize>(
    stream: &mut (impl AsyncWrite + Unpin),
    value: &T,
) -> io::Result<()> {
    let bytes = codec::encode(value).map_err(io::Error::other)?;
    stream.write_all(&bytes).await?;
    stream.flush().await
}

/// Checks an identity against what the cluster state knows [R13]. A node that the state does not know may
/// be newer than the state; that it knows the cluster id says that it was admitted.
///
/// # Errors
/// Why the identity is not acceptable.
pub(super) fn check_sender(state: &ClusterState, from: &Sender) -> Result<(), String> {
    if mutated(Mutation::R13) {
        return Ok(());
    }
    let node = from.node;
    if state.retired.contains(&node) {
        return Err(format!("{node} was removed from the cluster; add it under a new id"));
    }
    let Some(record) = state.nodes.get(&node) else { return Ok(()) };
    if record.store != from.store {
        return Err(format!(
            "{node} is known with store {}, not {}; if it lost its disk, remove it and add it under a new id",
            record.store, from.store
        ));
    }
    match newer_run(state, from) {
        Some(newest) => Err(format!(
            "{node} has run as {newest} already and speaks as {}: its store was rolled back or copied; \
             remove it and add it under a new id",
            from.incarnation
        )),
        None => Ok(()),
    }
}

/// The registered run of the sender's store that shows that it was rolled back or copied: its counter is not
/// below the sender's, and it is another run. A store counts its starts durably before it speaks [R13].
pub(super) fn newer_run(state: &ClusterState, from: &Sender) -> Option<Incarnation> {
    if mutated(Mutation::R13) {
        return None;
    }
    let record = state.nodes.get(&from.node).filter(|record| record.store == from.store)?;
    record.incarnation.filter(|newest| *newest != from.incarnation && newest.boot >= from.incarnation.boot)
}

/// What a receiver knows of itself.
pub(super) struct Receiver<'a> {
    pub(super) me: Sender,
    pub(super) state: &'a ClusterState,
    /// Nodes from which a node without a cluster accepts one.
    pub(super) contacts: &'a [NodeId],
}

impl Receiver<'_> {
    /// Checks whether a request may be handled [R13, R19]. `Ok(Some(_))` names the cluster that this node,
    /// which had none, has to adopt durably before it handles the request.
    ///
    /// # Errors
    /// Why it may not.
    pub(super) fn check(&self, request: &Request) -> Result<Option<ClusterId>, String> {
        if matches!(request.body, RequestBody::Identify) {
            return Ok(None);
        }
        let from = &request.from;
        if request.to != Some((self.me.node, self.me.store)) {
            return Err(format!(
                "the request is not meant for {} with store {}; a node that lost its disk is added under a \
                 new id",
                self.me.node, self.me.store
            ));
        }
        match (self.me.cluster, from.cluster) {
            (Some(mine), Some(theirs)) if mine == theirs || mutated(Mutation::R19) => {
                check_sender(self.state, from)?;
                Ok(None)
            }
            (Some(mine), theirs) => {
                let theirs = theirs.map_or("none".into(), |c| c.to_string());
                Err(format!("this is cluster {mine}, the sender belongs to {theirs}; add it as a new node"))
            }
            (None, Some(theirs)) if request.body.is_raft() && self.contacts.contains(&from.node) => {
                Ok(Some(theirs))
            }
            (None, _) => Err(format!("{} belongs to no cluster yet", self.me.node)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::fixture::{Cluster, member, record};
    use super::super::state::NodeKind;
    use super::*;

    fn sender(node: u64, boot: u64) -> Sender {
        let store = record(node, NodeKind::Data).store;
        let incarnation = member(node, boot).incarnation;
        Sender { cluster: Some(ClusterId(99)), node: NodeId(node), store, incarnation }
    }

    fn vote() -> RequestBody {
        RequestBody::Vote(VoteRequest::new(Vote::new(3, 1), None))
    }

    fn check(me: Sender, from: Sender, to: Sender, body: RequestBody) -> Result<Option<ClusterId>, String> {
        let mut c = Cluster::pair();
        c.register(1, 2);
        let receiver = Receiver { me, state: &c.state, contacts: &[NodeId(1), NodeId(2)] };
        receiver.check(&Request { from, to: Some((to.node, to.store)), body })
    }

    #[test]
    fn r13_another_store_or_an_older_run_under_a_known_id_is_refused() {
        let me = sender(2, 1);
        assert_eq!(check(me, sender(1, 2), me, vote()), Ok(None));
        assert_eq!(check(me, sender(1, 3), me, vote()), Ok(None), "started anew, not registered yet");
        check(me, sender(1, 1), me, vote()).unwrap_err();
        let mut twin = sender(1, 2);
        twin.incarnation.nonce += 1;
        check(me, twin, me, vote()).unwrap_err();
        let other = Sender { store: StoreId(123), ..sender(1, 9) };
        check(me, other, me, vote()).unwrap_err();
        // Addressed to the store that this node had before it lost its disk.
        let lost = Sender { store: StoreId(5), ..me };
        check(lost, sender(1, 2), me, vote()).unwrap_err();
    }

    #[test]
    fn r13_a_removed_node_is_refused_and_one_not_known_yet_is_not() {
        let mut c = Cluster::new(&[1, 2]);
        assert_eq!(check_sender(&c.state, &sender(8, 1)), Ok(()));
        c.state.retired.insert(NodeId(8));
        check_sender(&c.state, &sender(8, 1)).unwrap_err();
    }

    #[test]
    fn r19_another_cluster_is_refused_and_a_new_node_adopts_one_from_its_contacts_only() {
        let me = sender(2, 1);
        let old = Sender { cluster: Some(ClusterId(98)), ..sender(1, 2) };
        check(me, old, me, vote()).unwrap_err();
        check(me, Sender { cluster: None, ..old }, me, vote()).unwrap_err();
        let blank = Sender { cluster: None, ..me };
        assert_eq!(check(blank, sender(1, 2), blank, vote()), Ok(Some(ClusterId(99))));
        check(blank, sender(8, 1), blank, vote()).unwrap_err();
        check(blank, sender(1, 2), blank, RequestBody::Admin(vec![])).unwrap_err();
        assert_eq!(check(blank, old, me, RequestBody::Identify), Ok(None));
    }

    #[tokio::test]
    async fn a_frame_that_lies_about_its_length_ends_the_connection() {
        let mut bytes = codec::encode(&7u64).unwrap();
        let mut stream = bytes.as_slice();
        assert_eq!(read_frame::<u64>(&mut stream).await.unwrap(), Some(Ok(7)));
        assert!(read_frame::<u64>(&mut stream).await.unwrap().is_none());
        bytes[1] = 200;
        assert!(matches!(read_frame::<u64>(&mut bytes.as_slice()).await, Ok(Some(Err(_)))));
        bytes[4] = 200;
        assert!(matches!(read_frame::<u64>(&mut bytes.as_slice()).await, Ok(Some(Err(_)))));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 1024, failure_persistence: None, ..ProptestConfig::default() })]

        /// The rules in one sentence each, for any sender and any receiver.
        #[test]
        fn r13_r19_a_request_is_accepted_exactly_by_the_rules(
            clusters in (prop::option::of(97u128..100), prop::option::of(97u128..100)),
            node in prop::sample::select(vec![1u64, 2, 3, 8]), boot in 1u64..4, twin in any::<bool>(),
            lost_disk in prop::bool::weighted(0.2), removed in prop::bool::weighted(0.2),
            strayed in prop::bool::weighted(0.2), contact in any::<bool>(), kind in 0u8..3,
        ) {
            let mut c = Cluster::pair();
            c.register(1, 2);
            c.register(2, 2);
            if removed {
                c.state.nodes.remove(&NodeId(node));
                c.state.retired.insert(NodeId(node));
            }
            let me = Sender { cluster: clusters.0.map(ClusterId), ..sender(2, 9) };
            let mut from = Sender { cluster: clusters.1.map(ClusterId), ..sender(node, boot) };
            from.incarnation.nonce += u64::from(twin);
            from.store = if lost_disk { StoreId(5) } else { from.store };
            let to = if strayed { StoreId(6) } else { me.store };
            let body = match kind {
                0 => RequestBody::Identify,
                1 => vote(),
                _ => RequestBody::Admin(Vec::new()),
            };
            let contacts: Vec<NodeId> = if contact { vec![NodeId(node)] } else { Vec::new() };
            let receiver = Receiver { me, state: &c.state, contacts: &contacts };
            let found = receiver.check(&Request { from, to: Some((me.node, to)), body });

            // A known node speaks from its own store, as its registered run or as one that was started later.
            let registered = c.state.newest(NodeId(node));
            let known = c.state.nodes.contains_key(&NodeId(node));
            let own_run = registered.is_none_or(|run| run == from.incarnation || run.boot < from.incarnation.boot);
            let credible = !removed && (!known || !lost_disk && own_run);
            let same_cluster = me.cluster.is_some() && me.cluster == from.cluster;
            // A node without a cluster takes the one of Raft traffic from a node that it was told of.
            let adopts = me.cluster.is_none() && from.cluster.is_some() && kind == 1 && contact;
            let expected = match kind {
                0 => Some(None),
                _ if strayed => None,
                _ if adopts => Some(from.cluster),
                _ if same_cluster && credible => Some(None),
                _ => None,
            };
            prop_assert_eq!(found.ok(), expected);
        }
    }
}
