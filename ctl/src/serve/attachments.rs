//! Which client host may write to each volume that this node is primary of, and its connections.
//!
//! A volume is attached to one client host at a time, unless it is shared. Who that is stands in cluster state, so
//! that it outlives the primary; the connections stand here. Rules kept:
//! - a connection is handed to the volume's reactor only while cluster state, as applied here, lets its client in;
//!   when it does no more, the connection is closed before any other client's is handed over;
//! - an attachment ends when the last connection of its client ends on the primary, however it ended; but not when
//!   the primary itself goes: then it waits [`ATTACHMENT_GRACE`] for its client at the next one;
//! - changes of one volume's attachment are asked for one after the other (`gate`), so that a client that leaves and
//!   one that comes do not overtake each other.
//!
//! Never does: reading a request, or deciding who is primary.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blkrepl_engine::control::{Applied, ClusterOp, ClusterState, VolumeRecord};
use blkrepl_engine::reactor::{ClientKey, NewClient};
use blkrepl_engine::types::{Member, Reign, VolumeId};
use blkrepl_nbd::{Admission, Attached, ExportRefusal};
use tokio::runtime::Handle;
use tokio::time::Instant;

use super::node::Node;
use crate::events::Happening;

/// How long an attachment waits for its client after the primary changed or restarted.
pub const ATTACHMENT_GRACE: Duration = Duration::from_secs(60);
/// How long a client waits for the last connection of the one before it to end, before it is refused: that one may
/// have hung up a moment ago.
const HOLDER_PATIENCE: Duration = Duration::from_millis(500);
/// How long a client whose connections an operator ended is not let in again, so that the client that is to have the
/// volume next can come first: one that is alive connects again at once.
const DETACHED_PAUSE: Duration = Duration::from_secs(10);
/// How often a client that waits looks again.
const HOLDER_POLL: Duration = Duration::from_millis(20);
/// How long the state that shows an attachment may take to arrive here after its outcome.
const STATE_PATIENCE: Duration = Duration::from_secs(5);
/// How often attachments whose client is gone are looked for.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// The connections of every volume that is or was served here.
pub struct Attachments {
    tables: Mutex<BTreeMap<VolumeId, Table>>,
    keys: AtomicU64,
    runtime: Handle,
}

/// One volume's.
#[derive(Default)]
struct Table {
    connections: BTreeMap<ClientKey, Connection>,
    /// The reign in which this node is primary, and since when.
    reign: Option<(Reign, Instant)>,
    /// The client whose last connection ended in this reign.
    ended: Option<String>,
    /// Whom the volume was attached to, as last seen here.
    holder: Option<String>,
    /// A client whose connections an operator ended, and until when it is not let in again.
    barred: Option<(String, Instant)>,
    /// Held while an attachment is changed.
    gate: Arc<tokio::sync::Mutex<()>>,
}

struct Connection {
    client: String,
    /// Its client may not be served any more.
    revoked: bool,
}

impl Table {
    fn connected(&self, client: &str) -> bool {
        self.connections.values().any(|c| c.client == client && !c.revoked)
    }

    /// The attachment of `client` is over: it went while this node was primary, or did not come back in time.
    fn is_over(&self, client: &str, now: Instant) -> bool {
        let late = || self.reign.is_some_and(|(_, since)| now >= since + ATTACHMENT_GRACE);
        !self.connected(client) && (self.ended.as_deref() == Some(client) || late())
    }

    /// Notes in which reign this node is primary.
    fn follow(&mut self, reign: Option<Reign>) {
        if self.reign.map(|(known, _)| known) != reign {
            self.reign = reign.map(|reign| (reign, Instant::now()));
            self.ended = None;
        }
    }

    /// Marks the connections whose clients may not be served any more; returns those newly marked.
    fn revoke(&mut self, record: Option<&VolumeRecord>, now: Instant) -> Vec<ClientKey> {
        let lets_in = |client: &str| record.is_some_and(|v| v.lets_in(client));
        let mut keys = Vec::new();
        for (key, connection) in &mut self.connections {
            if connection.revoked || lets_in(&connection.client) {
                continue;
            }
            connection.revoked = true;
            keys.push(*key);
            // It was attached, and has connections: so somebody else ended that.
            if self.holder.as_ref() == Some(&connection.client) {
                self.barred = Some((connection.client.clone(), now + DETACHED_PAUSE));
            }
        }
        self.holder = record.and_then(|v| v.attached.clone());
        keys
    }

