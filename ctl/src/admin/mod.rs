//! The admin interface: requests and replies as JSON lines over a unix socket.
//!
//! One request per line, one reply line per request; `events` with `follow` answers with a stream of
//! lines until the client leaves. The types here are what `--json` prints, documented in docs/cli.md;
//! fields are only ever added. This module holds plain data; [`client`] and [`server`] move it.

pub mod client;
pub mod server;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Longest request line in bytes.
pub const REQUEST_BYTES_MAX: usize = 64 << 10;

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Everything: [`StatusView`].
    Status {},
    /// Events above `after`; with `follow` as they happen.
    Events {
        /// Sequence number to start after.
        #[serde(default)]
        after: u64,
        /// Go on.
        #[serde(default)]
        follow: bool,
    },
    /// Create a volume.
    VolumeCreate {
        /// Name.
        volume: String,
        /// Bytes.
        size: u64,
        /// Names of nodes; empty: all data nodes.
        #[serde(default)]
        replicas: Vec<String>,
        /// `flush` or `always`.
        #[serde(default)]
        durability: DurabilityWord,
        /// `exclusive` or `shared`.
        #[serde(default)]
        sharing: SharingWord,
    },
    /// Change settings of a volume; what is not named stays.
    VolumeSet {
        /// Name.
        volume: String,
        /// What changes.
        #[serde(default)]
        change: SettingsChange,
        /// `exclusive` or `shared`; `null`: as it is.
        #[serde(default)]
        sharing: Option<SharingWord>,
    },
    /// Make this node's replica anew.
    VolumeRecreate {
        /// Name.
        volume: String,
        /// Remove files that exist.
        #[serde(default)]
        discard_data: bool,
    },
    /// Make the asked node primary.
    Promote {
        /// Name.
        volume: String,
        /// Although it is not in sync.
        #[serde(default)]
        force: bool,
        /// Even if its resync did not end.
        #[serde(default)]
        discard_inconsistent: bool,
    },
    /// No primary until promoted.
    Demote {
        /// Name.
        volume: String,
    },
    /// Hand the role over.
    Move {
        /// Name.
        volume: String,
        /// Name of the node.
        to: String,
    },
    /// End the attachment of a client host.
    Detach {
        /// Name.
        volume: String,
        /// The client host.
        client: String,
    },
    /// Change the cluster's lease length.
    SetLease {
        /// Milliseconds.
        ms: u64,
    },
}

/// When a write counts as committed, in requests and status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DurabilityWord {
    /// Flushes make it stable.
    #[default]
    Flush,
    /// Every write is stable.
    Always,
}

/// How many client hosts may be attached to a volume at once, in requests and status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SharingWord {
    /// One.
    #[default]
    Exclusive,
    /// Any number.
    Shared,
}

/// Settings of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingsView {
    /// A member that answers nothing for so many milliseconds is taken out of the in-sync set.
    pub peer_timeout_ms: u64,
    /// A disk request that takes more milliseconds makes its replica unhealthy.
    pub disk_timeout_ms: u64,
    /// Most intent regions set at once.
    pub intent_regions_max: u32,
    /// Bytes of resync copies in flight per target.
    pub resync_window_bytes: u32,
    /// Milliseconds that, because of a resync, at most one client request in a hundred should exceed.
    pub resync_latency_ms: u64,
}

/// A change of settings; the fields mean what those of [`SettingsView`] do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SettingsChange {
    /// Milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer_timeout_ms: Option<u64>,
    /// Milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_timeout_ms: Option<u64>,
    /// Regions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub intent_regions_max: Option<u32>,
    /// Bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resync_window_bytes: Option<u32>,
    /// Milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resync_latency_ms: Option<u64>,
}

/// The answer to one request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Done.
    Ok(Value),
    /// Refused or failed: the reason and the next step.
    Error(String),
}

/// What a command that changes something reports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// The volume, if it concerns one.
    pub volume: Option<String>,
    /// Its epoch afterwards, if known.
    pub epoch: Option<u64>,
    /// Its primary afterwards.
    pub primary: Option<String>,
    /// For people.
    pub text: String,
}

/// `status --json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusView {
    /// Id of the cluster; `null` while it is not formed.
    pub cluster: Option<String>,
    /// Name of the node that answered.
    pub asked: String,
    /// Name of the Raft leader, as the asked node sees it.
    pub leader: Option<String>,
    /// Nodes by id.
    pub nodes: Vec<NodeView>,
    /// Volumes by name.
    pub volumes: Vec<VolumeView>,
}

