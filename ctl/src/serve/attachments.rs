//! Which client host may write to each volume that this node is primary of, and its connections.
//!
//! A volume is attached to one client host at a time, unless it is shared. Who that is stands in cluster state, so
//! that it outlives the primary; the connections stand here. Rules kept:
//! - a connection is handed to the volume's reactor only while cluster state, as applied here, lets its client in;
//!   when it does no more, the connection is closed before any other client's is handed over;
//! - an attachment ends when the last connection of its client has ended on the primary by the client's doing, or its
//!   machine's; when the primary closed it, or went itself, it waits [`ATTACHMENT_GRACE`] for its client, here or at
//!   the next primary;
//! - a change that may still be on its way ends no attachment that its client has come back to;
//! - changes of one volume's attachment are asked for one after the other (`gate`), so that a client that leaves and
//!   one that comes do not overtake each other.
//!
//! Never does: reading a request, or deciding who is primary.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blkrepl_engine::control::{Applied, Attachment, ClusterOp, ClusterState, SubmitError, VolumeRecord};
use blkrepl_engine::reactor::{ClientKey, End, NewClient};
use blkrepl_engine::types::{Member, Reign, VolumeId};
use blkrepl_nbd::{Admission, Attached, ExportRefusal};
use tokio::time::Instant;

use super::node::Node;
use crate::events::Happening;

/// How long an attachment waits for its client after the primary changed, restarted, or closed its connections.
pub const ATTACHMENT_GRACE: Duration = Duration::from_secs(60);
/// How long a client waits for the last connection of the one before it to end, before it is refused: that one may
/// have hung up a moment ago.
const HOLDER_PATIENCE: Duration = Duration::from_millis(500);
/// How long a client whose connections an operator ended is not let in again, so that the client that is to have the
/// volume next can come first: one that is alive connects again at once.
const EVICTED_PAUSE: Duration = Duration::from_secs(10);
/// How often a client that waits looks again.
const HOLDER_POLL: Duration = Duration::from_millis(20);
/// How long the state that shows an attachment may take to arrive here after its outcome.
const STATE_PATIENCE: Duration = Duration::from_secs(5);
/// How long an attachment whose client is gone stays on record while nobody else comes: a client that comes and goes is
/// not agreed on each time.
const DETACH_DELAY: Duration = Duration::from_secs(3);
/// How often attachments whose client is gone are looked for.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// The connections of every volume that is or was served here.
pub struct Attachments {
    tables: Mutex<BTreeMap<VolumeId, Table>>,
    keys: AtomicU64,
}

/// One volume's.
#[derive(Default)]
struct Table {
    connections: BTreeMap<ClientKey, Connection>,
    /// The reign in which this node is primary, and since when.
    reign: Option<(Reign, Instant)>,
    /// The client whose last connection ended in this reign, and from when on its attachment is over.
    ended: Option<(String, Instant)>,
    /// A client that an operator evicted, as cluster state names it, and until when it is not let in again.
    evicted: Option<(String, Instant)>,
    /// Whether an end that was asked for has come about is not known.
    in_doubt: bool,
    /// The client whose attachment was told of last.
    told: Option<String>,
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
        let went = match &self.ended {
            Some((ended, over)) if ended == client => now >= *over,
            _ => self.reign.is_some_and(|(_, since)| now >= since + ATTACHMENT_GRACE),
        };
        went && !self.connected(client)
    }

    /// Follows what cluster state says of the volume; returns the connections whose clients may not be served any
    /// more.
    fn follow(&mut self, record: Option<&VolumeRecord>, me: Member, now: Instant) -> Vec<ClientKey> {
        let reign = record.filter(|v| v.primary == Some(me)).map(|v| v.reign);
        if self.reign.map(|(known, _)| known) != reign {
            self.reign = reign.map(|reign| (reign, now));
            self.ended = None;
        }
        let evicted = record.and_then(|v| v.evicted.as_deref());
        if self.evicted.as_ref().map(|(client, _)| client.as_str()) != evicted {
            self.evicted = evicted.map(|client| (client.to_owned(), now + EVICTED_PAUSE));
        }
        let lets_in = |client: &str| record.is_some_and(|v| v.lets_in(client));
        let unwanted = self.connections.iter_mut().filter(|(_, c)| !c.revoked && !lets_in(&c.client));
        unwanted
            .map(|(key, connection)| {
                connection.revoked = true;
                *key
            })
            .collect()
    }

    /// Why a client may not be attached as things are; `None` if it may.
    fn refusal(&self, record: &VolumeRecord, client: &str, now: Instant) -> Option<String> {
        if record.lets_in(client) {
            return None;
        }
        match (&self.evicted, record.holder()) {
            (Some((evicted, until)), _) if evicted == client && now < *until => Some(format!(
                "volume {} was detached from {client} by an operator; {client} may attach it again in {} s",
                record.name,
                (*until - now).as_secs() + 1
            )),
            (_, Some(holder)) if self.is_over(holder, now) => None,
            _ => record.refusal(client),
        }
    }
}

