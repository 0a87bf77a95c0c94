//! What operators ask for, carried out: promote, demote, move, volume create, status.
//!
//! The node whose admin socket was asked carries the request out. Where an action must start on another
//! node (a move starts at the primary; a new volume's first files are made where it starts), it calls that
//! node over the control plane with a [`NodeCall`]. Every check here only gives a better answer sooner: the
//! control plane and the core check again and have the last word.

mod clients;

use std::sync::Arc;
use std::time::{Duration, Instant};

use blkrepl_engine::control::{Applied, ClusterOp, ClusterState, NodeKind, SubmitError, VolumeRecord};
use blkrepl_engine::types::{
    BLOCK_SIZE_DEFAULT, Durability, Geometry, LineageId, Member, NodeId, REGION_SIZE_DEFAULT, VolumeId,
    VolumeSettings,
};
use serde::{Deserialize, Serialize};

use crate::admin::server::{AdminApi, ReplyFuture, to_reply};
use crate::admin::{Done, DurabilityWord, Reply, Request, SettingsChange, SharingWord, StatusView};
use crate::cli::{DurabilityArg, SharingArg};
use crate::config::check_name;
use crate::events::Happening;
use crate::render;
use crate::serve::node::Node;
use crate::serve::status::{Gathered, OwnReplicas, node_name};
use crate::serve::{files, left_over};

/// How long another node may take to say how its replicas are.
const STATUS_CALL_TIMEOUT: Duration = Duration::from_millis(400);
/// How long another node may take for its part of a change.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a change of primary may take until it shows.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a new volume may take until it is served.
const CREATE_TIMEOUT: Duration = Duration::from_secs(15);

/// What one node asks of another.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum NodeCall {
    /// How are your replicas? Answer: [`NodeAnswer::Replicas`].
    Replicas,
    /// Hand the primary role of a volume to a node.
    Move {
        /// The volume.
        volume: VolumeId,
        /// To whom.
        to: NodeId,
    },
    /// Give the primary role up.
    Demote {
        /// The volume.
        volume: VolumeId,
    },
    /// Make the files of a volume that is about to be created with you as its first member.
    Prepare(Box<NewVolume>),
    /// The volume was not created: remove the files again.
    Discard(Box<NewVolume>),
}

/// A volume about to be created.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NewVolume {
    /// Id.
    pub id: VolumeId,
    /// Name.
    pub name: String,
    /// Sizes.
    pub geometry: Geometry,
    /// Replicas, ascending.
    pub replicas: Vec<NodeId>,
    /// First lineage.
    pub lineage: LineageId,
}

/// Answer to a [`NodeCall`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum NodeAnswer {
    /// Done, or begun.
    Ok,
    /// The replicas.
    Replicas(OwnReplicas),
    /// Files are made; this incarnation is the first member.
    Prepared(Member),
    /// Refused.
    Refused(String),
}

impl From<DurabilityArg> for DurabilityWord {
    fn from(arg: DurabilityArg) -> Self {
        match arg {
            DurabilityArg::Flush => Self::Flush,
            DurabilityArg::Always => Self::Always,
        }
    }
}

impl From<SharingArg> for SharingWord {
    fn from(arg: SharingArg) -> Self {
        match arg {
            SharingArg::Exclusive => Self::Exclusive,
            SharingArg::Shared => Self::Shared,
        }
    }
}

/// Carries out what comes over the admin socket.
pub struct Ops(pub Arc<Node>);

impl AdminApi for Ops {
    fn handle(&self, request: Request) -> ReplyFuture {
        let node = Arc::clone(&self.0);
        Box::pin(async move {
            let result = match request {
                Request::Status {} => return to_reply(&status(&node).await),
                Request::Events { .. } => Err("events are answered by the admin server".to_string()),
                Request::VolumeCreate { volume, size, replicas, durability, sharing } => {
                    let created = create(&node, &volume, size, &replicas, durability).await;
                    and_share(&node, &volume, created, (sharing == SharingWord::Shared).then_some(sharing))
                        .await
                }
                Request::VolumeSet { volume, change, sharing } => {
                    let changed = set(&node, &volume, change).await;
                    and_share(&node, &volume, changed, sharing).await
                }
                Request::VolumeRecreate { volume, discard_data } => {
                    recreate(&node, &volume, discard_data).await
                }
                Request::Promote { volume, force, discard_inconsistent } => {
                    promote(&node, &volume, force, discard_inconsistent).await
                }
                Request::Demote { volume } => demote(&node, &volume).await,
                Request::Move { volume, to } => move_to(&node, &volume, &to).await,
                Request::Detach { volume, client } => clients::detach(&node, &volume, &client).await,
                Request::SetLease { ms } => set_lease(&node, ms).await,
            };
            match result {
                Ok(done) => to_reply(&done),
                Err(reason) => Reply::Error(reason),
            }
        })
    }
}

