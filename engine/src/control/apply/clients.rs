//! The rules about clients: which client host a volume is attached to.
//!
//! At most one, unless the volume is shared. Only the primary attaches one, and only if nobody else is; the
//! attachment outlives the primary, so that the next one lets nobody else in. It ends by the primary's word, which
//! saw the client go, or by an operator's; the primary names the very attachment, because its word may come late. No
//! config and no epoch changes: replicas need not know, and no change of theirs is lost because a client came.

use crate::types::{LogIndex, Member, VolumeId};

use super::super::state::{Attachment, CLIENT_LEN_MAX, ClusterState, VolumeRecord};
use super::{Effect, Refusal};

pub(super) fn attach(
    state: &mut ClusterState,
    index: LogIndex,
    volume: VolumeId,
    client: String,
    by: Member,
) -> Effect {
    let record = find(state, volume)?;
    check_primary(record, by)?;
    check_client(&client)?;
    if let Some(refusal) = record.refusal(&client) {
        return Err(refusal);
    }
    record.evicted = None;
    if !record.shared {
        record.attached = Some(Attachment { client, index });
    }
    Ok(Some(record.epoch))
}

pub(super) fn detach(
    state: &mut ClusterState,
    volume: VolumeId,
    attachment: &Attachment,
    by: Member,
) -> Effect {
    let record = find(state, volume)?;
    check_primary(record, by)?;
    if record.attached.as_ref() != Some(attachment) {
        return Err(format!("volume {} has another attachment now, or none", record.name));
    }
    record.attached = None;
    Ok(Some(record.epoch))
}

pub(super) fn evict(state: &mut ClusterState, volume: VolumeId, client: String) -> Effect {
    let record = find(state, volume)?;
    check_client(&client)?;
    match record.holder() {
        Some(holder) if holder == client => {
            record.attached = None;
            record.evicted = Some(client);
        }
        Some(other) => {
            return Err(format!("volume {} is attached by {other}, not by {client}", record.name));
        }
        None if record.shared => {
            return Err(format!("volume {} is shared: no client holds it alone", record.name));
        }
        None => return Err(format!("volume {} is attached by nobody", record.name)),
    }
    Ok(Some(record.epoch))
}

pub(super) fn share(state: &mut ClusterState, volume: VolumeId, shared: bool) -> Effect {
    let record = find(state, volume)?;
    record.shared = shared;
    if shared {
        (record.attached, record.evicted) = (None, None);
    }
    Ok(Some(record.epoch))
}

fn find(state: &mut ClusterState, volume: VolumeId) -> Result<&mut VolumeRecord, Refusal> {
    state.volumes.get_mut(&volume).ok_or_else(|| format!("volume {volume} does not exist"))
}

/// Names are remembered, so they are bounded.
fn check_client(client: &str) -> Result<(), Refusal> {
    if client.is_empty() || client.len() > CLIENT_LEN_MAX {
        return Err(format!("a client's name has 1 to {CLIENT_LEN_MAX} bytes, not {}", client.len()));
    }
    Ok(())
}

/// The named run of the primary alone knows its clients. A former primary does not: the client may have come back
/// to the new one since.
fn check_primary(record: &VolumeRecord, by: Member) -> Result<(), Refusal> {
    if record.primary == Some(by) {
        return Ok(());
    }
    Err(format!("{} run {} is not primary of volume {}", by.node, by.incarnation, record.name))
}

#[cfg(test)]
mod tests {
    use super::super::super::command::ClusterOp;
    use super::super::super::fixture::{Cluster, VOL, member};
    use super::*;
    use crate::types::{NodeId, ProposalKind};

    fn attach_by(client: &str, node: u64) -> ClusterOp {
        ClusterOp::Attach { volume: VOL, client: client.into(), by: member(node, 1) }
    }

    /// The end of the present attachment, as a node has seen it.
    fn detach_by(c: &Cluster, node: u64) -> ClusterOp {
        let attachment = c.vol().attached.clone().unwrap();
        ClusterOp::Detach { volume: VOL, attachment, by: member(node, 1) }
    }