/// What an end of a connection says of its client.
fn is_clients_end(end: End) -> bool {
    match end {
        End::Client | End::Violation | End::Idle => true,
        // It may be there, and come back.
        End::Unread | End::Stalled | End::Full | End::Replaced | End::Server => false,
    }
}

impl Attachments {
    /// None yet.
    pub fn new() -> Self {
        Self { tables: Mutex::default(), keys: AtomicU64::new(0) }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<VolumeId, Table>> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with the table of a volume.
    fn table<R>(&self, volume: VolumeId, body: impl FnOnce(&mut Table) -> R) -> R {
        body(self.lock().entry(volume).or_default())
    }

    /// Follows cluster state: closes the connections of clients that may not be served any more.
    pub fn follow(&self, node: &Node, state: &ClusterState) {
        let (me, now) = (node.me(), Instant::now());
        let mut unwanted = Vec::new();
        {
            let mut tables = self.lock();
            tables.retain(|id, table| state.volumes.contains_key(id) || !table.connections.is_empty());
            for &id in state.volumes.keys() {
                tables.entry(id).or_default();
            }
            for (&id, table) in tables.iter_mut() {
                let keys = table.follow(state.volumes.get(&id), me, now);
                if !keys.is_empty() {
                    unwanted.push((id, keys));
                }
            }
        }
        for (id, keys) in unwanted {
            if let Some(handle) = node.handle(id) {
                handle.end_clients(keys);
            }
        }
    }

    /// Registers a connection, if cluster state lets its client in.
    fn register(&self, node: &Node, volume: VolumeId, client: &str) -> Option<ClientKey> {
        self.table(volume, |table| {
            // Read with the lock held: a change that comes later finds the connection here.
            node.state().volumes.get(&volume).filter(|v| v.lets_in(client))?;
            table.ended = table.ended.take().filter(|(ended, _)| ended != client);
            let key = ClientKey(self.keys.fetch_add(1, Ordering::Relaxed));
            table.connections.insert(key, Connection { client: client.to_owned(), revoked: false });
            Some(key)
        })
    }

    fn is_revoked(&self, volume: VolumeId, key: ClientKey) -> bool {
        self.table(volume, |t| t.connections.get(&key).is_none_or(|c| c.revoked))
    }

    /// Forgets a connection. If its client has no other one, its attachment is over: now, or, if that was not the
    /// client's doing, when it has not come back for a while.
    fn forget(&self, volume: VolumeId, key: ClientKey, by_client: bool) {
        let now = Instant::now();
        self.table(volume, |table| {
            if let Some(Connection { client, revoked: false }) = table.connections.remove(&key)
                && !table.connected(&client)
            {
                let over = if by_client { now } else { now + ATTACHMENT_GRACE };
                table.ended = Some((client, over));
            }
        });
    }
}

impl Default for Attachments {
    fn default() -> Self {
        Self::new()
    }
}

/// The right of one connection of a client to be served, from its admission to its end.
struct Ticket {
    node: Arc<Node>,
    volume: VolumeId,
    key: ClientKey,
    /// It ended by its client's doing; so it does until it is handed over.
    by_client: bool,
}

impl Admission for Ticket {
    fn attach(mut self: Box<Self>, client: Attached) {
        let (node, volume, key) = (Arc::clone(&self.node), self.volume, self.key);
        self.by_client = false;
        // What revokes it runs on this thread, too: either it did so before, or it finds the connection there.
        let serves = !node.is_stopping() && !node.attachments.is_revoked(volume, key);
        let Some(handle) = node.handle(volume).filter(|_| serves) else {
            // Dropping the connection closes it; the client finds out where the volume went.
            return tracing::debug!(peer = client.peer, "the volume went away");
        };
        let Attached { fd, protocol, session, peer } = client;
        // Dropped untold, it says nothing of the client.
        let mut ticket = self;
        let guard = Box::new(move |end| {
            ticket.by_client = is_clients_end(end);
            drop(ticket);
        });
        handle.client_connected(NewClient { key, socket: fd, protocol, session, name: peer, guard });
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.node.attachments.forget(self.volume, self.key, self.by_client);
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
    let give_up = Instant::now() + HOLDER_PATIENCE;
    loop {
        match try_admit(node, volume, client).await {
            Ok(admission) => return Ok(admission),
            Err(Turned::Held(_)) if Instant::now() < give_up => tokio::time::sleep(HOLDER_POLL).await,
            Err(Turned::Held(refusal)) => return Err(ExportRefusal::Policy(refusal)),
            Err(Turned::Away(refusal)) => return Err(refusal),
        }
    }
}

/// Why a client was not admitted.
enum Turned {
    /// Another client has the volume, or it was evicted: that may change.
    Held(String),
    /// It cannot be served.
    Away(ExportRefusal),
}

async fn try_admit(node: &Arc<Node>, volume: VolumeId, client: &str) -> Result<Box<dyn Admission>, Turned> {
    let gate = node.attachments.table(volume, |table| Arc::clone(&table.gate));
    let _turn = gate.lock().await;
    let state = node.state();
    // What was applied is enforced before anybody else is let in.
    node.attachments.follow(node, &state);
    let Some(record) = state.volumes.get(&volume) else {
        return Err(Turned::Away(ExportRefusal::Unknown("the volume is gone".into())));
    };
    let now = Instant::now();
    let (refusal, in_doubt) =
        node.attachments.table(volume, |table| (table.refusal(record, client, now), table.in_doubt));
    if let Some(refusal) = refusal {
        return Err(Turned::Held(refusal));
    }
    if !record.lets_in(client) || (in_doubt && !record.shared) {
        let away = |why| Turned::Away(ExportRefusal::Policy(why));
        attach(node, record, client).await.map_err(away)?;
        node.attachments.follow(node, &node.state());
    }
    match node.attachments.register(node, volume, client) {
        Some(key) => Ok(Box::new(Ticket { node: Arc::clone(node), volume, key, by_client: true })),
        None => Err(Turned::Held(format!("volume {} was detached from {client} just now", record.name))),
    }
}

/// Asks for an attachment, for that of its holder to be ended first, and waits until both show here.
async fn attach(node: &Node, record: &VolumeRecord, client: &str) -> Result<(), String> {
    if let Some(holder) = record.attached.as_ref().filter(|held| held.client != client) {
        detach(node, record, holder).await?;
    }
    let op = ClusterOp::Attach { volume: record.id, client: client.to_owned(), by: node.me() };
    let attached = change(node, op).await;
    let told = node.attachments.table(record.id, |table| {
        match attached {
            // Whatever was on its way before comes too late now.
            Ok(()) => table.in_doubt = false,
            // It may have been agreed on all the same; then nobody is to wait for this client.
            Err(_) if !table.connected(client) => table.ended = Some((client.to_owned(), Instant::now())),
            Err(_) => {}
        }
        table.told.replace(client.to_owned())
    });
    // Once for each client: one that comes and goes all day must not be all that the events tell.
    if attached.is_ok() && told.as_deref() != Some(client) {
        let text = format!("attached by {client}");
        node.events.record(Some(&record.name), Happening::new("attached", text));
    }
    attached
}

async fn detach(node: &Node, record: &VolumeRecord, attachment: &Attachment) -> Result<(), String> {
    let op = ClusterOp::Detach { volume: record.id, attachment: attachment.clone(), by: node.me() };
    node.attachments.table(record.id, |table| table.in_doubt = true);
    let detached = change(node, op).await;
    if detached.is_ok() {
        node.attachments.table(record.id, |table| table.in_doubt = false);
    }
    detached
}

/// Has a command applied, here too.
async fn change(node: &Node, op: ClusterOp) -> Result<(), String> {
    let index = match node.control.submit(op).await {
        Ok(Applied::Done { index, .. }) => index,
        Ok(Applied::Refused(why)) | Err(SubmitError::Refused(why)) => return Err(why),
        Err(error) => return Err(format!("the attachment cannot be agreed on: {error}; try again")),
    };
    if !node.applied(index, STATE_PATIENCE).await {
        return Err("the attachment does not show here yet; try again".to_string());
    }
    Ok(())
}

/// Ends the attachment of a volume served here, if its client has been gone for a while. If another client comes
/// sooner, that one has it ended.
async fn settle(node: &Node, volume: VolumeId) {
    let gate = node.attachments.table(volume, |table| Arc::clone(&table.gate));
    let _turn = gate.lock().await;
    let (state, me) = (node.state(), node.me());
    let Some(record) = state.volumes.get(&volume).filter(|v| v.primary == Some(me)) else { return };
    let Some(attachment) = &record.attached else { return };
    let Some(before) = Instant::now().checked_sub(DETACH_DELAY) else { return };
    let over = node.attachments.table(volume, |table| table.is_over(&attachment.client, before));
    if !over || node.is_stopping() {
        return;
    }
    // Asked for again by the next sweep: without a quorum, or by another primary.
    if let Err(why) = detach(node, record, attachment).await {
        tracing::debug!(
            volume = record.name,
            client = attachment.client,
            "an attachment cannot end yet: {why}"
        );
    }
}

/// Ends attachments whose clients are gone, until the task is dropped.
pub async fn sweep(node: Arc<Node>) {
    let mut ticks = tokio::time::interval(SWEEP_INTERVAL);
    loop {
        ticks.tick().await;
        let state = node.state();
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
    use blkrepl_engine::types::LogIndex;

    fn table(connections: &[(u64, &str)]) -> Table {
        let connections = connections.iter().map(|(key, client)| {
            (ClientKey(*key), Connection { client: (*client).to_string(), revoked: false })
        });
        Table { connections: connections.collect(), ..Table::default() }
    }

    fn held_by(client: Option<&str>) -> VolumeRecord {
        let attached = client.map(|client| Attachment { client: client.into(), index: LogIndex(3) });
        VolumeRecord { attached, ..record() }
    }

    /// The primary of [`record`].
    fn me() -> Member {
        record().primary.unwrap()
    }

    #[test]
    fn an_attachment_is_over_when_its_client_went_from_this_primary() {
        let now = Instant::now();
        let mut t = table(&[(1, "a")]);
        t.follow(Some(&held_by(Some("a"))), me(), now);
        t.ended = Some(("a".into(), now));
        assert!(!t.is_over("a", now), "another connection of it is there");
        t.connections.clear();
        assert!(t.is_over("a", now));
        assert!(!t.is_over("b", now));
    }

    #[test]
    fn an_attachment_waits_for_its_client_after_a_change_of_primary_but_not_for_ever() {
        let now = Instant::now();
        let mut t = table(&[]);
        let mut v = held_by(Some("a"));
        t.follow(Some(&v), me(), now);
        t.ended = Some(("a".into(), now));
        v.primary = None;
        t.follow(Some(&v), me(), now);
        assert!(!t.is_over("a", now + 2 * ATTACHMENT_GRACE), "whoever is not primary waits for nobody");
        (v.primary, v.reign) = (Some(me()), Reign(9));
        t.follow(Some(&v), me(), now);
        assert!(!t.is_over("a", now), "its end was that of the primary before");
        assert!(t.is_over("a", now + ATTACHMENT_GRACE));
        // The same reign again is no new wait.
        t.follow(Some(&v), me(), now + ATTACHMENT_GRACE);
        assert!(t.is_over("a", now + ATTACHMENT_GRACE));
        t.connections.insert(ClientKey(3), Connection { client: "a".into(), revoked: false });
        assert!(!t.is_over("a", now + ATTACHMENT_GRACE), "it came back");
    }

    #[test]
    fn connections_that_the_server_closed_say_nothing_of_their_client() {
        let attachments = Attachments::new();
        let volume = record().id;
        for (by_client, over_at_once) in [(true, true), (false, false)] {
            attachments.lock().insert(volume, table(&[(1, "a"), (2, "a")]));
            attachments.forget(volume, ClientKey(1), by_client);
            assert!(!attachments.table(volume, |t| t.is_over("a", Instant::now())), "one is left");
            attachments.forget(volume, ClientKey(2), by_client);
            let now = Instant::now();
            let over = |at| attachments.table(volume, |t| t.is_over("a", at));
            assert_eq!((over(now), over(now + ATTACHMENT_GRACE)), (over_at_once, true));
        }
        assert!(is_clients_end(End::Client) && !is_clients_end(End::Server) && !is_clients_end(End::Unread));
    }

    #[test]
    fn a_client_that_an_operator_evicted_is_let_in_again_after_a_pause() {
        let now = Instant::now();
        for connections in [&[(1, "a"), (2, "a")][..], &[]] {
            let mut t = table(connections);
            assert_eq!(t.follow(Some(&held_by(Some("a"))), me(), now), []);
            let v = VolumeRecord { evicted: Some("a".into()), ..held_by(None) };
            assert_eq!(t.follow(Some(&v), me(), now).len(), connections.len());
            assert_eq!(t.follow(Some(&v), me(), now), [], "once");
            assert!(t.refusal(&v, "a", now).is_some_and(|why| why.contains("detached from a")));
            assert_eq!(t.refusal(&v, "b", now), None);
            assert_eq!(t.refusal(&v, "a", now + EVICTED_PAUSE), None);
            let shared = VolumeRecord { shared: true, ..v };
            assert_eq!(t.refusal(&shared, "a", now), None);
        }
    }

    #[test]
    fn a_client_that_becomes_one_of_several_no_more_may_be_the_one() {
        let now = Instant::now();
        let mut t = table(&[(1, "a"), (2, "b")]);
        assert_eq!(t.follow(Some(&VolumeRecord { shared: true, ..record() }), me(), now), []);
        assert_eq!(t.follow(Some(&record()), me(), now).len(), 2);
        assert_eq!((t.refusal(&record(), "a", now), t.refusal(&record(), "b", now)), (None, None));
    }

    #[test]
    fn another_client_is_refused_until_the_one_before_is_over() {
        let now = Instant::now();
        let (mut t, v) = (table(&[(1, "a")]), held_by(Some("a")));
        t.follow(Some(&v), me(), now);
        assert_eq!(t.refusal(&v, "a", now), None);
        assert!(t.refusal(&v, "b", now).is_some_and(|why| why.contains("attached by a")));
        t.connections.clear();
        assert!(t.refusal(&v, "b", now).is_some(), "it may come back");
        t.ended = Some(("a".into(), now));
        assert_eq!(t.refusal(&v, "b", now), None);
    }
}