/// After a change that was made, the one of sharing, if there is one.
async fn and_share(
    node: &Arc<Node>,
    volume: &str,
    before: Result<Done, String>,
    sharing: Option<SharingWord>,
) -> Result<Done, String> {
    let before = before?;
    let Some(sharing) = sharing else { return Ok(before) };
    let shared = clients::share(node, volume, sharing).await;
    let shared = shared.map_err(|why| format!("{}, but not its sharing: {why}", before.text))?;
    Ok(Done { text: format!("{}; {}", before.text, shared.text), ..shared })
}

/// Answers another node.
pub async fn answer(node: Arc<Node>, call: Vec<u8>) -> Vec<u8> {
    let answer = match serde_json::from_slice::<NodeCall>(&call) {
        Ok(call) => carry_out(&node, call).await,
        Err(error) => NodeAnswer::Refused(format!(
            "{} does not understand the call ({error}); run one version of blkrepl on all nodes",
            node.config.name
        )),
    };
    serde_json::to_vec(&answer).unwrap_or_default()
}

async fn carry_out(node: &Arc<Node>, call: NodeCall) -> NodeAnswer {
    match call {
        NodeCall::Replicas => NodeAnswer::Replicas(node.own_replicas()),
        NodeCall::Move { volume, to } => begin(node, volume, Some(to)).await,
        NodeCall::Demote { volume } => begin(node, volume, None).await,
        NodeCall::Prepare(new) => {
            prepare(node, *new).await.map_or_else(NodeAnswer::Refused, NodeAnswer::Prepared)
        }
        NodeCall::Discard(new) => {
            let removed = discard(node, *new).await;
            removed.map_or_else(NodeAnswer::Refused, |()| NodeAnswer::Ok)
        }
    }
}

async fn begin(node: &Arc<Node>, volume: VolumeId, to: Option<NodeId>) -> NodeAnswer {
    let Some(handle) = node.handle(volume) else {
        return NodeAnswer::Refused(format!("the volume does not run on {}", node.config.name));
    };
    let (reply, begun) = tokio::sync::oneshot::channel();
    let reply = move |result| {
        // Nobody waits any more if the call timed out.
        let _late = reply.send(result);
    };
    match to {
        Some(to) => handle.begin_move(to, reply),
        None => handle.begin_demote(reply),
    }
    match begun.await {
        Ok(Ok(())) => NodeAnswer::Ok,
        Ok(Err(reason)) => NodeAnswer::Refused(reason),
        Err(_) => NodeAnswer::Refused(format!("the volume's thread on {} has ended", node.config.name)),
    }
}

async fn prepare(node: &Arc<Node>, new: NewVolume) -> Result<Member, String> {
    let me = node.me();
    let state = node.state();
    let cluster = state.cluster.ok_or("the cluster is not formed yet")?;
    let place = files::Place::of(&node.config, &new.name);
    let os_boot = node.os_boot;
    let made = tokio::task::spawn_blocking(move || {
        if left_over::remove(&place, cluster, me.node, &state)? {
            tracing::info!(volume = %new.name, "removed the files of a creation that an earlier run did not end");
        }
        files::create_first(&place, &new, cluster, me, os_boot)
    });
    made.await.map_err(|e| format!("making the files panicked: {e}"))?.map_err(|e| e.to_string())?;
    Ok(me)
}

