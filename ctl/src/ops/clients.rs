//! What operators ask for about clients: to end an attachment, and how many client hosts may be attached.

use std::sync::Arc;

use blkrepl_engine::control::{Applied, CLIENT_LEN_MAX, ClusterOp};

use super::{CHANGE_TIMEOUT, done, find, not_shown, submit};
use crate::admin::{Done, SharingWord};
use crate::events::Happening;
use crate::serve::node::Node;

/// Ends the attachment of a client host. It may be attached again later, by its own connections.
pub(super) async fn detach(node: &Arc<Node>, name: &str, client: &str) -> Result<Done, String> {
    let state = node.state();
    let id = find(&state, name)?.id;
    if client.len() > CLIENT_LEN_MAX {
        return Err(format!("no client's name has more than {CLIENT_LEN_MAX} bytes; see `blkrepl status`"));
    }
    let op = ClusterOp::Evict { volume: id, client: client.to_owned() };
    commit(node, name, op, "the detachment").await?;
    let text = format!("volume {name} is no longer attached by {client}; the primary closes its connections");
    node.events.record(Some(name), Happening::new("detached", text.clone()));
    Ok(done(node, id, text))
}

/// Lets several client hosts in at once, or one only.
pub(super) async fn share(node: &Arc<Node>, name: &str, sharing: SharingWord) -> Result<Done, String> {
    let state = node.state();
    let record = find(&state, name)?;
    let shared = sharing == SharingWord::Shared;
    let text = if shared {
        format!("volume {name} is shared: any number of client hosts may write to it")
    } else {
        format!("volume {name} is exclusive: one client host at a time may be attached")
    };
    if record.shared != shared {
        commit(node, name, ClusterOp::Share { volume: record.id, shared }, "the change of sharing").await?;
        node.events.record(Some(name), Happening::new("sharing_changed", text.clone()));
    }
    Ok(done(node, record.id, text))
}

/// Has a command applied, and waits until that shows here.
async fn commit(node: &Arc<Node>, name: &str, op: ClusterOp, what: &str) -> Result<(), String> {
    let Applied::Done { index, .. } = submit(node, op).await? else {
        return Err(format!("{what} of {name} was refused"));
    };
    if !node.applied(index, CHANGE_TIMEOUT).await {
        return Err(not_shown(name, what));
    }
    Ok(())
}
