//! openraft's state machine on the store: the cluster state, persisted with every batch applied and
//! published only after that.

use std::io::{self, Cursor};
use std::sync::Arc;

use openraft::storage::RaftStateMachine;
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder, StorageIOError};
use tokio::sync::watch;

use crate::types::LogIndex;

use super::super::apply::apply_under;
use super::super::codec;
use super::super::environment::Environment;
use super::super::raft::{
    Entry, LogId, Response, Snapshot, SnapshotMeta, StorageError, StoredMembership, TypeConfig, leadership_of,
};
use super::super::state::ClusterState;
use super::log::storage_error;
use super::{Machine, StoreHandle};

/// The state machine that openraft drives.
pub(in super::super) struct StateMachine {
    env: Arc<dyn Environment>,
    store: StoreHandle,
    machine: Machine,
    published: watch::Sender<Arc<ClusterState>>,
}

impl StateMachine {
    /// Takes up the persisted state. The receiver sees it and every later one, after it is durable.
    pub(in super::super) async fn load(
        env: Arc<dyn Environment>,
        store: StoreHandle,
    ) -> io::Result<(Self, watch::Receiver<Arc<ClusterState>>)> {
        let machine = store.run(|db| db.machine()).await?;
        let (published, receiver) = watch::channel(Arc::new(machine.state.clone()));
        Ok((Self { env, store, machine, published }, receiver))
    }

    fn apply_entry(machine: &mut Machine, entry: Entry) -> Response {
        let index = LogIndex(entry.log_id.index);
        machine.last_applied = Some(entry.log_id);
        match entry.payload {
            EntryPayload::Blank => {
                machine.state.applied = index;
                Response::Nothing
            }
            EntryPayload::Membership(membership) => {
                machine.state.applied = index;
                machine.membership = StoredMembership::new(Some(entry.log_id), membership);
                Response::Nothing
            }
            EntryPayload::Normal(command) => {
                match apply_under(&mut machine.state, index, leadership_of(&entry.log_id), command) {
                    Some(applied) => Response::Applied(applied),
                    None => Response::Stale,
                }
            }
        }
    }
}

/// Applies entries to a machine outside of openraft, for recovery.
pub(in super::super) fn apply_offline(machine: &mut Machine, entries: Vec<Entry>) {
    for entry in entries {
        StateMachine::apply_entry(machine, entry);
    }
}

/// Decodes and checks the state in a snapshot.
///
/// # Errors
/// The bytes are no cluster state, or one that breaks its invariants.
pub(in super::super) fn decode_snapshot(data: &[u8]) -> io::Result<ClusterState> {
    let state: ClusterState = codec::decode(data).map_err(io::Error::other)?;
    state.check().map_err(io::Error::other)?;
    Ok(state)
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), StorageError> {
        Ok((self.machine.last_applied, self.machine.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Response>, StorageError>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut next = self.machine.clone();
        let mut responses = Vec::new();
        for entry in entries {
            responses.push(Self::apply_entry(&mut next, entry));
            self.env.applied(&next.state);
        }
        let copy = next.clone();
        self.store
            .run(move |db| db.set_machine(&copy))
            .await
            .map_err(storage_error(StorageIOError::write_state_machine))?;
        self.machine = next;
        self.published.send_replace(Arc::new(self.machine.state.clone()));
        Ok(responses)
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        SnapshotBuilder { store: self.store.clone(), machine: self.machine.clone() }
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<Cursor<Vec<u8>>>, StorageError> {
        Ok(Box::new(Cursor::new(Vec::new())))
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: Box<Cursor<Vec<u8>>>,
    ) -> Result<(), StorageError> {
        let write_error = |e| storage_error(|s| StorageIOError::write_snapshot(Some(meta.signature()), s))(e);
        let data = snapshot.into_inner();
        let state = decode_snapshot(&data).map_err(write_error)?;
        let machine =
            Machine { last_applied: meta.last_log_id, membership: meta.last_membership.clone(), state };
        let (copy, stored) = (machine.clone(), (meta.clone(), data));
        self.store.run(move |db| db.install(&copy, &stored)).await.map_err(write_error)?;
        self.machine = machine;
        self.published.send_replace(Arc::new(self.machine.state.clone()));
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, StorageError> {
        let stored = self
            .store
            .run(|db| db.snapshot())
            .await
            .map_err(storage_error(|e| StorageIOError::read_snapshot(None, e)))?;
        Ok(stored.map(|(meta, data)| Snapshot { meta, snapshot: Box::new(Cursor::new(data)) }))
    }
}

/// Builds a snapshot of one moment.
pub(in super::super) struct SnapshotBuilder {
    store: StoreHandle,
    machine: Machine,
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    async fn build_snapshot(&mut self) -> Result<Snapshot, StorageError> {
        let machine = &self.machine;
        let data = codec::encode(&machine.state)
            .map_err(io::Error::other)
            .map_err(storage_error(StorageIOError::read_state_machine))?;
        let at = machine.last_applied.map_or_else(|| "none".into(), |id| id.to_string());
        let meta = SnapshotMeta {
            last_log_id: machine.last_applied,
            last_membership: machine.membership.clone(),
            // Two snapshots of one position have the same bytes.
            snapshot_id: at,
        };
        let stored = (meta.clone(), data.clone());
        self.store
            .run(move |db| db.set_snapshot(&stored))
            .await
            .map_err(storage_error(|e| StorageIOError::write_snapshot(None, e)))?;
        Ok(Snapshot { meta, snapshot: Box::new(Cursor::new(data)) })
    }
}