    /// Why a client may not be attached as things are; `None` if it may.
    fn refusal(&self, record: &VolumeRecord, client: &str, now: Instant) -> Option<String> {
        match (&self.barred, &record.attached) {
            (Some((barred, until)), _) if barred == client && now < *until => Some(format!(
                "volume {} was detached from {client} by an operator; {client} may attach it again in {} s",
                record.name,
                (*until - now).as_secs() + 1
            )),
            (_, Some(holder)) if self.is_over(holder, now) => None,
            _ => record.refusal(client),
        }
    }
}

impl Attachments {
    /// None yet; they are changed on `runtime`.
    pub fn new(runtime: Handle) -> Self {
        Self { tables: Mutex::default(), keys: AtomicU64::new(0), runtime }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<VolumeId, Table>> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn gate(&self, volume: VolumeId) -> Arc<tokio::sync::Mutex<()>> {
        Arc::clone(&self.lock().entry(volume).or_default().gate)
    }

    /// Why a client may not be served as things are; `None` if it may, or if that has to be asked for.
    pub fn refusal(&self, record: &VolumeRecord, client: &str) -> Option<String> {
        match self.lock().get(&record.id) {
            Some(table) => table.refusal(record, client, Instant::now()),
            None => record.refusal(client),
        }
    }

    /// Follows cluster state: closes the connections of clients that may not be served any more.
    pub fn follow(&self, node: &Node, state: &ClusterState) {
        let me = node.me();
        let mut unwanted = Vec::new();
        for (&id, table) in self.lock().iter_mut() {
            let record = state.volumes.get(&id);
            table.follow(record.filter(|v| v.primary == Some(me)).map(|v| v.reign));
            let keys = table.revoke(record, Instant::now());
            if !keys.is_empty() {
                unwanted.push((id, keys));
            }
        }
        for (id, keys) in unwanted {
            if let Some(handle) = node.handle(id) {
                handle.end_clients(keys);
            }
        }
    }

    /// Begins to wait for the clients of volumes that this node became primary of.
    fn adopt(&self, state: &ClusterState, me: Member) {
        let mut tables = self.lock();
        for record in state.volumes.values().filter(|v| v.attached.is_some() && v.primary == Some(me)) {
            tables.entry(record.id).or_default().follow(Some(record.reign));
        }
    }

    /// Registers a connection, if cluster state lets its client in.
    fn register(&self, node: &Node, volume: VolumeId, client: &str) -> Option<ClientKey> {
        let mut tables = self.lock();
        // Read with the lock held: a change that comes later finds the connection here.
        let state = node.state();
        let record = state.volumes.get(&volume).filter(|v| v.lets_in(client))?;
        let table = tables.entry(volume).or_default();
        table.follow((record.primary == Some(node.me())).then_some(record.reign));
        table.holder.clone_from(&record.attached);
        if table.ended.as_deref() == Some(client) {
            table.ended = None;
        }
        let key = ClientKey(self.keys.fetch_add(1, Ordering::Relaxed));
        table.connections.insert(key, Connection { client: client.to_owned(), revoked: false });
        Some(key)
    }

    fn is_revoked(&self, volume: VolumeId, key: ClientKey) -> bool {
        self.lock().get(&volume).and_then(|t| t.connections.get(&key)).is_some_and(|c| c.revoked)
    }

    /// Forgets a connection. True if its client has no other one.
    fn forget(&self, volume: VolumeId, key: ClientKey) -> bool {
        let mut tables = self.lock();
        let Some(table) = tables.get_mut(&volume) else { return false };
        let Some(Connection { client, revoked }) = table.connections.remove(&key) else { return false };
        let last = !revoked && !table.connected(&client);
        if last {
            table.ended = Some(client);
        }
        last
    }
}

/// The right of one connection of a client to be served, from its admission to its end.
struct Ticket {
    node: Arc<Node>,
    volume: VolumeId,
    key: ClientKey,
}

impl Admission for Ticket {
    fn attach(self: Box<Self>, client: Attached) {
        let (node, volume, key) = (Arc::clone(&self.node), self.volume, self.key);
        let Some(handle) = node.handle(volume).filter(|_| !node.is_stopping()) else {
            // Dropping the connection closes it; the client finds out where the volume went.
            return tracing::debug!(peer = client.peer, "the volume went away");
        };
        let Attached { fd, protocol, peer } = client;
        handle.client_connected(NewClient { key, socket: fd, protocol, name: peer, guard: self });
        // Whoever revoked it before it was handed over could not close it.
        if node.attachments.is_revoked(volume, key) {
            handle.end_clients(vec![key]);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.node.attachments.forget(self.volume, self.key) {
            let (node, volume) = (Arc::clone(&self.node), self.volume);
            self.node.attachments.runtime.spawn(async move { settle(&node, volume).await });
        }
    }
}

/// Attaches a volume to a client, unless another one has it.
///
/// # Errors
/// Why not: who has it, or that nobody can say.
pub async fn admit(
    node: &Arc<Node>,
    volume: VolumeId,
    client: &str,
) -> Result<Box<dyn Admission>, ExportRefusal> {
    let gate = node.attachments.gate(volume);
    let _turn = gate.lock().await;
    let give_up = Instant::now() + HOLDER_PATIENCE;
    loop {
        let state = node.state();
        let Some(record) = state.volumes.get(&volume) else {
            return Err(ExportRefusal::Unknown("the volume is gone".into()));
        };
        if !record.lets_in(client) {
            match node.attachments.refusal(record, client) {
                Some(refusal) if Instant::now() >= give_up => return Err(ExportRefusal::Policy(refusal)),
                Some(_) => {
                    tokio::time::sleep(HOLDER_POLL).await;
                    continue;
                }
                None => attach(node, record, client).await?,
            }
        }
        // What was applied meanwhile is enforced before anybody else is let in.
        node.attachments.follow(node, &node.state());
        if let Some(key) = node.attachments.register(node, volume, client) {
            return Ok(Box::new(Ticket { node: Arc::clone(node), volume, key }));
        }
    }
}

/// Asks for an attachment, for that of its holder to be ended first, and waits until both show here.
async fn attach(node: &Node, record: &VolumeRecord, client: &str) -> Result<(), ExportRefusal> {
    let me = node.me();
    if let Some(holder) = &record.attached {
        detach(node, record, holder, me).await.map_err(ExportRefusal::Policy)?;
    }
    change(node, ClusterOp::Attach { volume: record.id, client: client.to_owned(), by: me })
        .await
        .map_err(ExportRefusal::Policy)?;
    let text = format!("attached by {client}");
    node.events.record(Some(&record.name), Happening::new("attached", text));
    Ok(())
}

async fn detach(node: &Node, record: &VolumeRecord, client: &str, me: Member) -> Result<(), String> {
    change(node, ClusterOp::Detach { volume: record.id, client: client.to_owned(), by: Some(me) }).await?;
    let text = format!("no longer attached by {client}: its connections have ended");
    node.events.record(Some(&record.name), Happening::new("detached", text));
    Ok(())
}

/// Has a command applied, here too.
async fn change(node: &Node, op: ClusterOp) -> Result<(), String> {
    let index = match node.control.submit(op).await {
        Ok(Applied::Done { index, .. }) => index,
        Ok(Applied::Refused(why)) => return Err(why),
        Err(error) => return Err(format!("the attachment cannot be agreed on: {error}; try again")),
    };
    let mut states = node.control.cluster_state();
    let shown = states.wait_for(|state| state.applied >= index);
    match tokio::time::timeout(STATE_PATIENCE, shown).await {
        Ok(Ok(_)) => Ok(()),
        _ => Err("the attachment does not show here yet; try again".to_string()),
    }
}

/// Ends the attachment of a volume served here, if its client is gone.
async fn settle(node: &Node, volume: VolumeId) {
    let gate = node.attachments.gate(volume);
    let _turn = gate.lock().await;
    let (state, me) = (node.state(), node.me());
    let Some(record) = state.volumes.get(&volume).filter(|v| v.primary == Some(me)) else { return };
    let Some(holder) = &record.attached else { return };
    let over = node.attachments.lock().get(&volume).is_some_and(|t| t.is_over(holder, Instant::now()));
    if !over || node.is_stopping() {
        return;
    }
    // Asked for again by the next sweep: without a quorum, or by another primary.
    if let Err(why) = detach(node, record, holder, me).await {
        tracing::debug!(volume = record.name, client = holder, "cannot end an attachment yet: {why}");
    }
}

/// Ends attachments whose clients are gone, until the task is dropped.
pub async fn sweep(node: Arc<Node>) {
    let mut ticks = tokio::time::interval(SWEEP_INTERVAL);
    loop {
        ticks.tick().await;
        let state = node.state();
        node.attachments.adopt(&state, node.me());
        for record in state.volumes.values().filter(|v| v.attached.is_some() && v.primary == Some(node.me()))
        {
            settle(&node, record.id).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::status::tests::record;

    fn table(connections: &[(u64, &str)]) -> Table {
        let connections = connections.iter().map(|(key, client)| {
            (ClientKey(*key), Connection { client: (*client).to_string(), revoked: false })
        });
        Table { connections: connections.collect(), ..Table::default() }
    }

    #[test]
    fn an_attachment_is_over_when_its_client_went_from_this_primary() {
        let mut t = table(&[(1, "a")]);
        let now = Instant::now();
        t.follow(Some(Reign(4)));
        t.ended = Some("a".into());
        assert!(!t.is_over("a", now), "another connection of it is there");
        t.connections.clear();
        assert!(t.is_over("a", now));
        assert!(!t.is_over("b", now));
    }

    #[test]
    fn an_attachment_waits_for_its_client_after_a_change_of_primary_but_not_for_ever() {
        let mut t = table(&[]);
        t.follow(Some(Reign(4)));
        t.ended = Some("a".into());
        t.follow(None);
        t.follow(Some(Reign(9)));
        let now = Instant::now();
        assert!(!t.is_over("a", now), "its end was that of the primary before");
        assert!(t.is_over("a", now + ATTACHMENT_GRACE));
        // The same reign again is no new wait.
        t.follow(Some(Reign(9)));
        assert!(t.is_over("a", now + ATTACHMENT_GRACE));
        t.connections.insert(ClientKey(3), Connection { client: "a".into(), revoked: false });
        assert!(!t.is_over("a", now + ATTACHMENT_GRACE), "it came back");
    }

    #[test]
    fn a_client_that_an_operator_detached_is_let_in_again_after_a_pause() {
        let mut v = record();
        let mut t = table(&[(1, "a"), (2, "a")]);
        let now = Instant::now();
        v.attached = Some("a".into());
        assert_eq!(t.revoke(Some(&v), now), []);
        v.attached = None;
        assert_eq!(t.revoke(Some(&v), now), [ClientKey(1), ClientKey(2)]);
        assert_eq!(t.revoke(Some(&v), now), [], "once");
        assert!(t.refusal(&v, "a", now).is_some_and(|why| why.contains("detached from a")));
        assert_eq!(t.refusal(&v, "b", now), None);
        assert_eq!(t.refusal(&v, "a", now + DETACHED_PAUSE), None);
    }

    #[test]
    fn a_client_that_becomes_one_of_several_no_more_may_be_the_one() {
        let mut v = record();
        let mut t = table(&[(1, "a"), (2, "b")]);
        let now = Instant::now();
        v.shared = true;
        assert_eq!(t.revoke(Some(&v), now), []);
        v.shared = false;
        assert_eq!(t.revoke(Some(&v), now).len(), 2);
        assert_eq!((t.refusal(&v, "a", now), t.refusal(&v, "b", now)), (None, None));
    }

    #[test]
    fn another_client_is_refused_until_the_one_before_is_over() {
        let mut v = record();
        let mut t = table(&[(1, "a")]);
        let now = Instant::now();
        v.attached = Some("a".into());
        t.follow(Some(Reign(1)));
        t.revoke(Some(&v), now);
        assert_eq!(t.refusal(&v, "a", now), None);
        assert!(t.refusal(&v, "b", now).is_some_and(|why| why.contains("attached by a")));
        t.connections.clear();
        assert!(t.refusal(&v, "b", now).is_some(), "it may come back");
        t.ended = Some("a".into());
        assert_eq!(t.refusal(&v, "b", now), None);
    }

    #[test]
    fn whoever_is_not_primary_waits_for_nobody() {
        let mut t = table(&[]);
        t.follow(None);
        assert!(!t.is_over("a", Instant::now() + 2 * ATTACHMENT_GRACE));
    }
}