async fn discard(node: &Arc<Node>, new: NewVolume) -> Result<(), String> {
    if node.state().volumes.contains_key(&new.id) {
        return Err("the volume was created after all; its files stay".to_string());
    }
    let place = files::Place::of(&node.config, &new.name);
    let (me, name) = (node.config.id, new.name.clone());
    let removed = tokio::task::spawn_blocking(move || files::remove_first(&place, &new, me));
    let removed = removed.await.map_err(|e| format!("removing the files panicked: {e}"))?;
    // The volume that got the name may have found these files in its way.
    node.open_again(&name).await;
    removed.map_err(|e| e.to_string())
}

/// Asks a node (itself without the network).
async fn call(node: &Arc<Node>, to: NodeId, call: NodeCall, limit: Duration) -> Result<NodeAnswer, String> {
    if to == node.config.id {
        return Ok(Box::pin(carry_out(node, call)).await);
    }
    let bytes = serde_json::to_vec(&call).map_err(|e| e.to_string())?;
    let name = node_name(&node.state(), to);
    match tokio::time::timeout(limit, node.control.call(to, bytes)).await {
        Err(_) => Err(format!("{name} did not answer within {} ms", limit.as_millis())),
        Ok(Err(error)) => Err(format!("{name} cannot be reached: {error}")),
        Ok(Ok(bytes)) => serde_json::from_slice(&bytes).map_err(|e| format!("{name} answered nonsense: {e}")),
    }
}

/// Cluster state and every node's own word, merged.
pub async fn status(node: &Arc<Node>) -> StatusView {
    let state = node.state();
    let mut asked = tokio::task::JoinSet::new();
    for &id in state.nodes.keys().filter(|&&id| id != node.config.id) {
        let node = Arc::clone(node);
        asked.spawn(async move { (id, call(&node, id, NodeCall::Replicas, STATUS_CALL_TIMEOUT).await) });
    }
    let mut answers = std::collections::BTreeMap::from([(node.config.id, node.own_replicas())]);
    while let Some(answered) = asked.join_next().await {
        if let Ok((id, Ok(NodeAnswer::Replicas(replicas)))) = answered {
            answers.insert(id, replicas);
        }
    }
    // Read again: what the answers tell of may have been applied here meanwhile.
    let state = node.state();
    let gathered = Gathered {
        state: &state,
        me: node.me(),
        my_name: &node.config.name,
        leader: node.control.leader(),
        answers,
    };
    gathered.view()
}

fn find<'a>(state: &'a ClusterState, name: &str) -> Result<&'a VolumeRecord, String> {
    state.volume_by_name(name).ok_or_else(|| {
        let known: Vec<&str> = state.volumes.values().map(|v| v.name.as_str()).collect();
        if known.is_empty() {
            format!("no volume is named '{name}'; there are none yet (blkrepl volume create)")
        } else {
            format!("no volume is named '{name}'; there are: {}", known.join(", "))
        }
    })
}

fn find_node(state: &ClusterState, name: &str) -> Result<NodeId, String> {
    state.node_by_name(name).map(|n| n.id).ok_or_else(|| {
        let known: Vec<&str> = state.nodes.values().map(|n| n.name.as_str()).collect();
        format!("no node is named '{name}'; there are: {}", known.join(", "))
    })
}

fn done(node: &Node, volume: VolumeId, text: String) -> Done {
    let state = node.state();
    let record = state.volumes.get(&volume);
    Done {
        volume: record.map(|v| v.name.clone()),
        epoch: record.map(|v| v.epoch.0),
        primary: record.and_then(|v| v.primary).map(|m| node_name(&state, m.node)),
        text,
    }
}

async fn submit(node: &Node, op: ClusterOp) -> Result<Applied, String> {
    try_submit(node, op).await.map_err(|unsuccessful| unsuccessful.why)
}

/// Why a change was not seen to happen.
struct Unsuccessful {
    /// It has not happened and will not; else nobody knows.
    certain: bool,
    why: String,
}

async fn try_submit(node: &Node, op: ClusterOp) -> Result<Applied, Unsuccessful> {
    match node.control.submit(op).await {
        Ok(Applied::Refused(why)) | Err(SubmitError::Refused(why)) => {
            Err(Unsuccessful { certain: true, why })
        }
        Ok(applied) => Ok(applied),
        Err(unknown) => {
            let why = format!("{unknown}; a quorum of nodes has to run");
            Err(Unsuccessful { certain: false, why })
        }
    }
}