/// One node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeView {
    /// Id.
    pub id: u64,
    /// Name.
    pub name: String,
    /// `data` or `witness`.
    pub kind: String,
    /// It answered the asked node just now.
    pub reachable: bool,
    /// The asked node sees it as Raft leader.
    pub leader: bool,
    /// Number of its newest registered start; 0 before the first.
    pub boot: u64,
    /// Control address.
    pub control: String,
    /// Peer address.
    pub peer: String,
    /// NBD address.
    pub nbd: String,
    /// What its clients did since its process started, by name; `null` on a witness, and if it did not answer.
    #[serde(default)]
    pub clients: Option<BTreeMap<String, u64>>,
}

/// One volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeView {
    /// Name.
    pub name: String,
    /// Id.
    pub id: String,
    /// Bytes.
    pub size: u64,
    /// Bytes.
    pub block_size: u32,
    /// `flush` or `always`.
    pub durability: DurabilityWord,
    /// Its settings; `null` from a node of an earlier release.
    #[serde(default)]
    pub settings: Option<SettingsView>,
    /// `exclusive` or `shared`.
    #[serde(default)]
    pub sharing: SharingWord,
    /// The client host that it is attached to; `null`: nobody, or it is shared.
    #[serde(default)]
    pub attached: Option<String>,
    /// Committed changes.
    pub epoch: u64,
    /// Epoch at which the primary took over.
    pub reign: u64,
    /// Lineage of the content.
    pub lineage: String,
    /// Name of the primary's node; `null` after a demote.
    pub primary: Option<String>,
    /// An operator demoted it.
    pub demoted: bool,
    /// The primary serves clients at the moment, as far as is known.
    pub serving: bool,
    /// The in-sync set is smaller than the replica set.
    pub degraded: bool,
    /// Names of the nodes in the in-sync set.
    pub in_sync: Vec<String>,
    /// Why it is not served, and what to do; `null` if it is.
    pub note: Option<String>,
    /// Replicas by node id.
    pub replicas: Vec<ReplicaView>,
}

/// One replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaView {
    /// Name of its node.
    pub node: String,
    /// `primary` or `secondary`.
    pub role: String,
    /// `in_sync`, `resyncing`, `disconnected` or `failed`.
    pub state: String,
    /// Bytes that it lacks, as the primary counts them; without a primary, as the best informed other
    /// replica counts them. `null`: nobody asked knows.
    pub dirty_bytes: Option<u64>,
    /// While it is being resynced.
    pub resync: Option<ResyncView>,
    /// Epoch that its node follows; `null` if its node did not answer.
    pub epoch: Option<u64>,
    /// Client writes that it acknowledged as primary since its process started.
    pub writes_acked: Option<u64>,
    /// Intent regions set at the moment.
    pub intent_regions: Option<u64>,
    /// Why it failed.
    pub failure: Option<String>,
}

/// Progress of a resync.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResyncView {
    /// Bytes compared or copied.
    pub done_bytes: u64,
    /// Bytes in the set.
    pub total_bytes: u64,
    /// Bytes that really travelled.
    pub moved_bytes: u64,
    /// Recent speed.
    pub bytes_per_s: u64,
    /// Seconds left at that speed; `null` while it is zero.
    pub eta_s: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_stable_lines() {
        let cases = [
            (Request::Status {}, r#"{"op":"status"}"#),
            (
                Request::Promote { volume: "v".into(), force: true, discard_inconsistent: false },
                r#"{"op":"promote","volume":"v","force":true,"discard_inconsistent":false}"#,
            ),
        ];
        for (request, line) in cases {
            assert_eq!(serde_json::to_string(&request).unwrap(), line);
            assert_eq!(serde_json::from_str::<Request>(line).unwrap(), request);
        }
        assert!(serde_json::from_str::<Request>(r#"{"op":"status","x":1}"#).is_err());
        assert!(serde_json::from_str::<Request>(r#"{"op":"promote","volume":"v"}"#).is_ok());
    }

    #[test]
    fn replies_are_ok_or_error() {
        let line = serde_json::to_string(&Reply::Error("no".into())).unwrap();
        assert_eq!(line, r#"{"error":"no"}"#);
        assert_eq!(
            serde_json::from_str::<Reply>(r#"{"ok":{"a":1}}"#).unwrap(),
            Reply::Ok(serde_json::json!({"a":1}))
        );
    }
}

#[cfg(test)]
mod property_tests;
