//! What `blkrepl status --json`, `events --json` and `cluster.json` say, as far as design section 9
//! promises it. Keys that are not known here are kept aside, so that more may be added.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Result, anyhow};
use serde::Deserialize;
use serde_json::Value;

/// `DIR/cluster.json`.
#[derive(Clone, Debug, Deserialize)]
pub struct ClusterFile {
    /// Name of the volume.
    pub volume: String,
    /// Its size in bytes.
    pub size: u64,
    /// The nodes.
    pub nodes: Vec<NodeEntry>,
}

/// One node of `cluster.json`.
#[derive(Clone, Debug, Deserialize)]
pub struct NodeEntry {
    /// Its id.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// `data` or `witness`.
    pub kind: String,
    /// Pid of its process, as last seen.
    #[serde(default)]
    pub pid: Option<u32>,
    /// NBD over a unix socket; data nodes only.
    #[serde(default)]
    pub nbd_unix: Option<String>,
    /// NBD over TCP; data nodes only.
    #[serde(default)]
    pub nbd_tcp: Option<String>,
    /// Admin socket.
    pub admin: PathBuf,
    /// The node's config file.
    pub config: PathBuf,
    /// The data object; data nodes only.
    #[serde(default)]
    pub data: Option<PathBuf>,
    /// The metadata file; data nodes only.
    #[serde(default)]
    pub meta: Option<PathBuf>,
}

impl NodeEntry {
    /// True if it holds a replica.
    #[must_use]
    pub fn is_data(&self) -> bool {
        self.kind == "data"
    }

    /// Its NBD address over the unix socket.
    ///
    /// # Errors
    /// If it is a witness.
    pub fn unix(&self) -> Result<&str> {
        self.nbd_unix.as_deref().ok_or_else(|| anyhow!("{} has no nbd_unix in cluster.json", self.name))
    }

    /// Its NBD address over TCP.
    ///
    /// # Errors
    /// If it is a witness.
    pub fn tcp(&self) -> Result<&str> {
        self.nbd_tcp.as_deref().ok_or_else(|| anyhow!("{} has no nbd_tcp in cluster.json", self.name))
    }

    /// Its data object.
    ///
    /// # Errors
    /// If it is a witness.
    pub fn data(&self) -> Result<&PathBuf> {
        self.data.as_ref().ok_or_else(|| anyhow!("{} has no data file in cluster.json", self.name))
    }

    /// Its metadata file.
    ///
    /// # Errors
    /// If it is a witness.
    pub fn meta(&self) -> Result<&PathBuf> {
        self.meta.as_ref().ok_or_else(|| anyhow!("{} has no metadata file in cluster.json", self.name))
    }
}

/// `status --json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Status {
    /// The nodes, as they come.
    pub nodes: Vec<Value>,
    /// The volumes.
    pub volumes: Vec<VolumeStatus>,
}

impl Status {
    /// The volume of that name.
    ///
    /// # Errors
    /// If it is not listed.
    pub fn volume(&self, name: &str) -> Result<&VolumeStatus> {
        self.volumes
            .iter()
            .find(|v| v.name == name)
            .ok_or_else(|| anyhow!("volume {name} is not in the status"))
    }
}

/// One volume of `status --json`.
#[derive(Clone, Debug, Deserialize)]
pub struct VolumeStatus {
    /// Its name.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Its epoch.
    pub epoch: u64,
    /// Name of the primary's node.
    pub primary: Option<String>,
    /// Names of the in-sync nodes.
    pub in_sync: Vec<String>,
    /// The replicas.
    pub replicas: Vec<ReplicaStatus>,
    /// What else is there.
    #[serde(flatten)]
    pub more: BTreeMap<String, Value>,
}

impl VolumeStatus {
    /// The replica on that node.
    ///
    /// # Errors
    /// If there is none.
    pub fn replica(&self, node: &str) -> Result<&ReplicaStatus> {
        self.replicas
            .iter()
            .find(|r| r.node == node)
            .ok_or_else(|| anyhow!("{} has no replica on {node}", self.name))
    }

    /// Whether every replica is in the in-sync set, lacks nothing and is not being resynced; else why not.
    ///
    /// # Errors
    /// Says what is missing.
    pub fn all_in_sync(&self) -> Result<()> {
        let primary = self.primary.as_deref().ok_or_else(|| anyhow!("{} has no primary", self.name))?;
        for replica in &self.replicas {
            let (node, state) = (&replica.node, &replica.state);
            if !self.in_sync.contains(node) {
                return Err(anyhow!("{node} is not in the in-sync set {:?} ({state})", self.in_sync));
            }
            if state != "in_sync" {
                return Err(anyhow!("{node} is {state}, primary is {primary}"));
            }
            let dirty_bytes = replica.dirty_bytes.unwrap_or(0);
            if dirty_bytes != 0 || replica.resync.is_some() {
                return Err(anyhow!("{node} lacks {dirty_bytes} bytes, resync {:?}", replica.resync));
            }
        }
        Ok(())
    }
}

/// One replica of `status --json`.
#[derive(Clone, Debug, Deserialize)]
pub struct ReplicaStatus {
    /// Name of its node.
    pub node: String,
    /// `primary` or `secondary`.
    #[serde(default)]
    pub role: Option<String>,
    /// `in_sync`, `resyncing`, `disconnected` or `failed`.
    pub state: String,
    /// Bytes that it lacks; none if nobody who was asked knows.
    #[serde(default)]
    pub dirty_bytes: Option<u64>,
    /// Present while it is being resynced.
    #[serde(default)]
    pub resync: Option<Value>,
    /// Why it failed, if it did.
    #[serde(default)]
    pub failure: Option<String>,
    /// What else is there.
    #[serde(flatten)]
    pub more: BTreeMap<String, Value>,
}

/// All numbers under the key `key`, anywhere in `value`.
#[must_use]
pub fn numbers_named(value: &Value, key: &str) -> Vec<u64> {
    let mut found = Vec::new();
    match value {
        Value::Object(map) => {
            for (name, inner) in map {
                if name == key {
                    found.extend(inner.as_u64());
                }
                found.extend(numbers_named(inner, key));
            }
        }
        Value::Array(items) => found.extend(items.iter().flat_map(|item| numbers_named(item, key))),
        _ => {}
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = r#"{"nodes": [{"name": "n1"}], "volumes": [{"name": "vol0", "size": 4096, "epoch": 3,
        "primary": "n1", "in_sync": ["n1"], "lineage": "00", "replicas": [
        {"node": "n1", "role": "primary", "state": "in_sync", "dirty_bytes": 0, "resync": null},
        {"node": "n2", "role": "secondary", "state": "resyncing", "dirty_bytes": 8192,
         "resync": {"done_bytes": 1, "total_bytes": 2, "bytes_per_s": 3, "eta_s": 4}}]}]}"#;

    #[test]
    fn status_is_read_and_says_what_is_missing() {
        let status: Status = serde_json::from_str(STATUS).unwrap();
        let volume = status.volume("vol0").unwrap();
        assert!(status.volume("other").is_err());
        let reason = volume.all_in_sync().unwrap_err().to_string();
        assert!(reason.contains("n2"), "{reason}");
        assert_eq!(volume.more["lineage"], "00");
    }

    #[test]
    fn numbers_are_found_at_any_depth() {
        let value: Value =
            serde_json::from_str(r#"[{"a": {"moved_bytes": 5}}, {"moved_bytes": 7}]"#).unwrap();
        assert_eq!(numbers_named(&value, "moved_bytes"), [5, 7]);
    }
}