/// Waits until cluster state as applied here shows what was asked for.
async fn wait_for(
    node: &Node,
    volume: VolumeId,
    limit: Duration,
    mut shown: impl FnMut(&VolumeRecord) -> bool,
) -> bool {
    let mut states = node.control.cluster_state();
    let wait = states.wait_for(|s| s.volumes.get(&volume).is_some_and(&mut shown));
    matches!(tokio::time::timeout(limit, wait).await, Ok(Ok(_)))
}

async fn set_lease(node: &Node, ms: u64) -> Result<Done, String> {
    let lease = Duration::from_millis(ms);
    if node.state().lease != lease {
        submit(node, ClusterOp::SetLease { lease }).await?;
    }
    Ok(Done { volume: None, epoch: None, primary: None, text: format!("the lease length is {ms} ms") })
}

async fn create(
    node: &Arc<Node>,
    name: &str,
    size: u64,
    replicas: &[String],
    durability: DurabilityWord,
) -> Result<Done, String> {
    check_name(name)?;
    let state = node.state();
    if state.cluster.is_none() {
        return Err("the cluster is not formed yet: start every founder of node.toml".to_string());
    }
    if state.volume_by_name(name).is_some() {
        return Err(format!("a volume named '{name}' exists; choose another name"));
    }
    let geometry = Geometry::new(size, BLOCK_SIZE_DEFAULT, REGION_SIZE_DEFAULT).map_err(|e| e.to_string())?;
    let mut nodes = Vec::new();
    for given in replicas {
        nodes.push(find_node(&state, given)?);
    }
    if nodes.is_empty() {
        nodes = state.nodes.values().filter(|n| n.kind == NodeKind::Data).map(|n| n.id).collect();
    }
    let first = *nodes.first().ok_or("there is no data node")?;
    nodes.sort_unstable();
    nodes.dedup();
    if let Some(witness) =
        nodes.iter().filter_map(|n| state.nodes.get(n)).find(|n| n.kind == NodeKind::Witness)
    {
        return Err(format!("{} is a witness and stores no blocks; name data nodes", witness.name));
    }
    let new = NewVolume {
        id: VolumeId(random_id()?),
        name: name.to_string(),
        geometry,
        replicas: nodes.clone(),
        lineage: LineageId(random_id()?),
    };
    let first = match call(node, first, NodeCall::Prepare(Box::new(new.clone())), CALL_TIMEOUT).await? {
        NodeAnswer::Prepared(member) => member,
        NodeAnswer::Refused(reason) => return Err(format!("{}: {reason}", node_name(&state, first))),
        other => return Err(format!("unexpected answer {other:?}")),
    };
    let settings = VolumeSettings {
        durability: match durability {
            DurabilityWord::Flush => Durability::Flush,
            DurabilityWord::Always => Durability::Always,
        },
        ..VolumeSettings::default()
    };
    let op = ClusterOp::CreateVolume {
        id: new.id,
        name: name.to_string(),
        geometry,
        settings,
        replicas: nodes,
        first,
        lineage: new.lineage,
    };
    let id = new.id;
    match node.control.submit(op).await {
        Ok(Applied::Refused(reason)) | Err(SubmitError::Refused(reason)) => {
            // For good: it will never exist, so the files are nobody's.
            let undone = call(node, first.node, NodeCall::Discard(Box::new(new)), CALL_TIMEOUT).await;
            tracing::debug!("files of the refused volume: {undone:?}");
            return Err(reason);
        }
        Ok(_) => {}
        // Its files stay: the volume may still appear.
        Err(unknown) => return Err(format!("{unknown}; a quorum of nodes has to run")),
    }
    wait_served(node, id, CREATE_TIMEOUT).await;
    node.events.record(Some(name), Happening::new("created", format!("volume of {size} bytes created")));
    Ok(done(node, id, format!("volume {name} is created")))
}