    fn evict(client: &str) -> ClusterOp {
        ClusterOp::Evict { volume: VOL, client: client.into() }
    }

    #[test]
    fn one_client_is_attached_and_the_next_is_told_who_is() {
        let mut c = Cluster::pair();
        let before = c.vol().clone();
        c.must(attach_by("a", 1));
        // Again is no other: the client has several connections.
        c.must(attach_by("a", 1));
        let why = c.refused(attach_by("b", 1));
        assert!(why.contains("attached by a") && why.contains("blkrepl detach vol0 --client a"), "{why}");
        assert_eq!((c.vol().epoch, c.vol().index), (before.epoch, before.index), "no config changes");
        c.must(detach_by(&c, 1));
        c.must(attach_by("b", 1));
        assert_eq!(c.vol().holder(), Some("b"));
    }

    #[test]
    fn an_attachment_outlives_its_primary_which_has_no_say_any_more() {
        let mut c = Cluster::pair();
        c.must(attach_by("a", 1));
        c.propose_ok(member(1, 1), ProposalKind::Move(member(2, 1)));
        // The old primary saw its connections end, because it lost the role.
        assert!(c.refused(detach_by(&c, 1)).contains("is not primary"));
        assert!(c.refused(attach_by("b", 1)).contains("is not primary"));
        assert!(c.refused(attach_by("b", 2)).contains("attached by a"));
        c.must(attach_by("a", 2));
        c.must(detach_by(&c, 2));
        assert_eq!(c.vol().attached, None);
    }

    /// It was on its way when the client came back.
    #[test]
    fn a_late_detach_does_not_end_the_attachment_that_its_client_has_come_back_to() {
        let mut c = Cluster::pair();
        c.must(attach_by("a", 1));
        let late = detach_by(&c, 1);
        c.must(attach_by("a", 1));
        assert!(c.refused(late).contains("another attachment"));
        assert_eq!(c.vol().holder(), Some("a"));
    }

    #[test]
    fn another_run_of_the_primary_has_no_say() {
        let mut c = Cluster::pair();
        let by = Member { node: NodeId(1), ..member(1, 2) };
        let op = ClusterOp::Attach { volume: VOL, client: "a".into(), by };
        assert!(c.refused(op).contains("is not primary"));
    }

    #[test]
    fn an_operator_detaches_exactly_the_client_that_is_named() {
        let mut c = Cluster::pair();
        assert!(c.refused(evict("a")).contains("attached by nobody"));
        c.must(attach_by("a", 1));
        assert!(c.refused(evict("b")).contains("attached by a, not by b"));
        c.must(evict("a"));
        assert_eq!((c.vol().holder(), c.vol().evicted.as_deref()), (None, Some("a")));
        c.must(attach_by("b", 1));
        assert_eq!(c.vol().evicted, None);
    }

    #[test]
    fn a_shared_volume_lets_everybody_in_and_is_attached_to_nobody() {
        let mut c = Cluster::pair();
        c.must(attach_by("a", 1));
        c.must(ClusterOp::Share { volume: VOL, shared: true });
        c.must(attach_by("b", 1));
        c.must(attach_by("a", 1));
        assert_eq!(c.vol().attached, None);
        assert!(c.refused(evict("a")).contains("shared"));
        c.must(ClusterOp::Share { volume: VOL, shared: false });
        c.must(attach_by("b", 1));
        assert!(c.refused(attach_by("a", 1)).contains("attached by b"));
    }

    #[test]
    fn names_of_clients_are_bounded() {
        let mut c = Cluster::pair();
        assert!(c.refused(attach_by("", 1)).contains("1 to 64 bytes"));
        assert!(c.refused(attach_by(&"x".repeat(65), 1)).contains("1 to 64 bytes"));
        assert!(c.refused(evict(&"x".repeat(65))).contains("1 to 64 bytes"));
        c.must(attach_by(&"x".repeat(64), 1));
    }
}