/// Waits until the primary says that it serves.
async fn wait_served(node: &Arc<Node>, volume: VolumeId, limit: Duration) {
    let give_up = Instant::now() + limit;
    while Instant::now() < give_up {
        let primary = node.state().volumes.get(&volume).and_then(|v| v.primary);
        if let Some(primary) = primary
            && let Ok(NodeAnswer::Replicas(own)) =
                call(node, primary.node, NodeCall::Replicas, STATUS_CALL_TIMEOUT).await
            && own.replicas.iter().any(|r| r.volume == volume && r.status.as_ref().is_some_and(|s| s.serving))
        {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Changes settings. Fails if another change of the volume came first.
async fn set(node: &Arc<Node>, name: &str, change: SettingsChange) -> Result<Done, String> {
    let state = node.state();
    let record = find(&state, name)?;
    let (id, settings) = (record.id, change.of(record.settings));
    if settings == record.settings {
        return Ok(done(node, id, format!("volume {name} has these settings already")));
    }
    submit(node, ClusterOp::ChangeSettings { volume: id, expected_epoch: record.epoch, settings }).await?;
    if !wait_for(node, id, CHANGE_TIMEOUT, |v| v.settings == settings).await {
        return Err(not_shown(name, "the change of settings"));
    }
    let text = format!("volume {name} has its new settings: {}", render::settings(&settings.into()));
    node.events.record(Some(name), Happening::new("settings_changed", text.clone()));
    Ok(done(node, id, text))
}

async fn recreate(node: &Arc<Node>, name: &str, discard: bool) -> Result<Done, String> {
    let state = node.state();
    let id = find(&state, name)?.id;
    node.recreate(id, discard).await?;
    let text =
        format!("the replica of {name} on {} is made anew and gets everything by resync", node.config.name);
    node.events.record(Some(name), Happening::new("recreated", text.clone()));
    Ok(done(node, id, text))
}

async fn demote(node: &Arc<Node>, name: &str) -> Result<Done, String> {
    let state = node.state();
    let record = find(&state, name)?;
    let id = record.id;
    let Some(primary) = record.primary else {
        return Ok(done(node, id, format!("volume {name} is demoted already")));
    };
    begin_at_primary(node, record, primary, NodeCall::Demote { volume: id }).await?;
    if !wait_for(node, id, CHANGE_TIMEOUT, |v| v.primary.is_none()).await {
        return Err(not_shown(name, "the demotion"));
    }
    let text = format!("volume {name} has no primary now; `blkrepl promote {name}` on a node ends that");
    node.events.record(Some(name), Happening::new("demoted", text.clone()));
    Ok(done(node, id, text))
}

async fn move_to(node: &Arc<Node>, name: &str, to: &str) -> Result<Done, String> {
    let state = node.state();
    let to = find_node(&state, to)?;
    let record = find(&state, name)?;
    let Some(primary) = record.primary else {
        return Err(format!(
            "volume {name} has no primary (demoted): use `blkrepl promote {name}` on a node"
        ));
    };
    do_move(node, record, primary, to).await
}

async fn do_move(
    node: &Arc<Node>,
    record: &VolumeRecord,
    primary: Member,
    to: NodeId,
) -> Result<Done, String> {
    let state = node.state();
    let (id, name, to_name) = (record.id, record.name.clone(), node_name(&state, to));
    if primary.node == to {
        return Ok(done(node, id, format!("{to_name} is primary of {name} already")));
    }
    if record.replica(to).is_none() {
        return Err(format!("{to_name} holds no replica of {name}"));
    }
    if !record.member(to).is_some_and(|m| state.is_newest(m)) {
        return Err(format!(
            "{to_name} is not in sync with {name}; wait until `blkrepl status` says in-sync (a resync gets \
            it there), then move"
        ));
    }
    let begun = Instant::now();
    begin_at_primary(node, record, primary, NodeCall::Move { volume: id, to }).await?;
    let mut voided = false;
    let shown = wait_for(node, id, CHANGE_TIMEOUT, |v| {
        // A later change that leaves the old primary in place voided the move, unless it is another kind.
        voided = v.epoch > record.epoch && v.primary == Some(primary) && v.member(to).is_none();
        voided || v.primary.is_some_and(|p| p.node == to)
    })
    .await;
    if voided {
        return Err(format!("{to_name} left the in-sync set during the move; {name} stays where it is"));
    }
    if !shown {
        return Err(not_shown(&name, "the move"));
    }
    let from = node_name(&state, primary.node);
    let text = format!(
        "{to_name} is primary of {name} now (before: {from}), after {} ms",
        begun.elapsed().as_millis()
    );
    node.events.record(Some(&name), Happening::new("moved", text.clone()));
    Ok(done(node, id, text))
}

async fn begin_at_primary(
    node: &Arc<Node>,
    record: &VolumeRecord,
    primary: Member,
    what: NodeCall,
) -> Result<(), String> {
    let name = node_name(&node.state(), primary.node);
    match call(node, primary.node, what, CALL_TIMEOUT).await {
        Ok(NodeAnswer::Ok) => Ok(()),
        Ok(NodeAnswer::Refused(reason)) => Err(reason),
        Ok(other) => Err(format!("unexpected answer {other:?} from {name}")),
        Err(reason) => Err(format!(
            "the primary of {} has to take part: {reason}. If it is gone, an in-sync replica takes over by \
            itself when its lease has run out",
            record.name
        )),
    }
}

fn not_shown(name: &str, what: &str) -> String {
    format!(
        "{what} of {name} has not happened within {} s; it may still: see `blkrepl status` and `blkrepl \
        events`",
        CHANGE_TIMEOUT.as_secs()
    )
}

async fn promote(
    node: &Arc<Node>,
    name: &str,
    force: bool,
    discard_inconsistent: bool,
) -> Result<Done, String> {
    let state = node.state();
    let record = find(&state, name)?;
    let me = node.me();
    let my_name = &node.config.name;
    if record.replica(me.node).is_none() {
        return Err(format!("{my_name} holds no replica of {name}; ask a node that does (--admin)"));
    }
    if record.primary == Some(me) {
        return Ok(done(node, record.id, format!("{my_name} is primary of {name} already")));
    }
    if record.in_sync.contains(&me) {
        return match record.primary {
            Some(primary) => do_move(node, record, primary, me.node).await,
            None => {
                let op = ClusterOp::Promote {
                    volume: record.id,
                    expected_epoch: record.epoch,
                    to: me,
                    operator: true,
                };
                commit_promotion(node, record, op, format!("{my_name} is primary of {name}")).await
            }
        };
    }
    let restarted =
        record.member(me.node).is_some() && record.in_sync.iter().all(|m| state.has_restarted(*m));
    if restarted && !force {
        let op = ClusterOp::PromoteRestarted {
            volume: record.id,
            expected_epoch: record.epoch,
            to: me,
            operator: true,
        };
        eligible(node, record)?;
        return commit_promotion(node, record, op, format!("{my_name} is primary of {name}")).await;
    }
    let loss = loss(node, record).await;
    if !force {
        return Err(format!(
            "{my_name} is not in sync with {name}{}: {loss}. Wait for the resync, or take the loss with \
            `blkrepl promote {name} --force`, which starts a new lineage",
            why_not(node, record)
        ));
    }
    force_promote(node, record, discard_inconsistent, &loss).await
}

/// After every member restarted: whether this one continues from where the config says [R6].
fn eligible(node: &Node, record: &VolumeRecord) -> Result<(), String> {
    let handle = node.handle(record.id).ok_or_else(|| {
        node.failure(record.id).unwrap_or_else(|| "the replica here is not open yet; try again".to_string())
    })?;
    let status = handle.status();
    let named = record.member(node.config.id).map(|m| m.incarnation);
    if status.report.inconsistent || status.report.member != named {
        return Err(format!(
            "every in-sync replica of {} restarted, and this one does not continue from the incarnation \
            that the config names; promote another, or use --force",
            record.name
        ));
    }
    Ok(())
}

fn why_not(node: &Node, record: &VolumeRecord) -> String {
    let Some(handle) = node.handle(record.id) else {
        return node
            .failure(record.id)
            .map_or_else(String::new, |reason| format!(" (its replica failed: {reason})"));
    };
    let status = handle.status();
    if status.report.inconsistent {
        return " (a resync into it has begun and not ended)".to_string();
    }
    let restarted = record.member(node.config.id).is_some();
    if restarted { " (it restarted since it was)".to_string() } else { String::new() }
}

/// What a forced promotion of this node would discard.
async fn loss(node: &Arc<Node>, record: &VolumeRecord) -> String {
    let me = node.config.id;
    let view = status(node).await;
    let my_view = view.volumes.iter().find(|v| v.name == record.name);
    let mine = my_view.and_then(|v| v.replicas.iter().find(|r| r.node == node.config.name));
    let holders: Vec<String> =
        record.in_sync.iter().filter(|m| m.node != me).map(|m| node_name(&node.state(), m.node)).collect();
    let holders = if holders.is_empty() { "nobody".to_string() } else { holders.join(", ") };
    let answered = my_view.is_some_and(|v| {
        let knows = |name: &str| record.in_sync.iter().any(|m| node_name(&node.state(), m.node) == name);
        v.replicas.iter().any(|r| r.node != node.config.name && knows(&r.node) && r.epoch.is_some())
    });
    match mine.and_then(|r| r.dirty_bytes).filter(|_| answered) {
        Some(bytes) => format!(
            "--force would discard up to {bytes} bytes ({}) that {holders} holds and {} lacks",
            render::bytes(bytes),
            node.config.name
        ),
        None => format!(
            "--force would discard an unknown number of bytes that {holders} may hold and {} lacks (nobody \
            who knows answers)",
            node.config.name
        ),
    }
}

async fn force_promote(
    node: &Arc<Node>,
    record: &VolumeRecord,
    discard_inconsistent: bool,
    loss: &str,
) -> Result<Done, String> {
    let (name, my_name) = (&record.name, &node.config.name);
    let handle = node.handle(record.id).ok_or_else(|| {
        format!(
            "the replica of {name} on {my_name} does not run and cannot be promoted, not even by force: {}",
            node.failure(record.id).unwrap_or_else(|| "it is not open yet; try again".to_string())
        )
    })?;
    let (reply, judged) = tokio::sync::oneshot::channel();
    handle.begin_force(discard_inconsistent, move |result| {
        // Nobody waits any more if the caller is gone.
        let _late = reply.send(result);
    });
    let ended = || format!("the volume's thread on {my_name} has ended");
    let report = judged.await.map_err(|_| ended())?;
    let report = report.map_err(|why| format!("{name} on {my_name} cannot be promoted: {why}. {loss}"))?;
    let op = ClusterOp::ForcePromote {
        volume: record.id,
        expected_epoch: record.epoch,
        to: node.me(),
        lineage: LineageId(random_id()?),
        fork_epoch: record.shared_epoch(&report),
    };
    let text = format!(
        "{my_name} is primary of {name} by force, in a new lineage; {}",
        loss.replacen("--force would discard", "discarded:", 1)
    );
    if let Err(unsuccessful) = try_submit(node, op).await {
        // If nobody knows, a newer epoch ends it, or time.
        if unsuccessful.certain {
            handle.end_force();
        }
        return Err(unsuccessful.why);
    }
    promoted(node, record, text).await
}

async fn commit_promotion(
    node: &Arc<Node>,
    record: &VolumeRecord,
    op: ClusterOp,
    text: String,
) -> Result<Done, String> {
    submit(node, op).await?;
    promoted(node, record, text).await
}

/// Waits until a promotion of this node that was applied shows here.
async fn promoted(node: &Arc<Node>, record: &VolumeRecord, text: String) -> Result<Done, String> {
    let me = node.config.id;
    if !wait_for(node, record.id, CHANGE_TIMEOUT, |v| v.primary.is_some_and(|p| p.node == me)).await {
        return Err(not_shown(&record.name, "the promotion"));
    }
    node.events.record(Some(&record.name), Happening::new("promoted", text.clone()));
    wait_served(node, record.id, Duration::from_secs(5)).await;
    Ok(done(node, record.id, text))
}

/// A random 128-bit id.
pub(crate) fn random_id() -> Result<u128, String> {
    use std::io::Read;
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut bytes))
        .map_err(|e| format!("cannot read /dev/urandom: {e}"))?;
    Ok(u128::from_le_bytes(bytes).max(1))
}
